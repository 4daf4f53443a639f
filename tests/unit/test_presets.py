"""The preset that a package carries: the repaired tokenizer, the params of the GGUF file, and kills on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atoll.errors import AtollError
from atoll.models import presets
from atoll.models.load import load_model, resolve, shapes
from atoll.models.tiny import byte_tokenizer

LICENSE = Path(__file__).parents[2] / "LICENSE"


def llama_cpp_order(param: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rotary rows in GGUF files, as llama.cpp's converter writes it: halves woven into pairs."""
    rows, hidden = param.shape
    return param.reshape(heads, 2, rows // heads // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        layer, _, rest = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
    return GGUF_NAMES[name.removesuffix(".weight")] + ".weight"


def write_gguf(model: LlamaForCausalLM, path: Path, without: str = "") -> None:
    """A GGUF file of a Llama, in float32, by the names and the order of llama.cpp."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, param in model.named_parameters():
        count = heads.get(name.split(".")[-2])
        stored = llama_cpp_order(param.detach(), count) if count else param.detach()
        if gguf_name(name) != without:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tied_llama() -> LlamaForCausalLM:
    """A tiny Llama like SmolLM2: grouped heads, tied embeddings, params that bfloat16 holds exactly."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    )
    config.vocab_size, config.tie_word_embeddings = 260, True
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(torch.bfloat16)
    return model


def test_the_params_of_a_gguf_file_come_back_bit_for_bit(tied_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tied_llama, tmp_path / "model.gguf")
    rebuilt = presets.build_llama(tied_llama.config, tmp_path / "model.gguf")
    expected, found = tied_llama.state_dict(), rebuilt.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    ids = torch.arange(20)[None]
    assert torch.equal(rebuilt(input_ids=ids).logits, tied_llama(input_ids=ids).logits)


def test_a_gguf_file_of_another_model_is_refused(tied_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tied_llama, tmp_path / "model.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(AtollError, match="does not hold a Llama") as told:
        presets.build_llama(tied_llama.config, tmp_path / "model.gguf")
    assert "blk.1.ffn_up.weight" in told.value.details["found"]


def test_the_repaired_tokenizer_splits_digits_and_puts_no_space_first() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    presets.repair_tokenizer(tokenizer, 8192)
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2048 ways")]
    assert pieces == ["in", "Ġ", "2", "0", "4", "8", "Ġways"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer.decode(tokenizer("in 2048 wäys").input_ids) == "in 2048 wäys"


def test_presets_are_named_apart_and_pinned() -> None:
    assert resolve("smollm2-135m").kind == "preset"
    assert resolve("smollm2-135m").identity == presets.preset_identity("smollm2-135m")
    carried = [name for name, preset in presets.PRESETS.items() if preset.carrier]
    assert carried == ["smollm2-135m"]


KILLED_CONVERSION = """
import os, signal, sys
from pathlib import Path
from atoll.models import presets
def fetch(carrier, say):
    return Path(sys.argv[1])
def half(gguf, folder, say):
    (folder / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
presets.fetch, presets.convert = fetch, half
presets.carrier_folder("smollm2-135m")
"""


def test_a_kill_during_the_conversion_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))
    source = tmp_path / "carrier"
    for member in presets.SMOLLM2.members:
        (source / member).parent.mkdir(parents=True, exist_ok=True)
        (source / member).write_text("content")
    killed = subprocess.run([sys.executable, "-c", KILLED_CONVERSION, str(source)], check=False)
    assert killed.returncode == -9
    assert not list((tmp_path / "home" / "models").glob("smollm2*"))

    monkeypatch.setattr(presets, "fetch", lambda carrier, say: source)
    monkeypatch.setattr(presets, "convert", lambda gguf, folder, say: (folder / "config.json").write_text("whole"))
    said: list[str] = []
    folder = presets.carrier_folder("smollm2-135m", said.append)
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "config.json"]
    assert (folder / "config.json").read_text() == "whole"
    assert len(said) == 1
    assert "converting smollm2-135m" in said[0]
    assert not list((tmp_path / "home" / "models").glob(".*.partial"))


def test_progress_bars_are_silent_for_a_while_only() -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    with presets.no_progress_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


@pytest.mark.real
def test_smollm2_is_converted_right() -> None:
    """2215 tokens as in llama.cpp; perplexity on the first 1024 as measured with transformers' own GGUF import."""
    model, tokenizer = load_model("smollm2-135m", dtype="float32")
    ids = tokenizer(LICENSE.read_text(), return_tensors="pt").input_ids
    assert ids.shape == (1, 2215)
    with torch.no_grad():
        loss = model(input_ids=ids[:, :1024], labels=ids[:, :1024]).loss
    assert loss.exp().item() == pytest.approx(14.21, abs=0.05)
    assert "<|im_start|>assistant\n" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    found = shapes("smollm2-135m")
    assert (found.count, found.layers, found.hidden, found.vocab, found.context) == (134_515_008, 30, 576, 49152, 8192)
    assert len(found.linears) == 30 * 7
    assert found.params["model.norm.weight"] == ((576,), "bfloat16")
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.real
def test_smollm2_equals_what_transformers_reads_from_the_gguf_file() -> None:
    from transformers import AutoModelForCausalLM

    from atoll.carriers import fetch

    gguf = fetch(presets.SMOLLM2) / presets.SMOLLM2.members[0]
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16).state_dict()
    ours = load_model("smollm2-135m", dtype="bfloat16")[0].state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_misspelt_preset_gets_the_closest() -> None:
    with pytest.raises(AtollError, match="no such model") as told:
        resolve("smollm2-135")
    assert "did you mean 'smollm2-135m'" in str(told.value)
