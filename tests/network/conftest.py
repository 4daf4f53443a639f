"""Federations for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machines import NAMES, RECIPE, Federation, free_port, write_sites

from atoll.fleet.flower import certs


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Keys, data and a recipe; nothing runs yet."""
    folder = tmp_path_factory.mktemp("federation")
    certs.init(folder / "certs", ["localhost", "127.0.0.1", "127.0.0.2"])
    for name in NAMES:
        certs.site(folder / "certs", name)
    write_sites(folder / "data")
    (folder / "home").mkdir()
    (folder / "mine.yaml").write_text(RECIPE)
    made = Federation(folder, free_port())
    yield made
    made.close()


@pytest.fixture(scope="module")
def federation(bare: Federation) -> Federation:
    """A server and three sites that have joined it."""
    bare.serve()
    for name in NAMES:
        bare.join(name)
    return bare
