"""The settings in which runs differ, as they took effect: what one run says and another leaves to its default is the same.

Parts are made of code that takes seconds to import, so only those that are written differently are asked for their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atoll import parts, recipe, schema
from atoll.record.folder import RunFolder
from atoll.record.views import differing, flat, read_tree

SLOTS = {
    "data": "data",
    "fleet": "fleet",
    **{
        f"finetune.{slot}": slot
        for slot in ("objective", "space", "optimizer", "rate", "correction", "schedule", "aggregate", "outer")
    },
}
"""Where a recipe has a part, and of which slot."""

TEXTS = {"description", "reference", "checked"}
"""What a recipe says of itself."""


def settings(folders: Sequence[RunFolder]) -> dict[str, dict[str, Any]]:
    """Path -> run -> value, where not all runs have the same."""
    trees = {folder.name: resolved(read_tree(folder)) for folder in folders}
    for path, slot in SLOTS.items():
        found = [_at(tree, path) for tree in trees.values()]
        if any(one != found[0] for one in found):
            trees = {name: recipe.put(tree, path, with_defaults(slot, _at(tree, path))) for name, tree in trees.items()}
    return differing({name: dict(flat(tree)) for name, tree in trees.items()})


def resolved(tree: schema.Tree) -> schema.Tree:
    """The tree with the schema's defaults, of the stages that it has, and every part as a mapping."""
    written = schema.validate(tree)
    idle = set(schema.STAGES) - {"finetune", schema.EVALUATE, *written.stages}
    whole = written.model_dump(by_alias=True, exclude=TEXTS | idle)
    for path in SLOTS:
        whole = recipe.put(whole, path, _mapping(_at(whole, path)))
    return whole


def with_defaults(slot: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """A part with the defaults of its factory. `_` and `-` in its name mean the same, and so do 0 and 0.0."""
    known = parts.arguments(parts.find(slot, part["use"], slot))
    defaults = {one["name"]: one["default"] for one in known if not one["required"]}
    said = {name: value for name, value in part.items() if name != "use"}
    numbers = {one["name"]: float(said[one["name"]]) for one in known if _whole_float(one, said)}
    return {"use": part["use"].replace("_", "-"), **defaults, **said, **numbers}


def _whole_float(argument: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    value = said.get(argument["name"])
    return argument["type"] == "float" and isinstance(value, int) and not isinstance(value, bool)


def _mapping(part: Any) -> dict[str, Any]:
    return {"use": part} if isinstance(part, str) else dict(part)


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree
