"""The views of runs as tables for a terminal. Numbers come from views.py and card.py; here is only how they look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from atoll.record.card import format_cell, human_bytes, human_seconds
from atoll.record.measured import ACCURACY, LOSS, REWARD_ACCURACY, Cell, Measure, cell
from atoll.record.measured import Table as Compared
from atoll.record.tasks import Score
from atoll.record.tasks import cell as score_cell
from atoll.record.tasks import columns as score_columns
from atoll.record.tasks import rows as score_rows
from atoll.record.views import Summary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

SITES_SHOWN = 8
"""More columns than this do not fit a terminal: the rest are counted, and are in the card and in `--json`."""


@dataclass(frozen=True)
class Fitting:
    """The first of these layouts that is no wider than the terminal; the last if all are."""

    layouts: Sequence[RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich's console protocol."""
        free = options.update(width=10_000)
        fits = (one for one in self.layouts if Measurement.get(console, free, one).maximum <= options.max_width)
        yield next(fits, self.layouts[-1])


def plain_table(*columns: str, title: str = "") -> Table:
    """Columns without boxes: names to the left, which wrap where there is no room; numbers, which never do, to the right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    return table


def loss_cell(value: float | None) -> str:
    """`0.321`, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def epsilon_cell(epsilon: float | None, delta: float | None) -> str:
    """`7.66 at 0.01`, or a dash where nothing was released with noise."""
    return "-" if epsilon is None else f"{epsilon:.3g} at {delta:g}"


def compared(table: Compared) -> RenderableType:
    """Base, each site alone, federated, pooled; the best of each column in bold.

    Where the terminal is too narrow the standard errors go first, then the columns go below each other.
    """
    more = len(table.columns) - SITES_SHOWN
    notes = [*table.notes, *([f"and {more} more sites: --json and the card have them"] if more > 0 else [])]
    return Group(*([Fitting(list(_layouts(table)))] if table.rows else []), *notes)


def _layouts(table: Compared) -> Iterator[RenderableType]:
    sites = table.columns[:SITES_SHOWN]
    columns = {site: [row[1][i] for row in table.rows] for i, site in enumerate(sites)}
    columns_with_mean = [*columns.items(), (table.mean_name, list(map(table.mean, table.rows)))]
    names = [row[0] for row in table.rows]
    yield _side_by_side(table.measure, names, columns_with_mean, format_cell)
    for most in range(len(columns_with_mean), 0, -1):
        parts = [columns_with_mean[at : at + most] for at in range(0, len(columns_with_mean), most)]
        yield Group(
            *(_side_by_side(table.measure, names, part, lambda value: loss_cell(value and value[0])) for part in parts),
            "standard errors: --json and the card have them",
        )


Values = list[Cell | None]


def _side_by_side(
    measure: Measure, models: Sequence[str], columns: Sequence[tuple[str, Values]], show: Callable[[Cell | None], str]
) -> Table:
    shown = plain_table(measure.name, *(name for name, _ in columns))
    best = [measure.best((c[0] for c in values if c), default=None) for _, values in columns]
    for number, model in enumerate(models):
        cells = [values[number] for _, values in columns]
        bold = [cell is not None and cell[0] == low for cell, low in zip(cells, best, strict=True)]
        shown.add_row(model, *(Text(show(c), "bold" if b else "") for c, b in zip(cells, bold, strict=True)))
    return shown


def runs(rows: Sequence[Summary]) -> RenderableType:
    """All runs; in a narrow terminal without what is least asked for."""
    left_out: list[tuple[str, ...]] = [(), ("down", "up"), ("clients", "baselines"), ("base loss", "time")]
    return Fitting([_runs(rows, [name for some in left_out[: n + 1] for name in some]) for n in range(len(left_out))])


def _runs(rows: Sequence[Summary], without: Sequence[str]) -> Table:
    bare = [] if any(row.epsilon is not None for row in rows) else ["epsilon"]
    columns = {name: show for name, show in _RUN.items() if name not in (*without, *bare)}
    table = plain_table(*columns)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table


_RUN: dict[str, Callable[[Summary], str]] = {
    "run": lambda row: row.name,
    "state": lambda row: row.state,
    "round": lambda row: f"{row.stage}: {row.round} of {row.rounds}" if row.stage else f"{row.round} of {row.rounds}",
    "clients": lambda row: str(row.clients),
    "base loss": lambda row: loss_cell(row.base_loss),
    "loss": lambda row: loss_cell(row.loss),
    "down": lambda row: human_bytes(row.bytes_down),
    "up": lambda row: human_bytes(row.bytes_up),
    "time": lambda row: human_seconds(row.seconds),
    "epsilon": lambda row: epsilon_cell(row.epsilon, row.delta),
    "baselines": lambda row: baselines(row.baselines),
}


def baselines(states: Mapping[str, str]) -> str:
    """`3 of 5`, and what is under way."""
    if not states:
        return "-"
    running = [name for name, state in states.items() if state == "running"]
    done = sum(state == "finished" for state in states.values())
    return f"{done} of {len(states)}" + (f", now {running[0]}" if running else "")


