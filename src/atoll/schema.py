"""What a recipe may say, key by key: a stage's section, the whole recipe, and what does not go together in its words.

Parts (`{use: NAME, ...}`) are checked by their factories (parts.py), where a plan is made of the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Len
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from atoll.errors import AtollError, closest, in_words, mend, placed, wanted

VERSION = 1

PartAsWritten = str | dict[str, Any]
Count = Annotated[int, Ge(1)]
POOLED = "pooled"
"""The client of a pooled run: it holds everybody's samples."""
LOCAL = "local-"
"""Before the client's name in that of its baseline."""

NAME = r"^\w[\w.-]{0,99}$"
"""A run's name becomes a folder's: no separator, and nothing that a shell or a listing passes over."""


class Section(BaseModel):
    """A mapping whose keys are known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def in_order(names: list[str]) -> list[str]:
    """Raises ValueError where a stage is named twice, or not in a place of its own."""
    if len(set(names)) < len(names):
        raise ValueError("each at most once")
    if EVALUATE in names[:-1] or names == [EVALUATE]:
        raise ValueError("`evaluate` as the last, after one that trains or fuses")
    return names


class Finetune(Section):
    """The stage `finetune`: rounds of local work and aggregation."""

    rounds: Annotated[int, Ge(0)] = 5
    """Rounds in all; with 0 what it begins with is measured and kept."""
    objective: PartAsWritten = "sft"
    """What is minimized."""
    context: Annotated[int, Ge(8)] = 512
    """The longest sample in tokens."""
    space: PartAsWritten = "lora"
    """What trains and travels."""
    personal: list[str] = []
    """Of that, what stays at its client and is never sent: parameters whose names hold one of these words."""
    batch_size: Count = 4
    """Samples in a batch."""
    local_steps: Count | None = None
    """Optimizer steps a round; without it, `epochs` passes over each client's own samples."""
    epochs: Annotated[Count, BeforeValidator(lambda value: 1 if value is None else value)] = 1
    """Passes over each client's own samples a round, instead of `local_steps`."""
    accumulate: Count = 1
    """Batches in an optimizer step."""
    optimizer: PartAsWritten = "adamw"
    """The inner one; it starts anew in every round."""
    rate: PartAsWritten = "constant"
    """How the learning rate changes over the whole run."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Of the gradients in a local step."""
    correction: PartAsWritten = "none"
    """What a method does to local gradients, and sends beside the update."""
    schedule: PartAsWritten = "synchronous"
    """Whom a round asks, and when it closes."""
    weighting: Literal["examples", "uniform"] = "examples"
    """What a client's update counts: its training samples, or 1."""
    up: list[PartAsWritten] = []
    """The transforms of an update, in the order of encoding."""
    down: list[PartAsWritten] = []
    """The transforms of a broadcast."""
    aggregate: PartAsWritten = "mean"
    """How many updates become one."""
    outer: PartAsWritten = "sgd"
    """How that one moves the shared params."""
    exchange: PartAsWritten = "plain"
    """The conversation of a round: whether the server sees single updates."""
    privacy: PartAsWritten = "none"
    """What hides a client's part in what is released: who clips, who adds noise, and the budget."""
    population: Literal["all", "pooled"] | list[str] = "all"
    """Who may be sampled: all clients, the named ones, or `pooled`: one client that holds everybody's samples."""


class Staged(Finetune):
    """A stage that is not the first: what it does not say is as in `finetune`."""

    start: str | list[str] | None = Field(default=None, alias="from")
    """A stage before it, with whose result it begins, or `base`; without it, the last one before."""
    data: PartAsWritten | None = None
    """Where its data come from, where not the run's."""
    judge: str | None = None
    """A stage before it that trained a judge, whose choices among a question's answers it learns in place of the data's."""


class Align(Staged):
    """The stage `align`: learns what is preferred, or rewarded."""

    objective: PartAsWritten = "dpo"
    """What is minimized."""


class Fuse(Staged):
    """The stage `fuse`: begins with what several stages came to, made one; all before it, where `from` names none."""

    rounds: Annotated[int, Ge(0)] = 0
    """Rounds after that."""
    by: PartAsWritten = "ties"
    """How several results become one."""


STAGES: dict[str, type[Finetune]] = {"finetune": Finetune, "align": Align, "fuse": Fuse}
"""What a run may do one after the other, each with a section of the recipe; after them, `evaluate`."""
BESIDE = sorted(
    {field.alias or name for one in STAGES.values() for name, field in one.model_fields.items()}
    - Finetune.model_fields.keys()
)
"""What a stage's section says of the stage, and not of its rounds."""
StageName = Literal["finetune", "align", "fuse", "evaluate"]
EVALUATE = "evaluate"
HARNESS = "lm-eval:"
"""Before the name of a public task that is not ours but the Language Model Evaluation Harness's."""
BASE = "base"
"""In a stage's `from`: the model before any stage."""


STAGE = "stage:"
"""Before a stage's name, in `from`: a stage of the same run."""


