"""Local work: what a client does with a broadcast. ClientUpdate of the FedAvg paper, in its order:

    write the broadcast into the model -> local steps -> update = after - before -> what else the method sends

Source: McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1. Our local steps are counted in optimizer steps, each over
`accumulate` batches of `batch_size` samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from atoll.aggregate.base import ALL, modality_of
from atoll.data.collate import Choices, choices_in, media_in
from atoll.data.read import Labels
from atoll.data.sources import ClientData, holders
from atoll.data.tokens import TokenDataset
from atoll.exchange import Done, Task, WorkFailed
from atoll.keys import rng
from atoll.local.corrections import Correction, Start
from atoll.local.optimizers import MakeOptimizer, Rate
from atoll.metrics import ACCURACY, CHANCE, LOSS, REWARD_ACCURACY, TEXT, Named
from atoll.models.spaces import Space, read, write
from atoll.params import Params, nested, subtract, under
from atoll.stream import REFERENCE, UPDATE


class Measured(NamedTuple):
    """What a model makes of samples."""

    losses: Tensor
    """The mean loss of each, [samples]."""
    right: Sequence[float | None] = ()
    """Of each that allows certain answers, whether the likeliest is its own: 1 or 0; where several are the likeliest, the
    share that a guess among them gets. None of the others; empty where there are no such samples."""
    rewarded: Sequence[float | None] = ()
    """The same of the answer with the greatest reward, where the objective has rewards."""
    chance: float | None = None
    """That a guess is right, where that is not one among the sample's choices: of what is written it is 0."""


class Objective(NamedTuple):
    """What is minimized, over batches that it makes itself."""

    collate: Callable[[Sequence[Any]], Any]
    """Samples -> a batch on the model's device."""
    loss: Callable[[nn.Module, Any], tuple[Tensor, int]]
    """The sum of the losses and how many terms it has."""
    terms: Callable[[Any], int]
    """How many terms a batch's loss has, before it is computed."""
    measure: Callable[[nn.Module, Sequence[Any]], Measured]
    """What the model makes of samples, without gradients."""
    refer: Callable[[nn.Module], None] | None = None
    """Takes the model as it is for what the loss is measured against, as it was when the objective was bound."""
    sees: bool = False
    """Whether samples may have pictures or sounds: what is measured is then told by modality, too."""
    tells: Callable[[], Mapping[str, float]] | None = None
    """Metrics of the batches since it was last asked."""


class Tick(NamedTuple):
    """Where a client is in its work: `done` of `of` local steps, or of held-out batches."""

    kind: str
    """Of the task: train or evaluate."""
    client: str
    round: int
    rounds: int
    done: int
    of: int
    loss: float
    """Of the last local step or batch; not a number before the first."""


PERSONAL = "personal"
"""In a client's state, what stays there."""

Report = Callable[[Tick], None]
"""Told at the start of a client's work and after each local step or held-out batch: work may take minutes."""


def unwatched(tick: Tick) -> None:
    """The `Report` that nobody reads."""


def optimizer_steps(count: int, local_steps: int | None, epochs: int, samples_a_step: int) -> int:
    """Optimizer steps a round for a client with `count` samples."""
    return epochs * math.ceil(count / samples_a_step) if local_steps is None else local_steps


class Needs(NamedTuple):
    """What an objective asks of a plan, before there is a model."""

    labels: Labels = "sft"
    """Where the loss is."""
    reference: bool = False
    """Whether it is measured against the model as it was before the first round."""
    more_tokens: int = 0
    """That the model may write after those of a sample."""
    texts: int = 1
    """That go through the model for a sample."""
    refuse_unmade: Callable[[], None] = lambda: None
    """Raises AtollError where what it asks beside the model cannot be made here."""


class BindObjective(Protocol):
    """What a recipe's `objective` is: an objective that does not know its model yet."""

    @property
    def needs(self) -> Needs:
        """What it asks of a plan; one of the user's own that says nothing learns from answers."""
        ...

    def bind(self, model: nn.Module, tokenizer: Any) -> Objective:
        """The objective on this model; `tokenizer` is None for models without one."""
        ...


def needs_of(objective: BindObjective) -> Needs:
    """What an objective asks of a plan."""
    return getattr(objective, "needs", Needs())


Gradients = Callable[["Local", Sequence[Any], int], Iterator[float | None]]
"""(local work, the client's samples, key) -> for each local step, with its gradient in `.grad`, the loss; None: not told."""


def plain(local: Local, samples: Sequence[Any], key: int) -> Iterator[float]:
    """Gradients of the mean loss over batches that the key draws."""
    for batches in draw(len(samples), local.batch_size, local.accumulate, key):
        yield backward(local, [local.objective.collate([samples[i] for i in batch]) for batch in batches])