def details(data: Mapping[str, Any], *measured: Compared) -> RenderableType:
    """One run."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(data):
        facts.add_row(name, value)
    asked = [Score(**one) for one in data["tasks"]]
    return Group(
        facts,
        *(part for table in measured for part in ("", compared(table))),
        *(["", scores(asked)] if asked else []),
    )


def scores(each: Sequence[Score]) -> RenderableType:
    """What public tasks said of a run's models."""
    table = plain_table(*score_columns(each))
    for row in score_rows(each):
        table.add_row(*row)
    return table


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    stage = f"{data['stage']}, " if data["stage"] else ""
    ended = f" ({data['ended']})" if data["ended"] not in (None, "finished") else ""
    facts = [
        ("run", f"{data['name']} in {data['path']}"),
        ("state", f"{data['state']}{ended}, {stage}round {data['round']} of {data['rounds']}"),
        ("clients", _clients(data)),
        ("trains", f"{data['trains']:,} of {data['of']:,} parameters"),
        ("moved", f"{human_bytes(data['bytes_down'])} down, {human_bytes(data['bytes_up'])} up"),
        ("time", f"{human_seconds(data['seconds'])}; of the rounds: {_spans(data['spans'])}"),
        *([("epsilon", _spent(data))] if data["epsilon"] is not None else []),
        ("baselines", baselines(data["baselines"])),
    ]
    facts += [("left out", f"{name}: {report.splitlines()[0]}") for name, report in data["left_out"].items()]
    facts += [("left out", one["in_words"]) for one in data["records_left_out"].values()]
    facts += [("refused" if m["refused"] else "dropped", _missing(m)) for m in data["missing"][:10]]
    if len(data["missing"]) > 10:
        facts.append(("", f"and {len(data['missing']) - 10} more: --json has them"))
    return facts + [("warning", warning) for warning in data["warnings"]]


def _clients(data: Mapping[str, Any]) -> str:
    """With the samples that each trains on, and those it holds out."""
    named = [f"{name} ({count} + {data['held_out'].get(name, 0)})" for name, count in data["samples"].items()]
    more = f" and {len(named) - SITES_SHOWN} more" if len(named) > SITES_SHOWN else ""
    return ", ".join(named[:SITES_SHOWN]) + f"{more}; samples to train on + held out"


def _spent(data: Mapping[str, Any]) -> str:
    return f"{data['epsilon']:.4g} at delta {data['delta']:g}, by the ledger; the card says of whom"


def _missing(one: Mapping[str, Any]) -> str:
    return f"round {one['round']}, {one['client']}: {one['reason']}"


def _spans(spans: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {human_seconds(seconds)}" for name, seconds in spans.items()) or "-"


def comparison(data: Mapping[str, Any]) -> RenderableType:
    """Runs side by side, one column each."""
    names = [run["name"] for run in data["runs"]]
    table = plain_table("", *names)
    for column in table.columns[1:]:
        column.no_wrap = False  # settings may be long
    for path, values in data["settings"].items():
        table.add_row(path, *(str(values[name]) for name in names))
    table.add_section()
    sites = dict.fromkeys(site for each in data["losses"].values() for site in each)
    for label, measure in _MEASURES.items():
        for site in sites:
            told = [cell(data["losses"][name], site, measure) for name in names]
            if measure is LOSS or any(told):
                table.add_row(f"{label} {site}", *map(format_cell, told))
    for label, cells in _asked([data["tasks"][name] for name in names]):
        table.add_row(label, *cells)
    for label, show in _COSTS.items():
        table.add_row(label, *(show(run) for run in data["runs"]))
    measured = {tuple(data["losses"][name]) for name in names if data["losses"][name]}
    uneven = "the means are over different sites: compare the sites' own rows"
    unlike = "the objectives differ, and with them what a loss is: compare accuracies"
    objectives = any(path.startswith("finetune.objective") for path in data["settings"])
    return Group(table, *([uneven] if len(measured) > 1 else []), *([unlike] if objectives else []))


def _asked(each: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, list[str]]]:
    """A row for each measure of each task that any of the runs' results was asked."""
    runs = [{(one["task"], one["measure"]): Score(**one) for one in run} for run in each]
    for task, measure in dict.fromkeys(asked for run in runs for asked in run):
        yield f"{task}, {measure}", [score_cell(run[task, measure]) if (task, measure) in run else "-" for run in runs]


_MEASURES = {"loss": LOSS, "accuracy": ACCURACY, "reward accuracy": REWARD_ACCURACY}

_COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "loss, mean": lambda run: loss_cell(run["loss"]),
    "state": lambda run: run["state"],
    "rounds": lambda run: f"{run['round']} of {run['rounds']}",
    "down": lambda run: human_bytes(run["bytes_down"]),
    "up": lambda run: human_bytes(run["bytes_up"]),
    "time": lambda run: human_seconds(run["seconds"]),
    "epsilon, at delta": lambda run: epsilon_cell(run["epsilon"], run["delta"]),
}


def spending(rows: Sequence[Mapping[str, Any]], delta: float) -> RenderableType:
    """Ledgers, and what they come to."""
    table = plain_table("ledger", "releases", "unit", f"epsilon at delta {delta:g}")
    for row in rows:
        table.add_row(row["ledger"], str(row["releases"]), row["unit"], f"{row['epsilon']:.4g}")
    return table
