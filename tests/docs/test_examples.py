"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from pages import ROOT

PACKAGE = ROOT / "src"
FETCHES = {"atoll.run"}
"""Whose example plans the quickstart, which needs its model and texts."""


def with_examples() -> list[object]:
    """Modules that hold an example."""
    found = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    names = [module_name(path) for path in found]
    return [pytest.param(name, marks=pytest.mark.real if name in FETCHES else ()) for name in names]


def module_name(path: Path) -> str:
    """atoll/models/fast/__init__.py -> atoll.models.fast"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name: str):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0
