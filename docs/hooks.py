"""What of the site is made from the program and the repository when it is built, so that nothing is written twice.

Pages at the root of the repository and in `decisions/` become pages of the site as they are. In `methods.md`, `parts.md`
and `recipe.md` a marker is replaced by what the shipped recipes, the factories' signatures and the recipe's schema say.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from atoll import parts, recipe, schema

ROOT = Path(__file__).parents[1]
FROM_ROOT = ("ARCHITECTURE.md", "GLOSSARY.md", "CONTRIBUTING.md", "CHANGELOG.md")
SECTIONS = {"": schema.Recipe, **schema.STAGES, "evaluate": schema.Evaluate, "checked": schema.Checked}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie elsewhere in the repository."""
    for name in FROM_ROOT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    pages = sorted((ROOT / "decisions").glob("*.md"))
    for page in pages:
        files.append(File.generated(config, f"decisions/{page.name}", abs_src_path=str(page)))
    files.append(File.generated(config, "decisions/index.md", content=decisions(pages)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills the markers."""
    for marker, made in (("methods", methods), ("parts", part_tables), ("recipe", recipe_tables)):
        if f"<!-- {marker} -->" in markdown:
            markdown = markdown.replace(f"<!-- {marker} -->", made())
    return markdown


def decisions(pages: list[Path]) -> str:
    """The list of decisions, by the title that each opens with."""
    titles = {page: page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in pages}
    lines = [f"- [{title}]({page.name})" for page, title in titles.items()]
    return "\n".join(["# Decisions", "", "One page a choice that is hard to undo.", "", *lines]) + "\n"


def methods() -> str:
    """Every shipped method: what it says of itself, and the file."""
    lines = ["| method | reference | checked |", "|---|---|---|"]
    files = {name: path for name, path in recipe.shipped().items() if name.startswith("methods/")}
    for name in files:
        tree = recipe.resolve(name)
        number = tree.get("checked")
        stated = f"{number['loss']} on `{number['run']}`" if number else "-"
        lines.append(f"| [`{name}`](#{name.replace('/', '')}) | {tree['reference']} | {stated} |")
    for name, path in files.items():
        lines += ["", f"## {name}", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join(lines)


def part_tables() -> str:
    """Every part that a recipe may name, by slot."""
    lines: list[str] = []
    for slot, known in parts.SLOTS.items():
        lines += [f"## {slot}", "", "| part | arguments | what it does |", "|---|---|---|"]
        for name in known:
            factory = parts.find(slot, name, slot)
            about = (inspect.getdoc(factory) or "").partition("\n\n")[0].replace("\n", " ")
            lines.append(f"| `{name}` | {arguments(factory)} | {cell(about)} |")
        lines.append("")
    return "\n".join(lines)


def arguments(factory: Any) -> str:
    """One line an argument: name, type, bounds, default."""
    said = []
    for one in parts.arguments(factory):
        bounds = f", {one['bounds']}" if one["bounds"] else ""
        default = "" if one["required"] else f", default {one['default']}"
        said.append(f"`{one['name']}`: {one['type']}{bounds}{default}")
    return cell("<br>".join(said)) or "-"


def recipe_tables() -> str:
    """Every key of a recipe, by section."""
    lines: list[str] = []
    for section, model in SECTIONS.items():
        notes = {name: text for one in reversed(model.__mro__[:-3]) for name, text in attribute_docs(one)}
        lines += [f"## {section or 'A recipe'}", "", "| key | default | what it says |", "|---|---|---|"]
        for name, field in own_fields(model).items():
            default = "required" if field.is_required() else f"`{shown(field.default)}`"
            lines.append(f"| `{field.alias or name}` | {default} | {cell(notes.get(name, ''))} |")
        lines.append("")
    return "\n".join(lines)


def own_fields(model: Any) -> dict[str, Any]:
    """The fields of a section; of a later stage those that are not as in `finetune`."""
    fields, common = model.model_fields, schema.Finetune.model_fields
    if model is schema.Finetune or not issubclass(model, schema.Finetune):
        return dict(fields)
    return {
        name: field for name, field in fields.items() if name not in common or field.default != common[name].default
    }


def shown(default: Any) -> str:
    """A default as a recipe would say it; a section's stands in its own table."""
    if isinstance(default, schema.Section):
        return "see below"
    return "null" if default is None else str(default) or '""'


def attribute_docs(model: type) -> Iterator[tuple[str, str]]:
    """The text that stands below a field in the source."""
    body = ast.parse(inspect.getsource(model)).body[0].body  # type: ignore[attr-defined]
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield field.target.id, inspect.cleandoc(str(after.value.value)).replace("\n", " ")  # type: ignore[union-attr]


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")
