"""Loading models by name: what a name stands for, every family at tiny size, shapes without params, plain errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.errors import AtollError
from atoll.models import load
from atoll.models.load import load_model, resolve, shapes, tiny
from atoll.models.tiny import FAMILIES

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 \N{SMILING FACE WITH SMILING EYES}"}]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama."""
    place = tmp_path / "model"
    for part in tiny("llama"):
        part.save_pretrained(place)
    return place


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_does_a_forward_and_a_backward(family: str) -> None:
    model, tokenizer = load_model(f"tiny:{family}")
    ids = tokenizer("hello, wörld", return_tensors="pt").input_ids
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits.shape == (1, 13, 260)
    assert 4.0 < output.loss.item() < 7.0  # ln 260 = 5.56: random, and not collapsed
    assert output.logits.std() > 0.2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.numel() > 64)
    assert model.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_causal(family: str) -> None:
    model, tokenizer = tiny(family)
    ids = tokenizer("abcdefgh", return_tensors="pt").input_ids
    other = ids.clone()
    other[0, 5] += 1
    with torch.no_grad():
        first, second = model(input_ids=ids).logits, model(input_ids=other).logits
    assert torch.equal(first[0, :5], second[0, :5])
    assert not torch.allclose(first[0, 5:], second[0, 5:])


def test_a_tiny_model_is_the_same_for_the_same_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    a, b, other = tiny("llama", 1)[0], tiny("llama", 1)[0], tiny("llama", 2)[0]
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)


def test_the_byte_tokenizer_keeps_every_text_and_knows_chats() -> None:
    tokenizer = tiny("llama")[1]
    text = "Tab\tline\n  ünï \N{GRINNING FACE} 2048"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [257, tokenizer("a").input_ids[0], 258]
    shown = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert shown == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.startswith(shown)
    assert tokenizer.eos_token_id == 258
    assert len(tokenizer) == 260


def test_a_folder_gives_the_saved_params_and_tokenizer(folder: Path) -> None:
    model, tokenizer = load_model(str(folder), dtype="float32")
    saved, _ = tiny("llama")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), saved.parameters(), strict=True))
    assert tokenizer("x").input_ids == tiny("llama")[1]("x").input_ids
    assert tokenizer.chat_template == tiny("llama")[1].chat_template


def test_the_dtype_is_the_chosen_one_and_auto_suits_the_processor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_model(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model("tiny:gpt2", dtype="bfloat16")[0].dtype == torch.bfloat16
    cpu = torch.device("cpu")
    for capabilities, expected in (
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True, "amx_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert load.choose_dtype("auto", cpu) == expected
        assert load_model(str(folder))[0].dtype == expected


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, tokenizer = load_model(f"tiny:{family}", gradient_checkpointing=checkpointing)
        model.train()
        ids = tokenizer("hello", return_tensors="pt").input_ids
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert model.is_gradient_checkpointing == checkpointing
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*gradients, strict=True))


def test_names_stand_for_presets_tiny_models_folders_and_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve("tiny:opt").location == "opt"
    by_name, by_path = resolve("model"), resolve("./model")
    assert by_name.kind == by_path.kind == "folder"
    assert by_name.location == str(folder)
    assert by_name.identity == by_path.identity == resolve(str(folder)).identity


