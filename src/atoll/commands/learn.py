"""Commands to find one's way: data, methods, parts, init."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from atoll.commands.output import AsJson, say, show, show_json

if TYPE_CHECKING:
    from atoll.schema import Recipe


def data(
    path: Annotated[Path, typer.Argument(help="A client's file or folder; or `get`.")],
    name: Annotated[str | None, typer.Argument(help="After `get`: tuxpaint, asterisk or emoji.")] = None,
    to: Annotated[
        Path | None, typer.Option(help="After `get`: the new folder; by the set's name if not given.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Whose tokenizer, chat template and senses; or a recipe, for its model, objective and held-out share.",
            show_default="smollm2-135m; where records name media, that of the recipe multimodal",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=8, help="The longest sample, in tokens.", show_default="512, or that of the recipe"),
    ] = None,
    samples: Annotated[int, typer.Option("--show", min=0, help="Samples to show, the labeled part marked.")] = 3,
    objective: Annotated[
        Literal["sft", "causal-lm", "preference"] | None,
        typer.Option(help="Where the loss is; by the data's format if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Preview what training would see of a file or folder; or get a public set of pictures or sounds.

    The preview has counts, lengths, what is left out, media, and the label mask.
    """
    from atoll.data.read import media_of, open_source

    if str(path) == "get" and not path.exists():
        if as_json or model or context or objective:
            raise typer.BadParameter(
                "after `get`, a set's name and --to alone: `atoll data FOLDER` shows what it wrote"
            )
        return get(name, to)
    if name is not None or to is not None:
        raise typer.BadParameter(f"one path, or `atoll data get NAME`; found {path} {name or '--to'}")
    source = open_source(path)  # a wrong path is told before the tokenizer is loaded
    named = model or (MULTIMODAL if any(True for file, _ in source.files for _ in media_of(file)) else TEXT)
    say(f"loading the tokenizer of {named}")
    from atoll.data.preview import preview, render
    from atoll.data.read import HELD_OUT
    from atoll.errors import placed
    from atoll.local.work import needs_of
    from atoll.models.load import load_senses, load_tokenizer
    from atoll.parts import make

    wanted: Any = objective and objective.replace("-", "_")
    with placed("--model"):
        whose, of_recipe = model_of(named)
        context = context or (of_recipe.finetune.context if of_recipe else CONTEXT)
        if wanted is None and of_recipe:
            wanted = needs_of(make("objective", of_recipe.finetune.objective, "finetune.objective")).labels
        held_out = share_of(of_recipe) if of_recipe else HELD_OUT
        tokenizer, senses = load_tokenizer(whose, say), load_senses(whose, say)
    seen = preview(path, tokenizer, context, samples, wanted, senses, say, held_out)
    if as_json:
        show_json(seen.as_dict())
    else:
        show(render(seen))


TEXT, MULTIMODAL = "smollm2-135m", "multimodal"
"""Whose view of the data is shown if nobody says."""


CONTEXT = 512


def model_of(name: str) -> tuple[Any, Recipe | None]:
    """A model by name; or that of a recipe, a file or a shipped one, and what its last stage says."""
    from atoll import recipe, schema
    from atoll.build import choose_model

    if name.endswith((".yaml", ".yml")) or f"runs/{name}" in recipe.shipped():
        _, tree = recipe.read(name)
        (*_, last) = recipe.staged(tree).values()
        written = schema.validate(last)
        return choose_model(written.model).name, written
    return name, None


def share_of(written: Recipe) -> float:
    """The share of records that a recipe's data hold out where no file is named for it."""
    from atoll import parts
    from atoll.data.read import HELD_OUT

    part = parts.spec(written.data, "data")
    said = parts.check(parts.find("data", part.use, "data"), part, "data")
    return float(said.get("held_out", HELD_OUT))


def get(name: str | None, to: Path | None) -> None:
    """Fetches a set into the cache, and writes its records."""
    from atoll.data import media_sets

    folder = media_sets.get(name or "", to or Path(name or ""), say)
    show(f"{folder} is written: `atoll data {folder}` shows it; SOURCES.md has its licenses")


def methods(as_json: AsJson = False) -> None:
    """List the methods that are shipped, with reference and checked number."""
    from atoll.recipe import resolve, shipped

    trees = {name: resolve(name) for name in shipped() if name.startswith("methods/")}
    rows = [
        {
            "name": name.removeprefix("methods/"),
            "description": tree.get("description", ""),
            "reference": tree.get("reference", ""),
            "checked": tree.get("checked"),
        }
        for name, tree in trees.items()
    ]
    if as_json:
        show_json(rows)
        return
    from atoll.record.tables import plain_table

    table = plain_table("method", "checked", "reference")
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    for row in rows:
        table.add_row(row["name"], _checked(row["checked"]), row["reference"])
    show(table)


def _checked(number: Any) -> str:
    return f"{number['loss']} on {number['run']}" if number else "-"


def parts(
    slot: Annotated[str | None, typer.Argument(help="One slot of a recipe: transform, outer, data, ...")] = None,
    as_json: AsJson = False,
) -> None:
    """List the parts that a recipe may name, with their arguments, types and bounds."""
    from atoll import parts as known
    from atoll.errors import AtollError, closest

    if slot is not None and slot not in known.SLOTS:
        raise AtollError("unknown slot", found=slot, remedy=closest(slot, known.SLOTS))
    rows = [_part(at, name) for at in ([slot] if slot else known.SLOTS) for name in known.SLOTS[at]]
    if as_json:
        show_json(rows)
        return
    for row in rows:
        arguments = ", ".join(_argument(one) for one in row["arguments"])
        show(f"{row['slot']}: {row['name']}({arguments})\n    {row['about']}")


def _part(slot: str, name: str) -> dict[str, Any]:
    from atoll import parts as known

    factory = known.find(slot, name, slot)
    about = (inspect.getdoc(factory) or "").partition("\n\n")[0].replace("\n", " ")
    return {"slot": slot, "name": name, "about": about, "arguments": known.arguments(factory)}


def _argument(one: dict[str, Any]) -> str:
    bounds = f" {one['bounds']}" if one["bounds"] else ""
    default = "" if one["required"] else f" = {one['default']}"
    return f"{one['name']}: {one['type']}{bounds}{default}"


def init(
    path: Annotated[Path, typer.Argument(help="The new recipe.")] = Path("atoll.yaml"),
    folder: Annotated[Path | None, typer.Option("--data", help="A folder with one subfolder or file a client.")] = None,
) -> None:
    """Write a commented recipe for your own folders. Overwrites nothing."""
    from atoll.starter import write_starter

    file = write_starter(path, folder)
    show(f"{file} is written: edit it, then `atoll plan {file}` and `atoll run {file}`")
