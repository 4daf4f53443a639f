"""Checkpoints: the whole state of a run in one safetensors file, replaced atomically.

Tensors under `params/STREAM/`, `outer/STREAM/`, `down/STREAM/` and `fixed/NAME/`; tasks in flight as data beside them, with
each broadcast they started from once, under `broadcast/ROUND/STREAM/`. A process that dies while writing leaves the old file
whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from atoll import wire
from atoll.cache import replace_tensors
from atoll.errors import AtollError
from atoll.exchange import Broadcast, Task
from atoll.params import Params, nested, under
from atoll.round import State

FORMAT = 1


def save_state(path: Path, state: State, extra: dict[str, Any] | None = None) -> None:
    """Writes `state`, and `extra` (plain data) beside it."""
    flat: Params = {}
    for part in ("params", "outer", "down"):
        for stream, values in getattr(state, part).items():
            flat |= nested(f"{part}/{stream}", values)
    for name, values in state.fixed.items():
        flat |= nested(f"fixed/{name}", values)
    broadcasts = {task.broadcast.round: task.broadcast for task in state.in_flight}
    sides: dict[str, dict[str, int]] = {}
    for number, sent in broadcasts.items():
        sides[str(number)] = {stream: len(payload.sides) for stream, payload in sent.payloads.items()}
        for stream, payload in sent.payloads.items():
            flat |= nested(f"broadcast/{number}/{stream}", wire.flatten(payload))
    about = {
        "format": FORMAT,
        "round": state.round,
        "clock": state.clock,
        "bytes_down": state.bytes_down,
        "streams": list(state.params),
        "fixed": list(state.fixed),
        "acknowledged": state.acknowledged,
        "in_flight": [_task_as_data(task) for task in state.in_flight],
        "broadcasts": sides,
        "extra": extra or {},
    }
    replace_tensors(path, flat, {"state": json.dumps(about)})


def load_state(path: Path) -> State:
    """The state that `save_state` wrote."""
    return load_with_extra(path)[0]


def load_with_extra(path: Path) -> tuple[State, dict[str, Any]]:
    """The state, and what was written beside it. Raises AtollError for a file that is no checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["state"])
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AtollError("this is no checkpoint", where=str(path), found=error, remedy="start the run again") from error
    if about["format"] != FORMAT:
        raise AtollError(
            "a checkpoint of another format", where=str(path), found=about["format"], allowed=FORMAT,
            remedy="resume with the version of atoll that wrote it",
        )  # fmt: skip
    return _state(about, flat), about["extra"]


def read_extra(path: Path) -> dict[str, Any]:
    """What was written beside a state; empty for a file that is no checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            extra: dict[str, Any] = json.loads((file.metadata() or {})["state"])["extra"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}
    return extra


def _state(about: dict[str, Any], flat: Params) -> State:
    streams = about["streams"]
    params, outer, down = ({s: under(f"{part}/{s}", flat) for s in streams} for part in ("params", "outer", "down"))
    broadcasts = {
        int(number): Broadcast(
            int(number),
            {s: wire.unflatten(under(f"broadcast/{number}/{s}", flat), count) for s, count in sides.items()},
        )
        for number, sides in about["broadcasts"].items()
    }
    tasks = [Task(**(data | {"broadcast": broadcasts[data["broadcast"]]})) for data in about["in_flight"]]
    return State(
        about["round"],
        params,
        outer,
        down,
        clock=about["clock"],
        bytes_down=about["bytes_down"],
        acknowledged=about["acknowledged"],
        in_flight=tasks,
        fixed={name: under(f"fixed/{name}", flat) for name in about.get("fixed", ())},
    )


def _task_as_data(task: Task) -> dict[str, Any]:
    fields = {name: getattr(task, name) for name in task.__dataclass_fields__ if name != "broadcast"}
    return fields | {"broadcast": task.broadcast.round}
