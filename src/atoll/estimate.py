"""What a plan will cost, before it runs: bytes, memory, time. Each number says where it comes from.

Bytes are measured on zeros of the update's shapes. Memory is a formula, given with its terms. Time is taken from
earlier runs of the same kind on this machine, whose speed lies in the cache; before the first it is unknown, and said so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from atoll import parts
from atoll.aggregate.robust import Robust
from atoll.assemble import check_data
from atoll.build import Plan, payload_bytes, samples
from atoll.cache import content_hash, home, write_file
from atoll.data.sources import ClientSource, planted_in
from atoll.models.spaces import PlannedShapes, frozen
from atoll.params import numel
from atoll.privacy.hidden import Hidden
from atoll.record.story import Story
from atoll.schema import Recipe
from atoll.statement import statement
from atoll.stream import Stream
from atoll.transforms.chain import Chain

COUNTED_BYTES = 64 << 20
"""Lines of JSONL are counted up to this size; beyond, a plan would not answer at once."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of all streams, for one client and for a round's cohort."""

    down: int
    up: int
    cohort: float
    rounds: int
    once: int
    """Down to a client beside that, when it is first asked."""
    clients: int

    def as_data(self) -> dict[str, float]:
        """Per client, per round and in total."""
        asked = self.cohort * self.rounds
        return {
            "down_per_client": self.down,
            "down_once_per_client": self.once,
            "up_per_client": self.up,
            "clients_per_round": self.cohort,
            "rounds": self.rounds,
            "down_total": round(self.down * asked + self.once * min(self.clients, asked)),
            "up_total": round(self.up * asked),
        }


def traffic(plan: Plan) -> Traffic | None:
    """What a round moves; None for a model without known shapes."""
    if plan.trains is None:
        return None
    shapes = {stream.name: shapes_of(stream, plan.trains) for stream in plan.rounds.streams}
    down = sum(payload_bytes(stream.down, shapes[stream.name]) for stream in plan.rounds.streams)
    once = payload_bytes(Chain(), plan.space.plan(plan.shapes)) if plan.shapes and plan.sends_start else 0
    up = sum(bytes_up(stream, shapes[stream.name]) for stream in plan.rounds.streams)
    return Traffic(down, up, plan.cohort, plan.recipe.finetune.rounds, once, len(plan.trainers))


def shapes_of(stream: Stream, trains: PlannedShapes) -> PlannedShapes:
    """What a stream carries: most carry values in the shapes of the params that train."""
    like = stream.initial({name: torch.empty(shape, device="meta") for name, shape in trains.items()})
    return {name: tuple(x.shape) for name, x in like.items()}