@dataclass(frozen=True)
class Local:
    """Everything that local work needs beside the broadcast and the data."""

    model: nn.Module
    space: Space
    objective: Objective
    optimizer: MakeOptimizer
    rate: Rate
    correction: Correction
    rounds: int
    batch_size: int
    local_steps: int | None
    """Optimizer steps a round; None: `epochs` passes over the client's own samples instead."""
    epochs: int = 1
    accumulate: int = 1
    clip_norm: float | None = None
    weighting: Literal["examples", "uniform"] = "examples"
    report: Report = unwatched
    gradients: Gradients = plain
    base: Params = field(default_factory=dict)
    """What trains, as it is in the base."""
    personal: Params = field(default_factory=dict)
    """What stays at its client, as it is before a client's first task."""

    def whole(self, params: Mapping[str, Params], state: Params) -> dict[str, Params]:
        """The broadcast's params, with the client's own beside those that travel."""
        begun = params.get(REFERENCE, {})  # where a run starts from another's result
        own = under(PERSONAL, state) or {name: begun.get(name, x) for name, x in self.personal.items()}
        return {**params, UPDATE: {**params[UPDATE], **own}}

    def told(self) -> Mapping[str, float]:
        """What the objective has to tell since it was last asked."""
        return self.objective.tells() if self.objective.tells else {}

    def refer(self, params: Mapping[str, Params]) -> None:
        """Has the objective measure against the reference that was sent, if one was."""
        if self.objective.refer and REFERENCE in params:
            write(self.space, self.model, params[REFERENCE])
            self.objective.refer(self.model)

    def steps(self, count: int) -> int:
        """Optimizer steps a round for a client with `count` samples."""
        return optimizer_steps(count, self.local_steps, self.epochs, self.batch_size * self.accumulate)

    def reporter(self, task: Task, of: int) -> Callable[[int, float], None]:
        """Reports (done, loss) of this task; says at once that it begins."""

        def report(done: int, loss: float) -> None:
            self.report(Tick(task.kind, task.client, task.broadcast.round, self.rounds, done, of, loss))

        report(0, math.nan)
        return report


