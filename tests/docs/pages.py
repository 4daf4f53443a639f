"""The pages of the docs as data: their code blocks, and what their language and title ask a test to do.

```python title="mine.py"     a file to write (any language)
```python                     code to run, in one namespace a page
```yaml title="mine.yaml"     a file to write, and a recipe that must build
```sh                         command lines: each must parse; on pages that are executed, each must work
```text                       output: not checked
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NETWORK = ROOT / "docs" / "how-to" / "network.md"
"""Its commands are processes that talk to each other: tests/network runs them."""

GUIDES = [ROOT / "docs" / "tutorial.md", *sorted({*(ROOT / "docs" / "how-to").glob("*.md")} - {NETWORK})]
"""Pages whose command lines run, too."""
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    ROOT / "docs" / "index.md",
    *GUIDES,
    NETWORK,
]

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(atoll [a-z][^`]*)`")


class Block(NamedTuple):
    """A fenced block: its language, the file it is to become ("" for none), its text and its first line on the page."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The page's blocks, in order."""
    written = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(written):
        yield Block(found[1], found[2] or "", found[3], written.count("\n", 0, found.start()) + 1)


def lines(block: Block) -> list[list[str]]:
    """The command lines of a block as words, comments left out."""
    return [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


def inline_commands(page: Path) -> list[list[str]]:
    """`atoll ...` in running text, as words."""
    return [shlex.split(" ".join(found.split())) for found in _INLINE.findall(page.read_text(encoding="utf-8"))]


def name(page: Path) -> str:
    """How a test calls the page."""
    return str(page.relative_to(ROOT))