def bytes_up(stream: Stream, shapes: PlannedShapes) -> int:
    """Of one client's update: of its words, where a ring hides it."""
    if not isinstance(stream.aggregate, Hidden):
        return payload_bytes(stream.up, shapes)
    like = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return sum(x.nbytes for x in stream.aggregate.vector(like).values())


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a simulation in one process, by what they are for."""

    base: int
    trained: int
    server: int
    activations: int
    formula: str

    @property
    def total(self) -> int:
        """All of it, beside the program itself (about 0.7 GB with its libraries)."""
        return self.base + self.trained + self.server + self.activations


ACTIVATIONS = 34
"""Values of 2 bytes a layer keeps for each token and feature: Korthikanti et al. 2022 (arXiv 2205.05198), equation 1."""

SERVER_COPIES = 5
"""Params, the start, the decoded broadcast, the running total, one update."""


def memory(plan: Plan) -> Memory | None:
    """An estimate from shapes; None for a model without known shapes."""
    if plan.shapes is None or plan.trains is None:
        return None
    from atoll.models.load import choose_device, choose_dtype

    stage, shapes = plan.recipe.finetune, plan.shapes
    here = plan.space.plan(shapes)
    trained, travels = (sum(map(math.prod, one.values())) for one in (here, plan.trains))
    full = here.keys() <= shapes.params.keys()
    tiny = str(plan.model.name).startswith("tiny:")
    size = (
        4
        if full or tiny
        else choose_dtype(plan.model.options["dtype"], choose_device(plan.model.options["device"])).itemsize
    )
    rest = {name: math.prod(shape) for name, (shape, _) in shapes.params.items() if name not in here}
    encoders = sum(count for name, count in rest.items() if frozen(name))
    base = sum(rest.values()) - encoders
    moments = inner_moments(plan)
    outer = numel(plan.rounds.streams[0].outer.init({"x": torch.empty(travels, device="meta")})) // travels
    tokens = stage.batch_size * tokens_a_sample(plan)
    reference = 2 if plan.needs.reference else 0  # what it was, and what it is while that is asked
    copies = SERVER_COPIES + (math.ceil(plan.cohort) if isinstance(plan.rounds.streams[0].aggregate, Robust) else 0)
    kept = 2 if plan.model.options["gradient_checkpointing"] else ACTIVATIONS
    return Memory(
        base=base * size + encoders * 4,
        trained=trained * 4 * (2 + moments + reference),
        server=travels * 4 * (copies + outer),
        activations=tokens * shapes.layers * shapes.hidden * kept * size // 2,
        formula=" + ".join(
            [
                f"base {base:,} x {size} B",
                *([f"encoders {encoders:,} x 4 B"] if encoders else []),
                f"trained {trained:,} x 4 B x (param, gradient, {moments} moments"
                + (f", {reference} of the reference)" if reference else ")"),
                f"server {travels:,} x 4 B x ({copies} copies, {outer} outer moments)",
                f"activations at most {tokens:,} tokens x {shapes.layers} layers x {shapes.hidden} features x {kept} x "
                f"{size / 2:g} B",
            ]
        ),
    )


def tokens_a_sample(plan: Plan) -> int:
    """At most: of two answers each in full, or of every completion that is drawn."""
    return (plan.recipe.finetune.context + plan.needs.more_tokens) * plan.needs.texts


def inner_moments(plan: Plan) -> int:
    """Numbers the inner optimizer keeps for each parameter. It is not made to be asked: that imports for two seconds."""
    optimizer = parts.spec(plan.recipe.finetune.optimizer, "finetune.optimizer")
    return int(bool(optimizer.arguments.get("momentum"))) if optimizer.use == "sgd" else 2


@dataclass(frozen=True)
class Count:
    """A client's records: to train on, and held out. `about`: where a share is held out it is computed, not counted."""

    train: int
    held_out: int
    about: bool
    bytes_each: float


def counts(sources: Mapping[str, Any]) -> dict[str, Count | None]:
    """Records of each client; None where counting would take long."""
    return {name: _count(source) for name, source in sources.items()}


def _count(source: object) -> Count | None:
    if not isinstance(source, ClientSource):
        return None
    files = source.source.files
    known = all(file.suffix.lower() == ".jsonl" and file.stat().st_size <= COUNTED_BYTES for file, _ in files)
    if not known and source.rows is None:
        return None
    lines = {split: sum(_lines(file) for file, named in files if named == split) for split in ("train", "test", None)}
    total = sum(lines.values()) if known else 0
    each = sum(file.stat().st_size for file, _ in files) / total if total else 0.0
    planted = len(planted_in(source))
    if lines["test"] and source.rows is None:
        return Count(lines["train"] + planted, lines["test"], about=False, bytes_each=each)
    mine = total if source.rows is None else len(source.rows) - planted
    held_out = round(mine * source.source.held_out)
    return Count(mine - held_out + planted, held_out, about=source.source.held_out > 0, bytes_each=each)


def _lines(file: Path) -> int:
    """Lines that are not blank."""
    with file.open("rb") as text:
        return sum(1 for line in text if line.strip())


RUNS_REMEMBERED = 8
"""The latest of a kind, so that a faster machine or program shows."""


@dataclass(frozen=True)
class Measured:
    """What a run measured of its own speed: samples, and the seconds that went into them."""

    run: str
    plan: str
    trained: float
    seconds_trained: float
    held_out: float
    seconds_held_out: float
    bytes_each: float
    """Of a record, on average; 0: unknown."""


