"""Commands of a federation over a network: certs, server, join, clients, audit."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.commands.output import AsJson, Insecure, say, show, show_json
from atoll.errors import AtollError

Address = Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server is.")]
Folder = Annotated[Path, typer.Option("--certs", help="The federation's keys, made by `atoll certs init`.")]
CERTS = Path("certs")

certs = typer.Typer(no_args_is_help=True, help="Make the keys and certificates of a federation.", rich_markup_mode=None)


@certs.command("init", epilog="Example: atoll certs init --host server.example --site clinic --site school")
def certs_init(
    folder: Annotated[Path, typer.Argument(help="Where they go.")] = CERTS,
    host: Annotated[list[str] | None, typer.Option(help="A name or address of the server; may be repeated.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="A site that may join; may be repeated.")] = None,
) -> None:
    """Make an authority, the server's certificate, the operator's token, and keys of sites."""
    from atoll.fleet.flower import certs as made

    made.init(folder, host or ["localhost", "127.0.0.1"])
    for name in site or ():
        made.site(folder, name)
    show(f"{folder}/ca        the authority: keep it apart from the server")
    show(f"{folder}/server    for the server: atoll server --listen HOST:PORT --certs {folder}/server")
    show(f"{folder}/operator  for who starts runs: atoll run RECIPE --fleet HOST:PORT --certs {folder}/operator")
    for name in site or ("NAME",):
        hint = "" if site else f"  (after `atoll certs site NAME {folder}`)"
        show(
            f"{folder}/sites/{name}  for the site: atoll join HOST:PORT --data DATA --certs {folder}/sites/{name}{hint}"
        )


@certs.command("site", epilog="Example: atoll certs site clinic")
def certs_site(
    name: Annotated[str, typer.Argument(help="What runs call the site.")],
    folder: Annotated[Path, typer.Argument(help="The federation's keys.")] = CERTS,
    public: Annotated[Path | None, typer.Option(help="The public key of a site that made its own.")] = None,
) -> None:
    """Let a site join: a key to hand over, or the public half of its own. Removing server/clients/NAME.pub revokes it."""
    from atoll.fleet.flower import certs as made

    given = None if public is None else made.read(public, "public key")
    handed = made.site(folder, name, given)
    show(
        f"{name} may join: server/clients/{name}.pub, also on the server that runs" if given else f"hand over {handed}"
    )


@certs.command("key", epilog="Example: atoll certs key ./clinic")
def certs_key(folder: Annotated[Path, typer.Argument(help="Where the site keeps it.")]) -> None:
    """Make a site's own key: the private half never leaves it."""
    from atoll.fleet.flower import certs as made

    path = folder / "site.key"
    if path.exists():
        raise AtollError(
            "there is a key already", where=str(path), remedy="a site that changes its key is enrolled anew"
        )
    made.write(folder / "site.pub", made.site_key(path))
    show(f"send {folder / 'site.pub'} to who hosts the server; put their ca.pem beside {path}")


@certs.command("server", epilog="Example: atoll certs server --host server.example")
def certs_server(
    folder: Annotated[Path, typer.Argument(help="The federation's keys.")] = CERTS,
    host: Annotated[list[str] | None, typer.Option(help="A name or address of the server; may be repeated.")] = None,
) -> None:
    """Make a new certificate of the server, for other hosts or before the old one expires."""
    from atoll.fleet.flower import certs as made

    made.server(folder, host or ["localhost", "127.0.0.1"])
    show(f"{folder}/server/server.pem is valid for a year; start the server again")


def server(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:8000",
    folder: Folder = CERTS / "server",
    insecure: Insecure = False,
) -> None:
    """Run the server that sites join: Flower's SuperLink over TLS. Ctrl-C stops it."""
    from atoll.cache import home
    from atoll.fleet.flower import quiet

    host, port = address(listen)
    quiet(home() / "flower")
    from atoll.fleet.flower import superlink

    superlink.serve(folder, host, port, say, insecure)


