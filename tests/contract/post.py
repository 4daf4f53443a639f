"""A post office in the place of Flower: an operator whose sites answer at once, and whatever may be lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from atoll import messages
from atoll.exchange import Task
from atoll.fleet.flower.calls import Gone
from atoll.fleet.flower.link import NotTaken, Received
from atoll.fleet.flower.operator import Failed
from atoll.site import opened_task
from atoll.talk import envelope, opened


@dataclass
class Office:
    """Speaks as `Operator` does. `client` makes the client of a site."""

    client: Callable[[str], Any]
    there: dict[str, int]
    sent: list[tuple[str, str]] = field(default_factory=list)
    """(site, kind) of every message, in order."""
    lose: set[str] = field(default_factory=set)
    """Kinds of messages that are taken and never arrive."""
    hold: set[str] = field(default_factory=set)
    """Kinds of messages whose answers lie here until they are let go."""
    fail: dict[str, str] = field(default_factory=dict)
    """Kinds of messages that Flower reports as failed, and why."""
    broken: bool = False
    """Whether the connection is gone."""
    link: Any = field(default_factory=lambda: SimpleNamespace(limit_bytes=0))
    _out: dict[str, tuple[str, str, list[bytearray]]] = field(default_factory=dict)
    _done: dict[str, list[Any]] = field(default_factory=dict)
    """By task, what the site answered: it keeps it."""

    def sites(self) -> dict[str, int]:
        if self.broken:
            raise Gone("the server died")
        return dict(self.there)

    def send(self, node: int, parts: Any) -> str:
        if self.broken:
            raise Gone("the server died")
        names = {number: name for name, number in self.there.items()}
        if node not in names:
            raise NotTaken("the site has left")
        flat = [bytearray(b"".join(view for chunk in one.chunks for view in chunk)) for one in parts]
        kind = opened(flat)["kind"]
        self.sent.append((names[node], kind))
        name = f"message-{len(self.sent)}"
        if kind not in self.lose:
            self._out[name] = (names[node], kind, flat)
        return name

    def answers(self, names: Any, wait: float) -> Any:
        for name in [name for name in names if name in self._out]:
            site, kind, flat = self._out[name]
            if kind in self.fail:
                del self._out[name]
                yield Failed(name, self.fail[kind])
            elif kind not in self.hold:
                del self._out[name]
                yield Received(None, name, 1, [bytearray(b"".join(one)) for one in self.answer(site, kind, flat)])

    def answer(self, site: str, kind: str, flat: list[bytearray]) -> list[Any]:
        """What a site answers."""
        if kind == "plan":
            return [envelope("ready", train=3, test=0, least=1)]
        if kind == "ask":
            return self._done.get(opened(flat)["task"], [envelope("unknown")])
        if kind == "cancel":
            return [envelope("cancelled")]
        task: Task = opened_task(flat)
        if task.id not in self._done:
            self._done[task.id] = [envelope("event"), messages.pack_event(self.client(site).handle(task))]
        return self._done[task.id]

    def close(self) -> None:
        self._out.clear()
