"""What averaging LoRA factors loses: mean(B) mean(A) is not mean(B A).

    python experiments/lora_averaging.py [SEED ...]

Runs the quickstart and, after each round, compares what the server has, the product of the mean factors, with the mean
of the clients' own products: |mean(BA) - mean(B) mean(A)| over all adapted layers, relative to the round's change of
mean(BA).
After the last round both are evaluated at every site.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import atoll
from atoll.assemble import Assembly, assemble, clients
from atoll.build import Plan
from atoll.evaluate import evaluate
from atoll.exchange import Accepted, Verdict
from atoll.fleet.inprocess import InProcess
from atoll.params import Params, add
from atoll.record.folder import RunFolder
from atoll.round import State, initial, run_round
from atoll.stream import UPDATE

A, B = ".lora_A.weight", ".lora_B.weight"


def products(params: Params) -> Params:
    """B A of every adapted layer."""
    return {
        name.removesuffix(A): params[name.removesuffix(A) + B] @ x for name, x in params.items() if name.endswith(A)
    }


def mean(many: list[Params]) -> Params:
    """By name; the quickstart weighs sites alike."""
    return {name: torch.stack([one[name] for one in many]).mean(0) for name in many[0]}


def distance(a: Params, b: Params) -> float:
    """Frobenius norm over all layers."""
    return float(torch.stack([(a[name] - b[name]).double().square().sum() for name in a]).sum().sqrt())


def rounds(ready: Plan, fleet: InProcess, state: State) -> Iterator[tuple[State, Params]]:
    """Each round's state, and the mean of its clients' products."""
    while state.round < ready.recipe.finetune.rounds:
        each: list[Params] = []

        def observe(verdict: Verdict, before: Params = state.params[UPDATE], each: list[Params] = each) -> None:
            assert isinstance(verdict, Accepted), verdict
            each.append(products(add(before, verdict.contributions[UPDATE].vector)))

        state = run_round(ready.rounds, state, fleet, observe)
        yield state, mean(each)


def set_products(things: Assembly, state: State, exact: Params, scale: float) -> State:
    """Puts the products into the base's weights, in place, and a zero into every B."""
    modules = dict(things.model.named_modules())
    with torch.no_grad():
        for name, product in exact.items():
            weight = modules[name].base_layer.weight
            weight += scale * product.to(weight.dtype)
    zeroed = {n: torch.zeros_like(x) if n.endswith(B) else x for n, x in state.params[UPDATE].items()}
    state.params[UPDATE] = zeroed
    return state


def experiment(seed: int) -> None:
    """One seed of the quickstart."""
    ready = atoll.plan("quickstart", [f"seed={seed}", "model={use: smollm2-135m, dtype: float32}"])
    things = assemble(ready)
    fleet = InProcess(list(things.data), clients(ready, things, RunFolder(Path(tempfile.mkdtemp()))))
    start = initial(ready.rounds, things.start)
    server = products(start.params[UPDATE])
    for state, exact in rounds(ready, fleet, start):
        before, server = server, products(state.params[UPDATE])
        change = distance(exact, before)
        print(
            f"seed {seed}, round {state.round}: {distance(exact, server) / change:.3f} of the change is lost",
            flush=True,
        )
    names, count = list(things.data), ready.recipe.evaluate.final_samples
    averaged, _ = evaluate(ready.rounds, state, fleet, names, count, True)
    scale = ready.space.alpha / ready.space.rank  # type: ignore[attr-defined]  # the quickstart's is LoRA
    state = set_products(things, state, exact, scale)
    exact_loss, _ = evaluate(ready.rounds, state, fleet, names, count, True)
    print(f"seed {seed}: held-out loss {averaged.mean:.4f} of mean factors, {exact_loss.mean:.4f} of mean products")


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["0"]:
        experiment(int(argument))
