"""Recipes: a run as it is written. YAML 1.2, extended from others, checked key by key.

    extends: methods/fedavg-lora        a shipped recipe by name, or a path
    --set finetune.rounds=10            the value is YAML too

A recipe over its base is merged mapping by mapping. A part (`{use: NAME, ...}`) of another name replaces the whole part,
since the old one's arguments mean nothing to it; lists are replaced as a whole.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path, PurePath
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


def read(name_or_path: str | Path, settings: Sequence[str] = ()) -> tuple[Recipe, Tree]:
    """A recipe by the name of a shipped one or by path, with `--set` settings; checked, and as the merged tree."""
    name_or_path = check_call(name_or_path, settings)
    tree = resolve(name_or_path)
    for setting in settings:
        tree = apply(tree, setting)
    with blamed(name_or_path, settings, tree):
        return validate(tree), tree


def check_call(name_or_path: object, settings: object) -> str:
    """The recipe's name or path as text, if that and the settings are what they must be."""
    if not isinstance(name_or_path, str | Path):
        raise AtollError(
            "not a recipe", found=type(name_or_path).__name__, allowed="a shipped recipe's name, or a path",
            remedy="write the mapping to a .yaml file and give its path",
        )  # fmt: skip
    if isinstance(settings, str) or not (
        isinstance(settings, Sequence) and all(isinstance(one, str) for one in settings)
    ):
        raise AtollError(
            "not a list of settings", found=repr(settings), allowed="a list of texts `path.to.key=value`",
            remedy='write ["finetune.rounds=10"]',
        )  # fmt: skip
    return str(name_or_path)


@contextmanager
def blamed(file: str, settings: Sequence[str], tree: Tree | None = None) -> Iterator[None]:
    """Mistakes at a key of the recipe, known or in `tree`, are told with who says it: the `--set` that does, or the file."""
    try:
        yield
    except AtollError as error:
        key, colon, rest = error.details["where"].partition(": ")
        if re.split(r"[.\[]", key)[0] in {*_keys([]), *(tree or {})}:
            error.details["where"] = f"{blame(key, file, settings)}{colon}{rest}"
        raise


def blame(key: str, file: str, settings: Sequence[str]) -> str:
    """Who says what stands at `key`.

    >>> blame("finetune.rounds", "a.yaml", ["seed=1"]), blame("finetune.rounds", "a.yaml", ["finetune.rounds=x"])
    ('a.yaml: finetune.rounds', '--set finetune.rounds')
    """
    own = f"{file}: {key}"
    for said in (setting.partition("=")[0].strip() for setting in reversed(settings)):
        if key == said:
            return f"--set {key}"
        if _inside(key, said):
            return f"--set {said}: {key}"
        if _inside(said, key):
            return f"{own}, or --set {said}"
    return own


def _inside(path: str, outer: str) -> bool:
    return path.startswith((f"{outer}.", f"{outer}["))


def resolve(name_or_path: str) -> Tree:
    """The tree of a recipe over everything it extends."""
    path = locate(name_or_path)
    tree: Tree = rooted(load(path), path.parent)
    chain = {path.resolve(): name_or_path}
    while base := tree.pop("extends", None):
        if not isinstance(base, str):
            found = f"{[*chain.values()][-1]}: extends"
            raise AtollError("not a recipe to extend", where=found, found=base, allowed="a name or a path")
        path = locate(base, path.parent)
        if path.resolve() in chain:
            circle = " -> ".join([*chain.values(), base])
            raise AtollError("recipes extend each other in a circle", where=name_or_path, found=circle)
        chain[path.resolve()] = base
        tree = merge(rooted(load(path), path.parent), tree)
    return tree


def rooted(tree: Any, folder: Path) -> Any:
    """Paths that begin with `./` or `../` are read from the recipe's folder, wherever one stands; `extends` is already."""
    if isinstance(tree, dict):
        return {key: value if key == "extends" else rooted(value, folder) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rooted(value, folder) for value in tree]
    if isinstance(tree, str):
        before = HARNESS if tree.startswith(HARNESS) else ""
        path = tree.removeprefix(before)
        return before + os.path.normpath(folder.absolute() / path) if path.startswith(("./", "../")) else tree
    return tree


