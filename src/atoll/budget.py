"""One privacy budget for all stages of a run, looked at with the plan."""

from __future__ import annotations

from collections.abc import Mapping

from atoll import parts
from atoll.build import Plan
from atoll.errors import AtollError
from atoll.estimate import counts, known_samples
from atoll.privacy.protection import entry, epsilon_of


def refuse_second_budget(ready: Plan, before: Mapping[str, Plan]) -> None:
    """Noise that an epsilon asks for is reckoned for one stage, and the budget holds for all: the next would not begin."""
    written = parts.spec(ready.recipe.finetune.privacy, "finetune.privacy").arguments
    if ready.protection and any(one.protection for one in before.values()) and "noise_multiplier" not in written:
        raise AtollError(
            "a budget is for all stages together, and noise is reckoned for one", where="finetune.privacy",
            found=f"epsilon: {written.get('epsilon')}", allowed="a noise_multiplier, beside an epsilon for all stages",
            remedy="--set finetune.privacy.noise_multiplier=1.0; `atoll plan` tells what each stage spends",
        )  # fmt: skip


def refuse_spent(ready: Plan, before: Mapping[str, Plan]) -> None:
    """Of a budget for all stages something must be left when a stage begins."""
    protection, earlier = ready.protection, [one for one in before.values() if one.protection]
    if protection is None or protection.mechanism.epsilon is None or not earlier:
        return
    entries = []
    for one in (*earlier, ready):
        if one.protection and one.protection.noise_multiplier:
            samples, rounds = known_samples(one, counts(one.sources)), 1 if one is ready else one.recipe.finetune.rounds
            entries += [entry(one.protection, "plan", one.hash, number, samples) for number in range(rounds)]
    if (spent := epsilon_of(protection, entries)) > protection.mechanism.epsilon:
        raise AtollError(
            "the stages before it leave nothing of the privacy budget", where="finetune.privacy",
            found=f"epsilon {spent:.4g} after its first round", allowed=f"{protection.mechanism.epsilon:g}, for all stages",
            remedy="more noise, fewer rounds before it, or a larger epsilon",
        )  # fmt: skip
