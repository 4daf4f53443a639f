"""A stage at work: rounds until they are done, evaluated on the way, with a checkpoint after each.

This loop is outermost for every method and for every baseline. A kill at any point loses at most the round or the
evaluation that it hits: both are done again from the last checkpoint, with the same result.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from atoll import parts
from atoll.assemble import Assembly, Rebuild, clients
from atoll.build import Plan, baseline_names, samples
from atoll.data.read import Report
from atoll.data.sources import one_a_line
from atoll.errors import AtollError, Interrupted
from atoll.evaluate import evaluate
from atoll.exchange import Abandoned, Accepted, Dropped, Opened, Refused, Verdict
from atoll.fleet.base import Fleet
from atoll.fleet.inprocess import Elsewhere
from atoll.handover import begun_with
from atoll.identity import base, before_first, versions
from atoll.models.spaces import split
from atoll.outcome import Progress, outcome, progress_of, refuse_other_base, refuse_other_start
from atoll.params import Params, numel
from atoll.privacy.ledger import Entry, Ledger
from atoll.privacy.protection import Protection, Samples, entry, epsilon_of
from atoll.record.checkpoint import load_state, save_state
from atoll.record.events import (
    EVERYBODY,
    ClientLeftOut,
    Missing,
    Record,
    RecordsLeftOut,
    Replied,
    RoundEnded,
    RunEnded,
    RunStarted,
    Sink,
    Spent,
    SumOpened,
    read_events,
)
from atoll.record.folder import RunFolder
from atoll.round import State, initial, run_round
from atoll.schema import POOLED
from atoll.statement import statement
from atoll.stream import REFERENCE


@dataclass(frozen=True)
class Stage:
    """A stage at work: what the loop needs beside its state."""

    ready: Plan
    things: Assembly
    folder: RunFolder
    fleet: Fleet
    record: Record
    outer: RunFolder
    started: float

    @property
    def seconds(self) -> float:
        """Since the stage began, time before a resume included."""
        return time.perf_counter() - self.started


def run_stage(ready: Plan, things: Assembly, folder: RunFolder, outer: RunFolder, sinks: Sequence[Sink]) -> State:
    """Rounds from where the checkpoint is, or from the start, to the end. A stage that has ended is left as it is.

    `outer` is the folder that people know: a baseline's own lies inside it, and stops when it is asked to.
    """
    state, progress = begin(ready, things, folder)
    if progress.ended:
        return state
    own_sinks = [parts.make("sink", one, f"sinks[{i}]")(folder.path) for i, one in enumerate(ready.recipe.sinks)]
    record = Record(folder.record, [*sinks, *own_sinks], keep_bytes=progress.record_bytes)
    names = [*things.data, POOLED] if ready.trainers == [POOLED] else list(things.data)
    make = clients(ready, things, folder)
    with closing(ready.fleet(names, make, Rebuild(ready.tree, folder), state.clock)) as fleet:
        fleet.submit(state.in_flight)
        return drive(
            Stage(ready, things, folder, fleet, record, outer, time.perf_counter() - progress.seconds), state, progress
        )


def drive(at: Stage, state: State, progress: Progress) -> State:
    """Rounds until they are done, early stopping says so, or somebody asks to stop.

    A kill at any point loses at most the round or the evaluation it hits: both are done again, with the same result.
    """
    if state.round == 0:
        introduce(at)
    refused: list[Refused] = []  # since a reply was last accepted
    while True:
        if due(at.ready, state.round):
            state, progress = measure(at, state, progress, final=state.round == 0)
        if reason := why_end(at.ready, state.round, progress) or why_spent(at):
            break
        stop_if_asked(at.outer)
        stop_if_hopeless(at, state, refused)
        enter(at, state.round)
        state, heard = whole_round(at, state)
        progress = checkpoint(at, state, progress)
        refused = [] if any(isinstance(one, Accepted) for one in heard) else refused
        refused += [one for one in heard if isinstance(one, Refused)]
    state, progress = measure(at, state, progress, final=True)
    at.record(RunEnded(state.round, reason, at.seconds))
    checkpoint(at, state, replace(progress, ended=reason))
    return state


def begin(ready: Plan, things: Assembly, folder: RunFolder) -> tuple[State, Progress]:
    """From the run's checkpoint if there is one; else from the model, or from the run that this one starts `from`."""
    start = begun_with(ready, things, folder)
    if folder.checkpoint.exists():
        _, progress = progress_of(folder.checkpoint)
        if progress.plan != ready.hash:
            raise AtollError(
                "the recipe has changed since the run began", where=str(folder.recipe), found=f"plan {ready.hash}",
                allowed=f"plan {progress.plan}", remedy="start a new run; `from:` lets it go on from this one's result",
            )  # fmt: skip
        refuse_other_base(progress, base(ready), str(folder.path), ready.recipe.model)
        if ready.recipe.starts:  # else it began with the model, which was looked at just now
            refuse_other_start(progress, before_first(ready, things, start).start, folder)
        state = load_state(folder.checkpoint, sent_along(ready, start))
        now = things.digests
        if isinstance(ready.fleet, Elsewhere):  # sites come and go: those that are here shall hold what they held
            now = {**progress.data, **{name: held for name, held in now.items() if name in progress.data}}
        refuse_changed_data(progress.data, now, folder)
        refuse_short_record(progress.record_bytes, folder)
        if accounted(ready):
            refuse_short_ledger(state.round, folder)
        return state, progress
    refuse_changed_between(ready, things, folder)
    travels, _ = split(start, ready.recipe.finetune.personal)
    return initial(ready.rounds, travels, fixed=sent_along(ready, start)), before_first(ready, things, start)


