"""A run's record, sorted by what its readers ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from atoll.errors import AtollError
from atoll.record.events import (
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
        """Whether rounds were run, and every reply was lost: it has not learned, whatever its tables say."""
        return bool(self.rounds and self.missing and not self.replies)

    @property
    def bytes_up(self) -> int:
        """All that clients sent."""
        return sum(r.bytes_up for r in self.rounds)

    @property
    def bytes_down(self) -> int:
        """All that the server sent to train."""
        return sum(r.bytes_down for r in self.rounds)

    @property
    def bytes_to_evaluate(self) -> int:
        """All that the server sent so that clients evaluate."""
        return sum(e.bytes_down for e in self.evaluations)


def refuse_fruitless(folder: RunFolder, story: Story) -> None:
    """Raises AtollError for a run that has learned nothing, with the reason."""
    if not story.fruitless:
        return
    refused = [one for one in story.missing if one.refused]
    first = (refused or [*story.missing])[0]
    remedy = (
        "a lower learning rate: --set finetune.optimizer.lr=..."
        if "loss is" in first.reason
        else f"`atoll show {folder.name}` tells every reply's fate"
    )
    count = f"{len(refused)} replies refused" if refused else f"{len(story.missing)} replies dropped"
    raise AtollError(
        "nothing was learned: no update was ever accepted",
        where=str(folder.path),
        found=f"{count}, the first {first.client}'s: {first.reason}",
        remedy=remedy,
    )


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
