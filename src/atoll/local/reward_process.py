"""The process in which a reward of the user's own runs: see rewards.py. It imports nothing heavy."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any


def serve(name: str) -> None:
    """A line of [number, completions, answers] in; a line of [number, rewards], or of the kind of error, out.

    Asked about null, it makes the reward and says null; of an error it then tells the text, too.

    Whatever the reward and those whom it starts read and print has nothing to do with it: the two ends are moved away.
    """
    asked, said = (os.fdopen(os.dup(end), mode, encoding="utf-8") for end, mode in ((0, "r"), (1, "w")))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    reward: Any = None
    for line in asked:
        number, completions, answers = json.loads(line)
        try:
            if reward is None:
                reward = made(name)
            found: Any = None if completions is None else [plain(one) for one in reward(completions, answers)]
        except Exception as error:
            if completions is not None:
                traceback.print_exc()
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
