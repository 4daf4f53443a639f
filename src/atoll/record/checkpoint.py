"""Checkpoints: the whole state of a run in one safetensors file, replaced atomically.

Tensors under `params/STREAM/`, `outer/STREAM/` and `down/STREAM/`; tasks in flight as data beside them, with
each broadcast they started from once, under `broadcast/ROUND/STREAM/`. A process that dies while writing leaves the old file
whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from atoll import wire
from atoll.cache import replace_tensors
from atoll.errors import AtollError
from atoll.exchange import Broadcast, Task
from atoll.params import Params, nested, under
from atoll.round import State
from atoll.wire import content

FORMAT = 3


def save_state(path: Path, state: State, extra: dict[str, Any] | None = None) -> None:
    """Writes `state`, but for what is fixed, and `extra` (plain data) beside it."""
    flat: Params = {}
    for part in ("params", "outer", "down"):
        for stream, values in getattr(state, part).items():
            flat |= nested(f"{part}/{stream}", values)
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
        "have_fixed": sorted(state.have_fixed),
        "acknowledged": state.acknowledged,
        "in_flight": [_task_as_data(task) for task in state.in_flight],
        "broadcasts": sides,
        "extra": extra or {},
    }
    replace_tensors(path, flat, {"state": json.dumps(about)})


def save_start(path: Path, params: Params) -> None:
    """Keeps what a run began with, and its content beside it."""
    replace_tensors(path, params, {"content": content(params)})


def load_start(path: Path) -> Params:
    """What `save_start` kept. Raises AtollError for a file that is not there, cannot be read, or holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
            if content(params) == (file.metadata() or {}).get("content"):
                return params
        odd = "other params than were kept"
    except (OSError, SafetensorError) as error:
        odd = str(error)
    raise AtollError(
        "what the run began with cannot be had from its folder", where=str(path), found=odd,
        remedy="put the file back from a copy; or remove it and resume the run, which makes it again from the run that it"
        " started from, if that has not changed",
    )  # fmt: skip


class Head(NamedTuple):
    """What a checkpoint says of itself, known without its tensors."""

    round: int
    """How many are behind it."""
    extra: dict[str, Any]
    """What was written beside the state."""


def load_state(path: Path, fixed: Mapping[str, Params] | None = None) -> State:
    """The state that `save_state` wrote, with what is `fixed`, which lies elsewhere.

    Raises AtollError for a file that is no checkpoint, or of another format.
    """
    with _opened(path) as (file, about):
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
        return _state(about, flat, fixed or {})


def read_head(path: Path) -> Head:
    """The head of the file that `save_state` wrote; raises as `load_state` does."""
    with _opened(path) as (_, about):
        return Head(about["round"], about["extra"])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file, and what it says of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["state"])
            if about["format"] == FORMAT:
                yield file, about
                return
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AtollError("this is no checkpoint", where=str(path), found=error, remedy="start the run again") from error
    raise AtollError(
        "a checkpoint of another format", where=str(path), found=about["format"], allowed=FORMAT,
        remedy="resume with the version of atoll that wrote it",
    )  # fmt: skip


def _state(about: dict[str, Any], flat: Params, fixed: Mapping[str, Params]) -> State:
    streams = about["streams"]
    params, outer, down = ({s: under(f"{part}/{s}", flat) for s in streams} for part in ("params", "outer", "down"))
    broadcasts = {
        int(number): Broadcast(
            int(number),
            {s: wire.unflatten(under(f"broadcast/{number}/{s}", flat), count) for s, count in sides.items()},
            fixed,
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
        fixed=fixed,
        have_fixed=frozenset(about["have_fixed"]),
    )


def _task_as_data(task: Task) -> dict[str, Any]:
    fields = {name: getattr(task, name) for name in task.__dataclass_fields__ if name != "broadcast"}
    return fields | {"broadcast": task.broadcast.round}
