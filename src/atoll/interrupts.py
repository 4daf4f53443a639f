"""Ctrl-C and SIGTERM, noted: some libraries swallow an interrupt, and fail in another way later."""

from __future__ import annotations

import signal
from typing import Any, NoReturn

_noted: list[int] = []


def note_interrupts() -> None:
    """From now on SIGTERM is an interrupt too, and either is remembered."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def interrupted() -> bool:
    """Whether this process was asked to stop, whatever has become of the exception."""
    return bool(_noted)


def _interrupt(number: int, frame: Any) -> NoReturn:
    _noted.append(number)
    raise KeyboardInterrupt
