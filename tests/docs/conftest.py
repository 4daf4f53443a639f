"""What the tests of the docs need."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def desk(tmp_path: Path, sites: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which a reader follows a page: three clients' files in `sites`, and nothing else.

    Modules that a page has a reader write are forgotten afterwards, so that the next page can use their names again.
    """
    folder = tmp_path / "desk"
    shutil.copytree(sites, folder / "sites")
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    monkeypatch.delenv("ATOLL_RUNS", raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that a second thread only waits
    importlib.invalidate_caches()
    yield folder
    torch.set_num_threads(threads)
    for module in [m for m, found in sys.modules.items() if str(folder) in str(getattr(found, "__file__", ""))]:
        del sys.modules[module]
