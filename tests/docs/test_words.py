"""One word for each thing: what the glossary rules out stands nowhere, and what it defines is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from pages import PAGES, ROOT

SOURCE = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.yaml")])
WRITTEN = sorted({*PAGES, *(ROOT / "docs").rglob("*.md"), *(ROOT / "decisions").glob("*.md")})


class Term(NamedTuple):
    """A line of the glossary."""

    name: str
    instead_of: list[str]


def glossary() -> list[Term]:
    """The lines of its tables."""
    rows = [line for line in (ROOT / "GLOSSARY.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [Term(c[0], [w.strip() for w in c[1].split(",") if w.strip()]) for c in cells if c[0] != "word"]


RULED_OUT = [word for term in glossary() for word in term.instead_of]


def uses(word: str, path: Path) -> list[str]:
    """Where a file uses a word, in the singular or the plural, also inside a name."""
    stem = f"{word[:-1]}(?:y|ies)" if word.endswith("y") else f"{word}s?"
    pattern = re.compile(rf"(?<![A-Za-z]){stem.replace(' ', '[ _]')}(?![A-Za-z])", re.IGNORECASE)
    text = path.read_text(encoding="utf-8")
    return [f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in pattern.finditer(text)]


@pytest.mark.parametrize("word", RULED_OUT)
def test_a_word_that_is_ruled_out_stands_nowhere(word: str):
    assert not [use for path in [*SOURCE, *WRITTEN] for use in uses(word, path)]


@pytest.mark.parametrize("term", glossary(), ids=lambda term: term.name)
def test_a_word_that_is_defined_is_used_in_the_code(term: Term):
    first = re.split(r" / |, ", term.name)[0]
    assert any(uses(first, path) for path in SOURCE)


def test_a_use_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("test_words.ROOT", tmp_path)
    (tmp_path / "x.py").write_text("def fit_ins(): ...\n# two Silos\nisland_count = 1\nstrategic = 2  # strategies\n")
    assert [len(uses(word, tmp_path / "x.py")) for word in ("fit_ins", "silo", "island", "strategy")] == [1, 1, 1, 1]
