"""Export: what is written is what the checkpoint holds, loads in plain peft, and appears as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import atoll
from atoll.errors import AtollError
from atoll.export import export_adapter, export_merged, hub_id
from atoll.models.tiny import tiny as tiny_model
from atoll.outcome import outcome
from atoll.params import equal
from atoll.record.folder import RunFolder
from support import Atoll


@pytest.fixture
def run(finished: Path, tmp_path: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "runs" / "tiny-1")))


def logits(folder: Path) -> torch.Tensor:
    model, tokenizer = tiny_model("llama")
    tuned = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        found: torch.Tensor = tuned(**tokenizer("item", return_tensors="pt")).logits
    return found


def test_plain_peft_loads_what_the_checkpoint_holds(run: RunFolder, tmp_path: Path) -> None:
    out = export_adapter(run, tmp_path / "out")
    assert equal(load_file(out / "adapter_model.safetensors"), outcome(run).params)
    assert torch.equal(logits(out), logits(run.adapter))
    model, tokenizer = tiny_model("llama")
    assert not torch.equal(logits(out), model(**tokenizer("item", return_tensors="pt")).logits)


def test_folder_has_a_card_and_nothing_stays_beside_it(run: RunFolder, tmp_path: Path) -> None:
    out = export_adapter(run, tmp_path / "new" / "out")
    text = (out / "README.md").read_text()
    assert "base_model:\n- tiny:llama\n" in text
    assert "PeftModel.from_pretrained" in text
    assert "| federated |" in text
    assert "the server sees every update by itself" in text
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert oct(out.stat().st_mode)[-3:] == "755"


def test_adapter_of_a_private_run_has_its_frozen_factor_and_says_what_was_spent(
    tmp_path: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    (tmp_path / "sites").mkdir()
    for site in ("north", "south"):
        lines = [json.dumps({"prompt": f"{site} {i}", "completion": str(i)}) for i in range(9)]
        (tmp_path / "sites" / f"{site}.jsonl").write_text("\n".join(lines))
    data, privacy = f"{{use: folders, path: {tmp_path / 'sites'}}}", "{use: central, clip: 1, delta: 0.1, epsilon: 9}"
    settings = ["model=tiny:llama", f"data={data}", f"finetune.privacy={privacy}", "finetune.weighting=uniform"]
    run = atoll.run("methods/ffa-lora", [*settings, "finetune.rounds=1", "finetune.local_steps=1", "name=private"])
    out = export_adapter(run, tmp_path / "out")
    assert {name.split(".lora_")[1][0] for name in load_file(out / "adapter_model.safetensors")} == {"A", "B"}
    assert torch.equal(logits(out), logits(run.adapter))
    assert "epsilon 9 at delta 0.1" in (out / "README.md").read_text()


def test_python_of_the_card_loads_the_adapter(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export_adapter(run, tmp_path / "this-folder")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], namespace)
    assert isinstance(namespace["model"], PeftModel)


def test_run_that_is_not_finished_is_exported_from_its_checkpoint(run: RunFolder, tmp_path: Path) -> None:
    finished = export_adapter(run, tmp_path / "one")
    shutil.rmtree(run.adapter)
    made = export_adapter(run, tmp_path / "two")
    assert (finished / "adapter_model.safetensors").read_bytes() == (made / "adapter_model.safetensors").read_bytes()
    one, two = (json.loads((folder / "adapter_config.json").read_text()) for folder in (finished, made))
    assert (one["r"], one["lora_alpha"]) == (two["r"], two["lora_alpha"]) == (8, 16)


def test_adapter_that_is_not_the_checkpoints_is_refused(run: RunFolder, tmp_path: Path) -> None:
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    tensors[first] = tensors[first].clone()
    tensors[first].view(-1)[0] += 1e-6
    save_file(tensors, path)
    with pytest.raises(AtollError, match="not what the checkpoint holds"):
        export_adapter(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_existing_folder_is_left_alone(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(AtollError, match="the folder is there already"):
        export_adapter(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_run_of_all_parameters_has_no_adapter(run: RunFolder, tmp_path: Path) -> None:
    text = run.recipe.read_text()
    assert "use: lora" in text
    run.recipe.write_text("\n".join(line for line in text.splitlines() if "rank" not in line and "alpha" not in line)
                          .replace("use: lora", "use: full"))  # fmt: skip
    with pytest.raises(AtollError, match="trained no adapter") as told:
        export_adapter(run, tmp_path / "out")
    assert told.value.details["allowed"] == "lora"


def test_preset_points_to_its_original() -> None:
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id("org/name") == "org/name"


def test_command_says_where(atoll: Atoll, run: RunFolder, tmp_path: Path) -> None:
    said = atoll("export", "latest", "--to", "adapter")
    assert (said.status, said.out) == (0, "tiny-1-adapter\n")
    assert (tmp_path / "tiny-1-adapter/adapter_config.json").exists()


def test_merged_model_says_what_the_adapted_one_says(run: RunFolder, tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export_merged(run, tmp_path / "this-folder")
    assert not (out / "adapter_config.json").exists()
    inputs = AutoTokenizer.from_pretrained(out)("item", return_tensors="pt")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out).eval()(**inputs).logits
    torch.testing.assert_close(found, logits(run.adapter), rtol=1e-4, atol=1e-4)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], namespace)
    assert type(namespace["model"]).__name__ == "LlamaForCausalLM"
    assert "| federated |" in (out / "README.md").read_text()


def test_merged_model_that_says_something_else_is_not_left(run: RunFolder, tmp_path: Path, monkeypatch) -> None:
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())
    with pytest.raises(AtollError, match="does not say what the adapted one says"):
        export_merged(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