@dataclass(frozen=True)
class Speed:
    """How fast earlier runs of the same kind were, in seconds a sample, and their names. Large runs count more."""

    run: str
    training: float
    held_out: float
    bytes_each: float


def speed_note(plan: Plan) -> Path:
    """Where the speed of this kind of work is noted: same model, space, objective and context."""
    stage = plan.recipe.finetune
    kind = [plan.recipe.model, stage.space, stage.objective, stage.context, os.cpu_count()]
    kind += ["one by one"] if plan.protection and plan.protection.mechanism.unit == "example" else []
    identity = plan.shapes.identity if plan.shapes else ""
    return home() / "speed" / f"{content_hash(identity, json.dumps(kind, sort_keys=True))}.json"


def remember_speed(plan: Plan, story: Story, run: str) -> None:
    """Notes the speed of a run for later plans. Its first reply is not counted where there are others: it warms up."""
    stage = plan.recipe.finetune
    replies = story.replies[1:] or story.replies
    clients = [client for one in story.evaluations for client in one.clients.values()]
    measured = Measured(
        run,
        plan.hash,
        trained=sum(reply.metrics.get("steps", 0.0) for reply in replies) * stage.batch_size * stage.accumulate,
        seconds_trained=sum(reply.metrics.get("seconds_in_steps", 0.0) for reply in replies),
        held_out=sum(client["samples"] for client in clients),
        seconds_held_out=sum(one.seconds for one in story.evaluations),
        bytes_each=bytes_each(counts(plan.sources), stage.context),
    )
    if measured.trained and measured.held_out:
        others = [one for one in remembered(plan) if (one.run, one.plan) != (run, plan.hash)]
        kept = [*others, measured][-RUNS_REMEMBERED:]
        write_file(speed_note(plan), json.dumps([asdict(one) for one in kept]).encode())


