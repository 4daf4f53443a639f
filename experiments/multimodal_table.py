"""Four sites with unlike modalities: base, each site alone, federated, pooled, by what samples hold, over seeds.

    python experiments/multimodal_table.py [--seeds 0 1 2] [--minutes 10] [--missing 0.4] [--set finetune.rounds=4]

One run of the recipe `multimodal` with its baselines for each seed. What it came to is a file under results/, named by what
was asked for: what is there is not run again, and a run that was stopped goes on, so this can be called in pieces. Prints
held-out loss and accuracy by modality, over seeds; how far the federated model is from the best site alone, in standard
errors of the difference; its share of pooled's gain; and what a client sends in a round. With `--missing`, that share of the
records to train on has no picture or sound, and the sites are not trained alone.

A standard error here is that of the held-out samples and that over seeds, added as independent ones are.

Owner: the maintainers of src/atoll/models. Expires with the first release.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.record.folder import RunFolder, root
from atoll.record.measured import ACCURACY, CHANCE, LOSS, Cell, Measure, by_modality
from atoll.record.story import Story, read_story

RECIPE = "multimodal"
FEDERATED, POOLED, BASE, ALONE = "federated", "pooled", "base", " alone"
RESULTS = Path(__file__).parent / "results" / "multimodal"

Cells = Mapping[str, Mapping[str, Cell]]
"""By model, by modality."""


def name_of(seed: int, settings: Sequence[str]) -> str:
    """Of a run, and of its file."""
    asked = hashlib.sha256(json.dumps(sorted(settings)).encode()).hexdigest()[:6]
    return f"{RECIPE}-{asked}-s{seed}"


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
        failed = process.wait(60 * minutes) != 0
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return
    if failed:
        raise SystemExit(f"{name} failed, with the reason above")


def keep(name: str, settings: Sequence[str]) -> None:
    """Writes what a finished run came to."""
    if (story := done(name)) is None:
        return
    git = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "../src"]
    found = {
        "settings": list(settings),
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "versions": dict(story.started.versions),
        "trains": [story.started.trains, story.started.of],
        "bytes_up": statistics.mean(reply.bytes_up for reply in story.replies),
        **{measure.value: as_cells(story, measure) for measure in (LOSS, ACCURACY)},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def as_cells(story: Story, measure: Measure) -> Cells:
    """A run's table by modality."""
    table = by_modality(story, measure)
    if table is None:
        raise SystemExit("a run without modalities")
    return {
        model: {name: cell for name, cell in zip(table.columns, row, strict=True) if cell} for model, row in table.rows
    }


def over_seeds(runs: Sequence[Mapping[str, Any]], measure: Measure) -> Cells:
    """Means over the runs, with standard errors."""
    tables: list[Cells] = [one[measure.value] for one in runs]
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
    federated, pooled, base = (cells[model][name][0] for model in (FEDERATED, POOLED, BASE))
    share = (federated - base) / (pooled - base) if pooled != base else float("nan")
    gain = f"{share:.0%} of pooled's gain, {sign * (federated - pooled):+.3f} from pooled"
    alone = {model: row[name] for model, row in cells.items() if model.endswith(ALONE)}
    if not alone:
        return f"{name}: {gain}"
    best = max(alone, key=lambda model: sign * alone[model][0])
    ahead = sign * (federated - alone[best][0])
    error = (cells[FEDERATED][name][1] ** 2 + alone[best][1] ** 2) ** 0.5
    return f"{name}: federated is {ahead:+.3f} better than {best}, {ahead / error:+.1f} standard errors; {gain}"


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--missing", type=float)
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--minutes", type=float, default=1e6)
    chosen = parser.parse_args()
    settings = list(chosen.settings)
    if chosen.missing is not None:
        less = f"{{use: without-media, inner: multimodal-sites, share: {chosen.missing}}}"
        settings += [f"data={less}", "baselines=[pooled]"]
    end, found = time.monotonic() + 60 * chosen.minutes, []
    for seed in chosen.seeds:
        name = name_of(seed, settings)
        file = RESULTS / f"{name}.json"
        if not file.exists() and not done(name) and time.monotonic() < end:
            carry_on(name, [*settings, f"seed={seed}"], (end - time.monotonic()) / 60)
        if not file.exists():
            keep(name, settings)
        found += [json.loads(file.read_text())] if file.exists() else []
    if not found:
        raise SystemExit("no run is finished yet: call it again")
    commits = ", ".join(sorted({one["commit"] for one in found}))
    print(f"over {len(found)} seeds, of the code at {commits}: {CHANCE} is what guessing comes to")
    for measure in (LOSS, ACCURACY):
        print("\n".join(lines(over_seeds(found, measure), measure)))
    (trains, of), up = found[0]["trains"], statistics.mean(one["bytes_up"] for one in found)
    print(f"\na client sends {up / 1e6:.1f} MB a round: {trains:,} of {of:,} parameters, {trains / of:.1%}")


if __name__ == "__main__":
    main()
