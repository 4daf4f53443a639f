"""Local work against plain torch: the same steps, written out, on a linear model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from atoll.data.collate import Choices, Sample
from atoll.data.sources import ClientData
from atoll.exchange import Broadcast, Task, WorkFailed
from atoll.local.corrections import CONTROL, l1, none, proximal, scaffold
from atoll.local.optimizers import adamw, constant, cosine, linear, sgd
from atoll.local.work import Local, Measured, Objective, answered, draw, evaluate, train
from atoll.models.spaces import full, read
from atoll.params import equal, subtract, zeros_like
from atoll.stream import UPDATE


@dataclass(frozen=True)
class Regression:
    """Squared error / 2 of a linear model; samples are (x [3], y [1])."""

    poison: float = math.inf

    def bind(self, model=None, tokenizer=None):
        def collate(samples):
            return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

        def each(model, batch):
            x, y = batch
            loss = (model(x) - y).square().squeeze(1) / 2
            return torch.where(x[:, 0] > self.poison, torch.nan, loss)

        def measure(model, samples):
            return Measured(each(model, collate(samples)))

        return Objective(collate, lambda m, b: (each(m, b).sum(), len(b[0])), lambda b: len(b[0]), measure)


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def samples(count: int = 12, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, generator=draw), torch.randn(1, generator=draw)) for _ in range(count)]


def local(**changes) -> Local:
    net = full().prepare(model(), 0)
    plain = Local(net, full(), Regression().bind(), sgd(0.1), constant(), none(), rounds=4, batch_size=4, local_steps=5)
    return replace(plain, **changes)


def task(round: int = 0, key: int = 7, **data) -> Task:
    return Task("train", "north", "plan", Broadcast(round, {}), key, data=data)


def start() -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in read(full(), model()).items()}


def by_hand(optimizer, steps=5, batch_size=4, adjust=lambda net: None, factors=None, data=None):
    """The same steps in plain torch."""
    net, data = model(), data or samples()
    inner, batches = optimizer(net.parameters()), draw(len(data), batch_size, 1, 7)
    lr = inner.param_groups[0]["lr"]
    for step in range(steps):
        chosen = [data[i] for batch in next(batches) for i in batch]
        x, y = torch.stack([a for a, _ in chosen]), torch.stack([b for _, b in chosen])
        inner.zero_grad()
        ((net(x) - y).square() / 2).mean().backward()
        adjust(net)
        if factors:
            inner.param_groups[0]["lr"] = lr * factors[step]
        inner.step()
    return subtract(read(full(), net), start())


def close(a, b):
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.parametrize("optimizer", [sgd(0.1), sgd(0.1, momentum=0.9), adamw(0.01), adamw(0.01, weight_decay=0.1)])
def test_the_update_is_what_plain_torch_does(optimizer):
    done = train(local(optimizer=optimizer), {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    close(done.updates[UPDATE], by_hand(optimizer))
    assert done.weights == {"all": 12.0}
    assert done.metrics["steps"] == 5


def test_epochs_pass_over_all_samples():
    seen = []
    work = local(local_steps=None, epochs=2, batch_size=5)
    counted = work.objective._replace(collate=lambda s: seen.extend(s) or Regression().bind().collate(s))
    train(replace(work, objective=counted), {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    assert len(seen) == 24
    assert work.steps(12) == 6


def test_an_epoch_of_accumulated_batches_ends_with_a_short_step():
    steps = list(islice(draw(28, 16, 8, 7), 2))
    assert [[len(batch) for batch in step] for step in steps] == [[16, 12], [16, 12]]
    assert [len(step) for step in islice(draw(12, 2, 4, 7), 2)] == [4, 2]
    seen = []
    work = local(local_steps=None, epochs=3, batch_size=2, accumulate=4)
    counted = work.objective._replace(collate=lambda s: seen.extend(s) or Regression().bind().collate(s))
    train(replace(work, objective=counted), {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    assert (len(seen), work.steps(12)) == (36, 6)


def test_accumulated_batches_are_one_large_batch():
    data = samples(8)
    small = local(batch_size=2, accumulate=4, local_steps=1)
    large = local(batch_size=8, local_steps=1)
    a, b = (train(w, {UPDATE: start()}, ClientData(data, ()), {}, task()).updates[UPDATE] for w in (small, large))
    close(a, b)


def test_gradients_are_clipped_by_their_norm():
    clipped = local(clip_norm=1e-3, local_steps=1)
    update = train(clipped, {UPDATE: start()}, ClientData(samples(), ()), {}, task()).updates[UPDATE]
    norm = math.sqrt(sum(float(x.square().sum()) for x in update.values()))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("round", [0, 2])
@pytest.mark.parametrize("rate", [linear(warmup=0.25), cosine(warmup=0.1, floor=0.2)])
def test_schedules_know_the_step_of_the_whole_run(rate, round):
    factors = [rate((round * 5 + step) / 20) for step in range(5)]
    done = train(local(rate=rate), {UPDATE: start()}, ClientData(samples(), ()), {}, task(round))
    close(done.updates[UPDATE], by_hand(sgd(0.1), factors=factors))


def test_schedules_rise_and_fall_as_torchs_do():
    """Against torch's own schedulers, over 20 steps without warm-up."""
    for ours, theirs in (
        (linear(), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-12, 20)),
        (cosine(), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
    ):
        optimizer = torch.optim.SGD(model().parameters(), 1.0)
        scheduler = theirs(optimizer)
        for step in range(20):
            assert ours(step / 20) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
            optimizer.step()
            scheduler.step()


