"""A run: recipe -> plan -> rounds -> record -> checkpoint -> adapter -> card.

`stage` is the outermost loop of every method: rounds until they are done, evaluated on the way, with a checkpoint after
each. A baseline is a run of its own inside the run: the same loop over the same data, with another population.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

from atoll import parts, recipe
from atoll.assemble import Assembly, again, assemble, clients, rebuild
from atoll.build import POOLED, Plan, build
from atoll.cache import Say, quiet
from atoll.errors import AtollError, Interrupted
from atoll.estimate import remember_speed
from atoll.evaluate import evaluate
from atoll.exchange import Accepted, Dropped, Verdict
from atoll.fleet.base import Fleet
from atoll.local.work import Report, unwatched
from atoll.models.spaces import write
from atoll.params import Params, numel
from atoll.record.card import read_story, write_card
from atoll.record.checkpoint import load_with_extra, save_state
from atoll.record.events import (
    ClientLeftOut,
    Missing,
    Record,
    Replied,
    RoundEnded,
    RunEnded,
    RunStarted,
    Sink,
)
from atoll.record.folder import RunFolder, create, find
from atoll.round import State, initial, run_round
from atoll.stream import UPDATE


def plan(name_or_path: str, settings: Sequence[str] = ()) -> Plan:
    """The plan of a recipe: what `atoll plan` shows. Runs nothing.

    >>> plan("quickstart", ["finetune.rounds=2"]).recipe.finetune.rounds
    2
    """
    return build(*recipe.read(name_or_path, settings))


def run(
    name_or_path: str,
    settings: Sequence[str] = (),
    sinks: Sequence[Sink] = (),
    say: Say = quiet,
    report: Report = unwatched,
) -> RunFolder:
    """Runs a recipe to its end; returns the folder with all that came of it.

    Args:
        name_or_path: a shipped recipe by name, or a path.
        settings: `finetune.rounds=10` and the like, laid over the recipe.
        sinks: hear every event beside the record.
        say: told before each slow step of the preparation.
        report: told after each local step.

    Raises:
        AtollError: the recipe cannot be run; nothing is left behind but the folder of a run that had begun.
    """
    ready = plan(name_or_path, settings)
    with begun(ready) as folder:
        return execute(ready, folder, sinks, say, report)


@contextmanager
def begun(ready: Plan) -> Iterator[RunFolder]:
    """A new run's folder with its recipe; gone again if a mistake ends the run before its first event."""
    folder = create(ready.recipe.name)
    write_recipe(folder, ready)
    try:
        yield folder
    except AtollError:
        if not folder.record.exists():
            shutil.rmtree(folder.path)
        raise


def resume(reference: str, sinks: Sequence[Sink] = (), say: Say = quiet, report: Report = unwatched) -> RunFolder:
    """Goes on with a run from its last whole round; a finished one is left as it is."""
    folder = find(reference)
    return execute(plan(str(folder.recipe)), folder, sinks, say, report)


def write_recipe(folder: RunFolder, ready: Plan) -> None:
    """The merged tree: it needs no other file to run again."""
    from ruamel.yaml import YAML

    with folder.recipe.open("w", encoding="utf-8") as file:
        YAML().dump(ready.tree, file)


def execute(
    ready: Plan, folder: RunFolder, sinks: Sequence[Sink] = (), say: Say = quiet, report: Report = unwatched
) -> RunFolder:
    """The run itself, then its baselines, the adapter and the card. Each is skipped if it is there."""
    with folder.locked(), folder.disk_errors():
        things = assemble(ready, say, report)
        state = stage(ready, things, folder, sinks)
        save_adapter(ready, things, state.params[UPDATE], folder)
        if story := read_story(folder):
            remember_speed(ready, story, folder.name)
        for name, variant in baselines(ready, list(things.data)):
            say(f"baseline {name}")
            inner = folder.baseline(name)
            inner.path.mkdir(parents=True, exist_ok=True)
            write_recipe(inner, variant)
            stage(variant, again(things, variant), inner, sinks)
        say("writing the card")
        write_card(folder)
    return folder


def baselines(ready: Plan, with_data: Sequence[str]) -> Iterator[tuple[str, Plan]]:
    """What the federated result is measured against: the same work by one client alone, or on everybody's data pooled."""
    stage = ready.recipe.finetune
    quiet_evaluation = {"start": False, "every": 0}
    for kind in ready.recipe.baselines:
        if kind == "local":
            for client in with_data:
                yield f"local-{client}", variant(ready, {"population": [client]}, quiet_evaluation)
        else:
            steps = None if stage.local_steps is None else round(stage.local_steps * ready.cohort)
            yield POOLED, variant(ready, {"population": POOLED, "local_steps": steps}, quiet_evaluation)


