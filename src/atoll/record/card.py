"""The card: what a finished run says of itself, in Markdown with plots.

Reads the record, what tests of leakage found, and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from atoll.cache import home
from atoll.record.events import (
    ClientLeftOut,
    Evaluated,
    Missing,
    RecordsLeftOut,
    Replied,
    RoundEnded,
    RunEnded,
    RunStarted,
    Spent,
    read_events,
)
from atoll.record.folder import RunFolder
from atoll.record.leakage import COLUMNS, NOTHING_TESTED, Findings, cells, read_findings


@dataclass(frozen=True)
class Story:
    """A record, sorted by what the readers of a run ask for."""

    started: RunStarted
    rounds: Sequence[RoundEnded]
    evaluations: Sequence[Evaluated]
    replies: Sequence[Replied]
    missing: Sequence[Missing]
    left_out: Sequence[ClientLeftOut]
    records: Sequence[RecordsLeftOut]
    ended: RunEnded | None
    spent: Sequence[Spent] = ()
    baselines: Mapping[str, Story] = field(default_factory=dict)

    @property
    def base(self) -> Evaluated | None:
        """Before the first round."""
        return next((e for e in self.evaluations if e.round == 0), None)

    @property
    def final(self) -> Evaluated | None:
        """After the last, once the run is over."""
        return next((e for e in reversed(self.evaluations) if e.final and e.round > 0), None)

    @property
    def bytes_up(self) -> int:
        """All that clients sent."""
        return sum(r.bytes_up for r in self.rounds)

    @property
    def bytes_down(self) -> int:
        """All that the server sent to train."""
        return sum(r.bytes_down for r in self.rounds)

    @property
    def bytes_to_evaluate(self) -> int:
        """All that the server sent so that clients evaluate."""
        return sum(e.bytes_down for e in self.evaluations)


def read_story(folder: RunFolder) -> Story | None:
    """The story so far; None before the run has begun."""
    kinds: dict[type, list[object]] = {}
    for event in read_events(folder.record):
        kinds.setdefault(type(event), []).append(event)
    if RunStarted not in kinds:
        return None

    def of(kind: type) -> list[object]:
        return kinds.get(kind, [])

    inner = {unquote(b.path.name): story for b in folder.baselines() if (story := read_story(b))}
    return Story(
        of(RunStarted)[0],  # type: ignore[arg-type]
        of(RoundEnded), of(Evaluated), of(Replied), of(Missing), of(ClientLeftOut), of(RecordsLeftOut),  # type: ignore[arg-type]
        next(iter(of(RunEnded)), None), of(Spent), inner,  # type: ignore[arg-type]
    )  # fmt: skip


Row = tuple[str, list[tuple[float, float] | None]]
"""A model's name; per site the held-out loss and its standard error, which one sample alone does not have: NaN."""


@dataclass(frozen=True)
class Table:
    """Held-out loss per site: base, each site alone, federated, pooled."""

    sites: list[str]
    rows: list[Row]
    notes: tuple[str, ...] = ()
    """Who is missing, and why."""

    @property
    def mean_name(self) -> str:
        """The head of the mean's column. A site may be called `mean`, too."""
        return "mean of sites" if "mean" in self.sites else "mean"

    def mean(self, row: Row) -> tuple[float, float] | None:
        """Over all sites, each counting once; with its standard error."""
        if any(cell is None for cell in row[1]):
            return None
        cells = [cell for cell in row[1] if cell]
        return sum(c[0] for c in cells) / len(cells), math.sqrt(sum(c[1] ** 2 for c in cells)) / len(cells)


def loss_table(story: Story) -> Table | None:
    """The comparison that the run was made for; None before anything is measured. It is but a note if nothing can be."""
    notes = unmeasured(story.started)
    measured = story.base or story.final
    if measured is None or not measured.clients:
        return Table([], [], notes) if notes else None
    sites = list(measured.clients)
    named: list[tuple[str, Evaluated | None]] = [("base", story.base)]
    named += [(f"{name.removeprefix('local-')} alone", s.final) for name, s in _of(story, "local-")]
    named += [("federated", story.final)]
    named += [("pooled", s.final) for _, s in _of(story, "pooled")]
    return Table(
        sites, [(name, [cell(e.clients, site) for site in sites]) for name, e in named if e is not None], notes
    )


def modality_table(story: Story) -> Table | None:
    """The same by what samples hold: text alone, pictures, sounds; None for a run of text alone."""
    table, measured = loss_table(story), story.base or story.final
    if table is None or measured is None:
        return None
    names = sorted(
        {key.partition("/")[2] for one in measured.clients.values() for key in one if key.startswith("loss/")}
    )
    models = [
        story.base,
        *(s.final for _, s in _of(story, "local-")),
        story.final,
        *(s.final for _, s in _of(story, "pooled")),
    ]
    rows = zip([row[0] for row in table.rows], [one for one in models if one is not None], strict=True)
    return (
        Table(names, [(name, [over_clients(one, modality) for modality in names]) for name, one in rows])
        if names
        else None
    )


