"""Plan -> the things that work: model, data, clients. A simulation does this once for all clients, a site for its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

from torch import nn
from torch.utils.data import ConcatDataset

from atoll import parts
from atoll.aggregate.base import ALL
from atoll.build import Plan, build, plan_hash, samples
from atoll.cache import SECONDS_OF_SILENCE, Say, quiet
from atoll.client import Client, FileStore, Work
from atoll.data import sources
from atoll.data.media import MODALITIES, Senses
from atoll.data.read import Report as DataReport
from atoll.data.sources import ClientData, Loaded
from atoll.errors import AtollError
from atoll.exchange import Done, Task
from atoll.fleet.inprocess import Elsewhere
from atoll.keys import key
from atoll.local.work import Local, Report, evaluate, train, unwatched
from atoll.metrics import EVALUATION, sums
from atoll.models.assembled import Assembled
from atoll.models.fast import accelerate
from atoll.models.features import Features, features_of
from atoll.models.spaces import read, split, write
from atoll.params import Params
from atoll.privacy.party import Memory
from atoll.record.folder import RunFolder
from atoll.schema import POOLED, Tree, validate

MayLeave = Callable[[Mapping[str, float]], Mapping[str, float]]
"""The metrics that a client's owner lets out."""


@dataclass(frozen=True)
class Assembly:
    """One warm model, and everybody's samples."""

    model: nn.Module
    tokenizer: Any
    local: Local
    data: Mapping[str, ClientData]
    left_out: Mapping[str, str]
    """Clients without usable data, and why."""
    reports: Mapping[str, DataReport]
    """What became of the records of the clients that take part."""
    digests: Mapping[str, str]
    """What each client holds, by content: a resumed run must find the same."""
    start: Params
    """What trains, before the first round."""


def assemble(plan: Plan, say: Say = quiet, report: Report = unwatched) -> Assembly:
    """Loads model and data, and prepares the model to train in the plan's space.

    Raises:
        AtollError: a model or data that cannot be loaded; no client with usable data.
    """
    check_data(plan)
    model, tokenizer = load_model(plan, say)
    features = features_of(model)
    loaded = load_data(plan, tokenizer, say, features.senses if features else {})
    left_out = useless(loaded)
    usable = {name: one for name, one in loaded.items() if name not in left_out}
    if plan.protection:
        counts = {name: len(one.data.train) for name, one in usable.items()}
        plan.protection.fits(samples(plan, counts))
    if features:
        tell_of_nobody(features, usable, say)
        make_features(features, usable, say)
    say("preparing the model")
    model = plan.space.prepare(model, key(plan.recipe.seed, "init"))
    if not plan.model.own_factory:
        accelerate(model)
    start = {name: x.clone() for name, x in read(plan.space, model).items()}
    local = make_local(plan, model, tokenizer, start, report)
    return Assembly(
        model,
        tokenizer,
        local,
        data={name: one.data for name, one in usable.items()},
        left_out=left_out,
        reports={name: one.report for name, one in usable.items()},
        digests={name: sources.digest(source) for name, source in plan.sources.items()},
        start=start,
    )


def check_data(plan: Plan) -> list[str]:
    """Reads the first records of every client, which takes no model; warnings of what it will leave out.

    A reward of the user's own is made where it will be asked: here, unless the clients are elsewhere.

    Raises:
        AtollError: all that is wrong.
    """
    if not isinstance(plan.fleet, Elsewhere):
        plan.needs.refuse_unmade()
    owners: dict[str, list[str]] = {}  # simulated clients are dealt the records of one source, and lack the same
    for name, what in sources.check(plan.sources, plan.needs.labels, takes(plan)).items():
        owners.setdefault(what, []).append(name)
    return [f"{first_few(names)}: {what}: they are left out" for what, names in owners.items()]


def first_few(names: Sequence[str]) -> str:
    """Names that a line has room for.

    >>> first_few(["a", "b"]), first_few(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def takes(plan: Plan) -> Collection[str] | None:
    """The modalities that the plan's model takes beside text; None where that is not known before it is made."""
    if isinstance(plan.model.name, Assembled):
        return plan.model.name.senses
    return None if plan.shapes is None or plan.shapes.text else ()


def load_model(plan: Plan, say: Say) -> tuple[nn.Module, Any]:
    """The model that the recipe names, and its tokenizer; None for a model of the user's own factory."""
    if plan.model.own_factory:
        return parts.make("model", plan.recipe.model, "model"), None
    from atoll.models.load import load_model as load_named

    say(f"loading {plan.model.name}")
    return load_named(plan.model.name, **plan.model.options, say=say)


def tell_of_nobody(features: Features, loaded: Mapping[str, Loaded], say: Say) -> None:
    """Names the modalities that the model takes and nobody holds: their connectors travel and learn nothing."""
    held = {name for one in loaded.values() for name in sources.holders(one.data.train)}
    for name in features.senses.keys() - held:
        say(f"nobody has {MODALITIES[name].columns[0]} to train on: the connector of {name} stays as it begins")


