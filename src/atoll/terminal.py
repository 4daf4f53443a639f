"""What a run says while it runs. In a terminal one live line, and a line that stays for every round and evaluation; where
there is none (a log, a pipe), plain lines: for every reply, round and evaluation, and for local steps that take long.

Everything goes to stderr: stdout is for results.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from atoll.record.card import counted as counted  # an ending counts in the same words
from atoll.record.card import human_bytes, human_seconds, records_in_words
from atoll.record.events import (
    EVERYBODY,
    ClientLeftOut,
    Evaluated,
    Event,
    Missing,
    RecordsLeftOut,
    Replied,
    RoundEnded,
    RunEnded,
    RunStarted,
    Spent,
    SumOpened,
)
from atoll.record.measured import unmeasured

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from atoll.local.work import Tick

SILENCE_SECONDS = 2.0
"""How long a plain log stays silent while clients work; longer in long runs, see `Plain`."""


class Watch(Protocol):
    """Shows a run: a `Say`, a `Sink` and a `Report` in one, open as long as the run goes."""

    def say(self, line: str) -> None:
        """A slow step begins."""
        ...

    def event(self, event: Event) -> None:
        """Something has happened that the record keeps."""
        ...

    def report(self, tick: Tick) -> None:
        """A local step or a held-out batch is done."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def watch() -> Watch:
    """What suits where stderr goes."""
    return Live(console(sys.stderr)) if sys.stderr.isatty() else Plain(_write_line)


def console(file: object = None) -> Console:
    """A console that prints text as it is; as wide as need be where it is no terminal."""
    from rich.console import Console

    file = file or sys.stdout
    wide = None if getattr(file, "isatty", lambda: False)() else 200
    return Console(file=file, width=wide, markup=False, emoji=False, highlight=False)  # type: ignore[arg-type]


def _write_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def told(event: Event) -> str:
    """An event in a line. People count rounds from 1."""
    match event:
        case RunStarted():
            begins = (
                f"{event.name}: {counted(len(event.clients), 'client')}, {counted(event.rounds, 'round')}; "
                f"{event.trains:,} of {event.of:,} parameters train; plan {event.plan}"
            )
            return "; ".join([begins, *unmeasured(event)])
        case ClientLeftOut():
            return f"{event.client} is left out, it has no usable data: {'; '.join(event.report.splitlines())}"
        case RecordsLeftOut():
            return records_in_words(event)
        case Replied():
            late = f", {counted(event.staleness, 'round')} late" if event.staleness else ""
            sent = human_bytes(event.bytes_up)
            loss = "" if math.isnan(event.loss) else f"loss {event.loss:.3f}, "
            return f"round {event.round + 1}: {event.client}: {loss}{sent} up, {event.seconds:.1f} s{late}"
        case Missing():
            return (
                f"round {event.round + 1}: {event.client} {'refused' if event.refused else 'dropped'}: {event.reason}"
            )
        case Spent():
            return f"round {event.round + 1}: epsilon {event.epsilon:.3g} at delta {event.delta:g} once it is released"
        case SumOpened():
            lost = f", {event.lost} lost on the way" if event.lost else ""
            return f"round {event.round + 1}: the sum of {counted(event.clients, 'client')} is open{lost}"
        case RoundEnded():
            return _round_in_words(event)
        case Evaluated():
            return f"held-out loss {_when(event)}: {_measured(event)}, {event.seconds:.1f} s"
        case RunEnded():
            return f"{event.reason}: {counted(event.rounds, 'round')} in {event.seconds:.0f} s"


def _when(event: Evaluated) -> str:
    return f"after round {event.round}" if event.round else "before the first round"


def _measured(event: Evaluated) -> str:
    silent = "".join(f"; not {name}: {reason}" for name, reason in event.absent.items())
    if not event.clients:
        return f"no client has measured one{silent}"
    if list(event.clients) == [EVERYBODY]:
        return f"{event.mean:.3f} over all samples of {EVERYBODY}{silent}"
    worst = max(event.clients, key=lambda name: event.clients[name]["loss"])
    return f"mean {event.mean:.3f}, worst {event.worst:.3f} ({worst}){silent}"


