"""Export a run's adapter: a folder that plain `peft` loads, with a README that says where it comes from.

The folder appears as a whole or not at all, and only after the tensors in it were compared with the run's checkpoint.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from atoll import parts, recipe
from atoll.build import choose_model
from atoll.cache import Say, quiet
from atoll.errors import AtollError
from atoll.models.presets import PRESETS
from atoll.models.spaces import LoRA
from atoll.params import Params, equal
from atoll.record.card import human_bytes, markdown_table, privacy_section
from atoll.record.folder import RunFolder
from atoll.record.measured import loss_table
from atoll.record.story import read_story
from atoll.result import load_result, tuned_params, unfinished

TENSORS = "adapter_model.safetensors"


def export_adapter(folder: RunFolder, out: Path, say: Say = quiet) -> Path:
    """Writes the adapter of a run to the new folder `out`, and returns it.

    Raises:
        AtollError: the run trained no adapter or has no result yet, `out` is there already, or what was written is not
            what the checkpoint holds.
    """
    written, _ = recipe.read(str(folder.recipe))
    space = parts.make("space", written.finetune.space, "finetune.space")
    if not isinstance(space, LoRA):
        raise AtollError(
            "the run trained no adapter", where=folder.name, found=f"space {parts.spec(written.finetune.space, '')}",
            allowed="lora", remedy=f"the trained model itself is in {folder.adapter}",
        )  # fmt: skip
    if out.exists():
        raise AtollError("the folder is there already", where=str(out), remedy="choose another by --out, or remove it")
    tuned, rounds = tuned_params(folder)
    with appearing(out) as partial:
        fill(folder, partial, say)
        check(partial / TENSORS, tuned, space)
        point_to_base(partial / "adapter_config.json", hub_id(str(choose_model(written.model).name)))
        (partial / "README.md").write_text(readme(folder, written, rounds), encoding="utf-8")
    return out


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fill(folder: RunFolder, target: Path, say: Say) -> None:
    """The adapter as the finished run left it; for one that is not finished, made from its checkpoint."""
    if (folder.adapter / TENSORS).exists():
        shutil.copytree(folder.adapter, target, dirs_exist_ok=True)
        return
    result = load_result(folder, say)
    result.space.save(result.model, target)
    result.tokenizer.save_pretrained(target)


def check(path: Path, expected: Params, space: LoRA) -> None:
    """Compares the tensors of a file that train with the checkpoint's, bit for bit. A frozen A is in the file alone."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not space.freezes(name)]  # noqa: SIM118 - safe_open is no dict
        found = {name: file.get_tensor(name) for name in names}
    if not equal(found, {name: x.to(torch.float32) for name, x in expected.items()}):
        odd = sorted(found.keys() ^ expected.keys()) or ["values"]
        raise AtollError(
            "the adapter is not what the checkpoint holds", where=str(path), found=odd[0],
            remedy="remove the run's folder `adapter` and export again: it is then made from the checkpoint",
        )  # fmt: skip


def hub_id(model: str) -> str:
    """Where others find the base model: a preset's original on the hub, else the name itself."""
    return PRESETS[model].hub_id if model in PRESETS else model


def point_to_base(config: Path, base: str) -> None:
    """The adapter names its base by a name that means something on other machines, not by a folder of this one's cache."""
    written = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(written | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")


def loads(base: str) -> list[str]:
    """The lines of Python that load the base model. Tiny random ones are made by Atoll and lie nowhere."""
    if base.startswith("tiny:"):
        return ["from atoll.models.load import load_model", "", f'base, tokenizer = load_model("{base}")']
    return [
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
    ]


def readme(folder: RunFolder, written: recipe.Recipe, rounds: int) -> str:
    """The card of the adapter: what it is, how it is loaded, what it gained."""
    base = hub_id(str(choose_model(written.model).name))
    story = read_story(folder)
    table = loss_table(story) if story else None
    lines = [
        "---", "library_name: peft", f"base_model: {base}", "tags: [lora, federated]", "---", "",
        f"# {folder.name}", "",
        f"A LoRA adapter for {base}, fine-tuned over {rounds} rounds by clients whose data stayed with them.", "",
        "```python",
        "from peft import PeftModel", *loads(base), "",
        'model = PeftModel.from_pretrained(base, "this-folder")',
        "```", "",
    ]  # fmt: skip
    if early := unfinished(folder, rounds):
        lines += [f"The run is not finished: this is the adapter {early}.", ""]
    if story:
        moved = f"{human_bytes(story.bytes_down)} down and {human_bytes(story.bytes_up)} up"
        lines += [f"{len(story.started.clients)} clients; {moved} travelled.", ""]
    if table:
        lines += ["## Held-out loss", "", *markdown_table(table), ""]
    return "\n".join([*lines, *(privacy_section(story) if story else [])]) + "\n"
