"""Types that tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Said(NamedTuple):
    """What a command line gave: its exit status and what it wrote."""

    status: int
    out: str
    err: str


Atoll = Callable[..., Said]
