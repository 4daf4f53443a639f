"""The ledger: every release is entered before it happens, and nothing is ever taken out.

One JSON line an entry, flushed to the disk before the round that it speaks of begins. A process that dies between entry and
release has spent what it entered: the account may say too much, never too little.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from atoll.cache import sync
from atoll.errors import AtollError
from atoll.privacy.accounting import LEAST_NOISE, MOST_NOISE, Release, worst

ANY = ""
"""In the place of a client's name: what is released is of all clients' data alike."""


@dataclass(frozen=True)
class Entry:
    """A release that was about to happen."""

    run: str
    plan: str
    round: int
    unit: str
    """Whose presence the release hides: client or example."""
    releases: tuple[Release, ...]
    clients: tuple[str, ...] = ()
    """Of whose data each release is; empty: of all clients' alike."""


def spent(entries: Iterable[Entry], delta: float) -> float:
    """Epsilon of all entries together, of the client that is told most of: releases of two clients' data do not add up.

    Where some hide clients and others examples, it is an example's: another example may turn a client's whole update around,
    which is twice the clip.
    """
    return worst(histories(of_one_unit(list(entries))), delta)[1]


def of_one_unit(entries: list[Entry]) -> list[Entry]:
    """Entries as what they tell of examples, if some of them hide examples."""
    return [of_examples(entry) for entry in entries] if len({entry.unit for entry in entries}) > 1 else entries


def histories(entries: Iterable[Entry]) -> dict[str, list[Release]]:
    """By client, the releases that tell of its data; those that tell of all clients alike are in each."""
    found: dict[str, list[Release]] = {}
    for entry in entries:
        for client, release in zip(entry.clients or [ANY] * len(entry.releases), entry.releases, strict=True):
            found.setdefault(client, []).append(release)
    of_all = found.pop(ANY, [])
    return {name: [*own, *of_all] for name, own in found.items()} or {ANY: of_all}


def spent_together(ledgers: Sequence[Sequence[Entry]], delta: float) -> float:
    """Epsilon of several ledgers of the same data, whatever their clients are called there: of each, what it tells most.

    What stands in two of them was released once: a stage was taken over.
    """
    ledgers = [kept for kept in once(ledgers) if kept]
    entries = of_one_unit([entry for ledger in ledgers for entry in ledger])
    if len({frozenset(histories(ledger)) for ledger in ledgers}) <= 1:  # the same clients: each has what it has
        return spent(entries, delta)
    ends = list(accumulate(map(len, ledgers), initial=0))
    each = [histories(entries[start:end]) for start, end in pairwise(ends)]
    return worst({ANY: [one for found in each for one in found[worst(found, delta)[0]]]}, delta)[1]


def once(ledgers: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """Each ledger without what those before it have: of a round that was done twice, in one of them, both stay."""
    seen, found = Counter[Entry](), []
    for ledger in ledgers:
        here = Counter(ledger)
        found.append(list((here - seen).elements()))
        seen |= here
    return found


def of_examples(entry: Entry) -> Entry:
    """What an entry tells of one example of a client."""
    if entry.unit == "example":
        return entry
    halved = tuple(replace(one, noise_multiplier=one.noise_multiplier / 2) for one in entry.releases)
    return replace(entry, unit="example", releases=halved)


@dataclass(frozen=True)
class Ledger:
    """Entries in a file."""

    path: Path

    def enter(self, entry: Entry) -> None:
        """Writes an entry, and waits until it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            end = self._without_cut_line(file)
            line = json.dumps({"time": round(time.time(), 3), **asdict(entry)}).encode() + b"\n"
            file.write(b"\n" + line if end else line)
            file.flush()
            os.fsync(file.fileno())
        sync(self.path.parent)

    def _without_cut_line(self, file: BinaryIO) -> bool:
        """Takes off what a crash left of a line, which was no entry yet; whether a whole one lacks its end."""
        file.seek(0)
        last = file.read().split(b"\n")[-1]
        try:
            return bool(last and _entry(json.loads(last)))
        except NO_ENTRY:
            file.truncate(file.seek(0, os.SEEK_END) - len(last))
            return False

    def __iter__(self) -> Iterator[Entry]:
        """All entries. One that a crash cut off was not followed by its release.

        Raises:
            AtollError: another line is damaged: what was spent is not known then.
        """
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                yield _entry(json.loads(line))
            except NO_ENTRY as error:
                if number == len(lines):
                    return
                shown = line[:80].decode(errors="replace")
                raise AtollError(
                    "a line of the ledger is damaged", where=f"{self.path}:{number}", found=shown,
                    allowed="an entry as JSON", remedy="put the file back from a copy: what was spent is not known without",
                ) from error  # fmt: skip


NO_ENTRY = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a line raises that is no entry."""


def _entry(data: dict[str, Any]) -> Entry:
    releases = tuple(Release(**one) for one in data.pop("releases"))
    clients = tuple(map(_name, data.pop("clients", ())))
    data.pop("time")
    if not all(map(possible, releases)) or len(clients) not in (0, len(releases)) or data["unit"] not in UNITS:
        raise ValueError("numbers that no release has")
    return Entry(**data, releases=releases, clients=clients)


def _name(written: object) -> str:
    if not isinstance(written, str):
        raise TypeError("a client's name is a text")
    return written


UNITS = ("client", "example")


def possible(one: Release) -> bool:
    """Whether these can be a release's numbers."""
    whole = isinstance(one.count, int) and 1 <= one.count <= MOST_RELEASES and isinstance(one.population, int)
    noise = isinstance(one.noise_multiplier, float | int) and LEAST_NOISE <= one.noise_multiplier <= MOST_NOISE
    drawn = one.sampling in ("everyone", "poisson") or (one.sampling == "uniform" and one.population >= 1)
    return whole and drawn and noise and 0 <= one.rate <= 1


MOST_RELEASES = 10**7


def spending(ledgers: Mapping[str, Sequence[Entry]], delta: float) -> list[dict[str, Any]]:
    """What each ledger comes to, and all of them together: what they have spent if they used the same data."""
    together = [entry for entries in once([*ledgers.values()]) for entry in entries]
    named = {**ledgers, **({"together": together} if len(ledgers) > 1 else {})}
    return [
        {
            "ledger": name,
            "releases": len(entries),
            "unit": max((entry.unit for entry in entries), default="-"),
            "epsilon": spent(entries, delta) if name in ledgers else spent_together([*ledgers.values()], delta),
            "delta": delta,
        }
        for name, entries in named.items()
    ]