def make_features(features: Features, loaded: Mapping[str, Loaded], say: Say) -> None:
    """What the encoders make of everybody's pictures and sounds, once."""
    media = [
        medium for one in loaded.values() for part in one.data for some in getattr(part, "media", ()) for medium in some
    ]
    said = time.monotonic()

    def tell(done: int, of: int) -> None:
        nonlocal said
        if time.monotonic() - said > SECONDS_OF_SILENCE or done == of:
            say(f"encoding pictures and sounds: {done} of {of}")
            said = time.monotonic()

    if without_room := features.fill(media, tell):
        most = features.most_bytes / 1024**3
        say(
            f"{without_room} of them find no room among {most:g} GiB of features: they are encoded whenever they are read"
        )


def load_data(plan: Plan, tokenizer: Any, say: Say, senses: Senses) -> dict[str, Loaded]:
    """Everybody's samples, and what became of their records."""
    if all(isinstance(source, ClientData) for source in plan.sources.values()):
        return {name: Loaded(data, DataReport()) for name, data in plan.sources.items()}
    say("reading and tokenizing, or mapping what was tokenized before")
    return sources.load(plan.sources, tokenizer, plan.recipe.finetune.context, plan.needs.labels, senses, say)


def useless(loaded: Mapping[str, Loaded]) -> dict[str, str]:
    """Clients without a training sample, and why. Raises AtollError where there is no other."""
    left_out = {name: why_useless(one) for name, one in loaded.items() if not len(one.data.train)}
    if len(left_out) == len(loaded):
        raise AtollError(
            "no client has usable data",
            where=sources.one_a_line(left_out),
            found=sources.one_a_line("; ".join(why.splitlines()) for why in left_out.values()),
            remedy="`atoll data PATH --model RECIPE` shows each record; where they are too long, raise finetune.context",
        )
    return left_out


def why_useless(one: Loaded) -> str:
    """Why nothing is left to train on."""
    said = [str(one.report)] if one.report.left_out or not len(one.data.test) else []
    if held_out := len(one.data.test):
        said.append(f"all its samples, {held_out}, are held out: lower data.held_out")
    return "; ".join(said)


def make_local(plan: Plan, model: nn.Module, tokenizer: Any, start: Params, report: Report) -> Local:
    """The plan's local work on this model, which is as it begins: an objective may refer to that."""
    write(plan.space, model, start)
    stage = plan.recipe.finetune
    return Local(
        model=model,
        space=plan.space,
        objective=plan.objective.bind(model, tokenizer),
        optimizer=plan.optimizer,
        rate=plan.rate,
        correction=plan.correction,
        rounds=stage.rounds,
        batch_size=stage.batch_size,
        local_steps=stage.local_steps,
        epochs=stage.epochs,
        accumulate=stage.accumulate,
        clip_norm=stage.clip_norm,
        weighting=stage.weighting,
        gradients=plan.gradients,
        report=report,
        base=start,
        personal=split(start, stage.personal)[1],
    )


def again(assembly: Assembly, plan: Plan) -> Assembly:
    """The same model and data for another plan that differs in rounds and population alone: a baseline."""
    one = assembly
    return replace(one, local=make_local(plan, one.model, one.tokenizer, one.start, one.local.report))


def clients(
    plan: Plan,
    assembly: Assembly,
    folder: RunFolder,
    memories: dict[str, Memory] | None = None,
    may_leave: MayLeave = lambda metrics: metrics,
) -> Callable[[str], Client]:
    """Makes a client by name. The pooled one holds everybody's training samples.

    `memories` are what clients know between the phases of a round; of those made by one call if they are not given. Metrics
    that `may_leave` holds back are in no sum either.
    """
    memories = {} if memories is None else memories
    training, measuring = partial(train, assembly.local), partial(evaluate, assembly.local)
    works = {
        "train": plan.protection.guarded(training) if plan.protection else training,
        "evaluate": as_sums(measuring, may_leave) if plan.rounds.evaluated else measuring,
    }

    def client(name: str) -> Client:
        data = pooled(assembly.data) if name == POOLED else assembly.data[name]
        side = plan.side(name, memories.setdefault(name, Memory()))
        store, evaluated = FileStore(folder.client(name)), plan.rounds.evaluated
        return Client(name, plan.hash, plan.rounds.streams, works, data, store, side, evaluated)

    return client


def as_sums(work: Work, may_leave: MayLeave) -> Work:
    """Work whose metrics become an update, to be added to everybody's."""

    def summed(params: Mapping[str, Params], data: Any, state: Params, task: Task) -> Done:
        done = work(params, data, state, task)
        return Done({EVALUATION.name: sums(may_leave(done.metrics))}, {ALL: 1.0}, {}, {})

    return summed


@dataclass(frozen=True)
class Rebuild:
    """`clients` from nothing but the plan's tree: what a worker process does."""

    tree: Tree
    folder: RunFolder

    @property
    def plan(self) -> str:
        """Its hash."""
        return plan_hash(self.tree)

    @property
    def run(self) -> str:
        """Names the run among all there are, on this machine and others."""
        return self.folder.id

    def __call__(self) -> Callable[[str], Client]:
        """Loads model and data."""
        plan = build(validate(self.tree, str(self.folder.recipe)), self.tree)
        return clients(plan, assemble(plan), self.folder)


def pooled(data: Mapping[str, ClientData]) -> ClientData:
    """Everybody's training samples together; held-out samples stay where they are."""
    return ClientData(ConcatDataset(list(map(attrgetter("train"), data.values()))), ())  # type: ignore[arg-type]
