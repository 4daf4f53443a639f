"""Aggregators against their formula, outer optimizers against torch's and the paper's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll import outer
from atoll.aggregate.mean import Mean, mean, share
from atoll.params import add

SHAPE = (3, 2)


def same(total):
    """A chain that has nothing to undo on the sum."""
    return total


def updates(count: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(SHAPE, generator=draw), "b": torch.randn(4, generator=draw)} for _ in range(count)]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.randoms())
@settings(max_examples=50, deadline=None)
def test_mean_is_the_weighted_mean_in_any_order(weights, random):
    given_, rule = updates(len(weights)), mean()
    order = list(range(len(weights)))
    random.shuffle(order)
    total = rule.init(given_[0])
    for i in order:
        total = rule.add(total, given_[i], {"all": weights[i]})
    result = rule.finish(total, same)
    for name in ("w", "b"):
        expected = np.average([u[name].double().numpy() for u in given_], axis=0, weights=weights)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=2e-4, atol=1e-5)


def test_totals_of_two_relays_add_up():
    rule, given_ = mean(), updates(4)
    whole, left, right = (rule.init(given_[0]) for _ in range(3))
    for i, update in enumerate(given_):
        whole = rule.add(whole, update, {"all": i + 1.0})
        half = left if i < 2 else right
        half.update(rule.add(half, update, {"all": i + 1.0}))
    assert rule.summable
    both = rule.finish(add(left, right), same)
    once = rule.finish(whole, same)
    assert all(torch.allclose(both[n], once[n], atol=1e-6) for n in once)


def test_a_group_that_a_client_does_not_hold_is_not_diluted_and_one_that_nobody_holds_stays():
    rule = Mean(group_of=lambda name: {"w": "image", "b": "text"}[name])
    one, two = updates(2)
    total = rule.add(rule.init(one), one, {"image": 0.0, "text": 2.0})
    total = rule.add(total, two, {"image": 0.0, "text": 2.0})
    assert set(rule.finish(total, same)) == {"b"}
    total = rule.add(rule.init(one), one, {"image": 3.0, "text": 1.0})
    result = rule.finish(rule.add(total, two, {"image": 0.0, "text": 1.0}), same)
    assert torch.allclose(result["w"], one["w"])
    assert torch.allclose(result["b"], (one["b"] + two["b"]) / 2)


def test_a_fixed_denominator_may_be_smaller_for_a_group_that_few_hold():
    rule = replace(share(4), group_of=lambda name: {"w": "image", "b": "all"}[name], shares={"image": 0.5})
    one, two = updates(2)
    total = rule.add(rule.add(rule.init(one), one, {"all": 1.0}), two, {"all": 1.0})
    result = rule.finish(total, same)
    assert torch.allclose(result["w"], (one["w"] + two["w"]) / 2)
    assert torch.allclose(result["b"], (one["b"] + two["b"]) / 4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (outer.sgd(0.5), lambda p: torch.optim.SGD(p, lr=0.5)),
        (outer.momentum(0.5, 0.9), lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)),
        (outer.nesterov(0.7, 0.9), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    ],
)
def test_outer_steps_equal_torch_on_the_negated_update(ours, theirs):
    params, steps = updates(1)[0], updates(5, seed=1)
    mirror = {n: torch.nn.Parameter(x.clone()) for n, x in params.items()}
    optimizer, state = theirs(mirror.values()), ours.init(params)
    for update in steps:
        for name, parameter in mirror.items():
            parameter.grad = -update[name]
        optimizer.step()
        state, params = ours.step(state, params, update)
    assert all(torch.allclose(params[n], mirror[n], atol=1e-6) for n in params)


def reddi(kind, x, deltas, lr, b1, b2, tau):
    """Algorithm 2 of arXiv 2003.00295, in numpy, as printed."""
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for delta in deltas:
        m = b1 * m + (1 - b1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
        else:
            v = b2 * v + (1 - b2) * delta**2
        x = x + lr * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_outer_steps_equal_the_paper(kind):
    params, steps = updates(1)[0], updates(6, seed=2)
    b1 = 0.0 if kind == "adagrad" else 0.9
    ours = outer.adagrad(0.1, 1e-2) if kind == "adagrad" else getattr(outer, kind)(0.1, 0.9, 0.99, 1e-2)
    state, moved = ours.init(params), params
    for update in steps:
        state, moved = ours.step(state, moved, update)
    for name, x in params.items():
        expected = reddi(kind, x.double().numpy(), [u[name].double().numpy() for u in steps], 0.1, b1, 0.99, 1e-2)
        np.testing.assert_allclose(moved[name].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "yogi", "adagrad"])
def test_params_without_an_update_stay(name):
    params = updates(1)[0]
    step = getattr(outer, name)()
    state, moved = step.step(step.init(params), params, {"w": torch.ones(SHAPE)})
    assert torch.equal(moved["b"], params["b"])
    assert not torch.equal(moved["w"], params["w"])
    assert state.keys() == step.init(params).keys()


def test_what_a_chain_undoes_on_the_sum_is_the_sum_and_not_the_weights():
    """Fixed point, decoded once: x -> 1000 x at the clients, / 1000 on the sum."""
    rule, given_ = mean(), updates(3)
    total = rule.init(given_[0])
    for update in given_:
        total = rule.add(total, {name: 1000 * x for name, x in update.items()}, {"all": 2.0})
    result = rule.finish(total, lambda sums: {name: x / 1000 for name, x in sums.items()})
    for name in ("w", "b"):
        assert torch.allclose(result[name], torch.stack([u[name] for u in given_]).mean(0), atol=1e-5)
