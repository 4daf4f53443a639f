"""A run's result: the model with what it learned, and what it was before. Chat, export and everything after start here.

The recipe says how to load the model; the values are the outcome's (outcome.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from atoll.build import choose_model
from atoll.cache import Say, quiet
from atoll.errors import AtollError
from atoll.keys import key
from atoll.models.shapes import shapes
from atoll.models.spaces import Space, read, write
from atoll.outcome import Outcome, base_of, outcome, refuse_other_base
from atoll.params import Params
from atoll.record.folder import RunFolder

if TYPE_CHECKING:
    from atoll.models.processor import MultimodalProcessor


@dataclass(frozen=True)
class Result:
    """A model that can be switched between what it was and what it has become."""

    model: nn.Module
    tokenizer: Any
    space: Space
    outcome: Outcome
    base: Params
    tuned: Params
    processor: MultimodalProcessor | None = None
    """Of texts with pictures and sounds; None for a model that takes text alone."""

    def use(self, base: bool) -> None:
        """Puts the base params, or the tuned ones, into the model."""
        write(self.space, self.model, self.base if base else {**self.base, **self.tuned})


def processor_of(model: Any, tokenizer: Any) -> MultimodalProcessor | None:
    """Of a loaded model, wrapped by PEFT or not."""
    from atoll.models.multimodal import MultimodalModel
    from atoll.models.processor import MultimodalProcessor

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return MultimodalProcessor(tokenizer, inner.config) if isinstance(inner, MultimodalModel) else None


def load_result(folder: RunFolder, say: Say = quiet, client: str | None = None) -> Result:
    """Loads the run's model, prepared in the run's space, with the tuned params in it; of a client, with its own parts.

    Raises:
        AtollError: the run has no checkpoint, its model cannot be loaded, or is one of the user's own factory.
    """
    found = outcome(folder)
    written = found.recipe
    tuned = {**found.begun, **found.params, **(found.own(client) if client else {})}
    choice = choose_model(written.model)
    if choice.own_factory:
        raise AtollError(
            "the model comes from a factory and has no tokenizer", where=f"{folder.name}: model", found=choice.name,
            allowed="a named model, a folder, or a hub id",
        )  # fmt: skip
    from atoll.models.load import load_model

    say(f"loading {choice.name}")
    base = base_of(shapes(choice.name).identity, found.space, written.seed)
    refuse_other_base(found.progress, base, f"{folder.name}: model", written.model)
    model, tokenizer = load_model(choice.name, **choice.options, say=say)
    space = found.space
    prepared = space.prepare(model, key(written.seed, "init"))
    before = {name: x.clone() for name, x in read(space, prepared).items()}
    result = Result(prepared.eval(), tokenizer, space, found, before, tuned, processor_of(model, tokenizer))
    result.use(base=False)
    return result
