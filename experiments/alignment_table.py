"""Four sites that prefer other answers: base, each site alone, federated, federated with personal parts, pooled, over seeds.

    python experiments/alignment_table.py [--seeds 0 1 2] [--minutes 10] [--set align.rounds=4]

Two runs of the recipe `align` for each seed: one with its baselines, and one whose LoRA A stays at its client while it is
aligned; the second takes the first's fine-tuning over. All held-out pairs are asked, 500 a site. Results are files under
results/, named by what was asked for: what is there is not run again, and a run that was stopped goes on.

Owner: the maintainers of src/atoll/local. Expires with the first release.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seeds import Cells, asked_for, brought, code, every, markdown, name_of, over_seeds

from atoll.record.measured import ACCURACY, REWARD_ACCURACY, Measure, accuracy_table
from atoll.record.story import Story

RECIPE = "align"
RESULTS = Path(__file__).parent / "results" / "alignment"
FEDERATED, PERSONAL, POOLED, CHANCE, ALONE = "federated", "federated + personal", "pooled", "chance", " alone"
MEASURES = (REWARD_ACCURACY, ACCURACY)
ALL_PAIRS = "evaluate.final_samples=500"


def variants(settings: Sequence[str]) -> dict[str, list[str]]:
    """The runs of a seed, by what its federated model is called."""
    common = [ALL_PAIRS, *settings]
    return {FEDERATED: common, PERSONAL: [*common, "align.personal=[lora_A]", "baselines=[]"]}


def cells(story: Story, measure: Measure) -> dict[str, dict[str, Any]]:
    """A run's table by site, with the mean over sites."""
    table = accuracy_table(story, measure)
    assert table
    return {
        row[0]: dict(zip([*table.columns, "mean"], [*row[1], table.mean(row)], strict=True))
        for row in table.rows
        if all(row[1])
    }


def kept(seed: int, settings: Sequence[str], end: float) -> dict[str, Any] | None:
    """What a seed's runs came to; None while they are not finished."""
    file = RESULTS / f"{name_of(RECIPE, seed, settings)}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    stories = {model: brought(RECIPE, seed, asked, end) for model, asked in variants(settings).items()}
    plain, personal = stories[FEDERATED], stories[PERSONAL]
    if plain is None or personal is None:
        return None
    found: dict[str, Any] = {"settings": list(settings), "commit": code(), "versions": dict(plain.started.versions)}
    for measure in MEASURES:
        found[measure.value] = cells(plain, measure) | {PERSONAL: cells(personal, measure)[FEDERATED]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def claims(found: Cells) -> list[str]:
    """Federated's share of what pooled gains over the model that alignment began with."""
    begun = next(model for model in found if model.startswith("after "))
    gain = {model: row["mean"][0] - found[begun]["mean"][0] for model, row in found.items()}
    best = max((model for model in found if model.endswith(ALONE)), key=lambda model: gain[model])
    points = {model: f"{100 * gain[model]:+.1f}" for model in (POOLED, FEDERATED, PERSONAL, best)}
    return [
        "",
        f"pooled gains {points[POOLED]} points over {begun}, federated {points[FEDERATED]} "
        f"({gain[FEDERATED] / gain[POOLED]:.0%}), with personal parts {points[PERSONAL]}, {best} {points[best]}",
    ]


def main() -> None:
    """Runs what is missing, then prints the tables."""
    chosen = asked_for(__doc__).parse_args()
    found = every(chosen, kept)
    print(f"over {len(found)} seeds, of the code at {', '.join(sorted({one['commit'] for one in found}))}")
    for measure in MEASURES:
        table = over_seeds([one[measure.value] for one in found])
        print("\n".join([*markdown(measure.name, table), *(claims(table) if measure is REWARD_ACCURACY else [])]))


if __name__ == "__main__":
    main()
