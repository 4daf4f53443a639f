"""What the operator and a site say to each other: the envelopes around plans, tasks and replies.

    hello                                     -> hello: versions, hardware, records, policy
    plan: tree, model, client, clients        -> ready: train, test, least or refused: reason
    task: run; a broadcast, a task            -> event; the event          or refused: reason, or unready
          and what is fixed, if anything is
    ask: run, task                            -> event; the event          or working, or unknown
    cancel: run                               -> cancelled

An envelope is the first part of a message, a small JSON object; the parts after it are those of messages.py. Every envelope
says its protocol's version, and an end that does not speak it says what to install.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from atoll.wire import Buffer

PROTOCOL = 2
"""The version of what is said here; both ends say it first."""

LARGEST = 4 << 20
"""Bytes of an envelope; a plan's tree is the longest thing in one."""


def envelope(kind: str, **about: Any) -> list[Buffer]:
    """A part that opens a message."""
    return [json.dumps({"protocol": PROTOCOL, "kind": kind, **about}).encode()]


def opened(parts: Sequence[Buffer]) -> dict[str, Any]:
    """The envelope of a message.

    Raises ValueError for what is none, and for another version of the protocol, with what to do about it.
    """
    if not parts or len(parts[0]) > LARGEST:
        raise ValueError("a message without an envelope")
    try:
        head = json.loads(bytes(parts[0]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not an envelope: {error}") from error
    if not isinstance(head, dict) or not isinstance(head.get("kind"), str):
        raise ValueError("an envelope without a kind")
    if head.get("protocol") != PROTOCOL:
        theirs = head.get("version", "?")
        raise ValueError(
            f"the other end speaks protocol {head.get('protocol')} (atoll {theirs}), this one {PROTOCOL}: install the same"
            " version of atoll on both"
        )
    return head