def sent_along(ready: Plan, start: Params) -> dict[str, Params]:
    """The result of the run that this one starts `from`, where clients need it beside what trains: all they begin with."""
    return {REFERENCE: start} if ready.sends_start else {}


def refuse_changed_data(before: Mapping[str, str], now: Mapping[str, str], folder: RunFolder) -> None:
    """A run whose clients hold something else is another run: what it gave could not be told from what it was given."""
    changed = [f"{name}: is no longer there" for name in before if name not in now]
    changed += [f"{name}: was not there" for name in now if name not in before]
    changed += [f"{name}: holds other records" for name in now if name in before and before[name] != now[name]]
    if changed:
        raise AtollError(
            "the clients' data have changed since the run began", where=str(folder.path), found=one_a_line(changed),
            allowed="what each client held then",
            remedy="put the data back, or start a new run; `from:` lets it go on from this one's result",
        )  # fmt: skip


def refuse_changed_between(ready: Plan, things: Assembly, folder: RunFolder) -> None:
    """A stage begins with what those before it had, where they have their data in common."""
    for name, one in ready.before.items():
        if (one.recipe.data, one.recipe.judge) != (ready.recipe.data, ready.recipe.judge):
            continue
        before = outcome(folder.outermost.stage(name)).progress.data
        both = before.keys() & things.digests.keys()
        refuse_changed_data({key: before[key] for key in both}, {key: things.digests[key] for key in both}, folder)


def refuse_short_record(written: int, folder: RunFolder) -> None:
    """The record is looked at before it goes on: what is lost or damaged there is found before hours of training."""
    events = sum(1 for _ in read_events(folder.record))
    size = folder.record.stat().st_size if events else 0
    if size < written:
        raise AtollError(
            "the record is shorter than when the run left it", where=str(folder.record), found=f"{size} bytes",
            allowed=f"{written} bytes", remedy="put the file back from a copy, or run again",
        )  # fmt: skip


def refuse_short_ledger(rounds: int, folder: RunFolder) -> None:
    """Every round has an entry; with fewer of them a run would spend a budget twice."""
    entered = {one.round for one in Ledger(folder.ledger)}
    if missing := set(range(rounds)) - entered:
        raise AtollError(
            "the ledger has fewer entries than the run has rounds", where=str(folder.ledger),
            found=f"{len(entered)} rounds, without round {min(missing) + 1}", allowed=f"{rounds}, one entry each or more",
            remedy="put the file back from a copy: what was spent is not known without",
        )  # fmt: skip


