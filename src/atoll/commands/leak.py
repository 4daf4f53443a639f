"""The command that attacks a run: leakage."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from atoll.commands.output import AsJson, RunName, say, show, show_json


def leakage(
    run: RunName = "latest",
    attack: Annotated[
        list[str] | None,
        typer.Option(help="membership, canaries or inversion; may be repeated. Without it, all that apply."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to attack, at most, of each site.")] = 64,
    candidates: Annotated[int, typer.Option(help="Codes that a canary's is ranked among; 512 to 4096.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Attack a finished run: what it tells of the samples it was trained on. The run's card keeps the numbers."""
    from atoll.record.folder import find

    folder = find(run)
    from atoll.leakage.attack import attack as attack_run

    found = attack_run(folder, attack or (), samples, candidates, say)
    if as_json:
        show_json({"run": folder.name, **asdict(found)})
        return
    from atoll.record.leakage import COLUMNS, cells
    from atoll.record.tables import plain_table

    table = plain_table(*COLUMNS)
    for row in found.rows:
        table.add_row(*cells(row))
    for column in (*table.columns[1:3], table.columns[5]):
        column.justify = "left"
    show(table)
    for name, why in found.skipped.items():
        show(f"{name} is skipped: {why}")
