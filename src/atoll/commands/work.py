"""Commands that run something, or say what would run: run, plan, resume, stop, sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.commands.output import AsJson, RecipeName, RunName, Settings, interruptible, say, show, show_json
from atoll.errors import AtollError, Interrupted

if TYPE_CHECKING:
    from atoll.build import Plan
    from atoll.record.folder import RunFolder


def run(recipe: RecipeName, settings: Settings = None, as_json: AsJson = False) -> None:
    """Run a recipe: rounds, evaluation, baselines, adapter and card."""
    say(f"planning {recipe}")
    from atoll.run import begun, plan

    ready = plan(recipe, settings or ())
    with begun(ready) as folder:
        work_on(ready, folder)
    conclude(folder, as_json)


def resume(run: RunName = "latest", as_json: AsJson = False) -> None:
    """Go on with a run from its last whole round."""
    from atoll.record.folder import find

    folder = find(run)
    say(f"planning {folder.name}")
    from atoll.run import plan

    work_on(plan(str(folder.recipe)), folder)
    conclude(folder, as_json)


def work_on(ready: Plan, folder: RunFolder) -> None:
    """The run itself, watched; Ctrl-C and crashes say where it can go on."""
    from atoll.run import execute
    from atoll.terminal import watch

    for warning in ready.warnings:
        say(f"warning: {warning}")
    say(f"run {folder.name} in {folder.path}")
    with interruptible(folder), watch() as shown:
        execute(ready, folder, [shown.event], shown.say, shown.report)


def conclude(folder: RunFolder, as_json: bool) -> None:
    """What the run was made for: the table, what moved, how long it took, and what to do next."""
    from atoll.record import tables, views
    from atoll.record.card import human_bytes, loss_table

    data = views.details(folder)
    if as_json:
        show_json(data)
        return
    if table := loss_table(views.need_story(folder)):
        show(tables.losses(table))
    beside = (
        f", and {tables.human_seconds(data['seconds_in_baselines'])} for the baselines" if data["baselines"] else ""
    )
    show(
        f"\n{human_bytes(data['bytes_down'])} down, {human_bytes(data['bytes_up'])} up, "
        f"{tables.human_seconds(data['seconds'])}{beside}\n\n"
        f"atoll chat {folder.name}      talk to the result\n"
        f"atoll card {folder.name}      what the run says of itself\n"
        f"atoll export {folder.name} --to adapter"
    )


def plan(recipe: RecipeName, settings: Settings = None, as_json: AsJson = False) -> None:
    """Say what a recipe would do: what trains, what travels, bytes, memory, time. Runs nothing."""
    from atoll.estimate import as_data
    from atoll.run import plan

    data = as_data(plan(recipe, settings or ()))
    if as_json:
        show_json(data)
        return
    from atoll.commands.planned import table

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
    trials: Annotated[int | None, typer.Option(help="Trials for each method; all points of the smallest grid.")] = None,
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
