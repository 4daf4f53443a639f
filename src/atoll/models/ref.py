"""What a model's name in a recipe stands for, and the identity of its content.

    smollm2-135m     a preset (models/presets.py)
    tiny:llama       a random tiny model (models/tiny.py)
    ./folder         a folder with config.json, *.safetensors and a tokenizer
    org/name         a model on the hub; org/name@revision pins a commit or a tag

and what is no name, `Assembled`, is a model put together of such parts (models/assembled.py).

The identity names the content, not the place: caches, plans and checkpoints are keyed by it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from atoll.cache import Say, content_hash, file_hash, home, once, quiet
from atoll.errors import AtollError, closest, placed
from atoll.models.assembled import ASSEMBLY, Assembled, put_together
from atoll.models.encoders import ENCODERS, preset_folder
from atoll.models.presets import PRESETS, carrier_folder, no_progress_bars, preset_identity
from atoll.models.tiny import FAMILIES, tiny_encoder, tiny_encoder_identity

MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "processor_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
]
"""What of a folder, or of a repository on a hub, is the model; what lies beside it is not."""

HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""


@dataclass(frozen=True)
class ModelRef:
    """A resolved name.

    Args:
        name: as written in the recipe.
        kind: "preset", "tiny", "folder", "hub" or "assembled".
        location: the preset, the family, the absolute folder, or the hub id.
        identity: 32 hex digits of the content; equal identities mean equal params and tokenizer.
        revision: the commit, for a hub model.
        parts: of an assembled model.
    """

    name: str
    kind: str
    location: str
    identity: str
    revision: str = ""
    parts: Assembled | None = None

    @property
    def tiny(self) -> bool:
        """Whether the language model is a random tiny one."""
        return self.kind == "tiny" or (self.parts is not None and self.parts.language.startswith("tiny:"))


def resolve(name: str | Assembled) -> ModelRef:
    """Find out what `name` stands for, without loading or converting anything.

    Raises:
        AtollError: nothing goes by that name here, or it is a folder that holds no model.

    Example:
        >>> resolve("tiny:llama").kind, resolve("smollm2-135m").location
        ('tiny', 'smollm2-135m')
    """
    if isinstance(name, Assembled):
        return _assembled(name)
    if name.startswith("tiny:"):
        return _tiny(name)
    if name in PRESETS and PRESETS[name].carrier:
        return ModelRef(name, "preset", name, preset_identity(name))
    if name in PRESETS:
        return _hub(name, PRESETS[name].hub_id)
    if name.startswith(("/", "./", "../", "~")) or (name and Path(name).is_dir()):
        return _folder(name)
    if is_hub_id(name):
        return _hub(name, name)
    raise AtollError(
        "there is no such model",
        found=name,
        allowed=f"{', '.join(PRESETS)}; tiny:FAMILY; ./folder; org/name on the hub",
        remedy=closest(name, PRESETS),
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a model on a hub: org/name, and no folder here.

    >>> is_hub_id("org/name@main"), is_hub_id("./folder"), is_hub_id("smollm2-135m")
    (True, False, False)
    """
    return name.count("/") == 1 and name[0] not in "/.~" and not Path(name).is_dir()


def folder_of(ref: ModelRef, say: Say = quiet) -> Path:
    """The local folder with the model's files; fetches and converts what is not there yet. Not for tiny models."""
    if ref.parts is not None:
        return _assembled_folder(ref.parts, ref.identity, say)
    if ref.kind == "preset":
        return carrier_folder(ref.location, say)
    if ref.kind == "hub":
        say(f"fetching {ref.location} from the hub, unless it is in the hub's cache")
        return _snapshot(ref)
    return Path(ref.location)


def resolve_encoder(name: str, modality: str) -> ModelRef:
    """What an encoder's name stands for: a preset of its own, `tiny:FAMILY`, a folder, or a hub id.

    Raises:
        AtollError: nothing goes by that name here, or it is an encoder of another modality.
    """
    where = f"model.{modality}.encoder"
    if preset := ENCODERS.get(name):
        if preset.modality != modality:
            of_this = [known for known, one in ENCODERS.items() if one.modality == modality]
            raise AtollError(
                f"this encoder takes no {modality}", where=where, found=name,
                allowed=f"{', '.join(of_this)}; ./folder; org/name on the hub",
            )  # fmt: skip
        return ModelRef(name, "encoder", name, preset.identity)
    if name.startswith("tiny:"):
        return ModelRef(name, "tiny", name, tiny_encoder_identity(name, modality))
    if "/" not in name and not Path(name).is_dir():
        known = [one for one, preset in ENCODERS.items() if preset.modality == modality]
        raise AtollError(
            "there is no such encoder", where=where, found=name,
            allowed=f"{', '.join(known)}; ./folder; org/name on the hub", remedy=closest(name, known),
        )  # fmt: skip
    with placed(where):
        return resolve(name)