def staged(tree: Tree) -> dict[str, Tree]:
    """By stage, the tree of a run of this stage alone; baselines and the stage `evaluate` are the last one's.

    >>> each = staged({"name": "x", "stages": ["finetune", "align"], "finetune": {"rounds": 3}, "align": {"batch_size": 2}})
    >>> each["align"]["finetune"], each["align"]["from"], each["finetune"]["name"]
    ({'rounds': 3, 'objective': 'dpo', 'batch_size': 2}, 'stage:finetune', 'x.finetune')
    """
    stages = tree.get("stages") or ["finetune"]
    names = [name for name in stages if name != EVALUATE]
    common = {key: value for key, value in tree.items() if key not in ("stages", *STAGES)}
    asked = tree.get(EVALUATE) or {}
    found: dict[str, Tree] = {}
    for at, name in enumerate(names):
        section = section_of(tree, name)
        beside = {key: section.pop(key, None) for key in BESIDE}
        one = {**common, **({"finetune": section} if section or "finetune" in tree else {})}
        if begins := begins_with(beside["from"], names[:at], all_of_them=name == "fuse"):
            one["from"] = begins
        if isinstance(one.get("from"), list) and (by := beside["by"] or (tree.get("fuse") or {}).get("by")):
            one["fuse"] = {"by": by}
        if beside["data"] is not None:
            one["data"] = beside["data"]
        if at:
            one.pop("judge", None)  # which the first stage learns from
        if beside["judge"] is not None:
            one["judge"] = STAGE + beside["judge"]
        if name != names[-1]:
            one |= {"name": f"{tree.get('name')}.{name}", "baselines": []}
            one |= {EVALUATE: {key: value for key, value in asked.items() if key not in OF_TASKS}} if asked else {}
        elif EVALUATE in stages:
            one["stages"] = ["finetune", EVALUATE]
        found[name] = one
    return found


def section_of(tree: Tree, stage: str) -> Tree:
    """All that a stage says, or `finetune` for it."""
    section = dict(tree.get("finetune") or {})
    if stage == "finetune":
        return section
    fields, of_all = STAGES[stage].model_fields, Finetune.model_fields
    own = {name: fields[name].default for name in of_all if fields[name].default != of_all[name].default}
    over: Tree = merge({**section, **own}, tree.get(stage) or {})
    return over


def begins_with(said: Any, before: Sequence[str], all_of_them: bool) -> Any:
    """What a stage begins with; nothing where that is what the run begins with.

    >>> begins_with(None, ["finetune", "align"], False), begins_with(None, ["finetune", "align"], True)
    ('stage:align', ['stage:finetune', 'stage:align'])
    >>> begins_with("base", ["finetune"], False), begins_with("finetune", ["finetune", "align"], False)
    (None, 'stage:finetune')
    """
    if said == BASE or not before:
        return None
    said = said or (list(before) if all_of_them else before[-1])
    return [STAGE + one for one in said] if isinstance(said, list) else STAGE + said


STAGE = "stage:"
"""Before a stage's name, in `from`: a stage of the same run."""


def with_method(tree: Tree, method: str) -> Tree:
    """A run's tree with what a method says laid over it: how methods are compared on one run."""
    said = resolve(method)
    over: Tree = merge(tree, {"finetune": said.get("finetune", {})})
    return over


def shipped() -> dict[str, Path]:
    """The recipes in the package: `quickstart` (or `runs/quickstart`), `methods/fedavg-lora`, ..."""
    root = Path(str(resources.files("atoll"))) / "recipes"
    return {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}