def _round_in_words(event: RoundEnded) -> str:
    loss = "" if math.isnan(event.loss) else f"loss {event.loss:.3f}, "
    lost = [f"{count} {what}" for what in ("refused", "dropped") if (count := getattr(event, what))]
    return (
        f"round {event.round + 1} done: {', '.join([f'{event.accepted} accepted', *lost])}; "
        f"{loss}{human_bytes(event.bytes_down)} down, {human_bytes(event.bytes_up)} up, {event.seconds:.1f} s"
    )


def at_work(tick: Tick) -> str:
    """Where a client is: `round 2 of 4 · clinic · local step 3 of 4 · loss 2.310`."""
    loss = "" if math.isnan(tick.loss) else f" · loss {tick.loss:.3f}"
    if tick.kind == "evaluate":
        after = f"evaluation after {tick.round} of {tick.rounds} rounds"
        return f"{after} · {tick.client} · batch {tick.done} of {tick.of}{loss}"
    return f"round {tick.round + 1} of {tick.rounds} · {tick.client} · local step {tick.done} of {tick.of}{loss}"


class Pace:
    """How long the rounds that are left may take: as those that were seen, with what lay between them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._began, self._rounds, self._seen = now(), 0, 0

    def report(self, tick: Tick) -> None:
        """A step of some client: with the first one a run begins that goes on."""
        if tick.kind != "evaluate" and not self._rounds:
            self._began, self._rounds = self._now(), tick.rounds

    def told(self, event: Event) -> str:
        """The event in a line; a round's with the time that is left."""
        line = told(event)
        match event:
            case RunStarted():
                self._began, self._rounds, self._seen = self._now(), event.rounds, 0
            case Evaluated() if not self._seen:
                self._began = self._now()
            case RoundEnded() if self._rounds:
                self._seen += 1
                left = self._rounds - event.round - 1
                seconds = left * (self._now() - self._began) / self._seen
                return f"{line}; {counted(left, 'round')} left, about {human_seconds(seconds)}" if left else line
            case RunEnded():
                self._rounds = self._seen = 0
        return line


class Plain:
    """Plain lines. Local steps get one when nothing was said for 2 seconds, or for a sixtieth of the time so far.

    The start of a client's work gets one where it may take as long: the first of its kind, and where steps are slow.
    """

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._write, self._now = write, now
        self._started = self._last = self._ticked = now()
        self._pace = Pace(now)
        self._kinds: set[str] = set()
        self._slow = False

    def say(self, line: str) -> None:
        """See `Watch`."""
        self._last = self._now()
        self._write(line)

    def event(self, event: Event) -> None:
        """See `Watch`."""
        self.say(self._pace.told(event))

    def report(self, tick: Tick) -> None:
        """See `Watch`."""
        now = self._now()
        self._pace.report(tick)
        patience = max(SILENCE_SECONDS, (now - self._started) / 60)
        if tick.done:
            self._slow = now - self._ticked > patience
        begins_slowly = tick.done == 0 and (self._slow or tick.kind not in self._kinds)
        self._kinds.add(tick.kind)
        self._ticked = now
        if begins_slowly or now - self._last > patience:
            self.say(at_work(tick))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class Live:
    """One line that lives, with the client at work, its step, loss, and the time since the start."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live as LiveDisplay

        self._console, self._now, self._started = console, now, now()
        self._pace = Pace(now)
        self._line = "starting"
        self._display = LiveDisplay(console=console, get_renderable=self._show, refresh_per_second=5, transient=True)

    def _show(self) -> RenderableType:
        from rich.text import Text

        minutes, seconds = divmod(int(self._now() - self._started), 60)
        return Text(f"{minutes}:{seconds:02d}  {self._line}", no_wrap=True, overflow="ellipsis")

    def say(self, line: str) -> None:
        """See `Watch`."""
        self._line = line
        self._console.print(line, style="dim")

    def event(self, event: Event) -> None:
        """See `Watch`. Replies pass by on the live line."""
        line = self._pace.told(event)
        if not isinstance(event, Replied):
            self._console.print(line)

    def report(self, tick: Tick) -> None:
        """See `Watch`."""
        self._pace.report(tick)
        self._line = at_work(tick)

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the live line away."""
        self._display.stop()