def train(local: Local, params: Mapping[str, Params], data: ClientData, state: Params, task: Task) -> Done:
    """A client's round. Raises WorkFailed where the loss stops being a number: the server hears it as a refusal."""
    local.refer(params)
    params = local.whole(params, state)
    write(local.space, local.model, params[UPDATE])
    trainable = local.space.trainable(local.model)
    optimizer = local.optimizer(trainable.values())
    optimizer.zero_grad(set_to_none=True)  # a task that failed before this one may have left gradients behind
    base_rates = [group["lr"] for group in optimizer.param_groups]
    start = Start(params, state, local.base)
    steps = local.steps(len(data.train))
    gradients = local.gradients(local, data.train, task.key)
    report = local.reporter(task, steps)
    local.told()  # a task that failed may have left something to tell, too
    local.model.train()
    torch.manual_seed(task.key)  # for dropout
    losses, moved, started = [], 0.0, time.perf_counter()
    for step in range(steps):
        loss = next(gradients)
        if loss is not None and not math.isfinite(loss):
            raise WorkFailed(f"the loss is {loss} at local step {step + 1} of {steps}")
        losses.append(loss)
        local.correction.adjust(trainable, start)
        if local.clip_norm is not None:
            nn.utils.clip_grad_norm_(trainable.values(), local.clip_norm)
        moved += set_rate(
            optimizer, base_rates, local.rate((task.broadcast.round * steps + step) / (local.rounds * steps))
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(step + 1, math.nan if loss is None else loss)
    known = [loss for loss in losses if loss is not None]
    told = local.told()
    metrics = {"loss": sum(known) / steps, **told} if known else {}
    metrics |= {"steps": float(steps), "seconds_in_steps": time.perf_counter() - started}
    after = read(local.space, local.model)
    extra, new_state = local.correction.conclude(after, start, moved)
    own = {name: after[name].clone() for name in local.personal}
    update = {name: x for name, x in subtract(after, params[UPDATE]).items() if name not in own}
    return Done({UPDATE: update, **extra}, weights(local, data, update), metrics, new_state | nested(PERSONAL, own))


def weights(local: Local, data: ClientData, update: Params) -> dict[str, float]:
    """How much this client counts, for each group: by its samples, or as one; 0 for a modality that it does not hold."""
    held = {ALL: len(data.train), **holders(data.train)}
    counts = {group: held.get(group, 0) for group in {ALL, *map(modality_of, update)}}
    return {group: float(n if local.weighting == "examples" else min(n, 1)) for group, n in counts.items()}


def backward(local: Local, micro: Sequence[Any]) -> float:
    """Gradients of the mean loss over all terms of the batches of one step; returns that mean."""
    terms = sum(local.objective.terms(batch) for batch in micro)
    total = 0.0
    for batch in micro:
        loss, _ = local.objective.loss(local.model, batch)
        (loss / terms).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total / terms


def draw(count: int, batch_size: int, accumulate: int, key: int) -> Iterator[list[list[int]]]:
    """The batches of each step, as sample numbers, for ever. Each pass is a new permutation; its last step may be short."""
    order = rng(key, "batches")
    while True:
        permutation = [int(i) for i in order.permutation(count)]
        batches = [permutation[at : at + batch_size] for at in range(0, count, batch_size)]
        yield from (batches[at : at + accumulate] for at in range(0, len(batches), accumulate))


def set_rate(optimizer: torch.optim.Optimizer, base: Sequence[float], factor: float) -> float:
    """Sets the learning rate for the coming step; returns it."""
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr * factor
    return float(base[0] * factor)


EVALUATION_BATCH = 16


def evaluate(local: Local, params: Mapping[str, Params], data: ClientData, state: Params, task: Task) -> Done:
    """Held-out loss: the mean over samples of each sample's mean loss, with its standard error."""
    if not len(data.test):
        raise WorkFailed("no held-out samples")
    local.refer(params)
    write(local.space, local.model, local.whole(params, state)[UPDATE])
    local.model.eval()
    limit = int(task.data.get("samples", len(data.test))) or len(data.test)
    chosen: Sequence[int] = range(min(limit, len(data.test)))
    if isinstance(data.test, TokenDataset):  # those of a size together: little padding
        chosen = np.argsort(data.test.lengths[: len(chosen)], kind="stable").tolist()
    starts = range(0, len(chosen), EVALUATION_BATCH)
    report = local.reporter(task, len(starts))
    each: list[Tensor] = []
    answers: list[Answered | None] = []
    with torch.no_grad():
        for at in starts:
            batch = [data.test[i] for i in chosen[at : at + EVALUATION_BATCH]]
            found = local.objective.measure(local.model, batch)
            each.append(found.losses.cpu())
            answers += answered(batch, found)
            report(len(each), float(found.losses.mean()))
    losses = torch.cat(each).double()
    metrics = told(losses, answers)
    if local.objective.sees:
        metrics |= by_modality(losses, answers, [data.test[i] for i in chosen])
    return Done({}, {}, metrics, {})


class Answered(NamedTuple):
    """What came of a sample that allows certain answers."""

    right: float | None
    """Whether it has the model's own answer right."""
    chance: float
    """That a guess is right."""
    rewarded: float | None = None
    """Whether it has the greatest reward."""


def answered(samples: Sequence[Any], found: Measured) -> list[Answered | None]:
    """What came of each sample that allows certain answers."""
    right, rewarded = (list(each) or [None] * len(samples) for each in (found.right, found.rewarded))
    return [
        None if share is None and reward is None else Answered(share, guessed(found, choices), reward)
        for share, reward, choices in zip(right, rewarded, map(choices_in, samples), strict=True)
    ]


def guessed(found: Measured, choices: Choices | None) -> float:
    """How often a guess is right."""
    if found.chance is not None:
        return found.chance
    return 1 / len(choices.rest) if choices else 0.0


def told(losses: Tensor, answers: Sequence[Answered | None], of: str = "") -> dict[str, float]:
    """Mean, its standard error and the number of samples' losses, as metrics; the same of the answers, and their chance."""
    found = summed(losses, LOSS)
    if asked := [(one.right, one.chance) for one in answers if one and one.right is not None]:
        right, chance = (torch.tensor(each, dtype=torch.float64) for each in zip(*asked, strict=True))
        found |= summed(right, ACCURACY) | {CHANCE: float(chance.mean())}
    if rewarded := [one.rewarded for one in answers if one and one.rewarded is not None]:
        share = torch.tensor(rewarded, dtype=torch.float64)
        found |= summed(share, REWARD_ACCURACY)
    return {f"{name}{of}": value for name, value in found.items()}


def summed(values: Tensor, names: Named) -> dict[str, float]:
    """Mean, standard error and number, under these names."""
    spread = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return {names.value: float(values.mean()), names.error: spread, names.counted: float(len(values))}


def by_modality(losses: Tensor, answers: Sequence[Answered | None], samples: Sequence[Any]) -> dict[str, float]:
    """The same for the samples with pictures, with sounds, and with neither: `loss/image`, `loss/text`, ..."""
    kinds = [{medium.modality for medium in media_in(sample) if medium.path} for sample in samples]
    metrics: dict[str, float] = {}
    for name in sorted({TEXT, *set[str]().union(*kinds)}):
        chosen = [i for i, kind in enumerate(kinds) if name in (kind or {TEXT})]
        metrics |= told(losses[chosen], [answers[i] for i in chosen], f"/{name}") if chosen else {}
    return metrics