def over_clients(evaluated: Evaluated, modality: str) -> tuple[float, float] | None:
    """Of a modality, over all clients' samples, each sample counting once. Who tells of none has text alone."""
    each = []
    for metrics in evaluated.clients.values():
        plain = not any(key.startswith("loss/") for key in metrics)
        of = "" if plain and modality == "text" else f"/{modality}"
        if f"loss{of}" in metrics:
            loss, error, samples = (metrics[f"{name}{of}"] for name in ("loss", "standard_error", "samples"))
            each.append((loss, error if samples > 1 else math.nan, samples))
    count = sum(samples for _, _, samples in each)
    if not count:
        return None
    error = math.sqrt(sum((samples * one) ** 2 for _, one, samples in each)) / count
    return sum(loss * samples for loss, _, samples in each) / count, error


def unmeasured(started: RunStarted) -> tuple[str, ...]:
    """Whose held-out loss is not known, because nothing of theirs is held out."""
    without = [name for name, count in started.held_out.items() if not count]
    if without and len(without) == len(started.held_out):
        return ("nothing is held out, so no loss is measured: set data.held_out, or name files for it",)
    return tuple(f"{name}: no held-out sample, not in the mean" for name in without)


def _of(story: Story, prefix: str) -> list[tuple[str, Story]]:
    return [(name, s) for name, s in story.baselines.items() if name.startswith(prefix)]


def cell(clients: Mapping[str, Mapping[str, float]], site: str) -> tuple[float, float] | None:
    """A site's loss and its standard error, of which one sample says nothing."""
    metrics = clients.get(site)
    if metrics is None:
        return None
    return metrics["loss"], metrics["standard_error"] if metrics["samples"] > 1 else math.nan


def write_card(folder: RunFolder) -> None:
    """card.md and its plots."""
    story = read_story(folder)
    if story is None:
        return
    plot_losses(story, folder.path / "loss.svg")
    plot_bytes(story, folder.path / "bytes.svg")
    folder.card.write_text(markdown(folder.name, story, read_findings(folder)), encoding="utf-8")


def markdown(name: str, story: Story, leaks: Findings = NOTHING_TESTED) -> str:
    """The card's text."""
    s = story.started
    lines = [
        f"# {name}",
        "",
        f"{counted(len(s.clients), 'client')}, {len(story.rounds)} of {counted(s.rounds, 'round')}, seed {s.seed}, "
        f"plan `{s.plan}`. {s.trains:,} of {s.of:,} parameters trained and travelled ({s.trains / s.of:.1%}).",
        "",
        *_recipe_section(s.recipe),
        *_loss_section(story),
        "## What moved",
        "",
        f"Down {human_bytes(story.bytes_down)}, up {human_bytes(story.bytes_up)} in {counted(len(story.rounds), 'round')}, "
        f"and {human_bytes(story.bytes_to_evaluate)} down for evaluation; "
        f"{sum(r.seconds for r in story.rounds):.0f} s in rounds"
        + (f", {story.ended.seconds:.0f} s with evaluation." if story.ended else "."),
        "",
        "![bytes](bytes.svg)",
        "",
        *_faults_section(story),
        *_leakage_section(leaks),
        "## Made with",
        "",
        ", ".join(f"{package} {number}" for package, number in s.versions.items()),
        "",
        *privacy_section(story),
    ]
    return "\n".join(lines) + "\n"


def privacy_section(story: Story) -> list[str]:
    """What was promised, and what was spent of it in fact."""
    said = story.started.privacy
    if not said:
        return ["## Privacy", "", "None claimed. Updates were aggregated in the clear."]
    lines = [f"- {line}" for line in privacy_in_words(said)]
    if story.spent:
        last = story.spent[-1]
        lines.append(f"- spent: epsilon {last.epsilon:.4g} at delta {last.delta:g}, by the ledger (ledger.jsonl)")
    return ["## Privacy", "", *lines]


def privacy_in_words(said: Mapping[str, Any]) -> list[str]:
    """What a plan says of privacy (statement.py), in sentences."""
    sees = f"the server sees {said['server_sees']}"
    promise = said["guarantee"]
    if promise is None:
        return [sees, "no differential privacy: what is released may tell of any one's data"]
    known = promise["epsilon"] is not None
    budget = f"; the run stops before it passes {promise['budget']:g}" if promise.get("budget") else ""
    about = "by the number of records about " if promise.get("about") else ""
    epsilon = f"{about}epsilon {promise['epsilon']:.3g}" if known else "epsilon, known once the data are read,"
    of = f", the most of any client, {promise['most_told_of']}" if promise.get("most_told_of") else ""
    amplified = f", rate {promise['rate']:.3g}" if known and promise["sampling"] != "everyone" else ""
    lines = [
        sees,
        f"{epsilon} at delta {promise['delta']:g} if all {promise['rounds']} rounds are run{budget}, of"
        f" {UNITS[promise['unit']]} ({promise['adjacency']}){of}; against {promise['holds_against']}",
        f"{promise['mechanism']}: clip {promise['clip']:g}, noise multiplier {promise['noise_multiplier']:.3g};"
        f" sampling: {promise['sampling']}{amplified}",
    ]
    return [*lines, f"not covered: {promise['not_covered']}"] if promise.get("not_covered") else lines