def encoder_folder(ref: ModelRef, modality: str, say: Say = quiet) -> Path:
    """The folder with an encoder and its preprocessing."""
    if ref.kind == "encoder":
        return preset_folder(ref.location, say)
    return tiny_encoder(ref.location, modality) if ref.kind == "tiny" else folder_of(ref, say)


def _assembled(one: Assembled) -> ModelRef:
    """Its identity is known before anything is fetched, for parts whose identities are."""
    encoders = {name: resolve_encoder(sense.encoder, name).identity for name, sense in one.senses.items()}
    senses = {name: [dict(sense.connector), sense.seconds] for name, sense in one.senses.items()}
    ready = {name: ref.identity for name, ref in _ready_made(one).items()}
    facts = json.dumps([ASSEMBLY, resolve(one.language).identity, encoders, senses, ready], sort_keys=True)
    return ModelRef(str(one), "assembled", str(one), content_hash(facts), parts=one)


def _ready_made(one: Assembled) -> dict[str, ModelRef]:
    """The ready-made models whose connectors are taken, by modality."""
    found = {}
    for name, sense in one.senses.items():
        if of := sense.connector.get("of"):
            with placed(f"model.{name}.connector.of"):
                found[name] = resolve(of)
    return found


def _assembled_folder(one: Assembled, identity: str, say: Say) -> Path:
    """Put together the first time."""

    def build(folder: Path) -> None:
        language = resolve(one.language)
        with no_progress_bars():
            encoders = {n: encoder_folder(resolve_encoder(s.encoder, n), n, say) for n, s in one.senses.items()}
            ready = {name: folder_of(ref, say) for name, ref in _ready_made(one).items()}
            say(f"putting {one} together once")
            put_together(one, None if language.tiny else folder_of(language, say), encoders, ready, folder)

    return once(home() / "models" / f"assembled-{identity[:12]}", build)


def _tiny(name: str) -> ModelRef:
    family = name.removeprefix("tiny:")
    if family not in FAMILIES:
        raise AtollError("unknown family of tiny models", found=family, remedy=closest(family, FAMILIES))
    return ModelRef(name, "tiny", family, content_hash("tiny", family, json.dumps(FAMILIES[family], sort_keys=True)))


def _folder(name: str) -> ModelRef:
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        remedy = closest(folder.name, near) if near else "check the path; save_pretrained writes such a folder"
        raise AtollError("there is no such folder", where=str(folder), found=name, remedy=remedy)
    params = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        raise AtollError(
            "the folder holds no model: config.json is missing", where=str(folder), found=_contents(folder)
        )
    if not params:
        remedy = "save the model with save_pretrained, which writes safetensors; pickled files (*.bin) are not read"
        raise AtollError("the folder holds no *.safetensors", where=str(folder), found=_contents(folder), remedy=remedy)
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    return ModelRef(name, "folder", str(folder), content_hash(*(f"{file.name} {file_hash(file)}" for file in files)))


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "an empty folder"


def _hub(name: str, hub_id: str) -> ModelRef:
    """Ask for config.json alone: its place in the hub's cache tells the commit.

    What is in that cache stands, without asking the hub again: runs repeat and work offline. `hf download` renews it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    hub_id, _, revision = hub_id.partition("@")
    try:
        config = try_to_load_from_cache(hub_id, "config.json", revision=revision or None)
        if not isinstance(config, str):
            url = hf_hub_url(hub_id, "config.json", revision=revision or None)
            get_hf_file_metadata(url, timeout=HUB_SECONDS)  # asks once; the download retries for half a minute
            config = hf_hub_download(hub_id, "config.json", revision=revision or None)
    except Exception as error:  # the hub's client raises its own, httpx's and OSError
        raise _not_there(name, hub_id, error) from error
    commit = Path(config).parent.name
    return ModelRef(name, "hub", hub_id, content_hash("hub", hub_id, commit), commit)


def _snapshot(ref: ModelRef) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref.location, revision=ref.revision, allow_patterns=MODEL_FILES))
    except Exception as error:  # as above
        raise _not_there(ref.name, ref.location, error) from error


def _not_there(name: str, hub_id: str, error: Exception) -> AtollError:
    return AtollError(
        "cannot get the model from the hub",
        where=name,
        found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        remedy=f"where there is a network: hf download {hub_id} --local-dir model; here: model: ./model. "
        "Without a hub, model: smollm2-135m comes from the package index",
    )