class Origin(NamedTuple):
    """What `from` or `judge` names, whose result is begun with or asked: another run, or a stage before this one."""

    run: str
    """By its name or path; empty for a stage."""
    stage: str

    @property
    def name(self) -> str:
        """Without where it lies, which is nobody's business: `align-1`, or `align-1/finetune` for a stage of it."""
        path = PurePath(self.run)
        if self.stage or not path.is_absolute():
            return self.stage or self.run
        inside = path.parent.name in ("stages", "baselines")
        return f"{path.parts[-3]}/{path.name}" if inside else path.name

    @property
    def written(self) -> str:
        """As a run's tree has it."""
        return STAGE + self.stage if self.stage else self.run

    def __str__(self) -> str:
        return f"the stage {self.stage}" if self.stage else self.name


def origin(written: str) -> Origin:
    """A name as a run's tree has it.

    >>> str(origin("stage:finetune")), str(origin("/home/ann/runs/align-1")), origin("/runs/align-1/stages/finetune").name
    ('the stage finetune', 'align-1', 'align-1/finetune')
    """
    is_stage = written.startswith(STAGE)
    return Origin("" if is_stage else written, written.removeprefix(STAGE) if is_stage else "")


class Evaluate(Section):
    """Held-out loss at the clients, and public tasks."""

    start: bool = True
    """Whether to evaluate before the first round: the base model."""
    every: Annotated[int, Ge(0)] = 1
    """Rounds between evaluations; 0: none between the start and the end."""
    samples: Count = 64
    """Held-out samples a client between rounds."""
    final_samples: Count = 256
    """Held-out samples a client at the start and at the end."""
    patience: Count | None = None
    """Stop after this many evaluations without a better mean loss."""
    min_delta: Annotated[float, Ge(0)] = 0.0
    """What counts as better."""
    tasks: list[str] = ["boolq", "openbookqa", "truthfulqa"]
    """The public tasks that the stage `evaluate` asks of base and results."""
    questions: Count = 100
    """Of each task, at most."""


class Checked(Section):
    """A method's number, reproduced by the tests: held-out loss of `run` with it, whose mean over clients must be `loss`."""

    run: str
    settings: list[str] = Field(default=[], alias="set")
    """What `--set` says on top: what the method leaves to its user."""
    loss: float
    within: Annotated[float, Gt(0), Le(1)] = 0.02


class Recipe(Section):
    """A complete recipe: what `atoll run` takes."""

    recipe: Literal[1]
    """The version of the format."""
    name: Annotated[str, Field(pattern=NAME)]
    """Names the folder of its runs: `name-1`, `name-2`, ...; letters, digits, `_`, `-` and `.`."""
    description: str = ""
    reference: str = ""
    """A method's paper and algorithm."""
    checked: Checked | None = None
    """A method's number."""
    seed: Annotated[int, Ge(0)] = 0
    """All randomness of the run starts here."""
    model: PartAsWritten = "smollm2-135m"
    """A preset, a folder, a hub id, `tiny:FAMILY`, or a factory of your own."""
    data: PartAsWritten
    """Where the clients' data come from."""
    stages: Annotated[list[StageName], Len(1), AfterValidator(in_order)] = ["finetune"]
    """What is done one after the other: each begins with what the one before came to."""
    finetune: Finetune = Finetune()
    align: Align = Align()
    fuse: Fuse = Fuse()
    evaluate: Evaluate = Evaluate()
    baselines: list[Literal["local", "pooled"]] = []
    """What the result is measured against: each client alone, everybody's data in one place."""
    fleet: PartAsWritten = "inprocess"
    """Where clients run."""
    sinks: list[PartAsWritten] = []
    """Who hears the events beside the record."""
    start: str | list[str] | None = Field(default=None, alias="from")
    """Another run, whose result is where this one starts; several become one by `fuse.by`."""

    judge: str | None = None
    """Another run that trained a judge, whose choices among a question's answers this one learns in place of the data's."""

    @property
    def tasks(self) -> list[str]:
        """The public tasks that are asked: of the stage `evaluate`."""
        return self.evaluate.tasks if EVALUATE in self.stages else []

    @property
    def starts(self) -> list[Origin]:
        """All runs or stages with whose results it begins."""
        return list(map(origin, [self.start] if isinstance(self.start, str) else self.start or []))

    @property
    def judged_by(self) -> Origin | None:
        """The run or stage whose choices it learns."""
        return origin(self.judge) if self.judge else None

    @property
    def stands_on(self) -> list[Origin]:
        """All runs and stages without which it would be another run."""
        return [*self.starts, *([self.judged_by] if self.judged_by else [])]

    @property
    def fuses(self) -> bool:
        """Whether it begins with several results."""
        return isinstance(self.start, list)


Tree = dict[str, Any]


