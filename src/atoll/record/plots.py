"""The card's plots, as SVG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from atoll.cache import home
from atoll.record.measured import Cell, accuracy_table, after
from atoll.record.story import Story
from atoll.record.tasks import TUNED, Score


def plot_losses(story: Story, path: Path) -> None:
    """Held-out loss per site over rounds."""
    axes, save = _figure("rounds", "held-out loss")
    for site in story.base.clients if story.base else ():
        points = [(e.round, e.clients[site]["loss"]) for e in story.evaluations if site in e.clients]
        axes.plot(*zip(*points, strict=True), marker="o", label=site)
    save(path)


def plot_bytes(story: Story, path: Path) -> None:
    """Bytes up and down, summed over rounds."""
    axes, save = _figure("rounds", "MB so far")
    for label in ("bytes_up", "bytes_down"):
        total, points = 0.0, [(0, 0.0)]
        for i, one in enumerate(story.rounds):
            total += getattr(one, label) / 1e6
            points.append((i + 1, total))
        axes.plot(*zip(*points, strict=True), marker="o", label=label.removeprefix("bytes_"))
    save(path)


Lines = Mapping[str, Sequence[tuple[str, float, float]]]
"""By site or task: (model, accuracy, standard error), in the order of the models' making."""


PUBLIC = ", public"
SHARES = ("acc", "exact")
"""How measures of tasks begin that are shares of right answers: accuracy, acc_norm, exact match."""


def accuracies(story: Story, scores: Sequence[Score]) -> Lines:
    """Of the base, of what every stage came to, and of the result; of several stages, or of public tasks, or none."""
    table = accuracy_table(story) if story.before or scores else None
    found: dict[str, dict[str, Cell]] = {}
    for name, row in table.rows if table else ():
        for site, cell in zip(table.columns, row, strict=True):  # type: ignore[union-attr]
            if cell is not None:
                found.setdefault(site, {})[name] = cell
    for one in scores:
        if one.measure.startswith(SHARES):
            model = "federated" if one.model == TUNED else one.model
            found.setdefault(f"{one.task} {one.measure}{PUBLIC}", {})[model] = (one.value, one.error or 0.0)
    lines = {
        name: [(model, *line[model]) for model in in_order(story) if model in line] for name, line in found.items()
    }
    return {name: line for name, line in lines.items() if len(line) > 1}


def in_order(story: Story) -> list[str]:
    """The models that a run makes, as tables call them."""
    return ["base", *map(after, story.before), "fused", "federated"]


def plot_stages(story: Story, lines: Lines, path: Path) -> None:
    """Accuracy from model to model; no file where there is nothing to show."""
    if not lines:
        return
    shown = {model for line in lines.values() for model, *_ in line}
    models = [model for model in in_order(story) if model in shown]
    axes, save = _figure("", "accuracy")
    for name, line in lines.items():
        at, values, errors = zip(*((models.index(model), value, error) for model, value, error in line), strict=True)
        style = "--" if name.endswith(PUBLIC) else "-"
        axes.errorbar(at, values, errors, marker="o", capsize=3, linestyle=style, label=name)
    axes.set_xticks(range(len(models)), models)
    save(path)


def _figure(xlabel: str, ylabel: str):  # type: ignore[no-untyped-def]  # matplotlib's own types are loose
    """Axes, and a function that saves them as SVG."""
    os.environ.setdefault("MPLCONFIGDIR", str(home() / "matplotlib"))  # it keeps a list of fonts
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)

    def save(path: Path) -> None:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        figure.savefig(path)
        pyplot.close(figure)

    return axes, save
