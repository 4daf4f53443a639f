"""The command that measures a run on public tasks: evaluate."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from atoll.commands.output import AsJson, RunName, say, show, show_json


def evaluate(
    run: RunName = "latest",
    tasks: Annotated[str, typer.Option(help="Their names, with commas between; `--tasks help` lists them.")] = "help",
    questions: Annotated[int, typer.Option(min=1, help="Of each task, at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Measure a run's model, its base and its stages on public tasks. The run's card keeps the numbers."""
    from atoll.data.prepared_tasks import TASKS
    from atoll.schema import HARNESS

    if tasks == "help":
        for name, one in TASKS.items():
            show(f"{name:14} answers are {'written' if one.written else 'chosen'}; {one.source} ({one.license})")
        show(
            f"{HARNESS}NAME   a task of the Language Model Evaluation Harness, or a YAML file of yours as it reads them"
        )
        return
    from atoll.record.folder import find

    folder = find(run)
    from atoll.tasks import evaluate_tasks

    scores = evaluate_tasks(folder, [name.strip() for name in tasks.split(",") if name.strip()], questions, say)
    if as_json:
        show_json({"run": folder.name, "scores": [asdict(one) for one in scores]})
        return
    from atoll.record.tables import scores as as_table

    show(as_table(scores))
