"""The one exception users see: what was found, what is allowed, what follows, what to do.

>>> print(AtollError("unknown key", where="mine.yaml: finetune.ronds", found="ronds", remedy="did you mean 'rounds'?"))
unknown key
  where:   mine.yaml: finetune.ronds
  found:   ronds
  remedy:  did you mean 'rounds'?
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AtollError(Exception):
    """A mistake that a person can mend.

    Args:
        what: the problem in one line.
        where: the place: file and line, recipe path, client, round.
        found: the value that was found.
        allowed: the values that would do.
        remedy: the next thing to do, as a command where there is one.
    """

    def __init__(
        self, what: str, *, where: str = "", found: object = "", allowed: object = "", remedy: str = ""
    ) -> None:
        super().__init__(what)
        self.what = what
        self.details = {"where": where, "found": str(found), "allowed": str(allowed), "remedy": remedy}

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {name + ':':9}{value}" for name, value in self.details.items() if value]
        return "\n".join(lines)


class Interrupted(AtollError):
    """A run that ended before its time, by somebody's wish: nothing is lost, and it can go on."""


def closest(word: str, choices: Iterable[str]) -> str:
    """The remedy for a misspelt name: the closest of `choices`, or all of them.

    >>> closest("fedavg-lroa", ["fedavg-lora", "fedprox"])
    "did you mean 'fedavg-lora'?"
    """
    names = sorted(choices)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"choose one of: {', '.join(names)}"