ALONE: dict[str, Any] = {
    "schedule": {"use": "synchronous"},
    "correction": {"use": "none"},
    "outer": {"use": "sgd", "lr": 1.0},
    "up": [],
    "down": [],
}
"""What one client that trains by itself has no use for: sampling, correction, compression, a server's step."""


def variant(ready: Plan, finetune: dict[str, Any], evaluation: dict[str, Any]) -> Plan:
    """The plan for one client that trains by itself. With these parts a round is nothing but its local steps."""
    changes = {"finetune": ALONE | finetune, "evaluate": evaluation, "baselines": [], "fleet": {"use": "inprocess"}}
    tree = recipe.merge(ready.tree, changes)
    return build(recipe.validate(tree, ready.recipe.name), tree)


@dataclass(frozen=True)
class Progress:
    """What the loop of a stage remembers beside the state; a checkpoint keeps it."""

    best: float = float("inf")
    without_better: int = 0
    record_bytes: int = 0
    seconds: float = 0.0
    ended: str = ""


@dataclass(frozen=True)
class Stage:
    """A stage at work: what the loop needs beside its state."""

    ready: Plan
    things: Assembly
    folder: RunFolder
    fleet: Fleet
    record: Record
    started: float

    @property
    def seconds(self) -> float:
        """Since the stage began, time before a resume included."""
        return time.perf_counter() - self.started


def stage(ready: Plan, things: Assembly, folder: RunFolder, sinks: Sequence[Sink]) -> State:
    """Rounds from where the checkpoint is, or from the start, to the end. A stage that has ended is left as it is."""
    state, progress = begin(ready, things, folder)
    if progress.ended:
        return state
    own_sinks = [parts.make("sink", one, f"sinks[{i}]")(folder.path) for i, one in enumerate(ready.recipe.sinks)]
    record = Record(folder.record, [*sinks, *own_sinks], keep_bytes=progress.record_bytes)
    names = [*things.data, POOLED] if ready.trainers == [POOLED] else list(things.data)
    make = clients(ready, things, folder)
    with closing(ready.fleet(names, make, partial(rebuild, ready.tree, folder), state.clock)) as fleet:
        fleet.submit(state.in_flight)
        return drive(
            Stage(ready, things, folder, fleet, record, time.perf_counter() - progress.seconds), state, progress
        )


def drive(at: Stage, state: State, progress: Progress) -> State:
    """Rounds until they are done, early stopping says so, or somebody asks to stop.

    A kill at any point loses at most the round or the evaluation it hits: both are done again, with the same result.
    """
    if state.round == 0:
        introduce(at)
    while True:
        if due(at.ready, state.round):
            progress = measure(at, state, progress, final=state.round == 0)
        if reason := why_end(at.ready, state.round, progress):
            break
        stop_if_asked(at.folder)
        state = whole_round(at, state)
        progress = checkpoint(at, state, progress)
    progress = measure(at, state, progress, final=True)
    at.record(RunEnded(state.round, reason, at.seconds))
    checkpoint(at, state, replace(progress, ended=reason))
    return state


def begin(ready: Plan, things: Assembly, folder: RunFolder) -> tuple[State, Progress]:
    """From the run's checkpoint if there is one; else from the model, or from the run that this one starts `from`."""
    if folder.checkpoint.exists():
        state, kept = load_with_extra(folder.checkpoint)
        return state, Progress(**kept)
    return initial(ready.rounds, start_of(ready, things)), Progress()


def start_of(ready: Plan, things: Assembly) -> Params:
    """The params before the first round."""
    if ready.recipe.start is None:
        return things.start
    other = find(ready.recipe.start)
    if not other.checkpoint.exists():
        raise AtollError(
            "the run has no result to start from", where="from", found=other.name, remedy=f"`atoll resume {other.name}`"
        )
    params = load_with_extra(other.checkpoint)[0].params[UPDATE]
    mine = {name: tuple(x.shape) for name, x in things.start.items()}
    if {name: tuple(x.shape) for name, x in params.items()} != mine:
        raise AtollError(
            "the run trained in another space", where="from", found=other.name,
            remedy="use the model and the finetune.space of that run",
        )  # fmt: skip
    return params


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
            trains=numel(things.start),
            of=ready.shapes.count if ready.shapes else sum(p.numel() for p in things.model.parameters()),
            seed=ready.recipe.seed,
            baselines=[name for name, _ in baselines(ready, list(things.data))],
            versions={name: version(name) for name in ("atoll", "torch", "transformers", "peft")},
            warnings=ready.warnings,
        )
    )
    for client, report in things.left_out.items():
        at.record(ClientLeftOut(client, report))


