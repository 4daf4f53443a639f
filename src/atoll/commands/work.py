"""Commands that run something, or say what would run: run, plan, resume, stop, sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cache import listening
from atoll.commands.output import (
    AsJson,
    Certs,
    Fleet,
    Insecure,
    RecipeName,
    RunName,
    Settings,
    interruptible,
    say,
    show,
    show_json,
)
from atoll.errors import AtollError, Interrupted

if TYPE_CHECKING:
    from atoll.build import Plan
    from atoll.record.folder import RunFolder


def run(
    recipe: RecipeName,
    settings: Settings = None,
    fleet: Fleet = None,
    certs: Certs = "certs/operator",
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: rounds, evaluation, baselines, adapter and card."""
    say(f"planning {recipe}")
    from atoll.run import begun

    ready = planned(recipe, [*at_sites(fleet, certs, insecure), *(settings or ())])
    with begun(ready) as folder:
        work_on(ready, folder, new=True)
    from atoll.commands.ending import conclude

    conclude(folder, as_json)


def resume(run: RunName = "latest", as_json: AsJson = False) -> None:
    """Go on with a run from its last whole round."""
    from atoll.commands.ending import conclude, told_if_finished
    from atoll.record.folder import find

    folder = find(run)
    if told_if_finished(folder, as_json):
        return
    say(f"planning {folder.name}")
    from atoll.planning import plan_again

    work_on(plan_again(folder), folder, new=False)
    conclude(folder, as_json)


def work_on(ready: Plan, folder: RunFolder, new: bool) -> None:
    """The run itself, watched; Ctrl-C and crashes say where it can go on."""
    from atoll.commands.planned import beyond_memory
    from atoll.run import execute
    from atoll.terminal import watch

    for warning in [*ready.warnings, *beyond_memory(ready)]:
        say(f"warning: {warning}")
    say(f"run {folder.name} in {folder.path}")
    with interruptible(folder, new), watch() as shown:
        execute(ready, folder, [shown.event], shown.say, shown.report)


def planned(recipe: str, settings: Sequence[str]) -> Plan:
    """The recipe's plan. What it fetches the first time, models and data, is told."""
    from atoll.planning import plan

    with listening(say):
        return plan(recipe, settings)


def at_sites(server: str | None, certs: str, insecure: bool) -> list[str]:
    """The settings that `--fleet` stands for. Baselines need everybody's data in one place."""
    if server is None:
        return []
    from atoll.commands.network import address

    address(server)
    where: dict[str, Any] = {"use": "flower", "server": server, "keys": str(Path(certs).absolute())}
    where |= {"insecure": True} if insecure else {}
    return [f"fleet={json.dumps(where)}", "baselines=[]"]


def plan(
    recipe: RecipeName,
    settings: Settings = None,
    fleet: Fleet = None,
    certs: Certs = "certs/operator",
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would do: what trains, what travels, bytes, memory, time. Runs nothing."""
    from atoll.commands.planned import beyond_memory, table
    from atoll.estimate import as_data

    ready = planned(recipe, [*at_sites(fleet, certs, insecure), *(settings or ())])
    each = [as_data(one) for one in (*ready.before.values(), ready)]
    for data, one in zip(each, (*ready.before.values(), ready), strict=True):
        data["warnings"] += beyond_memory(one)
    if as_json:
        show_json(each[-1] | {"before": dict(zip(ready.before, each, strict=False))})
        return
    for number, data in enumerate(each):
        show("") if number else None
        show(table(data))


def stop(run: RunName = "latest") -> None:
    """Ask a run to stop after the round it is in. It can go on later."""
    from atoll.record.folder import find

    folder = find(run)
    if not folder.is_running():
        raise AtollError("the run is not running", where=str(folder.path), remedy=f"`atoll show {folder.name}`")
    folder.ask_to_stop()
    say(f"{folder.name} stops after the round it is in; `atoll resume {folder.name}` goes on")


def sweep(
    recipe: RecipeName,
    method: Annotated[list[str], typer.Option(help="A method to tune; may be repeated.")],
    grid: Annotated[list[str], typer.Option(metavar="[METHOD:]KEY=V,V", help="Values to try; may be repeated.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials for each method; all points of the smallest grid.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the trials from the grid.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Tune methods on a grid, the same number of trials each. The same command goes on where it was cut off."""
    say(f"planning the trials of {recipe}")
    from atoll.sweep import parse_grid
    from atoll.sweep import sweep as run_sweep
    from atoll.terminal import watch

    try:
        with watch() as shown:
            folder, outcomes = run_sweep(
                recipe, method, parse_grid(grid), trials, seed, [shown.event], shown.say, shown.report
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; finished trials stay", remedy="the same command goes on") from None
    if as_json:
        show_json({"path": folder, "trials": [vars(one) for one in outcomes]})
        return
    from atoll.record.tables import plain_table

    table = plain_table("method", "settings", "mean loss", "worst", "seconds")
    for one in outcomes:
        table.add_row(one.method, _settings(one.settings), f"{one.loss:.4f}", f"{one.worst:.4f}", f"{one.seconds:.0f}")
    show(table)
    show(f"\n{folder / 'sweep.json'}: chosen on these held-out data, the best loss flatters; measure it on others")


def _settings(settings: Any) -> str:
    return ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in settings.items()) or "-"
