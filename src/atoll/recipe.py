"""Recipes: a run as it is written. YAML 1.2, extended from others, checked key by key.

    extends: methods/fedavg-lora        a shipped recipe by name, or a path
    --set finetune.rounds=10            the value is YAML too

A recipe over its base is merged mapping by mapping. A part (`{use: NAME, ...}`) of another name replaces the whole part,
since the old one's arguments mean nothing to it; lists are replaced as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.errors import AtollError, closest

VERSION = 1

PartAsWritten = str | dict[str, Any]
Count = Annotated[int, Ge(1)]


class Section(BaseModel):
    """A mapping whose keys are known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Finetune(Section):
    """The stage `finetune`: rounds of local work and aggregation."""

    rounds: Count = 5
    """Rounds in all."""
    objective: PartAsWritten = "sft"
    """What is minimized."""
    context: Annotated[int, Ge(8)] = 512
    """The longest sample in tokens."""
    space: PartAsWritten = "lora"
    """What trains and travels."""
    batch_size: Count = 4
    """Samples in a batch."""
    local_steps: Count | None = None
    """Optimizer steps a round; without it, `epochs` passes over each client's own samples."""
    epochs: Count = 1
    """Only without `local_steps`."""
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
    population: Literal["all", "pooled"] | list[str] = "all"
    """Who may be sampled: all clients, the named ones, or `pooled`: one client that holds everybody's samples."""


class Evaluate(Section):
    """Held-out loss at the clients."""

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
    name: str
    """Names the folder of its runs: `name-1`, `name-2`, ..."""
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
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    baselines: list[Literal["local", "pooled"]] = []
    """What the result is measured against: each client alone, everybody's data in one place."""
    fleet: PartAsWritten = "inprocess"
    """Where clients run."""
    sinks: list[PartAsWritten] = []
    """Who hears the events beside the record."""
    start: str | None = Field(default=None, alias="from")
    """Another run, whose result is where this one starts."""


Tree = dict[str, Any]


def read(name_or_path: str, settings: Iterable[str] = ()) -> tuple[Recipe, Tree]:
    """A recipe by the name of a shipped one or by path, with `--set` settings; checked, and as the merged tree."""
    tree = resolve(name_or_path)
    for setting in settings:
        tree = apply(tree, setting)
    return validate(tree, name_or_path), tree


def resolve(name_or_path: str) -> Tree:
    """The tree of a recipe over everything it extends."""
    path = locate(name_or_path)
    tree, chain = load(path), {path.resolve(): name_or_path}
    while base := tree.pop("extends", None):
        if not isinstance(base, str):
            found = f"{[*chain.values()][-1]}: extends"
            raise AtollError("not a recipe to extend", where=found, found=base, allowed="a name or a path")
        path = locate(base, path.parent)
        if path.resolve() in chain:
            circle = " -> ".join([*chain.values(), base])
            raise AtollError("recipes extend each other in a circle", where=name_or_path, found=circle)
        chain[path.resolve()] = base
        tree = merge(load(path), tree)
    return tree


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
        raise AtollError("the recipe is not UTF-8", where=f"{path}: byte {error.start}") from error
    tree: Any = parse(text, str(path))
    if not isinstance(tree, dict):
        raise AtollError("a recipe is a mapping", where=str(path), found=type(tree).__name__, remedy="`atoll init`")
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
        raise AtollError("not YAML", where=place, found=getattr(error, "problem", None) or error) from error


def apply(tree: Tree, setting: str) -> Tree:
    """`finetune.rounds=10` -> the tree with that value. The path's end may be new, or an argument of a part."""
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise AtollError("not a setting", found=setting, allowed="path.to.key=value", remedy="--set finetune.rounds=10")
    return put(tree, path, parse(text, f"--set {path}"))


def put(tree: Tree, path: str, value: Any) -> Tree:
    """The tree with `value` at the dotted `path`. An argument for a part that the tree leaves out is its default's."""
    keys = path.strip().split(".")
    return _under_default(tree, keys, nest(keys, value))


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
        if isinstance(default, str):
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


def validate(tree: Tree, where: str) -> Recipe:
    """The tree as a Recipe, or the first thing that is wrong with it."""
    if (version := tree.get("recipe")) != VERSION:
        raise AtollError("a recipe needs its version", where=f"{where}: recipe", found=version, allowed=VERSION,
                         remedy=f"start the file with `recipe: {VERSION}`")  # fmt: skip
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _mistake(error, where) from error


def _mistake(error: ValidationError, where: str) -> AtollError:
    first = error.errors()[0]
    path = [str(key) for key in first["loc"] if key not in ("str", "dict[str,any]")]
    at = f"{where}: {'.'.join(path)}"
    if first["type"] == "extra_forbidden":
        return AtollError("unknown key", where=at, found=path[-1], remedy=closest(path[-1], _keys(path[:-1])))
    if first["type"] == "missing":
        return AtollError(
            f"'{path[-1]}' is missing", where=where, remedy=f"add `{path[-1]}:`; `atoll init` writes an example"
        )
    allowed = first["msg"].removeprefix("Input should be ")
    return AtollError("wrong value", where=at, found=repr(first["input"]), allowed=allowed)


def _keys(path: list[str]) -> list[str]:
    """The keys that the section at `path` knows."""
    section: Any = Recipe
    for key in path:
        section = section.model_fields[key].annotation
    return [field.alias or name for name, field in section.model_fields.items()]