def join(
    server: Address,
    data: Annotated[Path, typer.Option(help="This site's data: a file or a folder.")],
    folder: Folder = Path(),
    policy: Annotated[Path | None, typer.Option(help="What the owner of the data allows, as YAML.")] = None,
    state: Annotated[Path, typer.Option(help="Where client state and the audit log are kept.")] = Path("atoll-site"),
    insecure: Insecure = False,
) -> None:
    """Join a server as a site: work on runs with this site's data, as far as the policy goes. Ctrl-C leaves."""
    from atoll.cache import home
    from atoll.fleet.flower import quiet

    address(server)
    quiet(home() / "flower")
    from atoll.fleet.flower.node import SuperNode, alone
    from atoll.policy import read
    from atoll.site import Site

    site = Site(data, read(policy), state, say)
    if not site.records:
        raise AtollError("no records", where=str(data), remedy=f"`atoll data {data}` shows what is read there")
    say(f"{site.records} records in {data}")  # or what is wrong with them, before anything is written
    with alone(state):
        say(f"{site.audit.path} ends with {site.audit.last[:16]}")
        node = SuperNode(server, folder / "site.key", folder / "ca.pem", state, say, insecure)
        node.join(patience=60.0)
        say(f"joined {server}; what leaves is noted in {state / 'audit.jsonl'}")
        signal.signal(signal.SIGINT, lambda *_: node.over.set())
        signal.signal(signal.SIGTERM, lambda *_: node.over.set())
        node.serve(site.urgent, site.answer)
    say(f"left {server}")


def clients(
    server: Address, folder: Folder = CERTS / "operator", insecure: Insecure = False, as_json: AsJson = False
) -> None:
    """List who is there: hardware, data, policy, and when each was last heard of."""
    from atoll.cache import home
    from atoll.fleet.flower import quiet

    quiet(home() / "flower")
    from atoll.fleet.flower.federation import Federation
    from atoll.record.tables import plain_table

    address(server)
    federation = Federation(server, folder, insecure)
    try:
        listed = federation.members()
    finally:
        federation.close()
    if as_json:
        show_json(listed)
        return
    if not listed:
        show("no site is enrolled; `atoll certs site NAME` enrolls one")
        return
    table = plain_table("site", "status", "records", "cores", "atoll", "policy", "last heard of")
    for one in listed:
        said = one["said"]
        table.add_row(one["name"], one["status"], *(str(said.get(key, "-")) for key in ("records", "cores", "version")),
                      limits(said.get("policy", {})), one["last_seen"] or "-")  # fmt: skip
    show(table)


def limits(policy: Mapping[str, Any]) -> str:
    """Where a policy differs from the default."""
    from atoll.policy import Policy

    default = Policy().model_dump()
    return "; ".join(f"{key}: {value}" for key, value in policy.items() if value != default.get(key)) or "default"


audit = typer.Typer(no_args_is_help=True, help="Look at what left a site.", rich_markup_mode=None)


@audit.command("verify", epilog="Example: atoll audit verify atoll-site/audit.jsonl")
def audit_verify(path: Annotated[Path, typer.Argument(help="A site's audit log.")], as_json: AsJson = False) -> None:
    """Check that no line of an audit log was changed, taken out or put in."""
    from atoll.audit import verify
    from atoll.record.card import human_bytes

    found = verify(path)
    if as_json:
        show_json(vars(found))
    else:
        show(f"{found.lines} payloads left, {human_bytes(found.bytes)}; the chain is whole and ends with {found.last}")


@audit.command("show", epilog="Example: atoll audit show atoll-site/audit.jsonl")
def audit_show(path: Annotated[Path, typer.Argument(help="A site's audit log.")], as_json: AsJson = False) -> None:
    """List what left: when, for which run and task, how much, with which hash."""
    import json
    import time

    from atoll.audit import verify
    from atoll.record.card import human_bytes
    from atoll.record.tables import plain_table

    verify(path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if as_json:
        show_json(lines)
        return
    table = plain_table("at", "run", "task", "bytes", "sha256")
    for line in lines:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["at"]))
        table.add_row(at, line["run"], line["task"], human_bytes(line["bytes"]), line["sha256"][:16])
    show(table)


def address(written: str) -> tuple[str, int]:
    """HOST:PORT. Raises AtollError."""
    if "://" in written:
        raise AtollError(
            "not an address", found=written, allowed="HOST:PORT", remedy=f"without {written.partition('://')[0]}://"
        )
    host, _, port = written.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise AtollError("not an address", found=written, allowed="HOST:PORT, such as server.example:8000")
    return host, int(port)
