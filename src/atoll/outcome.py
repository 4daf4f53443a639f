"""What a run, a stage or a baseline has come to: the head of its checkpoint at once, its params when they are asked for.

Whatever begins with a result, is judged by it, exports it or asks it questions gets it from here. The values are the
checkpoint's, so that a run which is under way, or was stopped, has an outcome too. The clients' data are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from atoll import parts, recipe, schema
from atoll.cache import content_hash
from atoll.client import FileStore
from atoll.errors import AtollError, closest
from atoll.local.work import PERSONAL
from atoll.models.spaces import Space, draws
from atoll.params import Params, under
from atoll.record.checkpoint import load_start, load_state, read_head
from atoll.record.folder import RunFolder, find
from atoll.record.story import read_story
from atoll.stream import UPDATE


@dataclass(frozen=True)
class Progress:
    """What the loop of a stage remembers beside the state; a checkpoint keeps it."""

    plan: str
    data: Mapping[str, str]
    """What each client held when the run began, by content."""
    best: float = float("inf")
    without_better: int = 0
    record_bytes: int = 0
    seconds: float = 0.0
    ended: str = ""
    start: str = ""
    """The model and the params before the first round, by content."""
    base: str = ""
    """What params are laid on, by content: the model, and what the space draws and does not train."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """What else decides the result, and neither the plan nor the data say: where clients run, and the code."""


@dataclass(frozen=True)
class Outcome:
    """Of a run that has a checkpoint."""

    folder: RunFolder
    recipe: schema.Recipe
    rounds: int
    """That the params have behind them."""
    progress: Progress

    @cached_property
    def params(self) -> Params:
        """What trains and travels, after the last whole round."""
        return load_state(self.folder.checkpoint).params[UPDATE]

    @property
    def begun(self) -> Params:
        """What others had come to that it began with, all that trains; empty where it began with the base.

        Raises AtollError where it is not in the folder any more.
        """
        return load_start(self.folder.start) if self.recipe.starts else {}

    @property
    def space(self) -> Space:
        """In which it trained."""
        return space_of(self.recipe)

    @property
    def is_learning(self) -> bool:
        """Whether some process is about to change it."""
        return not self.progress.ended and self.folder.outermost.is_running()

    @property
    def early(self) -> str:
        """`after round 5 of 60, stopped` for a run that has not ended; empty for one that has."""
        story = read_story(self.folder)
        if story is None or story.ended:
            return ""
        state = "running" if self.folder.outermost.is_running() else "stopped"
        return f"after round {self.rounds} of {story.started.rounds}, {state}"

    def own(self, client: str) -> Params:
        """What stays at a client, as after its last task. Raises AtollError where there is nothing."""
        acknowledged = load_state(self.folder.checkpoint).acknowledged
        here = [name for name in acknowledged if self.folder.client(name).exists()]
        kept = FileStore(self.folder.client(client)).settle(acknowledged[client]) if client in here else {}
        own = under(PERSONAL, under("work", kept))
        if not own:
            raise AtollError(
                "nothing of this client's own is here", where=f"{self.folder.name}: --client", found=client,
                allowed="a client of a run with `finetune.personal` that was simulated here: " + (", ".join(here) or "none"),
                remedy=closest(client, here) if here else "what is a site's own lies at the site: leave --client out",
            )  # fmt: skip
        return own


def place(one: schema.Origin, inside: RunFolder) -> RunFolder:
    """The folder of another run, or of another stage of the run `inside` whose folder somebody asks."""
    return inside.outermost.stage(one.stage) if one.stage else find(one.run)


def base_of(identity: str, space: Space, seed: int) -> str:
    """What params are laid on, by content: the model's `identity`, and what the space draws by `seed` and keeps."""
    return content_hash(identity, str(seed) if draws(space) else "")


def space_of(written: schema.Recipe) -> Space:
    """In which a recipe trains."""
    space: Space = parts.make("space", written.finetune.space, "finetune.space")
    return space


def refuse_other_base(progress: Progress, base: str, where: str, model: object) -> None:
    """Raises AtollError where the model is no longer what params were trained on: its folder holds something else."""
    if progress.base != base:
        raise AtollError(
            "the model has changed since the run began", where=where, found=parts.spec(model, "model").use,
            allowed="what it was then", remedy="put its files back, or train again",
        )  # fmt: skip


def refuse_other_start(progress: Progress, start: str, folder: RunFolder) -> None:
    """Raises AtollError where what is kept as a run's beginning is not what it began with."""
    if progress.start != start:
        raise AtollError(
            "what the run began with has changed", where=str(folder.path), found="other params",
            allowed=f"those that {folder.start.name} held then", remedy="put the file back from a copy, or run again",
        )  # fmt: skip


def outcome(folder: RunFolder) -> Outcome:
    """What the run in this folder has come to so far. Raises AtollError where that is nothing yet."""
    if not folder.checkpoint.exists():
        raise AtollError(
            "the run has no result yet", where=str(folder.path), found="no checkpoint",
            remedy=f"`atoll resume {folder.name}`",
        )  # fmt: skip
    rounds, progress = progress_of(folder.checkpoint)
    return Outcome(folder, recipe.read(str(folder.recipe))[0], rounds, progress)


def progress_of(checkpoint: Path) -> tuple[int, Progress]:
    """How many rounds are behind a checkpoint, and what the loop remembered. Raises AtollError for what is none of ours."""
    head = read_head(checkpoint)
    try:
        return head.round, Progress(**head.extra)
    except TypeError as error:
        raise AtollError(
            "a checkpoint of another version of atoll", where=str(checkpoint), found=error,
            remedy="use the version that wrote it, or start the run again",
        ) from error  # fmt: skip
