"""Every command line in the docs is one that the program takes: its name, its options and their values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from pages import PAGES, ROOT, blocks, inline_commands, lines, name

from atoll.cli import COMMANDS, GROUPS, make_app

CLI = typer.main.get_command(make_app())
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
ALSO = {"pip", "pre-commit", "source"}
"""What else a block may call, unchecked."""


def parse(words: list[str], whole: bool = True) -> None:
    """Raises a usage error for what the program would refuse. In running text the arguments may be left out."""
    assert words[0] in {*COMMANDS, *GROUPS}, f"no command '{words[0]}'"
    command = CLI.commands[words[0]]
    if words[0] in GROUPS and len(words) > 1:
        assert words[1] in command.commands, f"no command '{words[0]} {words[1]}'"
        command, words = command.commands[words[1]], words[1:]
    if "--help" not in words:
        command.make_context(words[0], words[1:], resilient_parsing=not whole)
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word.partition("=")[0] for word in words[1:] if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_parse(page: Path):
    for block in blocks(page):
        if block.language != "sh":
            continue
        for words in lines(block):
            if words[0] == "make":
                assert set(words[1:]) <= TARGETS
            elif words[0] == "atoll":
                parse(words[1:])
            else:
                assert words[0].rpartition("/")[2] in ALSO, f"{name(page)}:{block.line}: {words[0]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_running_text_parse(page: Path):
    for words in inline_commands(page):
        parse(words[1:], whole=False)


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "quickstart", "--sets", "a=1"])
    with pytest.raises(AssertionError):
        parse(["fly"])


def test_every_command_is_in_the_docs():
    said = {words[1] for page in PAGES for words in [*inline_commands(page), *commands_of(page)]}
    assert COMMANDS.keys() <= said


def commands_of(page: Path) -> list[list[str]]:
    """The page's `atoll` lines."""
    found = [lines(block) for block in blocks(page) if block.language == "sh"]
    return [words for each in found for words in each if words[0] == "atoll"]
