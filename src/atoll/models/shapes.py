"""The shapes of a model's params and linear modules, found without loading its params.

A plan needs them to say what trains, what travels and what it weighs. The model is built on torch's meta device from
its configuration once; the answer lies in the cache under the model's identity, so that later plans import no transformers.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.cache import Say, home, quiet, write_file
from atoll.models.assembled import Assembled
from atoll.models.causal import causal_config
from atoll.models.ref import ModelRef, folder_of, resolve
from atoll.models.tiny import tiny_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMAT = "2"
"""Raise this when `Shapes` changes: it is part of the name of the cached answer."""


@dataclass(frozen=True)
class Shapes:
    """What a plan knows of a model.

    Args:
        identity: of the model's content.
        family: the model type in transformers: "llama", "gpt2", ...
        params: name -> (shape, dtype in the checkpoint); params that share storage stand under their first name.
        linears: name of each linear module -> (in, out); GPT-2's Conv1D modules too, the output embeddings not.
        layers: how many layers it has.
        hidden: features of a hidden state.
        vocab: tokens of the vocabulary.
        context: the most tokens a sample may have; 0 where the family sets no bound.
        text: what the names of the language model's modules begin with; empty where the model is nothing else.
    """

    identity: str
    family: str
    params: dict[str, tuple[tuple[int, ...], str]]
    linears: dict[str, tuple[int, int]]
    layers: int
    hidden: int
    vocab: int
    context: int
    text: str = ""

    @property
    def count(self) -> int:
        """The number of params."""
        return sum(math.prod(shape) for shape, _ in self.params.values())


def shapes(name: str | Assembled, say: Say = quiet) -> Shapes:
    """The shapes of the model `name`.

    Raises:
        AtollError: the model is not there, or is not a causal language model.

    Example:
        >>> found = shapes("tiny:gpt2")
        >>> found.linears["transformer.h.0.attn.c_attn"], found.params["transformer.wte.weight"]
        ((32, 96), ((260, 32), 'float32'))
    """
    ref = resolve(name)
    known = _note(ref)
    return _read(known) if known.is_file() else shapes_of(ref, None if ref.kind == "tiny" else folder_of(ref, say))


def shapes_of(ref: ModelRef, folder: Path | None) -> Shapes:
    """`shapes` of a resolved model whose files are in `folder` (None: a tiny model)."""
    note = _note(ref)
    if not note.is_file():
        found = measure(ref.identity, read_config(ref, folder))
        write_file(note, json.dumps(asdict(found)).encode())
    return _read(note)


def _note(ref: ModelRef) -> Path:
    return home() / "shapes" / f"{ref.identity}-{FORMAT}.json"


def _read(note: Path) -> Shapes:
    raw: dict[str, Any] = json.loads(note.read_text())
    raw["params"] = {name: (tuple(shape), dtype) for name, (shape, dtype) in raw["params"].items()}
    raw["linears"] = {name: (first, second) for name, (first, second) in raw["linears"].items()}
    return Shapes(**raw)


def read_config(ref: ModelRef, folder: Path | None) -> PretrainedConfig:
    """The model's configuration, if it is one of a causal language model. Raises AtollError, see `causal_config`."""
    return tiny_config(ref.location) if folder is None else causal_config(folder)


def measure(identity: str, config: PretrainedConfig) -> Shapes:
    """Build the model on the meta device, where params have shapes and no storage, and read them off."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    head, text = model.get_output_embeddings(), config.get_text_config()
    return Shapes(
        identity=identity,
        family=config.model_type,
        params={name: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in model.named_parameters()},
        linears={name: sizes for name, m in model.named_modules() if m is not head and (sizes := _in_out(m))},
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        context=_context(text),
        text="language_model." if hasattr(model, "language_model") else "",
    )


def _in_out(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear module, None for any other. A Conv1D is a linear module that holds [in, out]."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def _context(config: PretrainedConfig) -> int:
    """The bound of the position embeddings. BLOOM's and Mamba's positions have none."""
    return int(getattr(config, "max_position_embeddings", 0) or 0)
