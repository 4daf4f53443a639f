"""One contract for every transform: it takes what it made back, its traits are true, and the wire carries it.

A new transform joins by one line in EVERY.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll import wire
from atoll.params import Params, add, equal, global_norm, subtract, zeros_like
from atoll.transforms.chain import Chain, Payload
from atoll.transforms.clip import clip
from atoll.transforms.noise import gaussian_noise
from atoll.transforms.quantize import int4, int8
from atoll.transforms.residual import error_feedback
from atoll.transforms.sparsify import topk

EVERY = {
    "clip": clip(norm=1.0),
    "gaussian_noise": gaussian_noise(std=0.1),
    "int8": int8(block=16),
    "int4": int4(block=16),
    "topk": topk(fraction=0.2),
    "error_feedback(topk)": error_feedback([topk(0.2)]),
    "error_feedback(topk, int8)": error_feedback([topk(0.2), int8(8)], decay=0.9),
}
CHAINS = {name: Chain((transform,)) for name, transform in EVERY.items()}
CHAINS |= {
    "empty": Chain(),
    "clip, topk, int4": Chain((clip(1.0), topk(0.3), int4(8))),
    "clip, int8": Chain((clip(1.0), int8())),
}

every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())


def example(seed: int = 0, scale: float = 1.0) -> Params:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 7), "b": (64,), "c": (1,), "d/e": (3, 1, 4)}
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def decoded(chain: Chain, x: Params, key: int = 0) -> Params:
    return chain.decode(chain.encode(chain.init(x), x, key)[1])


@every_chain
def test_gives_back_the_names_and_shapes_it_took(chain):
    x = example()
    back = decoded(chain, x)
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in x.items()}
    assert all(torch.isfinite(v).all() for v in back.values())


@every_chain
def test_is_a_function_of_its_arguments(chain):
    x, before = example(), example()
    state = chain.init(x)
    first, again = chain.encode(state, x, 3), chain.encode(state, x, 3)
    assert equal(wire.flatten(first[1]), wire.flatten(again[1]))
    assert equal(first[0], again[0])
    assert equal(x, before), "encode must not change what it is given"
    assert equal(state, chain.init(x)), "encode must not change the state it is given"


@every_chain
def test_the_wire_carries_it_bit_for_bit(chain):
    _, payload = chain.encode(chain.init(example()), example(), 1)
    data = wire.pack(payload)
    assert len(data) == wire.size(payload)
    back = wire.unpack(data, limit_bytes=len(data))
    assert equal(wire.flatten(back), wire.flatten(payload))
    assert equal(chain.decode(back), chain.decode(payload))


@every_chain
def test_says_whether_it_keeps_state(chain):
    after, _ = chain.encode(chain.init(example()), example(), 0)
    assert bool(after) == chain.traits.client_state
    assert after.keys() == chain.init(example()).keys()


@every_chain
def test_summable_means_decode_once_on_the_sum(chain):
    x, y = example(1), example(2)
    (_, p), (_, q) = chain.encode(chain.init(x), x, 1), chain.encode(chain.init(y), y, 2)
    by_split = chain.decode_sum(add(chain.decode_reply(p), chain.decode_reply(q)))
    one_by_one = add(chain.decode(p), chain.decode(q))
    assert all(torch.allclose(by_split[n], one_by_one[n], atol=1e-5) for n in x)
    if chain.traits.summable:
        assert chain.split == len(chain.transforms)


@every_chain
def test_linear_means_linear(chain):
    x, y = example(1), example(2)
    left = decoded(chain, add(x, y, scale=2.0), key=7)
    right = add(decoded(chain, x, key=7), decoded(chain, y, key=7), scale=2.0)
    holds = all(torch.allclose(left[n], right[n], atol=1e-5) for n in x)
    assert holds or not chain.traits.linear


@every_chain
def test_fixed_support_means_the_same_coordinates_for_everybody(chain):
    shapes = []
    for seed in (1, 2):
        _, payload = chain.encode(chain.init(example(seed)), example(seed), seed)
        positions = {n: v for side in payload.sides for n, v in side.items() if n.endswith("#at")}
        shapes.append(({n: v.shape for n, v in payload.main.items()}, positions))
    same = shapes[0][0] == shapes[1][0] and equal(shapes[0][1], shapes[1][1])
    assert same == chain.traits.fixed_support


@every_chain
def test_unbiased_means_the_mean_over_keys_is_the_value(chain):
    x = {"w": torch.linspace(-1, 1, 33)}
    draws = torch.stack([decoded(chain, x, key=k)["w"] for k in range(4000)])
    error = draws.mean(0) - x["w"]
    allowed = 5 * draws.std(0) / 4000**0.5 + 1e-6
    assert bool((error.abs() <= allowed).all()) == chain.traits.unbiased


@every_chain
def test_bounded_means_a_bounded_norm(chain):
    norms = [global_norm(decoded(chain, example(seed, scale=100.0))) for seed in range(3)]
    small = max(norms) < 50  # the examples have a norm of about 1,000
    assert small == chain.traits.bounded


@pytest.mark.parametrize("name", [n for n in EVERY if n != "gaussian_noise"])
def test_what_is_sent_is_close_to_what_is_meant(name):
    """The error of each is what its paper says: nothing beyond the clip, one level of a block, the small entries."""
    x = example()
    error = subtract(decoded(CHAINS[name], x), x)
    worst = max(float(v.abs().max()) for v in x.values())
    bound = {"clip": worst, "int8": worst / 127, "int4": worst / 7}.get(name, worst)
    assert max(float(v.abs().max()) for v in error.values()) <= bound + 1e-6


@given(st.floats(0.01, 1.0), st.integers(1, 200), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_topk_keeps_the_largest(fraction, n, seed):
    x = {"w": torch.randn(n, generator=torch.Generator().manual_seed(seed))}
    back = decoded(Chain((topk(fraction),)), x)["w"]
    kept = back != 0
    assert int(kept.sum()) == max(1, -(-int(fraction * n * 10**9) // 10**9)) or abs(int(kept.sum()) - fraction * n) <= 1
    assert torch.equal(back[kept], x["w"][kept])
    assert not (~kept).any() or float(x["w"][kept].abs().min()) >= float(x["w"][~kept].abs().max())


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_four_bits_take_half_a_byte(n, block, seed):
    x = {"w": torch.randn(n, generator=torch.Generator().manual_seed(seed))}
    _, payload = Chain((int4(block),)).encode({}, x, 0)
    assert payload.main["w"].numel() == -(-n // 2)
    assert payload.main["w"].dtype == torch.uint8


def test_error_feedback_sends_everything_in_the_end():
    """With a constant update, what was sent catches up with what was meant (Karimireddy et al. 2019, Lemma 3)."""
    chain = Chain((error_feedback([topk(0.05)]),))
    x = example()
    state, sent = chain.init(x), zeros_like(x)
    for k in range(60):
        state, payload = chain.encode(state, x, k)
        sent = add(sent, chain.decode(payload))
    missing = subtract(sent, {n: 60 * v for n, v in x.items()})
    assert global_norm(missing) < 25 * global_norm(x), "the residual stays bounded, it does not grow with the rounds"
    plain = Chain((topk(0.05),))
    lost = subtract(decoded(plain, x), x)
    assert global_norm(missing) < 60 * global_norm(lost) / 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p._replace(sides=()),
        lambda p: p._replace(sides=({},)),
        lambda p: p._replace(main={n: v[:-1] for n, v in p.main.items()}),
    ],
)
@pytest.mark.parametrize("name", ["int8", "int4", "topk", "error_feedback(topk)"])
def test_a_payload_that_nobody_made_is_a_value_error(name, spoil):
    _, payload = CHAINS[name].encode(CHAINS[name].init(example()), example(), 0)
    with pytest.raises(ValueError, match=r"side|lack|level|position|shape"):
        CHAINS[name].decode(spoil(payload))


def test_a_forged_shape_cannot_ask_for_all_memory():
    _, payload = CHAINS["topk"].encode({}, {"w": torch.randn(50)}, 0)
    side = payload.sides[0] | {"w#shape": torch.tensor([10**6, 10**6])}
    with pytest.raises(ValueError, match="claims the shape"):
        CHAINS["topk"].decode(Payload(payload.main, (side,)))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_payload_are_a_value_error(data):
    with pytest.raises(ValueError):
        wire.unpack(data, limit_bytes=1000)


def test_a_payload_over_the_limit_is_refused_before_it_is_read():
    data = wire.pack(Payload({"w": torch.zeros(1000)}))
    with pytest.raises(ValueError, match="allowed"):
        wire.unpack(data, limit_bytes=100)
