"""Commands that look at runs: runs, show, compare, card, ledger. They read records alone and answer at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.commands.output import AsJson, RunName, show, show_json

if TYPE_CHECKING:
    from atoll.privacy.ledger import Entry


def runs(as_json: AsJson = False) -> None:
    """List the runs here: which are running, finished or stopped, and how far they are."""
    from atoll.record import tables
    from atoll.record.folder import every, root
    from atoll.record.views import summarize

    rows = [summarize(folder) for folder in every()]
    if as_json:
        show_json([asdict(row) for row in rows])
    elif rows:
        show(tables.runs(rows))
    else:
        show(f"no runs in {root()}; `atoll run quickstart` makes one")


def show_run(run: RunName = "latest", as_json: AsJson = False) -> None:
    """Show a run: held-out loss per site, bytes, time, and what went wrong."""
    from atoll.record import tables, views
    from atoll.record.folder import find
    from atoll.record.measured import measured

    folder = find(run)
    data = views.details(folder)
    if as_json:
        show_json(data)
    else:
        story = views.need_story(folder)
        show(tables.details(data, *measured(story)))


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Names or paths of runs.")],
    as_json: AsJson = False,
) -> None:
    """Compare runs: settings in which they differ, losses, costs."""
    from atoll.commands.compared import settings
    from atoll.errors import AtollError
    from atoll.record import tables, views
    from atoll.record.folder import find

    if len(runs) < 2:
        raise AtollError("one run compares with nothing", found=runs[0], allowed="two runs or more",
                         remedy=f"`atoll show {runs[0]}` shows one")  # fmt: skip
    folders = [find(run) for run in runs]
    data = views.compare(folders) | {"settings": settings(folders)}
    if as_json:
        show_json(data)
    else:
        show(tables.comparison(data))


def ledger(
    where: Annotated[
        list[str], typer.Argument(metavar="RUN|FILE...", help="Runs, or ledgers of sites (ledger.jsonl).")
    ],
    delta: Annotated[
        float | None,
        typer.Option(min=1e-12, max=0.5, help="The delta that epsilon is said at.", show_default="that of the runs"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add up what was spent of privacy: over all rounds of all the runs that used the same data."""
    from atoll.errors import AtollError
    from atoll.privacy.ledger import Ledger, spending
    from atoll.record import tables

    files = {key: path for name in where for key, path in ledgers_of(name).items()}
    for name, path in files.items():
        if not path.exists() or not path.stat().st_size:
            raise AtollError(
                "no account was kept", where=str(path), found=name,
                allowed="a ledger with an entry for each round that was released with noise",
                remedy="what was released without noise has no epsilon: leave it out, and know that nothing bounds it",
            )  # fmt: skip
    delta = own_delta(where) if delta is None or math.isnan(delta) else delta
    entries = {name: list(Ledger(path)) for name, path in files.items()}
    refuse_short(entries, files)
    rows = spending(entries, delta)
    if as_json:
        show_json(rows)
    else:
        show(tables.spending(rows, delta))


def ledgers_of(name: str) -> dict[str, Path]:
    """A ledger by its path, or those of a run: of every stage that keeps one."""
    from atoll.record.folder import find

    if Path(name).is_file():
        return {name: Path(name)}
    folder = find(name)
    kept = {one.name: one.ledger for one in (*folder.earlier(), folder) if one.ledger.exists()}
    return kept or {name: folder.ledger}


def refuse_short(entries: Mapping[str, Sequence[Entry]], files: Mapping[str, Path]) -> None:
    """A ledger with less entries than its run has made releases, or with none at all, is damaged. Raises AtollError."""
    from atoll.errors import AtollError
    from atoll.record.folder import find
    from atoll.record.story import read_story

    for name, found in entries.items():
        story = None if files[name] == Path(name) else read_story(find(name))
        least = max(1, len(story.spent) if story else 1)
        if len(found) < least:
            raise AtollError(
                "the ledger has lost entries", where=str(files[name]), found=len(found), allowed=f"{least} or more",
                remedy="put the file back from a copy: what was spent is not known without",
            )  # fmt: skip


def own_delta(where: Sequence[str]) -> float:
    """The delta of all these runs' plans. Raises AtollError where it is not one, or a site's ledger is named."""
    from atoll.errors import AtollError
    from atoll.record.folder import find
    from atoll.record.views import summarize

    found = {name: None if Path(name).is_file() else summarize(find(name)).delta for name in where}
    deltas = set(found.values())
    if len(deltas) > 1 or None in deltas:
        told = ", ".join(f"{name}: {delta:g}" if delta else f"{name}: none" for name, delta in found.items())
        raise AtollError("no one delta that epsilon is to be said at", where="--delta", found=told,
                         allowed="above 0 and at most 0.5", remedy="--delta 1e-5")  # fmt: skip
    return float(deltas.pop())  # type: ignore[arg-type]


def card(run: RunName = "latest") -> None:
    """Print a run's card, made anew from its record."""
    from atoll.record import views
    from atoll.record.card import write_card
    from atoll.record.folder import find

    folder = find(run)
    views.need_story(folder)
    write_card(folder)
    print(folder.card.read_text(encoding="utf-8"), end="")
