"""Examples in docstrings as code: `>>>` and what it prints are fenced before the text is read as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension

EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*|\n(?P=indent) +\S.*)*", re.MULTILINE)


class Doctests(Extension):
    """See the module's text."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Each object once, when it is loaded."""
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(example: re.Match[str]) -> str:
    """The example between fences, as far in as it stands."""
    indent = example["indent"]
    return f"{indent}```pycon\n{example[0]}\n{indent}```"