def validate(tree: Tree, where: str = "") -> Recipe:
    """The tree as a Recipe, or the first thing that is wrong with it, which is told with `where` before its key."""
    with placed(where):
        if (version := tree.get("recipe")) != VERSION:
            raise AtollError("a recipe needs its version", where="recipe", found=in_words(version), allowed=VERSION,
                             remedy=f"start the file with `recipe: {VERSION}`")  # fmt: skip
        try:
            found = Recipe.model_validate(tree)
        except ValidationError as error:
            raise _mistake(error) from error
        refuse_two_lengths(tree)
        refuse_idle_section(tree, found)
        refuse_unknown_starts(found)
        return found


OF_TASKS = {"tasks", "questions"}
"""Of the section `evaluate`, what the stage of this name reads."""


def refuse_idle_section(tree: Tree, found: Recipe) -> None:
    """A section for a stage that is not run would count for nothing."""
    if OF_TASKS & (tree.get(EVALUATE) or {}).keys() and EVALUATE not in found.stages:
        raise AtollError(
            "public tasks are asked in a stage of their own", where="evaluate", found=f"stages: {found.stages}",
            remedy=f"stages: [{', '.join([*found.stages, EVALUATE])}]",
        )  # fmt: skip
    used = {*found.stages, *(["fuse"] if found.fuses else [])}
    for stage in STAGES:
        if stage in tree and stage not in {"finetune", *used}:
            raise AtollError(
                "settings for a stage that is not run", where=stage, found=f"stages: {found.stages}",
                remedy=f"stages: [{', '.join(sorted([*found.stages, stage], key=EVALUATE.__eq__))}], or leave it out, "
                f"as --set {stage}=null does",
            )  # fmt: skip


def refuse_unknown_starts(found: Recipe) -> None:
    """A stage begins with what one before it came to, or several that it fuses."""
    for at, stage in enumerate(found.stages):
        section = getattr(found, stage)
        said = section.start if isinstance(section, Staged) else None
        known = [name for name in found.stages[:at] if name != EVALUATE]
        judge = section.judge if isinstance(section, Staged) else None
        begins = [said] if isinstance(said, str) else said or []
        for key, named, allowed in (("from", begins, [BASE, *known]), ("judge", [judge] if judge else [], known)):
            for odd in (one for one in named if one not in allowed):
                raise AtollError(
                    "no such stage before this one", where=f"{stage}.{key}", found=odd,
                    allowed=", ".join(allowed) or "no stage comes before it",
                    remedy=f"another run is named above all stages: `{key}: {odd}`",
                )  # fmt: skip
        if stage == "fuse" and (isinstance(said, str) or (not known and not found.fuses)):
            raise AtollError(
                "there are no results to fuse", where="fuse.from", found=said or "nothing before it",
                allowed="several stages before it", remedy="stages: [finetune, align, fuse], or from: [RUN, RUN]",
            )  # fmt: skip
        if isinstance(said, list) and (stage != "fuse" or BASE in said):
            raise AtollError(
                "several results become one in the stage `fuse`", where=f"{stage}.from", found=in_words(said),
                allowed="one stage" if stage != "fuse" else "stages", remedy="stages: [finetune, align, fuse]",
            )  # fmt: skip


def refuse_two_lengths(tree: Tree) -> None:
    """A round's local work is as long as one key says. The other would count for nothing."""
    stage = tree.get("finetune") or {}
    if stage.get("local_steps") is not None and stage.get("epochs") is not None:
        raise AtollError(
            "local_steps and epochs both say how long local work is", where="finetune.epochs",
            found=f"local_steps: {stage['local_steps']}, epochs: {stage['epochs']}", allowed="one of the two",
            remedy="clear the other: --set finetune.local_steps=null, or --set finetune.epochs=null",
        )  # fmt: skip


def _mistake(error: ValidationError) -> AtollError:
    first = error.errors()[0]
    path = _path(first)
    at = re.sub(r"\.(\d+)", r"[\1]", ".".join(path))
    if first["type"] == "extra_forbidden":
        return AtollError("unknown key", where=at, found=path[-1], remedy=closest(path[-1], keys_of(path[:-1])))
    if first["type"] == "missing":
        return AtollError(
            f"'{path[-1]}' is missing", where=at, remedy=f"add `{path[-1]}:`; `atoll init` writes an example"
        )
    here = [one for one in error.errors() if _path(one) == path]
    return AtollError(
        "wrong value", where=at, found=in_words(first["input"]), allowed=wanted(here), remedy=mend(here)
    )  # fmt: skip


def _path(one: Mapping[str, Any]) -> list[str]:
    """Where a mistake is, as a recipe writes it; pydantic also names the branches of a union."""
    branches = ("str", "dict[str,any]", "list[str]", "literal['all','pooled']")
    return [str(key) for key in one["loc"] if key not in branches and not str(key).startswith("function-")]


def keys_of(path: list[str]) -> list[str]:
    """The keys that the section at `path` knows."""
    section: Any = Recipe
    for key in path:
        section = section.model_fields[key].annotation
    return [field.alias or name for name, field in section.model_fields.items()]
