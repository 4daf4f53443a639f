"""Export a run's result, as an adapter that plain `peft` loads or merged, with a README that says where it comes from.

The folder appears as a whole or not at all, and only after the tensors in it were compared with the run's checkpoint.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from atoll import parts, recipe, schema
from atoll.build import choose_model
from atoll.cache import Say, quiet
from atoll.data.answers import ChatFormat
from atoll.errors import AtollError
from atoll.models.assembled import Assembled, assembled
from atoll.models.presets import PRESETS, no_progress_bars
from atoll.models.spaces import LoRA, split
from atoll.outcome import Outcome, outcome, space_of
from atoll.params import Params, equal
from atoll.record.card import human_bytes, markdown_table, privacy_section
from atoll.record.folder import RunFolder
from atoll.record.measured import measured
from atoll.record.story import Story, read_story
from atoll.result import load_result

TENSORS = "adapter_model.safetensors"

KEPT = 0.5
"""How far a merged model may be from the adapted one, of the base's distance: its weights are rounded once more."""


def export_adapter(folder: RunFolder, out: Path, say: Say = quiet, client: str | None = None) -> Path:
    """Writes the adapter of a run to the new folder `out`, and returns it; of a client, with its own parts.

    Raises:
        AtollError: the run trained no adapter or has no result yet, `out` is there already, or what was written is not
            what the checkpoint holds.
    """
    space = adapted(folder)
    refuse_there(out)
    found = outcome(folder)
    tuned = {**found.params, **(found.own(client) if client else {})}
    with appearing(out) as partial:
        fill(folder, partial, say, client)
        check(partial / TENSORS, tuned, space, [] if client else found.recipe.finetune.personal)
        point_to_base(partial / "adapter_config.json", choose_model(found.recipe.model).name)
        (partial / "README.md").write_text(readme(found, adapter_use(found.recipe), client), encoding="utf-8")
    return out


def export_merged(folder: RunFolder, out: Path, say: Say = quiet, client: str | None = None) -> Path:
    """Writes the model of a run, the adapter merged into it, to the new folder `out`, and returns it.

    Raises:
        AtollError: as for `export_adapter`; or the merged model does not say what the adapted one says.
    """
    adapted(folder)
    refuse_there(out)
    result = load_result(folder, say, client)
    result.use(base=True)
    before = logits_of(result.model, result.tokenizer)
    result.use(base=False)
    said = logits_of(result.model, result.tokenizer)
    say("merging the adapter into the model")
    merged: Any = result.model.merge_and_unload()  # type: ignore[operator]
    lost, learned = (float((one - said).norm()) for one in (logits_of(merged, result.tokenizer), before))
    if not lost <= KEPT * learned:
        raise AtollError(
            "the merged model does not say what the adapted one says", where=folder.name,
            found=f"its logits are {lost:.3g} from the adapted one's, the base's {learned:.3g}",
            allowed=f"{KEPT:.0%} of what the run has changed: small changes are rounded away in {result.model.dtype}",
            remedy=f"`atoll export {folder.name} --to adapter` loses nothing",
        )  # fmt: skip
    with appearing(out) as partial, no_progress_bars():
        merged.save_pretrained(partial)
        (result.processor or result.tokenizer).save_pretrained(partial)
        use = merged_use(result.outcome.recipe)
        (partial / "README.md").write_text(readme(result.outcome, use, client), encoding="utf-8")
    return out


def adapted(folder: RunFolder) -> LoRA:
    """A run's space. Raises AtollError where that is no adapter's."""
    written, _ = recipe.read(str(folder.recipe))
    space = space_of(written)
    if not isinstance(space, LoRA):
        raise AtollError(
            "the run trained no adapter", where=folder.name, found=f"space {parts.spec(written.finetune.space, '')}",
            allowed="lora", remedy=f"the trained model itself is in {folder.adapter}",
        )  # fmt: skip
    return space


def refuse_there(out: Path) -> None:
    """Nothing is written over."""
    if out.exists():
        raise AtollError("the folder is there already", where=str(out), remedy="choose another by --out, or remove it")


ASKED = [
    {"role": "user", "content": "A train leaves at 9 and arrives at 11. How long does it take?"},
    {"role": "assistant", "content": "It takes 2 hours."},
]
"""Text: what models say of tokens in no order is hardly of what they have learned, and rounding moves it more than that."""


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    """Of a short conversation, float32 [1, tokens, V]."""
    ids = tokenizer(ChatFormat(tokenizer).render(ASKED), return_tensors="pt").input_ids
    found: torch.Tensor = model(input_ids=ids.to(next(model.parameters()).device)).logits
    return found.float()


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


def fill(folder: RunFolder, target: Path, say: Say, client: str | None) -> None:
    """The adapter as the finished run left it; a client's, or one of a run that is not finished, from the checkpoint."""
    if (folder.adapter / TENSORS).exists() and client is None:
        shutil.copytree(folder.adapter, target, dirs_exist_ok=True)
        return
    result = load_result(folder, say, client)
    result.space.save(result.model, target)
    result.tokenizer.save_pretrained(target)


def check(path: Path, expected: Params, space: LoRA, personal: Sequence[str]) -> None:
    """Compares the tensors of a file that train with the checkpoint's, bit for bit.

    In the file alone are a frozen A, and what is clients' own, as it was at the start.
    """
    with safe_open(path, framework="pt") as file:
        trained = {name: name for name in file.keys() if not space.freezes(name)}  # noqa: SIM118 - safe_open is no dict
        found = {name: file.get_tensor(name) for name in split(trained, personal)[0]}
    if not equal(found, {name: x.to(torch.float32) for name, x in expected.items()}):
        odd = sorted(found.keys() ^ expected.keys()) or ["values"]
        raise AtollError(
            "the adapter is not what the checkpoint holds", where=str(path), found=odd[0],
            remedy="remove the run's folder `adapter` and export again: it is then made from the checkpoint",
        )  # fmt: skip