UNITS = {"client": "a whole client", "example": "one example of a client"}


def _recipe_section(recipe: Mapping[str, Any]) -> list[str]:
    """Model, method and settings. Where the data lie is nobody's business who reads the card."""
    if not recipe:
        return []
    data = recipe["data"]
    facts = {
        "model": recipe["model"],
        "method": recipe["reference"],
        "data": data["use"] if isinstance(data, Mapping) else data,
        **recipe["finetune"],
    }
    if facts.get("local_steps"):
        facts.pop("epochs", None)
    rows = [f"| {name.replace('_', ' ')} | {in_words(value)} |" for name, value in facts.items() if value or value == 0]
    return ["## Made from", "", "| setting | value |", "|---|---|", *rows, ""]


def in_words(value: Any) -> str:
    """A setting as people read it.

    >>> in_words({"use": "error-feedback", "chain": [{"use": "topk", "fraction": 0.1}]})
    'error-feedback (chain: topk (fraction: 0.1))'
    """
    if isinstance(value, Mapping):
        rest = ", ".join(f"{name}: {in_words(each)}" for name, each in value.items() if name != "use")
        return f"{value['use']} ({rest})" if "use" in value and rest else str(value.get("use", rest))
    return ", ".join(map(in_words, value)) if isinstance(value, list | tuple) else str(value)


def _loss_section(story: Story) -> list[str]:
    table = loss_table(story)
    if table is None:
        return []
    if not table.rows:
        return ["## Held-out loss", "", *table.notes, ""]
    note = (
        "Mean over held-out samples of each sample's mean token loss, ± its standard error; "
        "the mean over sites counts each once."
    )
    shown = [*markdown_table(table), "", note, ""]
    if modalities := modality_table(story):
        shown += [
            "By what samples hold, over all sites, each sample counting once:",
            "",
            *markdown_table(modalities),
            "",
        ]
    return ["## Held-out loss", "", *shown, "![loss per site](loss.svg)", ""]


def markdown_table(table: Table) -> list[str]:
    """The table's lines in Markdown."""
    head = "| held-out loss | " + " | ".join([*table.sites, table.mean_name]) + " |"
    rule = "|---" * (len(table.sites) + 2) + "|"
    rows = [f"| {row[0]} | " + " | ".join(map(format_cell, [*row[1], table.mean(row)])) + " |" for row in table.rows]
    return [*([head, rule, *rows] if rows else []), *(f"\n{note}" for note in table.notes)]


def _faults_section(story: Story) -> list[str]:
    lines = [f"- {one.client}: no usable data ({one.report.splitlines()[0]})" for one in story.left_out]
    lines += [f"- {records_in_words(one)}" for one in story.records]
    lines += [
        f"- round {m.round + 1}, {m.client}: {'refused' if m.refused else 'dropped'}: {m.reason}"
        for m in story.missing[:20]
    ]
    if len(story.missing) > 20:
        lines.append(f"- and {len(story.missing) - 20} more replies refused or dropped")
    lines += [f"- warning: {warning}" for warning in story.started.warnings]
    return ["## What went wrong or might", "", *lines, ""] if lines else []


def _leakage_section(leaks: Findings) -> list[str]:
    """What attacks on the result found; nothing where none was made."""
    if not leaks.rows:
        return []
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    rows = [f"| {' | '.join(cells(row))} |" for row in leaks.rows]
    notes = [line for name, why in leaks.skipped.items() for line in (f"{name}: {why}", "")]
    return ["## Leakage", "", *head, *rows, "", *notes]


def records_in_words(event: RecordsLeftOut) -> str:
    """`clinic: 28 of 30 records used: 2 no answer, first at clinic.jsonl:7`."""
    reasons = [f"{count} {why}, first at {place}" for why, (count, place) in event.reasons.items()]
    return f"{event.client}: {event.kept} of {counted(event.read, 'record')} used: {'; '.join(reasons)}"


def format_cell(cell: tuple[float, float] | None) -> str:
    """`0.321 ± 0.012`.

    >>> format_cell((0.3214, 0.012)), format_cell((0.3214, math.nan)), format_cell(None), format_cell((math.nan, 1.0))
    ('0.321 ± 0.012', '0.321 ± n/a', '-', '-')
    """
    if cell is None or math.isnan(cell[0]):
        return "-"
    return f"{cell[0]:.3f} ± " + ("n/a" if math.isnan(cell[1]) else f"{cell[1]:.3f}")


def counted(count: int, what: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def human_bytes(count: float) -> str:
    """`12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


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