def introduce(at: Stage) -> None:
    """What is going to happen, and who cannot take part."""
    ready, things = at.ready, at.things
    at.record(
        RunStarted(
            name=ready.recipe.name,
            plan=ready.hash,
            rounds=ready.recipe.finetune.rounds,
            clients=ready.trainers,
            samples={name: len(data.train) for name, data in things.data.items()},
            held_out={name: len(data.test) for name, data in things.data.items()},
            trains=numel(split(things.start, ready.recipe.finetune.personal)[0]),
            of=ready.shapes.count if ready.shapes else sum(p.numel() for p in things.model.parameters()),
            seed=ready.recipe.seed,
            baselines=baseline_names(ready),
            versions=versions(),
            warnings=ready.warnings,
            privacy=statement(ready, samples_of(at)),
            recipe=ready.recipe.model_dump(
                include={"model", "reference", "data", "start", "fuse", "judge", "finetune", "evaluate"}
            ),
            data=things.digests,
        )
    )
    if at.folder.is_baseline:  # it trains on what its run has told of
        return
    for client, report in things.left_out.items():
        at.record(ClientLeftOut(client, report))
    for client, records in distinct(things.reports).items():
        if records.left_out:
            at.record(RecordsLeftOut(client, records.read, records.kept, records.left_out))


def distinct(reports: Mapping[str, Report]) -> dict[str, Report]:
    """Each report once: simulated clients are dealt the records of one source, and have its report in common."""
    shared = len({id(report) for report in reports.values()}) < len(reports)
    return {EVERYBODY: next(iter(reports.values()))} if shared else dict(reports)


def due(ready: Plan, round: int) -> bool:
    """Whether to evaluate before round `round` begins: as the recipe says. The end comes by itself."""
    wanted = ready.recipe.evaluate
    if round == 0:
        return wanted.start and ready.recipe.finetune.rounds > 0
    return wanted.every > 0 and round % wanted.every == 0 and round < ready.recipe.finetune.rounds


def measure(at: Stage, state: State, progress: Progress, final: bool) -> tuple[State, Progress]:
    """Evaluates, and notes whether it got better. Compared are evaluations between rounds, on the same samples of all."""
    wanted = at.ready.recipe.evaluate
    held_out = [name for name, data in at.things.data.items() if len(data.test)]
    samples = wanted.final_samples if final else wanted.samples
    if not held_out:
        return state, progress
    heard, state = evaluate(at.ready.rounds, state, at.fleet, held_out, samples, final)
    at.record(heard)
    if final or math.isnan(heard.mean) or heard.absent:
        return state, progress
    if heard.mean < progress.best - wanted.min_delta:
        return state, replace(progress, best=heard.mean, without_better=0)
    return state, replace(progress, without_better=progress.without_better + 1)


def why_end(ready: Plan, round: int, progress: Progress) -> str:
    """Why the stage is over; empty while it is not."""
    if round >= ready.recipe.finetune.rounds:
        return "finished"
    patience = ready.recipe.evaluate.patience
    if patience is not None and progress.without_better >= patience:
        return f"no better held-out loss in {patience} evaluations"
    return ""


def why_spent(at: Stage) -> str:
    """Why no further release is allowed; empty while one is, and where nothing is promised."""
    protection = at.ready.protection
    if protection is None or protection.mechanism.epsilon is None:
        return ""
    spent = spent_after(at, protection, next_entry(at, protection, 0))
    budget = protection.mechanism.epsilon
    return (
        f"the privacy budget of {budget:g} is spent: another round would make it {spent:.4g}" if spent > budget else ""
    )


def enter(at: Stage, round: int) -> None:
    """The ledger's entry for the round that comes, before anything of it is released; no resume takes it out."""
    protection = accounted(at.ready)
    if protection is None:
        return
    coming = next_entry(at, protection, round)
    spent = spent_after(at, protection, coming)
    Ledger(at.folder.ledger).enter(coming)
    at.record(Spent(round, spent, protection.mechanism.delta))


def accounted(ready: Plan) -> Protection | None:
    """What is accounted for: without noise there is nothing to add up."""
    return ready.protection if ready.protection and ready.protection.noise_multiplier else None


def next_entry(at: Stage, protection: Protection, round: int) -> Entry:
    """What the next release will be."""
    return entry(protection, at.folder.id, at.ready.hash, round, samples_of(at))


def samples_of(at: Stage) -> Samples:
    """How many those train on who may be asked."""
    return samples(at.ready, {name: len(data.train) for name, data in at.things.data.items()})


def spent_after(at: Stage, protection: Protection, coming: Entry) -> float:
    """Epsilon after one more release, with what the stages before have spent of the same data."""
    return epsilon_of(protection, [*spent_before(at.ready, at.folder), *Ledger(at.folder.ledger), coming])