def hub_id(model: str) -> str:
    """Where others find the base model: a preset's original on the hub, else the name itself, without its commit."""
    return PRESETS[model].hub_id if model in PRESETS else model.removesuffix(f"@{commit_of(model)}")


def commit_of(model: str) -> str:
    """The commit or tag by which a model of a hub is named; empty for others."""
    found = re.fullmatch(r"\w[\w.-]*/[\w.-]+@(\w[\w.-]*)", model)
    return found[1] if found else ""


def bases(model: str | Assembled) -> list[str]:
    """The base model by its name elsewhere; of one put together, its parts that a hub has."""
    if isinstance(model, str):
        return [hub_id(model)]
    found = (hub_id(part) for part in (model.language, *(sense.encoder for sense in model.senses.values())))
    return [one for one in found if re.fullmatch(r"\w[\w.-]*/[\w.-]+", one)]


def point_to_base(config: Path, base: str | Assembled) -> None:
    """The adapter names its base by a name that means something on other machines, not by a folder of this one's cache.

    One that was put together has none: the card says how it is made.
    """
    written = json.loads(config.read_text(encoding="utf-8"))
    name, commit = (hub_id(base), commit_of(base) or None) if isinstance(base, str) else (None, None)
    named = {"base_model_name_or_path": name, "revision": commit}
    config.write_text(json.dumps(written | named, indent=2), encoding="utf-8")


def loads(written: schema.Recipe) -> list[str]:
    """The lines of Python that load the base model. What Atoll makes or puts together lies nowhere else."""
    name = choose_model(written.model).name
    if isinstance(name, Assembled):
        names = inspect.signature(assembled).parameters
        own = {key: value for key, value in spec_of(written).items() if key in names}
        return [
            "from atoll.models.assembled import assembled", "from atoll.models.load import load_model", "",
            f"base, tokenizer = load_model(assembled(**{own}))",
        ]  # fmt: skip
    if name.startswith("tiny:"):
        return ["from atoll.models.load import load_model", "", f'base, tokenizer = load_model("{name}")']
    pinned = f', revision="{commit}"' if (commit := commit_of(name)) else ""
    return [
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{hub_id(name)}"{pinned})',
    ]


def spec_of(written: schema.Recipe) -> dict[str, Any]:
    """What a recipe says of its model beside its kind."""
    return dict(parts.spec(written.model, "model").arguments)


class Use(NamedTuple):
    """What an export is for its card."""

    library: str
    tags: str
    what: str
    code: list[str]


def adapter_use(written: schema.Recipe) -> Use:
    """See `readme`."""
    code = [
        "from peft import PeftModel",
        *loads(written),
        "",
        'model = PeftModel.from_pretrained(base, "this-folder")',
    ]
    return Use("peft", "[lora, federated]", "A LoRA adapter for", code)


def merged_use(written: schema.Recipe) -> Use:
    """See `readme`."""
    ours = isinstance(choose_model(written.model).name, Assembled)
    code = [
        *(["import atoll.models.processor  # the model's class, and its processor's"] if ours else []),
        f"from transformers import AutoModelForCausalLM, {'AutoProcessor' if ours else 'AutoTokenizer'}",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this-folder")',
        'processor = AutoProcessor.from_pretrained("this-folder")'
        if ours
        else 'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
    ]
    return Use("transformers", "[federated]", "A model merged from an adapter and", code)


def asks(model: Assembled) -> list[str]:
    """The lines of Python that ask a merged model about the media that it takes."""
    parts_ = ", ".join(f'{{"type": "{name}", "path": "a.{FILE[name]}"}}' for name in model.senses)
    return [
        f'content = [{parts_}, {{"type": "text", "text": "What is it?"}}]',
        'chat = [{"role": "user", "content": content}]',
        "inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)",
        "print(processor.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))",
    ]


FILE = {"image": "png", "audio": "wav"}


def readme(found: Outcome, use: Use, client: str | None) -> str:
    """The card of an export: what it is, how it is loaded, what it gained."""
    model = choose_model(found.recipe.model).name
    base, named = hub_id(model) if isinstance(model, str) else str(model), bases(model)
    story = read_story(found.folder)
    lines = [
        "---", f"library_name: {use.library}", "base_model:", *(f"- {one}" for one in named), f"tags: {use.tags}", "---", "",
        f"# {found.folder.name}", "",
        f"{use.what} {base}, fine-tuned over {found.rounds} rounds by clients whose data stayed with them.", "",
        "```python", *use.code, "```", "",
    ]  # fmt: skip
    if early := found.early:
        lines += [f"The run is not finished: this is its result {early}.", ""]
    if isinstance(model, Assembled) and use.library == "transformers":
        lines += ["```python", *asks(model), "```", ""]
    if words := found.recipe.finetune.personal:
        those = f"with {client}'s" if client else "without them: --client of `atoll export` names one"
        lines += [f"Clients have parts of their own (names with {', '.join(words)}). This is the model {those}.", ""]
    if story:
        moved = f"{human_bytes(story.bytes_down)} down and {human_bytes(story.bytes_up)} up"
        lines += [f"{len(story.started.clients)} clients; {moved} travelled.", ""]
        lines += measured_section(story)
        lines += privacy_section(story)
    return "\n".join(lines) + "\n"


def measured_section(story: Story) -> list[str]:
    """Losses and accuracies."""
    tables = [line for table in measured(story) for line in (*markdown_table(table), "")]
    return ["## Measured on held-out samples", "", *tables] if tables else []