def locate(name: str, beside: Path = Path()) -> Path:
    """The file of a recipe; a path is read from the folder `beside`, where the recipe is that names it."""
    known = shipped()
    for candidate in (name, f"runs/{name}", f"methods/{name}"):
        if candidate in known:
            return known[candidate]
    path = beside / Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        raise AtollError("there is no such recipe file", where=str(path), remedy="`atoll init` writes one")
    names = [n.removeprefix("runs/") for n in known]
    raise AtollError("there is no such recipe", found=name, allowed="a shipped recipe or a path to a .yaml file",
                     remedy=closest(name, names))  # fmt: skip


def load(path: Path) -> Tree:
    """A YAML file as a tree of plain values."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AtollError(
            "the recipe is not UTF-8", where=f"{path}: byte {error.start}", found=f"byte {error.object[error.start]:#x}",
            remedy="save it as UTF-8, for example with iconv -f latin1 -t utf-8",
        ) from error  # fmt: skip
    tree: Any = parse(text, str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else in_words(tree)
        raise AtollError("a recipe is a mapping", where=str(path), found=found, remedy="`atoll init` writes an example")
    return dict(tree)


def parse(text: str, where: str) -> Any:
    """YAML 1.2: `1e-6` is a number, `no` is a word."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}: line {mark.line + 1}, column {mark.column + 1}" if mark else where
        remedy = "close what is open, quote texts that hold `: ` or `#`, and indent by spaces"
        found = getattr(error, "problem", None) or error
        raise AtollError("not YAML", where=place, found=found, remedy=remedy) from error


def apply(tree: Tree, setting: str) -> Tree:
    """`finetune.rounds=10` -> the tree with that value. The path's end may be new, or an argument of a part."""
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise AtollError("not a setting", found=setting, allowed="path.to.key=value", remedy="--set finetune.rounds=10")
    return put(tree, path, parse(text, f"--set {path}"))


def put(tree: Tree, path: str, value: Any) -> Tree:
    """The tree with `value` at the dotted `path`. An argument for a part that the tree leaves out is its default's.

    Paths that begin with `./` or `../` are read from the current folder: a run may go on from elsewhere.
    """
    keys = path.strip().split(".")
    return _under_default(tree, keys, nest(keys, rooted(value, Path())))


def nest(keys: Sequence[str], value: Any) -> Any:
    """`value` under one mapping for each key."""
    for key in reversed(keys):
        value = {key: value}
    return value


def _under_default(tree: Tree, keys: Sequence[str], over: Tree) -> Tree:
    """`over` over `tree` over the default part that `keys` lead into."""
    section: Any = Recipe
    for depth, key in enumerate(keys[:-1], 1):
        default = section.model_fields[key].default if key in section.model_fields else None
        common = Finetune.model_fields.get(key) if issubclass(section, Staged) else None
        if common and default == common.default:  # it is as in `finetune`
            default = (tree.get("finetune") or {}).get(key, default)
        if isinstance(default, str | Mapping):
            tree = merge(nest(keys[:depth], default), tree)
        if not isinstance(default, Section):
            break
        section = type(default)
    merged: Tree = merge(tree, over)
    return merged


def merge(base: Any, over: Any) -> Any:
    """`over` laid over `base`; see the module's text."""
    if isinstance(base, str) and isinstance(over, Mapping):
        base = {"use": base}
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return copy.deepcopy(over)
    if "use" in over and over["use"] != base.get("use"):
        return copy.deepcopy(dict(over))
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}


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
                remedy=f"stages: [{', '.join(sorted([*found.stages, stage], key=EVALUATE.__eq__))}], or leave `{stage}` out",
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
                    "no such stage before this one", where=f"{stage}.{key}", found=odd, allowed=", ".join(allowed),
                    remedy=closest(odd, allowed),
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
        return AtollError("unknown key", where=at, found=path[-1], remedy=closest(path[-1], _keys(path[:-1])))
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


def _keys(path: list[str]) -> list[str]:
    """The keys that the section at `path` knows."""
    section: Any = Recipe
    for key in path:
        section = section.model_fields[key].annotation
    return [field.alias or name for name, field in section.model_fields.items()]
