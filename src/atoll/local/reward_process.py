"""The process in which a reward of the user's own runs: see rewards.py. It imports nothing heavy."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Any

SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER, of Linux' prctl(2)."""


def serve(name: str) -> None:
    """A line of [number, completions, answers] in; a line of [number, rewards], or of the kind of error, out.

    Asked about null, it makes the reward and says null; of an error it then tells the text, too.

    Whatever the reward and those whom it starts read and print has nothing to do with it: the two ends are moved away.
    """
    take_in_orphans()
    asked, said = (os.fdopen(os.dup(end), mode, encoding="utf-8") for end, mode in ((0, "r"), (1, "w")))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    threading.Thread(target=end_with_who_asks, args=(asked.fileno(),), daemon=True).start()
    reward: Any = None
    told: set[str] = set()
    for line in asked:
        number, completions, answers = json.loads(line)
        try:
            if reward is None:
                reward = made(name)
            found: Any = None if completions is None else numbers(reward(completions, answers))
        except Exception as error:
            if completions is not None:
                text = traceback.format_exc()
                print(f"{name}: {text.splitlines()[-1]}, as before" if text in told else text, file=sys.stderr)
                told.add(text)
            found = type(error).__name__ + (f": {error}" if completions is None else "")
        said.write(json.dumps([number, found]) + "\n")
        said.flush()


def made(name: str) -> Any:
    """The reward that a factory gives."""
    module, _, factory = name.partition(":")
    reward = getattr(importlib.import_module(module), factory)()
    if not callable(reward):
        raise TypeError(f"the factory gave {type(reward).__name__}, which cannot be called")
    return reward


def take_in_orphans() -> None:
    """What a child of this process leaves behind becomes its child, so that whoever ends it finds all of them (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def end_with_who_asks(pipe: int) -> None:
    """Ends this process and its group once nobody can ask any more: a run that was killed leaves no reward at work."""
    waiting = select.poll()
    waiting.register(pipe, 0)  # an end that is closed is told in any case
    waiting.poll()
    os.killpg(0, signal.SIGKILL)


def numbers(found: Any) -> list[float | None]:
    """What a reward gave, in its order. Raises TypeError for what has none that means anything, or is no list."""
    if isinstance(found, str | bytes | Mapping | Set):
        raise TypeError(f"a list of numbers is needed, and not {type(found).__name__}")
    return [plain(one) for one in found]


def plain(value: Any) -> float | None:
    """A number, of whatever library; None for what is none."""
    if isinstance(value, bool | str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


if __name__ == "__main__":
    serve(sys.argv[1])