def due(ready: Plan, round: int) -> bool:
    """Whether to evaluate before round `round` begins: as the recipe says. The end comes by itself."""
    wanted = ready.recipe.evaluate
    if round == 0:
        return wanted.start
    return wanted.every > 0 and round % wanted.every == 0 and round < ready.recipe.finetune.rounds


def measure(at: Stage, state: State, progress: Progress, final: bool) -> Progress:
    """Evaluates, and notes whether it got better."""
    wanted = at.ready.recipe.evaluate
    held_out = [name for name, data in at.things.data.items() if len(data.test)]
    samples = wanted.final_samples if final else wanted.samples
    heard = evaluate(at.ready.rounds, state, at.fleet, held_out, samples, final)
    at.record(heard)
    if heard.mean < progress.best - wanted.min_delta:
        return replace(progress, best=heard.mean, without_better=0)
    return replace(progress, without_better=progress.without_better + 1)


def why_end(ready: Plan, round: int, progress: Progress) -> str:
    """Why the stage is over; empty while it is not."""
    if round >= ready.recipe.finetune.rounds:
        return "finished"
    patience = ready.recipe.evaluate.patience
    if patience is not None and progress.without_better >= patience:
        return f"no better held-out loss in {patience} evaluations"
    return ""


def stop_if_asked(folder: RunFolder) -> None:
    """Between rounds, where nothing is lost."""
    if folder.asked_to_stop():
        raise Interrupted(
            "stopped as asked; nothing is lost", where=str(folder.path), remedy=f"`atoll resume {folder.name}`"
        )


def whole_round(at: Stage, state: State) -> State:
    """One round, and its events."""
    started = time.perf_counter()
    heard: list[Verdict] = []

    def observe(verdict: Verdict) -> None:
        heard.append(without_tensors(verdict))
        at.record(event_of(state.round, verdict))

    after = run_round(at.ready.rounds, state, at.fleet, observe)
    at.record(sum_up(state, after, heard, time.perf_counter() - started))
    return after


def without_tensors(verdict: Verdict) -> Verdict:
    """What the round's sum needs; the update itself is let go at once."""
    return replace(verdict, contributions={}) if isinstance(verdict, Accepted) else verdict


def event_of(round: int, verdict: Verdict) -> Replied | Missing:
    """A verdict as the record has it."""
    if isinstance(verdict, Accepted):
        reply = verdict.reply
        loss = reply.metrics.get("loss", float("nan"))
        return Replied(round, reply.client, loss, reply.nbytes, reply.seconds, verdict.staleness, reply.metrics)
    return Missing(round, verdict.client, verdict.reason, not isinstance(verdict, Dropped))


def sum_up(before: State, after: State, heard: Sequence[Verdict], seconds: float) -> RoundEnded:
    """A round in one event."""
    accepted = [verdict.reply for verdict in heard if isinstance(verdict, Accepted)]
    losses = [reply.metrics.get("loss", float("nan")) for reply in accepted]
    kinds = Counter(type(verdict).__name__ for verdict in heard)
    local_steps = sum(reply.metrics.get("seconds_in_steps", 0.0) for reply in accepted)
    return RoundEnded(
        round=before.round,
        accepted=len(accepted),
        refused=kinds["Refused"],
        dropped=kinds["Dropped"],
        loss=sum(losses) / len(losses) if losses else float("nan"),
        bytes_down=after.bytes_down - before.bytes_down,
        bytes_up=sum(reply.nbytes for reply in accepted),
        seconds=seconds,
        clock=after.clock,
        spans={"local_steps": local_steps, "outside": seconds - local_steps},
    )


def checkpoint(at: Stage, state: State, progress: Progress) -> Progress:
    """Everything that going on needs, in one file."""
    progress = replace(progress, record_bytes=at.record.position, seconds=at.seconds)
    save_state(at.folder.checkpoint, state, asdict(progress))
    return progress


def save_adapter(ready: Plan, things: Assembly, params: Params, folder: RunFolder) -> None:
    """Leaves the federated params in the model, and writes what trained where the ecosystem's tools find it."""
    write(ready.space, things.model, params)
    ready.space.save(things.model, folder.adapter)
    if things.tokenizer is not None:
        things.tokenizer.save_pretrained(folder.adapter)


class _Callable(ModuleType):
    """This module and the function `atoll.run` share a name in the package, so the module is called as the function."""

    __call__ = staticmethod(run)


sys.modules[__name__].__class__ = _Callable