def test_fedprox_is_the_gradient_of_its_term():
    mu, before = 0.3, start()

    def adjust(net):
        term = mu / 2 * sum((p - before[name]).square().sum() for name, p in net.named_parameters())
        for p, g in zip(net.parameters(), torch.autograd.grad(term, list(net.parameters())), strict=True):
            p.grad += g

    done = train(local(correction=proximal(mu)), {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    close(done.updates[UPDATE], by_hand(sgd(0.1), adjust=adjust))


def test_l1_is_the_gradient_of_its_term_about_the_base():
    strength, base = 0.3, {name: x + 0.01 for name, x in start().items()}

    def adjust(net):
        term = strength * sum((p - base[name]).abs().sum() for name, p in net.named_parameters())
        for p, g in zip(net.parameters(), torch.autograd.grad(term, list(net.parameters())), strict=True):
            p.grad += g

    work = replace(local(correction=l1(strength)), base=base)
    done = train(work, {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    close(done.updates[UPDATE], by_hand(sgd(0.1), adjust=adjust))


def test_scaffold_corrects_each_gradient_and_sends_the_difference_of_its_variates():
    c = {name: torch.full_like(x, 0.05) for name, x in start().items()}
    c_k = {name: torch.full_like(x, -0.02) for name, x in start().items()}

    def adjust(net):
        for name, p in net.named_parameters():
            p.grad += c[name] - c_k[name]

    params = {UPDATE: start(), CONTROL: c}
    done = train(local(correction=scaffold()), params, ClientData(samples(), ()), c_k, task())
    update = by_hand(sgd(0.1), adjust=adjust)
    close(done.updates[UPDATE], update)
    new = {name: c_k[name] - c[name] - update[name] / (5 * 0.1) for name in c}
    close(done.state, new)
    close(done.updates[CONTROL], subtract(new, c_k))


def test_scaffold_starts_without_state():
    params = {UPDATE: start(), CONTROL: zeros_like(start())}
    done = train(local(correction=scaffold()), params, ClientData(samples(), ()), {}, task())
    close(done.updates[UPDATE], by_hand(sgd(0.1)))
    close(done.state, done.updates[CONTROL])


def test_scaffold_learns_nothing_of_the_gradient_from_steps_of_rate_zero():
    work = local(optimizer=sgd(0.1), correction=scaffold(), rate=lambda progress: 0.0)
    variates = {name: torch.ones_like(x) for name, x in start().items()}
    done = train(work, {UPDATE: start(), CONTROL: variates}, ClientData(samples(), ()), variates, task())
    assert equal(done.updates[CONTROL], zeros_like(variates))
    assert equal(done.state, variates)


def test_a_loss_that_is_no_number_fails_the_task_and_leaves_nothing_for_the_next():
    """The model and its gradients are shared by all simulated clients: one that fails must not spoil the others."""
    bad = replace(local(), objective=Regression(poison=-math.inf).bind())
    with pytest.raises(WorkFailed, match="nan at local step 1 of 5"):
        train(bad, {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    good = replace(bad, objective=Regression().bind())
    done = train(good, {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    close(done.updates[UPDATE], by_hand(sgd(0.1)))


def test_held_out_loss_is_the_mean_with_its_standard_error():
    data = samples(20, seed=3)
    done = evaluate(local(), {UPDATE: start()}, ClientData((), data), {}, task(samples=15))
    net = model()
    each = torch.stack([(net(x) - y).square().squeeze() / 2 for x, y in data[:15]]).double()
    assert done.metrics["loss"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert done.metrics["standard_error"] == pytest.approx(float(each.std() / 15**0.5), rel=1e-5)
    assert done.metrics["samples"] == 15
    assert not done.updates


def test_batches_are_permutations_drawn_by_key():
    first = [i for step in islice(draw(12, 4, 1, 7), 3) for batch in step for i in batch]
    again = [i for step in islice(draw(12, 4, 1, 7), 3) for batch in step for i in batch]
    other = [i for step in islice(draw(12, 4, 1, 8), 3) for batch in step for i in batch]
    assert sorted(first) == list(range(12))
    assert first == again != other


def test_a_guess_is_right_as_often_as_the_objective_says() -> None:
    choices = Choices(1, (np.array([1], np.int32), np.array([2], np.int32)), (np.ones(1, bool),) * 2, 0)
    sample = Sample(np.array([0], np.int32), np.array([0], np.int32), (), choices)
    for found, chance in ((Measured(torch.zeros(1), [1.0]), 0.5), (Measured(torch.zeros(1), [1.0], chance=0.0), 0.0)):
        assert [one.chance for one in answered([sample], found) if one] == [chance], "what is written is not guessed"
