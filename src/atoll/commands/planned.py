"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from atoll.record.card import human_bytes, human_seconds, privacy_in_words
from atoll.record.tables import SITES_SHOWN

if TYPE_CHECKING:
    from rich.console import RenderableType

    from atoll.build import Plan


def table(data: Mapping[str, Any]) -> RenderableType:
    """What `estimate.as_data` says, a line each."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts(data):
        grid.add_row(name, value)
    return grid


def beyond_memory(plan: Plan) -> list[str]:
    """The warning that a run needs more memory than is free where it would train; none if it fits or is not known."""
    from atoll.estimate import memory
    from atoll.models.load import choose_device, free_memory

    needs = memory(plan)
    if needs is None:
        return []
    device = choose_device(str(plan.model.options["device"]))
    free = free_memory(device)
    if needs.total <= free:
        return []
    stage = plan.recipe.finetune
    return [
        f"about {human_bytes(needs.total)} at most are needed, and {human_bytes(free)} are free on {device}: lower "
        f"finetune.batch_size ({stage.batch_size}) or finetune.context ({stage.context}), or take a smaller model"
    ]


def facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each line."""
    lines = [
        ("plan", f"{data['name']} ({data['plan']})"),
        ("model", _model(data["model"])),
        *([("begins with", data["begins_with"])] if data["begins_with"] else []),
        ("trains", _trains(data)),
        ("local work", data["local_work"]),
        *(("travels", _stream(stream)) for stream in data["streams"]),
        ("bytes", _bytes(data["bytes"])),
        ("memory", _memory(data["memory"])),
        ("time", _time(data)),
        ("clients", _clients(data["clients"])),
        *(("privacy", line) for line in privacy_in_words(data["privacy"])),
    ]
    if set(data["population"]) != set(data["clients"]):
        lines.append(("asks only", ", ".join(data["population"])))
    if data["baselines"]:
        lines.append(("baselines", ", ".join(data["baselines"])))
    if asked := [f"{name} ({most} questions at most)" for name, most in data["tasks"].items()]:
        lines.append(("evaluate", f"base and results on {', '.join(asked)}"))
    return lines + [("warning", warning) for warning in data["warnings"]]


def _model(model: Mapping[str, Any]) -> str:
    known = f", {model['params']:,} parameters" if model["params"] else ""
    return f"{model['name']}{known}"


def _trains(data: Mapping[str, Any]) -> str:
    trains = data["trains"]
    if trains["params"] is None:
        return f"{trains['space']}; a model of your own factory has no shapes to read before it is made"
    return f"{trains['space']}: {trains['params']:,} parameters, {trains['params'] / data['model']['params']:.1%}"


def _stream(stream: Mapping[str, Sequence[str]]) -> str:
    down, up = (" -> ".join(stream[way]) or "as it is" for way in ("down", "up"))
    return f"{stream['name']}: down {down}, up {up}"


def _bytes(moved: Mapping[str, float] | None) -> str:
    if moved is None:
        return "unknown before the model is made"
    each = (
        f"{human_bytes(moved['down_per_client'])} down and {human_bytes(moved['up_per_client'])} up a client and round"
    )
    if moved["down_once_per_client"]:
        each += f", {human_bytes(moved['down_once_per_client'])} down to each client once"
    total = f"{human_bytes(moved['down_total'])} down and {human_bytes(moved['up_total'])} up"
    return f"{each}; {moved['clients_per_round']:g} clients x {moved['rounds']} rounds: {total}"


def _memory(needs: Mapping[str, Any] | None) -> str:
    if needs is None:
        return "unknown before the model is made"
    return f"about {human_bytes(needs['total'])} at most, beside 0.7 GB for the program: {needs['formula']}"


def _time(data: Mapping[str, Any]) -> str:
    speed = data["speed"]
    if speed is None:
        return "unknown until a first run of this kind on this machine"
    basis = (
        f"{speed['run']} took {speed['training']:.3g} s a training sample and {speed['held_out']:.3g} s a held-out one"
    )
    if data["seconds"] is None:
        return f"unknown, since the clients' sizes are; {basis}"
    return f"about {human_seconds(data['seconds'])}, baselines included: {basis}"


def _clients(records: Mapping[str, Mapping[str, Any] | None]) -> str:
    shown = [name + _split(count) for name, count in list(records.items())[:SITES_SHOWN]]
    more = len(records) - len(shown)
    known = "; records to train on + held out" if any(records.values()) else ""
    return f"{len(records)}: " + ", ".join(shown) + (f" and {more} more" if more else "") + known


def _split(count: Mapping[str, Any] | None) -> str:
    if count is None:
        return ""
    return f" ({'about ' if count['about'] else ''}{count['train']} + {count['held_out']})"
