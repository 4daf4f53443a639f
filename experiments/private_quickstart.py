"""What privacy costs the quickstart: masks, 8 bits, FFA-LoRA and shares of noise, against the same run in the clear.

    PYTHONPATH=examples python experiments/private_quickstart.py [--tune | --network] [--seeds 0 1 2] [--minutes 10]

One run for each seed in the clear and for each epsilon; runs that are there already are not run again, so that it can be
called in pieces. Prints the mean held-out loss over the sites, and over seeds with its standard error. `--network` does the
same over four sites as processes, with TLS and keys. `--tune` tries one knob of each case, four values for each and with a
seed of its own: the learning rate in the clear, the clip elsewhere (`--set finetune.optimizer.lr=4e-3`: at the best rate).

Owner: the maintainers of src/atoll/privacy. Expires with the first release.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import atoll
from atoll.cache import home
from atoll.data.prepared import four_sites
from atoll.record.folder import RunFolder, root
from atoll.record.story import read_story
from network import Demo

RECIPE = "private-quickstart"
SITES = ("clinic", "desk", "school", "social")
CLEAR = ["finetune.exchange=plain", "finetune.privacy=none"]
NO_NOISE = ["finetune.privacy.epsilon=null", "finetune.privacy.noise_multiplier=0"]
RATE, CLIP = "finetune.optimizer.lr", "finetune.privacy.clip"

CASES: dict[str, tuple[list[str], str, float]] = {
    "clear": (CLEAR, RATE, 4e-3),
    "inf": ([*NO_NOISE, f"{RATE}=4e-3"], CLIP, 0.8),
    "8": (["finetune.privacy.epsilon=8"], CLIP, 0.05),
    "3": (["finetune.privacy.epsilon=3"], CLIP, 0.05),
    "1": (["finetune.privacy.epsilon=1"], CLIP, 0.0125),
}
"""In the clear, or a budget (an infinite one is the clip without noise): settings, the knob, and what trials found best."""

TRIED = {RATE: (5e-4, 1e-3, 2e-3, 4e-3), CLIP: (0.0125, 0.05, 0.2, 0.8)}
TUNING_SEED = 7

Run = Callable[[list[str]], object]


def trials(chosen: argparse.Namespace) -> dict[str, dict[str, list[str]]]:
    """By row of the table: by run's name, its settings."""
    where = "network-" if chosen.network else ""
    rows: dict[str, dict[str, list[str]]] = {}
    for case in chosen.cases:
        settings, knob, found = CASES[case]
        for value in TRIED[knob] if chosen.tune else [found]:
            row = f"{case}, {knob.rpartition('.')[2]} {value:g}"
            seeds = [TUNING_SEED] if chosen.tune else chosen.seeds
            rows[row] = {
                f"{RECIPE}-{where}{case}-{value:g}-s{seed}": [
                    *settings,
                    f"{knob}={value}",
                    f"seed={seed}",
                    "evaluate.start=false",
                    *chosen.settings,
                ]
                for seed in seeds
            }
    return rows


def done(name: str) -> RunFolder | None:
    """The run of this name, if it is finished."""
    folder = RunFolder(root() / f"{name}-1")
    story = read_story(folder)
    return folder if story and story.ended else None


def line(row: str, names: list[str]) -> str:
    """What there is of a row so far."""
    stories = [read_story(found) for name in names if (found := done(name))]
    losses = [story.final.mean for story in stories if story and story.final]
    if not losses:
        return f"{row}: not run"
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    spent = {round(story.spent[-1].epsilon, 3) for story in stories if story and story.spent}
    each = " ".join(f"{loss:.3f}" for loss in losses)
    return (
        f"{row}: {statistics.mean(losses):.3f} +- {error:.3f} over {len(losses)} seeds: {each}; spent {spent or None}"
    )


@contextmanager
def in_one_process() -> Iterator[Run]:
    """Runs as they come."""
    yield lambda settings: atoll.run(RECIPE, settings)


@contextmanager
def over_a_network() -> Iterator[Run]:
    """Runs over a server and the quickstart's four sites as processes on this machine."""
    demo = Demo(Path(tempfile.mkdtemp(prefix="atoll-private-")))
    demo.environment["ATOLL_RUNS"] = str(root().absolute())
    (demo.folder / "data").symlink_to(four_sites(home()))
    try:
        address = demo.federate(SITES)
        yield lambda settings: demo.call(
            "run", RECIPE, "--fleet", address, *(word for one in settings for word in ("--set", one))
        )
    finally:
        demo.close()


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--minutes", type=float, default=1e6)
    chosen = parser.parse_args()
    end, rows = time.monotonic() + 60 * chosen.minutes, trials(chosen)
    missing = {name: settings for row in rows.values() for name, settings in row.items() if not done(name)}
    if missing:
        with over_a_network() if chosen.network else in_one_process() as run:
            for name, settings in missing.items():
                if time.monotonic() < end:
                    run([f"name={name}", *settings])
    print("\n".join(line(row, list(names)) for row, names in rows.items()))


if __name__ == "__main__":
    main()
