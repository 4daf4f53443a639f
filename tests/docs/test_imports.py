"""Each folder and module imports only from those above it in the list of ARCHITECTURE.md."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from itertools import takewhile
from pathlib import Path

import pytest
from pages import ROOT, blocks

PACKAGE = ROOT / "src" / "atoll"
FILES = sorted(PACKAGE.rglob("*.py"))


def listed() -> list[str]:
    """The units in the order of ARCHITECTURE.md: a folder, or a module at the top."""
    block = next(b for b in blocks(ROOT / "ARCHITECTURE.md") if "errors.py" in b.text)
    names = [takewhile(lambda word: word.endswith((".py", "/")), line.split()) for line in block.text.splitlines()]
    return [name.strip("/").removesuffix(".py") for line in names for name in line]


def unit_of(path: Path) -> str:
    """data/read.py -> data; run.py -> run"""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """What a file imports from the package, wherever in the file it does, as dotted names below `atoll`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("atoll.") for name in found if name.startswith("atoll.")}


def test_the_list_is_complete():
    assert sorted(listed()) == sorted({unit_of(path) for path in FILES} - {"__init__"})


@pytest.mark.parametrize(
    "path", [p for p in FILES if unit_of(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_module_imports_only_from_above(path: Path):
    order = listed()
    mine = unit_of(path)
    below = {name for name in imported(path) if order.index(name.partition(".")[0]) > order.index(mine)}
    assert not below


def test_no_module_imports_itself_in_a_circle():
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    graph = {}
    for name, path in names.items():
        targets = {t if t in names else t.rpartition(".")[0] for t in imported(path)}
        graph[name] = (targets & names.keys()) - {name}
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)
