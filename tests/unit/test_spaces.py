"""Spaces: what is planned is what trains, what is written is read back, what is saved loads in plain `peft`."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from atoll.errors import AtollError
from atoll.models.load import shapes
from atoll.models.spaces import full, lora, read, write
from atoll.models.tiny import FAMILIES, tiny

every_family = pytest.mark.parametrize("family", list(FAMILIES))
SPACES = {"full": full(), "lora": lora(rank=4), "lora on two": lora(rank=2, targets=["q_proj", "v_proj"])}


@every_family
@pytest.mark.parametrize("space", [full(), lora(rank=3)], ids=["full", "lora"])
def test_what_is_planned_is_what_trains(family, space):
    model = space.prepare(tiny(family)[0], seed=0)
    planned = space.plan(shapes(f"tiny:{family}"))
    assert planned == {name: tuple(p.shape) for name, p in space.trainable(model).items()}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_what_is_written_is_read_back(space):
    model = space.prepare(tiny("llama")[0], seed=0)
    values = {name: torch.randn_like(x) for name, x in read(space, model).items()}
    write(space, model, values)
    assert all(torch.equal(values[name], x) for name, x in read(space, model).items())


def test_the_first_update_starts_from_the_base_model_and_a_seed_names_the_draw():
    space = lora(rank=4)
    one, same, other = (space.prepare(tiny("llama")[0], seed) for seed in (1, 1, 2))
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        base = tiny("llama")[0](ids).logits
        assert torch.allclose(one(ids).logits, base, atol=1e-6)
    a, b, c = (read(space, model) for model in (one, same, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_adapters_train_in_float32_on_a_bfloat16_base():
    space = lora(rank=4)
    model = space.prepare(tiny("llama")[0].to(torch.bfloat16), seed=0)
    assert {p.dtype for p in space.trainable(model).values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora" not in n} == {torch.bfloat16}


def test_what_is_saved_loads_in_plain_peft(tmp_path):
    space, (base, _) = lora(rank=4), tiny("llama")
    base.save_pretrained(tmp_path / "base")
    model = space.prepare(base, seed=0)
    write(space, model, {name: torch.randn_like(x) * 0.1 for name, x in read(space, model).items()})
    space.save(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-6)
        assert not torch.allclose(plain(ids).logits, tiny("llama")[0](ids).logits, atol=1e-3)


def test_a_target_that_does_not_exist_names_the_closest():
    with pytest.raises(AtollError) as caught:
        lora(targets=["q_prj"]).plan(shapes("tiny:llama"))
    assert "q_proj" in str(caught.value)
