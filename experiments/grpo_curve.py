"""The recipe `grpo` over seeds: what share of held-out questions the model answers rightly, round by round.

    python experiments/grpo_curve.py [--seeds 0 1 2] [--minutes 10] [--set align.rounds=4]

Before the first round of `align` the model has learned the form of an answer by fine-tuning; `form` is the share of answers
that end with a number after `=` or `is`, so that it can be seen whether what rises is form. Results are files under
results/; what is there is not run again, and a run that was stopped goes on.

Owner: the maintainers of src/atoll/local. Expires with the first release.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from seeds import asked_for, brought, code, every, name_of, together

from atoll.data.answers import ends_of
from atoll.data.prepared_arithmetic import arithmetic_sites
from atoll.data.tokenize import prompting
from atoll.local.rollouts import Sampling, completed
from atoll.models.spaces import write
from atoll.record.events import Evaluated
from atoll.record.folder import RunFolder, root
from atoll.record.measured import ACCURACY, Cell, numbers
from atoll.record.story import Story
from atoll.result import load_result
from atoll.tasks import batches, models

RECIPE = "grpo"
RESULTS = Path(__file__).parent / "results" / "grpo"
Curve = dict[str, dict[str, Cell]]
"""By round, by site and over all of them."""


def curve(story: Story, folder: RunFolder) -> Curve:
    """Of a run; the form of answers before its first round and after its last."""
    found = {str(one.round): cells(one) for one in story.evaluations}
    for at, form in zip((min(found, key=int), max(found, key=int)), forms(folder), strict=True):
        found[at]["form"] = form
    return found


FORM = re.compile(r"(=|is) -?\d+\.?$")


def forms(folder: RunFolder) -> list[Cell]:
    """The share of held-out answers that have the form, of the model that the run began with and of its result."""
    result = load_result(folder)
    tokenizer, sites = result.tokenizer, arithmetic_sites()
    asked = [json.loads(line)["prompt"] for file in sorted(sites.glob("*/test.jsonl")) for line in file.open()]
    prompts = list(map(prompting(tokenizer), asked))
    found = []
    for params in list(models(folder, result).values())[1:]:
        write(result.space, result.model, params)
        how = Sampling(1, 16, 0.0, ends_of(tokenizer))
        said = [
            tokenizer.decode(ids, skip_special_tokens=True)
            for some in batches(prompts)
            for ids in completed(result.model, some, how)
        ]
        share = sum(bool(FORM.search(one.strip())) for one in said) / len(said)
        found.append((share, (share * (1 - share) / len(said)) ** 0.5))
    return found


def cells(evaluated: Evaluated) -> dict[str, Cell]:
    """Accuracy by site, and the mean of sites."""
    each = {site: numbers(told, ACCURACY) for site, told in evaluated.clients.items()}
    found: dict[str, Cell] = {site: (one[0], one[1]) for site, one in each.items() if one}
    mean = sum(value for value, _ in found.values()) / len(found)
    return found | {"mean": (mean, sum(error**2 for _, error in found.values()) ** 0.5 / len(found))}


def kept(seed: int, settings: Sequence[str], end: float) -> Curve | None:
    """A seed's curve; None while its run is not finished."""
    name = name_of(RECIPE, seed, settings)
    file = RESULTS / f"{name}.json"
    if file.exists():
        return dict(json.loads(file.read_text())["curve"])
    if (story := brought(RECIPE, seed, settings, end)) is None:
        return None
    measured = curve(story, RunFolder(root() / f"{name}-1"))
    found = {"settings": list(settings), "commit": code(), "curve": measured}
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return measured


def main() -> None:
    """Runs what is missing, then prints the curve."""
    chosen = asked_for(__doc__).parse_args()
    found = every(chosen, kept)
    rounds, sites = list(found[0]), list(next(iter(found[0].values())))
    means = {
        at: {site: together([one[at][site] for one in found]) for site in sites if site in found[0][at]}
        for at in rounds
    }
    print(f"over {len(found)} seeds\n\n| round | {' | '.join(sites)} |", "|---" * (len(sites) + 1) + "|", sep="\n")
    for at, row in means.items():
        shown = (f"{row[site][0]:.3f} ± {row[site][1]:.3f}" if site in row else "" for site in sites)
        print(f"| {at} | {' | '.join(shown)} |")
    (before, e0), (after, e1) = means["0"]["mean"], means[rounds[-1]]["mean"]
    print(f"\nfrom {before:.3f} to {after:.3f}: {(after - before) / (e0**2 + e1**2) ** 0.5:.1f} standard errors")


if __name__ == "__main__":
    main()
