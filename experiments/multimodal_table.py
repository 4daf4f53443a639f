"""Four sites with unlike modalities: base, each site alone, federated, pooled, by what samples hold, over seeds.

    python experiments/multimodal_table.py [--seeds 0 1 2] [--minutes 10] [--set finetune.rounds=4]

One run of the recipe `multimodal` with its baselines for each seed; a run that is there is not run again, and one that was
stopped goes on, so that it can be called in pieces. Prints held-out loss and accuracy by modality, over seeds; how far the
federated model is from the best site alone, in standard errors of the difference; its share of pooled's gain; and what a
client sends in a round.

A standard error here is that of the held-out samples and that over seeds, added as independent ones are.

Owner: the maintainers of src/atoll/models. Expires with the first release.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from atoll.record.folder import RunFolder, root
from atoll.record.measured import ACCURACY, CHANCE, LOSS, Cell, Measure, by_modality
from atoll.record.story import Story, read_story

RECIPE = "multimodal"
FEDERATED, POOLED, BASE, ALONE = "federated", "pooled", "base", " alone"

Cells = Mapping[str, Mapping[str, Cell]]
"""By model, by modality."""


def done(name: str) -> Story | None:
    """The run of this name, if it and its baselines are finished."""
    story = read_story(RunFolder(root() / f"{name}-1"))
    whole = story and story.ended and story.baselines and all(one.ended for one in story.baselines.values())
    return story if whole else None


def carry_on(name: str, settings: Sequence[str], minutes: float) -> None:
    """Runs it, or goes on with it, for so long: in a process of its own, which is then asked to stop."""
    begun = RunFolder(root() / f"{name}-1").path.exists()
    words = [word for one in (f"name={name}", *settings) for word in ("--set", one)]
    command = ["resume", f"{name}-1"] if begun else ["run", RECIPE, *words]
    process = subprocess.Popen([sys.executable, "-m", "atoll", *command], stdout=subprocess.DEVNULL)
    try:
        process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def over_seeds(stories: Sequence[Story], measure: Measure) -> Cells:
    """Means over the runs, with standard errors."""
    found = [by_modality(story, measure) for story in stories]
    cells: dict[str, dict[str, Cell]] = {}
    for table in found:
        if table is None:
            raise SystemExit("a run without modalities")
        for model in dict(table.rows):
            cells[model] = {
                name: together([dict(zip(t.sites, dict(t.rows)[model], strict=True))[name] for t in found if t])
                for name in table.sites
            }
    return cells


def together(each: Sequence[Cell | None]) -> Cell:
    """The mean of cells, with the error of their samples and of their spread."""
    known = [one for one in each if one]
    values = [value for value, _ in known]
    samples = sum(error**2 for _, error in known) / len(known)  # the same samples at every seed
    seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
    return statistics.mean(values), (samples + seeds) ** 0.5


def lines(cells: Cells, measure: Measure) -> list[str]:
    """A table in Markdown, and what is claimed of it."""
    names = list(cells[BASE])
    head = [f"| {measure.name} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows = [
        f"| {model} | {' | '.join(f'{row[name][0]:.3f} ± {row[name][1]:.3f}' for name in names)} |"
        for model, row in cells.items()
    ]
    return ["", *head, *rows, *(claim(cells, name, measure) for name in names)]


def claim(cells: Cells, name: str, measure: Measure) -> str:
    """Federated against the best site alone, and its share of what pooled gains over the base."""
    sign = 1 if measure.best is max else -1
    alone = {model: row[name] for model, row in cells.items() if model.endswith(ALONE)}
    best = max(alone, key=lambda model: sign * alone[model][0])
    federated, pooled, base = (cells[model][name][0] for model in (FEDERATED, POOLED, BASE))
    ahead = sign * (federated - alone[best][0])
    error = (cells[FEDERATED][name][1] ** 2 + alone[best][1] ** 2) ** 0.5
    share = (federated - base) / (pooled - base) if pooled != base else float("nan")
    return (
        f"{name}: federated is {ahead:+.3f} better than {best}, {ahead / error:+.1f} standard errors;"
        f" {share:.0%} of pooled's gain"
    )


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--minutes", type=float, default=1e6)
    chosen = parser.parse_args()
    end, names = time.monotonic() + 60 * chosen.minutes, {seed: f"{RECIPE}-table-s{seed}" for seed in chosen.seeds}
    for seed, name in names.items():
        if not done(name) and time.monotonic() < end:
            carry_on(name, [f"seed={seed}", *chosen.settings], (end - time.monotonic()) / 60)
    stories = [story for name in names.values() if (story := done(name))]
    if not stories:
        raise SystemExit("no run is finished yet: call it again")
    print(f"over {len(stories)} seeds: {CHANCE} is what guessing comes to")
    for measure in (LOSS, ACCURACY):
        print("\n".join(lines(over_seeds(stories, measure), measure)))
    trains, of = stories[0].started.trains, stories[0].started.of
    up = statistics.mean(reply.bytes_up for reply in stories[0].replies)
    print(f"\na client sends {up / 1e6:.1f} MB a round: {trains:,} of {of:,} parameters, {trains / of:.1%}")


if __name__ == "__main__":
    main()
