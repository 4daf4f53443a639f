"""The one exception users see: what was found, what is allowed, what follows, what to do.

>>> print(AtollError("unknown key", where="mine.yaml: finetune.ronds", found="ronds", remedy="did you mean 'rounds'?"))
unknown key
  where:   mine.yaml: finetune.ronds
  found:   ronds
  remedy:  did you mean 'rounds'?
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


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


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Mistakes in the block are told with `where`, before the place that they name themselves.

    >>> with placed("model"):
    ...     raise AtollError("there is no such folder", where="/data/nowhere")
    Traceback (most recent call last):
    atoll.errors.AtollError: there is no such folder
      where:   model: /data/nowhere
    """
    try:
        yield
    except AtollError as error:
        error.details["where"] = ": ".join(filter(None, (where, error.details["where"])))
        raise


class Interrupted(AtollError):
    """A run that ended before its time, by somebody's wish: nothing is lost, and it can go on."""


def closest(word: str, choices: Iterable[str]) -> str:
    """The remedy for a misspelt name: the closest of `choices`, or all of them. Folders before a name may be left out.

    >>> closest("fedavg-lroa", ["fedavg-lora", "fedprox"]), closest("fedprx", ["methods/fedavg", "methods/fedprox"])
    ("did you mean 'fedavg-lora'?", "did you mean 'methods/fedprox'?")
    """
    names = sorted(choices)
    by_last_part = {name.rpartition("/")[2]: name for name in reversed(names)}
    known = by_last_part | {name: name for name in names}
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{known[near[0]]}'?" if near else f"choose one of: {', '.join(names)}"


WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "sequence": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "none": "null",
}
"""Pydantic's types of mistakes, by their first word, in the words of a recipe."""


def wanted(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """What would do in place of a value, by pydantic's `errors()` of it.

    >>> wanted([{"type": "int_parsing", "msg": "Input should be a valid integer, unable to parse string"}])
    'a whole number'
    """
    return " or ".join(dict.fromkeys(map(_wanted, mistakes)))


def _wanted(mistake: Mapping[str, Any]) -> str:
    first = str(mistake["type"]).partition("_")[0]
    if mistake["type"] == "string_pattern_mismatch":
        return "letters, digits, _, - and ., with a letter, digit or _ first; 100 at most"
    return WANTED.get(first) or str(mistake["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")


def mend(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """The remedy where it is known: a single value in place of a list."""
    single = isinstance(mistakes[0]["input"], str | int | float)
    lists = any(str(one["type"]).startswith(("list", "sequence")) for one in mistakes)
    return f"write [{mistakes[0]['input']}]" if single and lists else ""


def in_words(value: object) -> str:
    """A value as a recipe says it, in short.

    >>> in_words(None), in_words(True), in_words("many"), in_words([1, 2])
    ('null', 'true', "'many'", 'a list: [1, 2]')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kind = "a list: " if isinstance(value, list) else "a mapping: " if isinstance(value, Mapping) else ""
    text = repr(value)
    return kind + (text if len(text) <= 80 else f"{text[:77]}...")
