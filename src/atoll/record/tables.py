"""The views of runs as tables for a terminal. Numbers come from views.py and card.py; here is only how they look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from atoll.record.card import Table as LossTable
from atoll.record.card import format_cell, human_bytes
from atoll.record.views import Summary

if TYPE_CHECKING:
    from rich.console import RenderableType

SITES_SHOWN = 8
"""More columns than this do not fit a terminal: the rest are counted, and are in the card and in `--json`."""


def plain_table(*columns: str, title: str = "") -> Table:
    """Columns without boxes: the first to the left, the others to the right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def human_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`.

    >>> human_seconds(42.4), human_seconds(200), human_seconds(7500)
    ('42 s', '3 min 20 s', '2 h 05 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def loss_cell(value: float | None) -> str:
    """`0.321`, or a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def losses(table: LossTable) -> RenderableType:
    """Held-out loss per site: base, each site alone, federated, pooled; the best of each column in bold."""
    sites = table.sites[:SITES_SHOWN]
    shown = plain_table("held-out loss", *sites, "mean")
    cells = [[*row[1][: len(sites)], table.mean(row)] for row in table.rows]
    best = [min((c[0] for c in column if c), default=None) for column in zip(*cells, strict=True)]
    for row, values in zip(table.rows, cells, strict=True):
        marked = [_marked(value, low) for value, low in zip(values, best, strict=True)]
        shown.add_row(row[0], *marked)
    more = len(table.sites) - len(sites)
    return Group(shown, *([f"and {more} more sites: --json and the card have them"] if more else []))


def _marked(value: tuple[float, float] | None, best: float | None) -> Text:
    return Text(format_cell(value), "bold" if value and value[0] == best else "")


def runs(rows: Sequence[Summary]) -> RenderableType:
    """All runs."""
    table = plain_table("run", "state", "round", "clients", "base loss", "loss", "down", "up", "time", "baselines")
    for row in rows:
        table.add_row(
            row.name,
            row.state,
            f"{row.round} of {row.rounds}",
            str(row.clients),
            loss_cell(row.base_loss),
            loss_cell(row.loss),
            human_bytes(row.bytes_down),
            human_bytes(row.bytes_up),
            human_seconds(row.seconds),
            baselines(row.baselines),
        )
    return table


def baselines(states: Mapping[str, str]) -> str:
    """`3 of 5`, and what is under way."""
    if not states:
        return "-"
    running = [name for name, state in states.items() if state == "running"]
    done = sum(state == "finished" for state in states.values())
    return f"{done} of {len(states)}" + (f", now {running[0]}" if running else "")


def details(data: Mapping[str, Any], table: LossTable | None) -> RenderableType:
    """One run."""
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(data):
        facts.add_row(name, value)
    return Group(facts, *(["", losses(table)] if table else []))


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    ended = f" ({data['ended']})" if data["ended"] not in (None, "finished") else ""
    facts = [
        ("run", f"{data['name']} in {data['path']}"),
        ("state", f"{data['state']}{ended}, round {data['round']} of {data['rounds']}"),
        ("clients", ", ".join(f"{name} ({count})" for name, count in list(data["samples"].items())[:SITES_SHOWN])),
        ("trains", f"{data['trains']:,} of {data['of']:,} parameters"),
        ("moved", f"{human_bytes(data['bytes_down'])} down, {human_bytes(data['bytes_up'])} up"),
        ("time", f"{human_seconds(data['seconds'])}; of the rounds: {_spans(data['spans'])}"),
        ("baselines", baselines(data["baselines"])),
    ]
    facts += [("left out", f"{name}: {report.splitlines()[0]}") for name, report in data["left_out"].items()]
    facts += [("refused" if m["refused"] else "dropped", _missing(m)) for m in data["missing"][:10]]
    if len(data["missing"]) > 10:
        facts.append(("", f"and {len(data['missing']) - 10} more: --json has them"))
    return facts + [("warning", warning) for warning in data["warnings"]]


def _missing(one: Mapping[str, Any]) -> str:
    return f"round {one['round']}, {one['client']}: {one['reason']}"


def _spans(spans: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {human_seconds(seconds)}" for name, seconds in spans.items()) or "-"


def comparison(data: Mapping[str, Any]) -> RenderableType:
    """Runs side by side, one column each."""
    names = [run["name"] for run in data["runs"]]
    table = plain_table("", *names)
    for path, values in data["settings"].items():
        table.add_row(path, *(str(values[name]) for name in names))
    table.add_section()
    sites = dict.fromkeys(site for each in data["losses"].values() for site in each)
    for site in sites:
        table.add_row(f"loss {site}", *(_loss_at(data["losses"][name], site) for name in names))
    for label, show in _COSTS.items():
        table.add_row(label, *(show(run) for run in data["runs"]))
    return table


def _loss_at(sites: Mapping[str, Mapping[str, float]], site: str) -> str:
    at = sites.get(site)
    return format_cell((at["loss"], at["standard_error"]) if at else None)


_COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "loss, mean": lambda run: loss_cell(run["loss"]),
    "state": lambda run: run["state"],
    "rounds": lambda run: f"{run['round']} of {run['rounds']}",
    "down": lambda run: human_bytes(run["bytes_down"]),
    "up": lambda run: human_bytes(run["bytes_up"]),
    "time": lambda run: human_seconds(run["seconds"]),
}
