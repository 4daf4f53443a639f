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
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from atoll.errors import AtollError, closest, in_words, placed
from atoll.schema import (
    BASE,
    BESIDE,
    EVALUATE,
    HARNESS,
    OF_TASKS,
    STAGE,
    STAGES,
    Finetune,
    Recipe,
    Section,
    Staged,
    Tree,
    keys_of,
    validate,
)


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
        if re.split(r"[.\[]", key)[0] in {*keys_of([]), *(tree or {})}:
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
        here = f"{[*chain.values()][-1]}: extends"
        if not isinstance(base, str):
            raise AtollError("not a recipe to extend", where=here, found=base, allowed="a name or a path")
        with placed(here):
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
        there = [one.name for one in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, there, n=1)
        raise AtollError(
            "there is no such recipe file", where=str(path),
            remedy=f"did you mean '{near[0]}'?" if near else "`atoll init` writes one",
        )  # fmt: skip
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
    """`finetune.rounds=10` -> the tree with that value. The path's end may be new, or an argument of a part.

    >>> apply({"name": "x", "align": {"rounds": 3}}, "align=null")
    {'name': 'x'}
    """
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise AtollError("not a setting", found=setting, allowed="path.to.key=value", remedy="--set finetune.rounds=10")
    value = parse(text, f"--set {path}")
    if value is None and path.strip() in STAGES:  # what is said of a stage is left out
        return {key: said for key, said in tree.items() if key != path.strip()}
    return put(tree, path, value)


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
