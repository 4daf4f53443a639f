"""What experiments over several seeds have in common: runs that go on where they were cut off, and means with their errors.

A standard error here is that of the held-out samples and that over seeds, added as independent ones are.

Owner: the maintainers of src/atoll/record. Expires with the first release.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from atoll.record.folder import RunFolder, root
from atoll.record.measured import Cell
from atoll.record.story import Story, read_story


def asked_for(text: str) -> argparse.ArgumentParser:
    """The command line of an experiment, whose module says `text`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--minutes", type=float, default=1e6)
    return parser


Cells = Mapping[str, Mapping[str, Cell]]
"""By model, by column."""


def name_of(recipe: str, seed: int, settings: Sequence[str]) -> str:
    """Of a run, and of its file."""
    asked = hashlib.sha256(json.dumps(sorted(settings)).encode()).hexdigest()[:6]
    return f"{recipe}-{asked}-s{seed}"


def done(name: str) -> Story | None:
    """The run of this name, if it and its baselines are finished."""
    story = read_story(RunFolder(root() / f"{name}-1"))
    finished = story and story.ended and all(one.ended for one in story.baselines.values())
    return story if story and finished and len(story.baselines) == len(story.started.baselines) else None


def carry_on(recipe: str, name: str, settings: Sequence[str], minutes: float) -> None:
    """Runs it, or goes on with it, for so long: in a process of its own, which is then asked to stop."""
    begun = RunFolder(root() / f"{name}-1").path.exists()
    words = [word for one in (f"name={name}", *settings) for word in ("--set", one)]
    command = ["resume", f"{name}-1"] if begun else ["run", recipe, *words]
    process = subprocess.Popen([sys.executable, "-m", "atoll", *command], stdout=subprocess.DEVNULL)
    try:
        failed = process.wait(60 * minutes) != 0
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return
    if failed:
        raise SystemExit(f"{name} failed, with the reason above")


def brought(recipe: str, seed: int, settings: Sequence[str], end: float) -> Story | None:
    """A seed's run, begun or gone on with until the `end` (of time.monotonic); None while it is not finished."""
    name = name_of(recipe, seed, settings)
    if done(name) is None and time.monotonic() < end:
        carry_on(recipe, name, [*settings, f"seed={seed}"], (end - time.monotonic()) / 60)
    return done(name)


T = TypeVar("T")


def every(chosen: argparse.Namespace, kept: Callable[[int, Sequence[str], float], T | None]) -> list[T]:
    """What the seeds that were asked for came to, as far as they are finished; ends where none is."""
    end = time.monotonic() + 60 * chosen.minutes
    found = [one for seed in chosen.seeds if (one := kept(seed, chosen.settings, end))]
    if not found:
        raise SystemExit("no run is finished yet: call it again")
    return found


def code() -> str:
    """The last commit that changed the program."""
    git = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "../src"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def over_seeds(tables: Sequence[Cells]) -> Cells:
    """Means over the runs, with standard errors."""
    return {
        model: {name: together([one[model][name] for one in tables]) for name in row}
        for model, row in tables[0].items()
    }


def together(each: Sequence[Cell]) -> Cell:
    """The mean of cells, with the error of their samples and of their spread."""
    values = [value for value, _ in each]
    samples = sum(error**2 for _, error in each) / len(each)  # the same samples at every seed
    seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
    return statistics.mean(values), (samples + seeds) ** 0.5


def markdown(title: str, cells: Cells) -> list[str]:
    """A table; what was not measured of a model is left empty."""
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    head = [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows = {
        model: [f"{row[n][0]:.3f} ± {row[n][1]:.3f}" if n in row else "" for n in names] for model, row in cells.items()
    }
    return ["", *head, *(f"| {model} | {' | '.join(row)} |" for model, row in rows.items())]