def spent_before(ready: Plan, folder: RunFolder) -> list[Entry]:
    """The entries of all stages before this one."""
    stages = [folder.outermost.stage(name) for name in ready.before]
    return [entry for stage in stages for entry in Ledger(stage.ledger)]


def stop_if_asked(folder: RunFolder) -> None:
    """Between rounds, where nothing is lost."""
    if folder.asked_to_stop():
        raise Interrupted(
            "stopped as asked; nothing is lost", where=str(folder.path), remedy=f"`atoll resume {folder.name}`"
        )


HOPELESS = 3
"""Refusals of each client, one after the other: what everybody finds wrong three times everybody will find again."""


def stop_if_hopeless(at: Stage, state: State, refused: Sequence[Refused]) -> None:
    """Raises AtollError where all who may be asked were refused again and again, and nobody is at work; it can go on."""
    times = Counter(one.client for one in refused)
    if not refused or state.in_flight or any(times[client] < HOPELESS for client in at.ready.trainers):
        return
    name = at.outer.name
    raise AtollError(
        f"every client was refused {HOPELESS} times, one after the other", where=str(at.folder.path),
        found=f"the last, {refused[-1].client}: {refused[-1].reason}",
        remedy=f"mend that; `atoll resume {name}` goes on, and `atoll show {name}` tells every reply's fate",
    )  # fmt: skip


def whole_round(at: Stage, state: State) -> tuple[State, Sequence[Verdict]]:
    """One round, and its events; with what was heard."""
    started = time.perf_counter()
    heard: list[Verdict] = []

    def observe(verdict: Verdict) -> None:
        heard.append(without_tensors(verdict))
        at.record(event_of(state.round, verdict))

    after = run_round(at.ready.rounds, state, at.fleet, observe)
    at.record(sum_up(state, after, heard, time.perf_counter() - started, at.fleet.lanes()))
    return after, heard


def without_tensors(verdict: Verdict) -> Verdict:
    """What the round's sum needs; the update itself is let go at once."""
    return replace(verdict, contributions={}) if isinstance(verdict, Accepted | Opened) else verdict


def event_of(round: int, verdict: Verdict) -> Replied | Missing | SumOpened:
    """A verdict as the record has it."""
    if isinstance(verdict, Opened):
        return SumOpened(round, verdict.clients, verdict.lost, verdict.bytes_up, verdict.bytes_down)
    if isinstance(verdict, Accepted):
        reply = verdict.reply
        loss = reply.metrics.get("loss", float("nan"))
        return Replied(round, reply.client, loss, reply.nbytes, reply.seconds, verdict.staleness, reply.metrics)
    if isinstance(verdict, Abandoned):
        return Missing(round, EVERYBODY, verdict.reason, refused=False)
    return Missing(round, verdict.client, verdict.reason, not isinstance(verdict, Dropped))


def sum_up(before: State, after: State, heard: Sequence[Verdict], seconds: float, lanes: int) -> RoundEnded:
    """A round in one event. Its local steps are those of the busiest of `lanes` that share the work evenly."""
    accepted = [verdict.reply for verdict in heard if isinstance(verdict, Accepted)]
    losses = [reply.metrics.get("loss", float("nan")) for reply in accepted]
    kinds = Counter(type(verdict).__name__ for verdict in heard)
    phases = [verdict for verdict in heard if isinstance(verdict, Opened)]
    worked = [reply.metrics.get("seconds_in_steps", 0.0) for reply in accepted]
    local_steps = max(sum(worked) / lanes, max(worked, default=0.0))
    return RoundEnded(
        round=before.round,
        accepted=len(accepted),
        refused=kinds["Refused"],
        dropped=kinds["Dropped"],
        loss=sum(losses) / len(losses) if losses else float("nan"),
        bytes_down=after.bytes_down - before.bytes_down + sum(one.bytes_down for one in phases),
        bytes_up=sum(reply.nbytes for reply in accepted)
        + sum(one.nbytes for one in heard if isinstance(one, Refused))
        + sum(one.bytes_up for one in phases),
        seconds=seconds,
        clock=after.clock,
        spans={"local_steps": local_steps, "outside": seconds - local_steps},
    )


def checkpoint(at: Stage, state: State, progress: Progress) -> Progress:
    """Everything that going on needs, in one file."""
    progress = replace(progress, record_bytes=at.record.position, seconds=at.seconds)
    save_state(at.folder.checkpoint, state, asdict(progress))
    return progress
