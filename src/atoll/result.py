"""A run's result: the model with what it learned, and what it was before. Chat, export and everything after start here.

The values come from the checkpoint, so that a run which is under way, or was stopped, has a result too; the recipe says
how to load the model. The clients' data are not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from atoll import parts, recipe
from atoll.build import choose_model
from atoll.cache import Say, quiet
from atoll.client import FileStore
from atoll.errors import AtollError, closest
from atoll.keys import key
from atoll.local.work import PERSONAL
from atoll.models.spaces import Space, read, write
from atoll.params import Params, under
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.record.story import read_story
from atoll.stream import REFERENCE, UPDATE

if TYPE_CHECKING:
    from atoll.models.processor import MultimodalProcessor


@dataclass(frozen=True)
class Result:
    """A model that can be switched between what it was and what it has become."""

    model: nn.Module
    tokenizer: Any
    space: Space
    recipe: recipe.Recipe
    base: Params
    tuned: Params
    rounds: int
    """How many rounds the tuned params have behind them."""
    processor: MultimodalProcessor | None = None
    """Of texts with pictures and sounds; None for a model that takes text alone."""

    def use(self, base: bool) -> None:
        """Puts the base params, or the tuned ones, into the model."""
        write(self.space, self.model, self.base if base else {**self.base, **self.tuned})


def tuned_params(folder: RunFolder) -> tuple[Params, int]:
    """The params after the run's last whole round, and the number of rounds."""
    if not folder.checkpoint.exists():
        raise AtollError(
            "the run has no result yet", where=str(folder.path), found="no checkpoint",
            remedy=f"`atoll resume {folder.name}`",
        )  # fmt: skip
    state = load_state(folder.checkpoint)
    return {**state.fixed.get(REFERENCE, {}), **state.params[UPDATE]}, state.round  # what is personal as it began


def unfinished(folder: RunFolder, rounds: int) -> str:
    """`after round 5 of 60, stopped` for a run that has not ended; empty for one that has."""
    story = read_story(folder)
    if story is None or story.ended:
        return ""
    return f"after round {rounds} of {story.started.rounds}, {'running' if folder.is_running() else 'stopped'}"


def processor_of(model: Any, tokenizer: Any) -> MultimodalProcessor | None:
    """Of a loaded model, wrapped by PEFT or not."""
    from atoll.models.multimodal import MultimodalModel
    from atoll.models.processor import MultimodalProcessor

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return MultimodalProcessor(tokenizer, inner.config) if isinstance(inner, MultimodalModel) else None


def own_params(folder: RunFolder, client: str) -> Params:
    """What stays at a client of the run, as after its last task. Raises AtollError where there is nothing."""
    state = load_state(folder.checkpoint)
    here = [name for name in state.acknowledged if folder.client(name).exists()]
    kept = FileStore(folder.client(client)).settle(state.acknowledged[client]) if client in here else {}
    own = under(PERSONAL, under("work", kept))
    if not own:
        raise AtollError(
            "nothing of this client's own is here", where=f"{folder.name}: --client", found=client,
            allowed="a client of a run with `finetune.personal` that was simulated here: " + (", ".join(here) or "none"),
            remedy=closest(client, here) if here else "what is a site's own lies at the site: leave --client out",
        )  # fmt: skip
    return own


def load_result(folder: RunFolder, say: Say = quiet, client: str | None = None) -> Result:
    """Loads the run's model, prepared in the run's space, with the tuned params in it; of a client, with its own parts.

    Raises:
        AtollError: the run has no checkpoint, its model cannot be loaded, or is one of the user's own factory.
    """
    tuned, rounds = tuned_params(folder)
    tuned |= own_params(folder, client) if client else {}
    written, _ = recipe.read(str(folder.recipe))
    choice = choose_model(written.model)
    if choice.own_factory:
        raise AtollError(
            "the model comes from a factory and has no tokenizer", where=f"{folder.name}: model", found=choice.name,
            allowed="a named model, a folder, or a hub id",
        )  # fmt: skip
    from atoll.models.load import load_model

    say(f"loading {choice.name}")
    model, tokenizer = load_model(choice.name, **choice.options, say=say)
    space: Space = parts.make("space", written.finetune.space, "finetune.space")
    prepared = space.prepare(model, key(written.seed, "init"))
    base = {name: x.clone() for name, x in read(space, prepared).items()}
    result = Result(prepared.eval(), tokenizer, space, written, base, tuned, rounds, processor_of(model, tokenizer))
    result.use(base=False)
    return result
