"""The table of what was measured, as Markdown: `python -m benchmarks.table [--at COMMIT ...] > table.md`.

Of several commits, each case is taken from the last one that has measurements of it; the table says from which.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.harness import DISTURBED, RESULTS, Bar, Case, Measurement, commit, read
from benchmarks.run import CLAIMS, claim

Results = dict[str, dict[str, list[Measurement]]]
"""Case -> contestant -> its measurements, in order."""


@dataclass(frozen=True)
class Spread:
    """A median with the least and the greatest."""

    values: Sequence[float]

    def __str__(self) -> str:
        return f"{median(self.values):.3g} ({min(self.values):.3g} to {max(self.values):.3g})"


def main() -> None:
    """Prints the table of a commit, by default the one that is checked out, or of several."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--at", nargs="+", default=[], help=f"folders under {RESULTS.name}/, the oldest first")
    at = parser.parse_args().at or [commit()]
    claims = [claim(name) for name in CLAIMS]
    results = everything(at, [case for one in claims for case in one.cases(False)])
    print("\n".join(markdown(at, [bar for one in claims for bar in one.BARS], results)))
    for note in filter(None, (getattr(one, "note", lambda: "")() for one in claims)):
        print(f"\n{note}")


def everything(at: Sequence[str], cases: Sequence[Case]) -> Results:
    """All that was measured, each case at the last commit that has it."""
    return {case.name: latest(at, case) for case in cases}


def latest(at: Sequence[str], case: Case) -> dict[str, list[Measurement]]:
    """The measurements of a case, of one commit."""
    for key in reversed(at):
        found = {one.name: read(key, case, one) for one in case.contestants}
        if any(found.values()):
            return found
    return {}


def markdown(at: Sequence[str], bars: Sequence[Bar], results: Results) -> Iterator[str]:
    """The bars first, then the numbers behind them."""
    yield from (
        f"# Benchmarks at {', '.join(at)}",
        "",
        "Median of the repetitions, least to greatest in parentheses.",
        "",
    )
    yield from ("| case | what | against | found | bar | met |", "|---|---|---|---|---|---|")
    yield from (row(bar, results) for bar in bars)
    yield from ("", "| case | contestant | measured | commit | disturbed |", "|---|---|---|---|---|")
    for case, contestants in results.items():
        yield from (numbers(case, name, found) for name, found in contestants.items() if found)
    yield from ("", "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions(results).items())))


def row(bar: Bar, results: Results) -> str:
    """One promise and what became of it."""
    values = found(bar, results.get(bar.case, {}))
    wanted = " to ".join(f"{x:g}" for x in (bar.at_least, bar.at_most) if x is not None)
    word = {(True, False): "at least ", (False, True): "at most "}
    sense = word.get((bar.at_least is not None, bar.at_most is not None), "")
    shown = f"{Spread(values)} {bar.unit}" if values else "not measured"
    verdict = ("yes" if met(bar, values) else "**no**") if values and wanted else ""
    limit = f"{sense}{wanted} {bar.unit}" if wanted else ""
    against = f"{bar.against} + {bar.plus:g}" if bar.plus else bar.against or ""
    return f"| {bar.case} | {bar.contestant}: {bar.metric} | {against} | {shown} | {limit} | {verdict} |"


def found(bar: Bar, contestants: dict[str, list[Measurement]]) -> list[float]:
    """Our numbers, or their ratios to the other's of the same turn."""
    ours = by_turn(contestants.get(bar.contestant, []), bar.metric)
    if bar.against is None:
        return list(ours.values())
    theirs = by_turn(contestants.get(bar.against, []), bar.metric)
    ratios = [(ours[turn], theirs[turn] + bar.plus) for turn in ours if turn in theirs]
    return [b / a if bar.less_is_better else a / b for a, b in ratios]


def by_turn(measurements: Sequence[Measurement], metric: str) -> dict[int, float]:
    """Repetition -> number."""
    return {one.repeat: float(one.result[metric]) for one in measurements if metric in one.result}


def met(bar: Bar, values: Sequence[float]) -> bool:
    """Whether the median keeps the promise."""
    middle = median(values)
    return (bar.at_least is None or middle >= bar.at_least) and (bar.at_most is None or middle <= bar.at_most)


def numbers(case: str, contestant: str, measurements: Sequence[Measurement]) -> str:
    """Everything that a contestant measured."""
    names = [name for name, value in measurements[0].result.items() if isinstance(value, int | float)]
    shown = "; ".join(f"{name} {Spread([m.result[name] for m in measurements])}" for name in names)
    disturbed = sum(m.busy > DISTURBED for m in measurements)
    return f"| {case} | {contestant} | {shown} | {measurements[0].commit} | {disturbed or ''} |"


def versions(results: Results) -> dict[str, Any]:
    """Of every package that took part."""
    all_found = (m.versions for contestants in results.values() for found in contestants.values() for m in found)
    return {name: version for one in all_found for name, version in one.items()}


if __name__ == "__main__":
    main()
