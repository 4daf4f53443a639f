"""What privacy costs the quickstart: masks, 8 bits, FFA-LoRA and shares of noise, against the same run in the clear.

    python experiments/private_quickstart.py [--fleet HOST:PORT] [--seeds 0 1 2] [--set KEY=VALUE ...] [--minutes 10]

One run for each seed in the clear and for each epsilon; runs that are there already are not run again, so that it can be
called in pieces. Prints the mean held-out loss over the sites, and over seeds with its standard error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import atoll
from atoll.record.card import read_story
from atoll.record.folder import RunFolder, root

RECIPE = "private-quickstart"
CLEAR = ("finetune.exchange=plain", "finetune.privacy=none")
BUDGETS = ("inf", "8", "3", "1")


def settings(case: str) -> list[str]:
    """Of a case: in the clear, or a budget; an infinite one is the clip without noise."""
    if case == "clear":
        return list(CLEAR)
    if case == "inf":
        return ["finetune.privacy.epsilon=null", "finetune.privacy.noise_multiplier=0"]
    return [f"finetune.privacy.epsilon={case}"]


def done(name: str) -> RunFolder | None:
    """The run of this name, if it is finished."""
    folder = RunFolder(root() / f"{name}-1")
    story = read_story(folder)
    return folder if story and story.ended else None


def table(cases: list[str], seeds: list[int], prefix: str) -> str:
    """What is there so far."""
    lines = []
    for case in cases:
        stories = [read_story(found) for seed in seeds if (found := done(f"{prefix}{case}-s{seed}"))]
        losses = [story.final.mean for story in stories if story and story.final]
        if not losses:
            continue
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
        spent = {round(story.spent[-1].epsilon, 3) for story in stories if story and story.spent}
        base = [story.base.mean for story in stories if story and story.base]
        before = f" (base {base[0]:.3f})" if base else ""
        each = " ".join(f"{loss:.3f}" for loss in losses)
        found = f"{statistics.mean(losses):.3f} +- {error:.3f} over {len(losses)} seeds: {each}"
        lines.append(f"{case:>6}: {found}; spent {spent or None}{before}")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", default="")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="*", default=["clear", *BUDGETS])
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--prefix", default="private-")
    parser.add_argument("--minutes", type=float, default=1e6)
    chosen = parser.parse_args()
    end = time.monotonic() + 60 * chosen.minutes
    fleet = [f"fleet={{use: flower, server: '{chosen.fleet}'}}"] if chosen.fleet else []
    for seed in chosen.seeds:
        for case in chosen.cases:
            name = f"{chosen.prefix}{case}-s{seed}"
            if done(name) or time.monotonic() > end:
                continue
            print(f"running {name}", file=sys.stderr, flush=True)
            more = [f"name={name}", f"seed={seed}", *fleet, *settings(case), *chosen.settings]
            atoll.run(RECIPE, more)
    print(table(chosen.cases, chosen.seeds, chosen.prefix))


if __name__ == "__main__":
    main()
