"""What PAFT's fused model keeps of what fine-tuning and alignment gain beside each other, over seeds.

    python experiments/fused_table.py [--seeds 0 1 2] [--minutes 10] [--set fuse.by.density=0.5]

Two runs of the recipe `paft` for each seed: one whose fused model is measured by DPO, one by fine-tuning's loss; the second
takes the stages of the first over. Asked are held-out pairs: the loss of the chosen answers is what fine-tuning is for, the
share of pairs whose chosen answer has gained more on the base than the rejected one what alignment is for. Results are files
under results/; what is there is not run again, and a run that was stopped goes on.

Owner: the maintainers of src/atoll/aggregate. Expires with the first release.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from seeds import Cells, asked_for, brought, code, every, markdown, name_of, over_seeds

from atoll.record.events import Evaluated
from atoll.record.measured import LOSS, REWARD_ACCURACY, Cell, Measure, numbers
from atoll.record.story import Story

RECIPE = "paft"
RESULTS = Path(__file__).parent / "results" / "paft"
OBJECTIVES = {REWARD_ACCURACY: "fuse.objective={use: dpo, beta: 0.1}", LOSS: "fuse.objective=sft"}
BASE, TUNED, ALIGNED, FUSED = "base", "fine-tuned", "aligned", "fused"


def over_sites(evaluated: Evaluated | None, measure: Measure) -> Cell:
    """The mean over sites, with its error."""
    each = [told for one in evaluated.clients.values() if (told := numbers(one, measure))] if evaluated else []
    return (
        sum(value for value, *_ in each) / len(each),
        sum(error**2 for _, error, _ in each) ** 0.5 / len(each),
    )


def table(by_dpo: Story, by_loss: Story) -> Cells:
    """Of each model what it was made for."""
    tuned, aligned = by_dpo.before["finetune"], by_dpo.before["align"]
    return {
        BASE: {
            LOSS.name: over_sites(tuned.base, LOSS),
            REWARD_ACCURACY.name: over_sites(aligned.base, REWARD_ACCURACY),
        },
        TUNED: {LOSS.name: over_sites(tuned.final, LOSS)},
        ALIGNED: {REWARD_ACCURACY.name: over_sites(aligned.final, REWARD_ACCURACY)},
        FUSED: {
            LOSS.name: over_sites(by_loss.final, LOSS),
            REWARD_ACCURACY.name: over_sites(by_dpo.final, REWARD_ACCURACY),
        },
    }


def kept(seed: int, settings: Sequence[str], end: float) -> Cells | None:
    """What a seed's runs came to; None while they are not finished."""
    file = RESULTS / f"{name_of(RECIPE, seed, settings)}.json"
    if not file.exists():
        stories = {one: brought(RECIPE, seed, [objective, *settings], end) for one, objective in OBJECTIVES.items()}
        by_dpo, by_loss = stories[REWARD_ACCURACY], stories[LOSS]
        if by_dpo is None or by_loss is None:
            return None
        RESULTS.mkdir(parents=True, exist_ok=True)
        found = {"settings": list(settings), "commit": code(), "table": table(by_dpo, by_loss)}
        file.write_text(json.dumps(found, indent=1) + "\n")
    return dict(json.loads(file.read_text())["table"])


def claim(found: Cells, measure: Measure, made: str) -> str:
    """The share of a gain that is left in the fused model."""
    base, gained, fused = (found[model][measure.name][0] for model in (BASE, made, FUSED))
    share = (fused - base) / (gained - base)
    return f"{measure.name}: {made} {gained - base:+.3f}, fused {fused - base:+.3f}, {share:.0%} of it"


def main() -> None:
    """Runs what is missing, then prints the table."""
    chosen = asked_for(__doc__).parse_args()
    found = every(chosen, kept)
    over = over_seeds(found)
    print("\n".join(markdown(f"{len(found)} seeds", over)))
    print(f"\n{claim(over, LOSS, TUNED)}\n{claim(over, REWARD_ACCURACY, ALIGNED)}")


if __name__ == "__main__":
    main()
