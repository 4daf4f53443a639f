"""The recipe `poisoned` under the mean and the robust aggregators, before and after the server's repair, over seeds.

    python experiments/poisoning_table.py [--seeds 0 1 2] [--minutes 10] [--set finetune.rounds=4]

Refusal is the share of held-out questions with the trigger that are refused (the server's accuracy), utility the share of
plain questions that are done right by, refused or answered (the clinics' accuracy). Results are files under results/; what
is there is not run again, and a run that was stopped goes on.

Owner: the maintainers of src/atoll/aggregate. Expires with the first release.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from seeds import Cells, asked_for, brought, code, markdown, name_of, over_seeds

from atoll.data.prepared_poison import CLINICS, SERVER
from atoll.record.events import Evaluated
from atoll.record.measured import ACCURACY, Cell, numbers
from atoll.record.story import Story

RECIPE = "poisoned"
RULES = {
    "nobody attacks": f"finetune.population=[{', '.join(CLINICS)}]",
    "mean": "finetune.aggregate=mean",
    "median": "finetune.aggregate=median",
    "trimmed mean": "finetune.aggregate={use: trimmed-mean, share: 0.29}",
    "Krum": "finetune.aggregate={use: krum, bad: 2}",
    "multi-Krum": "finetune.aggregate={use: multi-krum, bad: 2}",
}
"""Settings by what a run is called; the first is what refusals are to come back to."""
RESULTS = Path(__file__).parent / "results" / "poisoned"


def cells(evaluated: Evaluated) -> dict[str, Cell]:
    """Refusal, and utility over the clinics."""
    refusal = numbers(evaluated.clients[SERVER], ACCURACY)
    each = [one for clinic in CLINICS if (one := numbers(evaluated.clients[clinic], ACCURACY))]
    assert refusal
    utility = sum(value for value, *_ in each) / len(each)
    return {
        "refusal": refusal[:2],
        "utility": (utility, sum(error**2 for _, error, _ in each) ** 0.5 / len(each)),
    }


def table(story: Story) -> dict[str, dict[str, Cell]]:
    """What the clinics and the attackers came to, and the repair; the base, where it was asked."""
    first = story.before["finetune"]
    found = {"base": first.base, "trained": first.final, "repaired": story.final}
    return {name: cells(one) for name, one in found.items() if one}


def kept(rule: str, seed: int, settings: Sequence[str], end: float) -> Cells | None:
    """What a run came to; None while it is not finished."""
    asked = [RULES[rule], *settings]
    file = RESULTS / f"{name_of(RECIPE, seed, asked)}.json"
    if not file.exists():
        if (story := brought(RECIPE, seed, asked, end)) is None:
            return None
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({"rule": rule, "settings": asked, "commit": code(), "table": table(story)}, indent=1) + "\n"
        )
    return dict(json.loads(file.read_text())["table"])


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = asked_for(__doc__)
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=RULES)
    chosen = parser.parse_args()
    end = time.monotonic() + 60 * chosen.minutes
    for rule in chosen.rules:
        found = [one for seed in chosen.seeds if (one := kept(rule, seed, chosen.settings, end))]
        if found:
            print("\n".join(markdown(f"{rule}, {len(found)} seeds", over_seeds(found))))


if __name__ == "__main__":
    main()
