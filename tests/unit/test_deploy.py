"""The files under deploy/: every command in them is one that `atoll` understands, and what they copy is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from atoll.cli import make_app

DEPLOY = Path(__file__).parents[2] / "deploy"
SYSTEMD = re.compile(r"%[A-Za-z]|\$\{\w+\}")


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of `atoll`, with where it is written."""
    found = []
    for unit in sorted(DEPLOY.glob("*.service")):
        (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
        found.append((unit.name, shlex.split(SYSTEMD.sub("X", line))[1:]))
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n#", " ")
    found += [("Containerfile", shlex.split(line)) for line in re.findall(r"podman run .* atoll\s+(.*)", text)]
    return found


@pytest.mark.parametrize(("where", "arguments"), commands())
def test_every_command_is_understood(where, arguments):
    root = typer.main.get_command(make_app())
    command = root.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])  # raises for an option that is none, or one that is missing


def test_there_are_a_server_and_a_site_of_each_kind():
    assert sorted((where, arguments[0]) for where, arguments in commands()) == [
        ("Containerfile", "join"),
        ("Containerfile", "server"),
        ("atoll-server.service", "server"),
        ("atoll-site.service", "join"),
    ]


def test_what_the_image_copies_is_there():
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert all((DEPLOY.parent / name).exists() for line in copied for name in line.split())
