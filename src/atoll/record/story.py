"""A run's record, sorted by what its readers ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from atoll.errors import AtollError
from atoll.record.events import (
    EVERYBODY,
    ClientLeftOut,
    Evaluated,
    Missing,
    RecordsLeftOut,
    Replied,
    RoundEnded,
    RunEnded,
    RunStarted,
    Spent,
    read_events,
)
from atoll.record.folder import RunFolder


@dataclass(frozen=True)
class Story:
    """A record, sorted by what the readers of a run ask for."""

    started: RunStarted
    rounds: Sequence[RoundEnded]
    evaluations: Sequence[Evaluated]
    replies: Sequence[Replied]
    missing: Sequence[Missing]
    left_out: Sequence[ClientLeftOut]
    records: Sequence[RecordsLeftOut]
    ended: RunEnded | None
    spent: Sequence[Spent] = ()
    baselines: Mapping[str, Story] = field(default_factory=dict)
    before: Mapping[str, Story] = field(default_factory=dict)
    """The stages before this one, by name."""

    @property
    def base(self) -> Evaluated | None:
        """Before the first round; of a run without a round there is but its result."""
        return next((e for e in self.evaluations if e.round == 0 and self.started.rounds), None)

    @property
    def final(self) -> Evaluated | None:
        """After the last, once the run is over."""
        ends = (e for e in reversed(self.evaluations) if e.final and (e.round > 0 or not self.started.rounds))
        return next(ends, None)

    @property
    def fruitless(self) -> bool:
        """Whether rounds were run, and each came to nothing: it has not learned, whatever its tables say."""
        abandoned = {one.round for one in self.missing if one.client == EVERYBODY}
        return bool(self.rounds and self.missing) and {one.round for one in self.replies} <= abandoned

    @property
    def bytes_up(self) -> int:
        """All that clients sent."""
        return sum(r.bytes_up for r in self.rounds)

    @property
    def bytes_down(self) -> int:
        """All that the server sent to train."""
        return sum(r.bytes_down for r in self.rounds) + sum(e.bytes_fixed for e in self.evaluations)

    @property
    def bytes_to_evaluate(self) -> int:
        """All that the server sent so that clients evaluate."""
        return sum(e.bytes_down for e in self.evaluations)


def refuse_fruitless(folder: RunFolder, story: Story) -> None:
    """Raises AtollError for a run that has learned nothing, with the reason."""
    if not story.fruitless:
        return
    abandoned = bool(story.replies)
    lost = [one for one in story.missing if (one.client == EVERYBODY) == abandoned] or [*story.missing]
    refused = [one for one in lost if one.refused]
    first, count = (refused or lost)[0], len(refused or lost)
    what = "every round was abandoned" if abandoned else "no update was ever accepted"
    unit = "rounds" if abandoned else "replies refused" if refused else "replies dropped"
    whose = "" if first.client == EVERYBODY else f" {first.client}'s"
    slower = "loss is" in first.reason and (folder.is_stage or not story.before)
    section = folder.path.name if folder.is_stage else "finetune"
    raise AtollError(
        f"nothing was learned: {what}", where=str(folder.path), found=f"{count} {unit}, the first{whose}: {first.reason}",
        remedy=f"a lower learning rate: --set {section}.optimizer.lr=..." if slower
        else f"`atoll show {folder.name}` tells every reply's fate; mend what is wrong, and run it anew",
    )  # fmt: skip


def read_story(folder: RunFolder) -> Story | None:
    """The story so far; None before the run has begun."""
    kinds: dict[type, list[object]] = {}
    for event in read_events(folder.record):
        kinds.setdefault(type(event), []).append(event)
    if RunStarted not in kinds:
        return None

    def of(kind: type) -> list[object]:
        return kinds.get(kind, [])

    inner = {unquote(b.path.name): story for b in folder.baselines() if (story := read_story(b))}
    before = {one.path.name: story for one in folder.stages() if (story := read_story(one))}
    return Story(
        of(RunStarted)[0],  # type: ignore[arg-type]
        of(RoundEnded), of(Evaluated), of(Replied), of(Missing), of(ClientLeftOut), of(RecordsLeftOut),  # type: ignore[arg-type]
        next(iter(of(RunEnded)), None), of(Spent), inner, before,  # type: ignore[arg-type]
    )  # fmt: skip