def test_identity_follows_the_content(folder: Path, tmp_path: Path) -> None:
    before = resolve(str(folder)).identity
    copy = folder.rename(tmp_path / "elsewhere")
    assert resolve(str(copy)).identity == before
    params = load_file(copy / "model.safetensors")
    params["model.norm.weight"][0] += 1
    save_file(params, copy / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(copy)).identity != before
    assert resolve("tiny:llama").identity != resolve("tiny:opt").identity


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_model(family: str) -> None:
    model, _ = tiny(family)
    found = shapes(f"tiny:{family}")
    assert found.params == {name: (tuple(p.shape), "float32") for name, p in model.named_parameters()}
    assert found.count == sum(p.numel() for p in model.parameters())
    assert (found.layers, found.hidden, found.vocab) == (2, 32, 260)
    assert found.context == {"bloom": 0, "mamba": 0, "gpt2": 256, "opt": 256}.get(family, 8192)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_what_peft_adapts_with_its_sizes(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = tiny(family)
    refused = ["out_proj"] if family == "mamba" else None  # Mamba's kernels bypass that module, so PEFT refuses it
    options = LoraConfig(r=3, target_modules="all-linear", exclude_modules=refused, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, options)
    factors = {name: tuple(p.shape) for name, p in adapted.named_parameters() if "lora_" in name}
    linears = {
        name: sizes for name, sizes in shapes(f"tiny:{family}").linears.items() if not refused or refused[0] not in name
    }
    expected = {}
    for name, (inputs, outputs) in linears.items():
        expected[f"base_model.model.{name}.lora_A.default.weight"] = (3, inputs)
        expected[f"base_model.model.{name}.lora_B.default.weight"] = (outputs, 3)
    assert factors == expected


def test_shapes_are_cached_and_then_need_neither_torch_nor_transformers(folder: Path) -> None:
    first = shapes(str(folder))
    code = (
        "import sys; from atoll.models.shapes import shapes; found = shapes(sys.argv[1]); "
        "print(found.count, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(first.count), "False", "False"]
    assert shapes(str(folder)) == first


def test_shapes_state_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert shapes(str(tmp_path / "half")).params["model.norm.weight"] == ((32,), "bfloat16")


def test_a_folder_without_a_model_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="no such folder"):
        resolve(str(tmp_path / "nothing"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(AtollError, match="holds no") as told:
        load_model(str(folder))
    assert "pytorch_model.bin" in told.value.details["found"]
    assert "pickled" in told.value.details["remedy"]
    (folder / "config.json").unlink()
    with pytest.raises(AtollError, match=r"config\.json is missing"):
        load_model(str(folder))


def test_a_damaged_model_is_told(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AtollError, match="cannot load the model") as told:
        load_model(str(folder))
    assert str(folder) in told.value.details["where"]


def test_missing_params_are_told_instead_of_drawn_at_random(folder: Path) -> None:
    params = load_file(folder / "model.safetensors")
    del params["model.layers.1.mlp.up_proj.weight"]
    save_file(params, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AtollError, match="lack params") as told:
        load_model(str(folder))
    assert "model.layers.1.mlp.up_proj.weight" in told.value.details["found"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "model_type t5"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
    ],
)
def test_a_model_of_another_kind_is_told(folder: Path, change: dict[str, object], found: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(AtollError, match="not a causal language model") as told:
        shapes(str(folder))
    assert found in told.value.details["found"]


def test_code_in_a_models_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(AtollError, match="configuration"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_config_that_is_not_json_is_told(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(AtollError, match="cannot read the model's configuration"):
        shapes(str(folder))


def test_a_model_that_is_not_on_the_hub_or_offline_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AtollError, match="cannot get the model from the hub") as told:
        load_model("atoll-test/no-such-model")
    assert "hf download atoll-test/no-such-model" in told.value.details["remedy"]
    assert "smollm2-135m" in told.value.details["remedy"]
    with pytest.raises(AtollError, match="hub"):
        resolve("smollm2-360m")


def test_a_model_in_the_hubs_cache_is_found_offline_with_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "snapshots").mkdir(parents=True)
    folder.rename(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ref = resolve("org/name")
    assert (ref.kind, ref.location, ref.revision) == ("hub", "org/name", commit)
    assert ref.identity == resolve(f"org/name@{commit}").identity
    assert load_model("org/name")[0].config.model_type == "llama"
    with pytest.raises(AtollError, match="hub"):
        resolve("org/name@another")


def test_a_model_that_does_not_fit_says_what_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_memory", lambda device: 100_000)
    with pytest.raises(AtollError, match="does not fit into memory") as told:
        load_model(str(folder), dtype="float32")
    assert "5e-05 billion params in bfloat16" in told.value.details["allowed"]
    load_model(str(folder), dtype="bfloat16")


def test_a_containers_limit_counts_as_memory(tmp_path: Path) -> None:
    assert load._group_free(tmp_path) == 2**63 - 1
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert load._group_free(tmp_path) == 2**63 - 1
    (tmp_path / "memory.max").write_text("1000\n")
    assert load._group_free(tmp_path) == 900
    assert 0 < load.free_memory(torch.device("cpu")) < 2**60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "unknown dtype"),
        ({"device": "gpu"}, "unknown device"),
        ({"device": "cuda:99"}, "no such GPU here"),
        ({"quantize": "3bit"}, "unknown quantization"),
        ({"quantize": "4bit", "device": "cpu"}, "needs a GPU"),
    ],
)
def test_choices_that_cannot_be_had_are_told(options: dict[str, str], message: str) -> None:
    with pytest.raises(AtollError, match=message):
        load_model("tiny:llama", **options)  # type: ignore[arg-type]


def test_a_4bit_base_without_its_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AtollError, match="needs bitsandbytes") as told:
        load.choose_quantization("4bit", torch.bfloat16, torch.device("cuda"))
    assert told.value.details["remedy"] == "pip install bitsandbytes"


@pytest.mark.parametrize("name", ["tiny:lama", "smollm2-135", "a/b/c", ""])
def test_a_name_that_stands_for_nothing_is_told(name: str) -> None:
    with pytest.raises(AtollError, match=r"unknown family|no such model"):
        resolve(name)
