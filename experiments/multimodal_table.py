"""Four sites with unlike modalities: base, each site alone, federated, pooled, by what samples hold, over seeds.

    python experiments/multimodal_table.py [--seeds 0 1 2] [--minutes 10] [--missing 0.4] [--set finetune.rounds=4]

One run of the recipe `multimodal` with its baselines for each seed. What it came to is a file under results/, named by what
was asked for: what is there is not run again, and a run that was stopped goes on, so this can be called in pieces. Prints
held-out loss and accuracy by modality, over seeds; how far the federated model is from the best site alone, in standard
errors of the difference; its share of pooled's gain; and what a client sends in a round. With `--missing`, that share of the
records to train on has no picture or sound, and the sites are not trained alone.

Owner: the maintainers of src/atoll/models. Expires with the first release.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seeds import Cells, asked_for, brought, code, every, markdown, name_of, over_seeds

from atoll.metrics import CHANCE
from atoll.record.measured import ACCURACY, LOSS, Measure, by_modality
from atoll.record.story import Story

RECIPE = "multimodal"
FEDERATED, POOLED, BASE, ALONE = "federated", "pooled", "base", " alone"
RESULTS = Path(__file__).parent / "results" / "multimodal"


def kept(seed: int, settings: Sequence[str], end: float) -> dict[str, Any] | None:
    """What a seed's run came to; None while it is not finished."""
    file = RESULTS / f"{name_of(RECIPE, seed, settings)}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    if (story := brought(RECIPE, seed, settings, end)) is None:
        return None
    found = {
        "settings": list(settings),
        "commit": code(),
        "versions": dict(story.started.versions),
        "trains": [story.started.trains, story.started.of],
        "bytes_up": statistics.mean(reply.bytes_up for reply in story.replies),
        **{measure.value: as_cells(story, measure) for measure in (LOSS, ACCURACY)},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def as_cells(story: Story, measure: Measure) -> Cells:
    """A run's table by modality."""
    table = by_modality(story, measure)
    if table is None:
        raise SystemExit("a run without modalities")
    return {
        model: {name: cell for name, cell in zip(table.columns, row, strict=True) if cell} for model, row in table.rows
    }


def lines(cells: Cells, measure: Measure) -> list[str]:
    """A table in Markdown, and what is claimed of it."""
    return [*markdown(measure.name, cells), *(claim(cells, name, measure) for name in cells[BASE])]


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
    parser = asked_for(__doc__)
    parser.add_argument("--missing", type=float)
    chosen = parser.parse_args()
    if chosen.missing is not None:
        less = f"{{use: without-media, inner: multimodal-sites, share: {chosen.missing}}}"
        chosen.settings = [*chosen.settings, f"data={less}", "baselines=[pooled]"]
    found = every(chosen, kept)
    commits = ", ".join(sorted({one["commit"] for one in found}))
    print(f"over {len(found)} seeds, of the code at {commits}: {CHANCE} is what guessing comes to")
    for measure in (LOSS, ACCURACY):
        print("\n".join(lines(over_seeds([one[measure.value] for one in found]), measure)))
    (trains, of), up = found[0]["trains"], statistics.mean(one["bytes_up"] for one in found)
    print(f"\na client sends {up / 1e6:.1f} MB a round: {trains:,} of {of:,} parameters, {trains / of:.1%}")


if __name__ == "__main__":
    main()
