"""Claims on learning from preferences and rewards, SmolLM2-135M on pairs of the recipe `align`:

- DPO, pairs a second: 1.5 times TRL's DPOTrainer, whose log-probabilities of the reference are made before, as ours are;
- GRPO, completions a second: 1.2 times TRL's GRPOTrainer without vLLM, 8 of at most 32 tokens for each of 2 prompts a step;
- rollouts: 16 completions of one prompt together, tokens a second, 4 times one completion;
- questions with choices: those that share a question's keys and values, twice as fast as each choice in full.
"""

from __future__ import annotations

from functools import partial

from benchmarks import inputs
from benchmarks.harness import Bar, Case, Contestant

OURS = "benchmarks.ours.preferences"
START = "smollm2-135m-start.safetensors"
BATCH = 4
BARS = [
    Bar("preferences", "dpo", "pairs_per_s", "atoll", against="trl-best", at_least=1.5),
    Bar("preferences", "dpo", "pairs_per_s", "atoll", against="trl-default"),
    Bar("preferences", "dpo", "loss", "atoll", against="trl-default", at_least=0.97, at_most=1.03),
    Bar("preferences", "grpo", "samples_per_s", "atoll", against="trl-best", at_least=1.2),
    Bar("preferences", "grpo", "samples_per_s", "atoll", against="trl-default"),
    Bar("preferences", "grpo", "tokens", "atoll", against="trl-default", at_least=0.9, at_most=1.1),
    Bar("preferences", "rollouts", "tokens_per_s", "16", against="1", at_least=4),
    Bar("preferences", "choices", "questions_per_s", "shared", against="in full", at_least=2),
]


def cases(tiny: bool) -> list[Case]:
    """DPO and GRPO beside TRL; rollouts of several and of one; choices together and apart."""
    return [dpo(2 if tiny else 8), grpo(2 if tiny else 6), rollouts(8 if tiny else 48), choices(8 if tiny else 48)]


def dpo(steps: int) -> Case:
    """The same pairs in the same order, from the same adapter."""
    common = {"model": inputs.MODEL, "file": f"pairs-{steps * BATCH}.jsonl", "batch": BATCH}
    best = {"gradient_checkpointing": False, "bf16": True}
    contestants = (
        Contestant("atoll", OURS, config={**common, "what": "dpo", "steps": steps, "save_start": START}),
        Contestant("trl-default", "benchmarks.peers.trl.dpo", "trl", {**common, "start": START}),
        Contestant("trl-best", "benchmarks.peers.trl.dpo", "trl", {**common, "start": START, "dpo": best}),
    )
    return Case("dpo", contestants, partial(inputs.pairs, steps * BATCH))


def grpo(steps: int) -> Case:
    """The same prompts in the same order, from the same adapter."""
    common = {"model": inputs.MODEL, "file": f"pairs-{2 * steps}.jsonl", "batch": 2, "completions": 8, "most": 32}
    best = {"gradient_checkpointing": False, "bf16": True}
    contestants = (
        Contestant("atoll", OURS, config={**common, "what": "grpo", "steps": steps, "save_start": START}),
        Contestant("trl-default", "benchmarks.peers.trl.grpo", "trl", {**common, "start": START}),
        Contestant("trl-best", "benchmarks.peers.trl.grpo", "trl", {**common, "start": START, "grpo": best}),
    )
    return Case("grpo", contestants, partial(inputs.pairs, 2 * steps))


def rollouts(most: int) -> Case:
    """Completions of so many tokens."""
    common = {"model": inputs.MODEL, "file": "pairs-16.jsonl", "what": "rollouts", "most": most}
    each = tuple(Contestant(str(count), OURS, config={**common, "completions": count}) for count in (16, 1))
    return Case("rollouts", each, partial(inputs.pairs, 16))


def choices(count: int) -> Case:
    """Questions of openbookqa."""
    common = {"model": inputs.MODEL, "what": "choices", "count": count}
    each = tuple(Contestant(name, OURS, config={**common, "how": name}) for name in ("shared", "in full"))
    return Case("choices", each, inputs.model)