def remembered(plan: Plan) -> list[Measured]:
    """What earlier runs of the same kind on this machine measured, the latest last."""
    try:
        return [Measured(**one) for one in json.loads(speed_note(plan).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def known_speed(plan: Plan) -> Speed | None:
    """The speed of earlier runs of the same kind on this machine, each counting by its samples."""
    runs = remembered(plan)
    if not runs:
        return None
    trained, held_out = sum(one.trained for one in runs), sum(one.held_out for one in runs)
    return Speed(
        run=runs[0].run if len(runs) == 1 else f"{len(runs)} runs, the latest {runs[-1].run},",
        training=sum(one.seconds_trained for one in runs) / trained,
        held_out=sum(one.seconds_held_out for one in runs) / held_out,
        bytes_each=sum(one.bytes_each * one.trained for one in runs) / trained,
    )


BYTES_A_TOKEN = 4
"""Of English, roughly: no sample is longer than the context."""


def bytes_each(records: Mapping[str, Count | None], context: int) -> float:
    """Of a record that fits the context, each client counting once; 0 where it is unknown."""
    known = [min(one.bytes_each, BYTES_A_TOKEN * context) for one in records.values() if one and one.bytes_each]
    return sum(known) / len(known) if known else 0.0


def seconds(plan: Plan, records: Mapping[str, Count | None], speed: Speed) -> float | None:
    """The whole run with its baselines; None where the clients' sizes are needed and not known.

    Longer texts take longer: a sample counts by its bytes, where they are known of both.
    """
    trainers = [name for name in plan.trainers if name in plan.sources] or plan.clients
    stage = plan.recipe.finetune
    if stage.local_steps is None and any(records[name] is None for name in trainers):
        return None
    each = {name: _samples_a_round(plan, one.train if (one := records[name]) else 0) for name in trainers}
    federated = stage.rounds * plan.cohort * sum(each.values()) / len(each)
    alone = stage.rounds * sum(each.values())
    extra = {"local": alone, "pooled": federated}
    training = federated + sum(extra[kind] for kind in plan.recipe.baselines)
    mine = bytes_each(records, stage.context)
    longer = mine / speed.bytes_each if mine and speed.bytes_each else 1.0
    return longer * (training * speed.training + held_out_samples(plan, len(trainers)) * speed.held_out)


def _samples_a_round(plan: Plan, records: int) -> float:
    stage = plan.recipe.finetune
    if stage.local_steps is None:
        return stage.epochs * records
    return stage.local_steps * stage.batch_size * stage.accumulate


def held_out_samples(plan: Plan, trainers: int) -> int:
    """Samples evaluated at most: at the start and the end of the run and of each baseline, and between."""
    wanted, rounds = plan.recipe.evaluate, plan.recipe.finetune.rounds
    runs = 1 + sum(trainers if kind == "local" else 1 for kind in plan.recipe.baselines)
    between = (rounds - 1) // wanted.every if wanted.every and rounds else 0
    return len(plan.sources) * (runs * 2 * wanted.final_samples + between * wanted.samples)


def as_data(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain data: what `atoll plan --json` prints.

    Raises:
        AtollError: the clients' data cannot be read; their first records are.
    """
    unfit = check_data(plan)
    stage = plan.recipe.finetune
    moved, needs, speed, records = traffic(plan), memory(plan), known_speed(plan), counts(plan.sources)
    trains = None if plan.trains is None else sum(math.prod(shape) for shape in plan.trains.values())
    return {
        "name": plan.recipe.name,
        "plan": plan.hash,
        "model": {"name": str(plan.model.name), "params": plan.shapes.count if plan.shapes else None},
        "begins_with": begins_with(plan.recipe),
        "trains": {"space": str(parts.spec(stage.space, "space")), "params": trains},
        "local_work": _local_work(plan),
        "streams": [_stream(plan, stream.name) for stream in plan.rounds.streams],
        "bytes": moved.as_data() if moved else None,
        "memory": asdict(needs) | {"total": needs.total} if needs else None,
        "seconds": seconds(plan, records, speed) if speed else None,
        "speed": asdict(speed) if speed else None,
        "clients": {name: asdict(one) if one else None for name, one in records.items()},
        "population": plan.trainers,
        "privacy": statement(plan, known_samples(plan, records), about=True),
        "baselines": list(plan.recipe.baselines),
        "tasks": dict.fromkeys(plan.recipe.tasks, plan.recipe.evaluate.questions),
        "warnings": [*plan.warnings, *unfit],
    }


def begins_with(written: Recipe) -> str:
    """What the model is before the first round, where it is not the base.

    >>> begins_with(Recipe(recipe=1, name="x", data="d", **{"from": ["a-1", "b-1"]}))
    'a-1 and b-1, fused by ties'
    """
    names = " and ".join(map(str, written.starts))
    return f"{names}, fused by {parts.spec(written.fuse.by, 'fuse.by')}" if written.fuses else names


def known_samples(plan: Plan, records: Mapping[str, Count | None]) -> Mapping[str, int]:
    """How many those train on who may be asked; empty if that is not known of one of them."""
    known = {name: one.train for name, one in records.items() if one and one.train}
    return samples(plan, known) if len(known) == len(records) else {}


def _local_work(plan: Plan) -> str:
    stage = plan.recipe.finetune
    length = f"{stage.local_steps} local steps" if stage.local_steps else f"{stage.epochs} epochs"
    of = f"{stage.batch_size} samples" + (f" x {stage.accumulate}" if stage.accumulate > 1 else "")
    optimizer, objective = (str(parts.spec(one, "")) for one in (stage.optimizer, stage.objective))
    return f"{length} of {of}, {objective}, {optimizer}, at most {stage.context} tokens a sample"


def _stream(plan: Plan, name: str) -> dict[str, Any]:
    """A stream with its chains as written; a method's own streams travel as they are."""
    stage = plan.recipe.finetune
    own = name != plan.rounds.streams[0].name

    def written(chain: Sequence[Any]) -> list[str]:
        return [] if own else [str(parts.spec(one, "")) for one in chain]

    hidden = next(one.aggregate for one in plan.rounds.streams if one.name == name)
    masked = [f"{hidden.ring.bits} bits a value under masks"] if isinstance(hidden, Hidden) else []
    return {"name": name, "down": written(stage.down), "up": [*written(stage.up), *masked]}
