"""Secure aggregation through the real driver: the exact sum with clients lost in any phase, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings as drawing
from hypothesis import strategies as st
from toys import rounds, toy_plan

from atoll.aggregate.mean import share
from atoll.assemble import as_sums
from atoll.client import Client, MemoryStore
from atoll.evaluate import evaluate
from atoll.exchange import Abandoned, Accepted, Done, Dropped, Opened, Refused
from atoll.fleet.inprocess import InProcess
from atoll.keys import key, rng
from atoll.metrics import read_back, sums, zeros
from atoll.privacy import graph, party
from atoll.privacy.graph import threshold
from atoll.privacy.hidden import range_at, rung
from atoll.privacy.masks import secure_aggregation
from atoll.privacy.party import Memory
from atoll.round import initial
from atoll.stream import UPDATE, Stream

LIKE = {"w": torch.zeros(5, 3), "b": torch.zeros(7)}


def updates(names, seed=0, size=1.0):
    """One update a client, of unlike sizes."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: {n: size * (i + 1) * torch.randn(x.shape, generator=draw) for n, x in LIKE.items()}
        for i, name in enumerate(names)
    }


class Losing(InProcess):
    """Loses the named answers: (kind, client), or (kind, client, sum)."""

    lost: tuple = ()

    def receive(self, tasks, until=math.inf):
        event = super().receive(tasks, until)
        kind, _, client, *variant = event.task.split(":")
        if {(kind, client), (kind, client, variant[-1])} & set(self.lost):
            return Dropped(event.client, event.task)
        return event


PLAIN = (Stream(),)


def masked_plan(settings, names, streams=PLAIN):
    hidden = tuple(settings.hide(stream, len(names)) for stream in streams)
    return toy_plan(streams=hidden, exchange=settings.exchange(hidden, len(names)), attempt=settings.attempt)


def masked_clients(plan, settings, given, weights=None, memories=None):
    memories = memories if memories is not None else {name: Memory() for name in given}

    def client(name):
        def work(params, data, state, task):
            return Done({UPDATE: given[name]}, {"all": (weights or {}).get(name, 1.0)}, {"loss": 1.0}, {})

        side = settings.party(name, len(given), memories[name])
        return Client(name, plan.hash, plan.streams, {"train": work}, None, MemoryStore(), side)

    return client


def masked_round(settings, given, lost=(), weights=None, streams=PLAIN):
    """One round; the params after it and the verdicts."""
    plan = masked_plan(settings, list(given), streams)
    fleet = Losing(list(given), masked_clients(plan, settings, given, weights))
    fleet.lost = lost
    heard = []
    state = rounds(plan, fleet, 1, initial(plan, LIKE), heard.append)
    return state.params[UPDATE], heard


def exact(given, names, weights=None):
    each = {name: (weights or {}).get(name, 1.0) for name in names}
    return {n: sum(each[name] * given[name][n].double() for name in names) / sum(each.values()) for n in LIKE}


def step_of(settings, given, weights=None):
    """What a level stands for, at most: a quarter of an octave above the largest value."""
    largest = max(
        float((w * x).abs().max()) for k, v in given.items() for x in v.values() for w in [(weights or {}).get(k, 1.0)]
    )
    return largest * 2**0.25 / (2 ** (settings.bits - 1) - 1)


def close(params, expected, atol):
    return all(torch.allclose(params[n].double(), x, atol=atol) for n, x in expected.items())


NAMES = list("abcdefg")
PHASES = ["train", "share", "range", "update"]


def test_the_mean_without_a_dropout():
    given = updates("abcd")
    aggregation = secure_aggregation(bits=16)
    params, heard = masked_round(aggregation, given)
    assert close(params, exact(given, given), step_of(aggregation, given))
    assert [type(one) for one in heard] == [Accepted] * 4 + [Opened]
    assert not any(one.reply.metrics or one.reply.weights for one in heard[:4])


@drawing(deadline=None, max_examples=40)
@drawn(
    lost=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(PHASES), max_size=3),
    while_unmasking=st.sets(st.sampled_from(NAMES), max_size=3),
    bits=st.sampled_from([4, 8, 11, 16, 24]),
    weights=st.lists(st.integers(1, 5000), min_size=7, max_size=7),
    seed=st.integers(0, 2**16),
)
def test_the_sum_is_exact_whoever_is_lost_in_whatever_phase(lost, while_unmasking, bits, weights, seed):
    """To the fixed point: each client's values are rounded to one of two levels, and the sum of those is exact."""
    given, weights = updates(NAMES, seed), dict(zip(NAMES, weights, strict=True))
    aggregation = secure_aggregation(bits=bits)
    gone = {("mask", name, phase) if phase in ("range", "update") else (phase, name) for name, phase in lost.items()}
    gone |= {("unmask", name, "update") for name in while_unmasking}
    params, heard = masked_round(aggregation, given, tuple(gone), weights)
    survivors = [name for name in NAMES if name not in lost]
    least = aggregation.least(len(NAMES))
    if len(survivors) < least or len(set(survivors) - while_unmasking) < threshold(len(NAMES) - early(lost), 0):
        assert isinstance(heard[-1], Abandoned) or any(isinstance(one, Abandoned) for one in heard)
        assert all(torch.equal(params[n], x) for n, x in LIKE.items()), "an abandoned round applies nothing"
        return
    assert any(isinstance(one, Opened) for one in heard)
    mean_step = len(survivors) * step_of(aggregation, given, weights) / sum(weights[name] for name in survivors)
    assert close(params, exact(given, survivors, weights), mean_step * 1.001 + 1e-6)


def early(lost):
    """Clients that are lost before the rosters are made: shares are split among the rest."""
    return sum(phase == "train" for phase in lost.values())


def test_words_are_summed_without_any_error():
    """The same levels, summed in the clear and under masks."""
    given = updates(NAMES)
    aggregation = secure_aggregation(bits=16)
    stream = aggregation.hide(Stream(), len(NAMES))
    how = stream.aggregate
    totals = {name: how.inner.alone(given[name], {"all": 1.0}) for name in NAMES}
    scale = how.scale(range_at(rung(max(map(how.largest, totals.values())))))
    plan = masked_plan(aggregation, NAMES)
    words = [how.words(totals[n], scale, rng(key(plan.seed, 0, n), "ring", UPDATE)) for n in NAMES]
    levels = sum(how.ring.centered(one) for one in words)
    params, _ = masked_round(aggregation, given)
    flat = how.open(
        how.init(LIKE) | {"ring": torch.from_numpy(how.ring.of(levels).view("i4")), "scale": torch.tensor(scale)}
    )
    for n in LIKE:
        assert torch.allclose(params[n], flat[n] / len(NAMES), atol=scale / 1000), "a level is a thousand times that"


def test_words_are_held_to_no_bound_that_is_one_of_values():
    """The server bounds replies where it adds the noise; behind masks it would scale words that it cannot read."""
    given = updates("abcd")
    aggregation = secure_aggregation(bits=16)
    params, _ = masked_round(aggregation, given, streams=(Stream(bound=lambda params: 0.5),))
    assert close(params, exact(given, given), step_of(aggregation, given))


def test_two_streams_have_a_scale_each():
    given = updates("abcd", size=1e-4)
    aggregation = secure_aggregation(bits=12)
    control = Stream(
        "control", aggregate=share(8), initial=lambda params: {n: torch.zeros_like(x) for n, x in params.items()}
    )
    plan = masked_plan(aggregation, list("abcd"), (Stream(), control))
    big = updates("abcd", seed=1, size=100.0)

    def client(name):
        def work(params, data, state, task):
            return Done({UPDATE: given[name], "control": big[name]}, {"all": 1.0}, {}, {})

        side = aggregation.party(name, 4, memories[name])
        return Client(name, plan.hash, plan.streams, {"train": work}, None, MemoryStore(), side)

    memories = {name: Memory() for name in given}
    state = rounds(plan, InProcess(list(given), client), 1, initial(plan, LIKE))
    assert close(state.params[UPDATE], exact(given, given), step_of(aggregation, given))
    summed = {n: x / 2 for n, x in exact(big, big).items()}
    assert close(state.params["control"], summed, step_of(aggregation, big))


@pytest.mark.parametrize("clients", [66, 80])
def test_the_sparse_graph_above_64_clients(clients, monkeypatch):
    """A graph of 20 neighbors, and a quarter of the clients lost."""
    for module in (graph, party):
        monkeypatch.setattr(module, "degree", lambda count: 20)
    names = [f"c{i}" for i in range(clients)]
    given = updates(names)
    aggregation = secure_aggregation(bits=16, survivors=30)
    lost = tuple(("mask", name, "update") for name in names[::8]) + tuple(("share", name) for name in names[3::16])
    params, heard = masked_round(aggregation, given, lost)
    gone = {*names[::8], *names[3::16]}
    survivors = [name for name in names if name not in gone]
    assert any(isinstance(one, Opened) for one in heard), heard[-1]
    assert close(params, exact(given, survivors), step_of(aggregation, given))


def test_one_masked_update_looks_uniform():
    """What one client sends: every bit is a coin's, whatever the update is."""
    given = {name: {n: torch.zeros(200, 50) for n in ("w",)} for name in "abc"}
    aggregation = secure_aggregation(bits=16)
    stream = aggregation.hide(Stream(), 3)
    seen = {}

    class Spy(InProcess):
        def receive(self, tasks, until=math.inf):
            event = super().receive(tasks, until)
            if event.payloads and "update" in event.payloads:
                seen[event.client] = event.payloads["update"].main["ring"].numpy()
            return event

    plan = toy_plan(streams=(stream,), exchange=aggregation.exchange((stream,), 3), attempt=aggregation.attempt)
    fleet = Spy(list(given), masked_clients(plan, aggregation, given))
    state = rounds(plan, fleet, 1, initial(plan, {"w": torch.zeros(200, 50)}))
    assert not state.params[UPDATE]["w"].any(), "the sum of zeros is zero"
    for data in seen.values():
        counts = np.bincount(data, minlength=256)
        chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert chi_square < 400, "255 degrees of freedom: 400 is ten to the minus eight"


# What a server that does not follow the protocol is told by the clients -------------------------------------------------


class Crooked(InProcess):
    """Changes what the server asks on its way to the clients."""

    def submit(self, tasks):
        super().submit([self.change(task) for task in tasks])

    def change(self, task):
        return task


def crooked_round(change, settings=None, given=None, bits=16):
    given = given or updates("abcde")
    aggregation = settings or secure_aggregation(bits=bits)
    plan = masked_plan(aggregation, list(given))
    fleet = Crooked(list(given), masked_clients(plan, aggregation, given))
    fleet.change = change
    heard = []
    state = rounds(plan, fleet, 1, initial(plan, LIKE), heard.append)
    assert all(torch.equal(state.params[UPDATE][n], x) for n, x in LIKE.items())
    return [one.reason for one in heard if isinstance(one, Refused | Abandoned)]


def changed(kind, **about):
    """A change of one phase's data; a function makes the new value of the old data."""

    def change(task):
        if task.kind != kind or (kind != "share" and task.data.get("sum") != "update"):
            return task
        new = {name: value(task.data) if callable(value) else value for name, value in about.items()}
        return replace(task, data={**task.data, **new})

    return change


ATTACKS = {
    "both secrets of a client": (
        changed("unmask", lost=lambda data: data["lost"] + data["survivors"][-1:]),
        "masks stay on",
    ),
    "a sum of one client": (
        changed("unmask", clients=1),
        "masks stay on",
    ),
    "a list of survivors that is one client": (
        changed("unmask", survivors=lambda data: data["survivors"][:1], lost=lambda data: data["survivors"][1:]),
        "masks stay on",
    ),
    "survivors who share no masks": (
        changed("unmask", survivors=lambda data: [*data["survivors"], "z"]),
        "masks stay on",
    ),
    "fewer peers than a threshold": (
        changed("mask", peers=lambda data: data["peers"][:1]),
        "neighbors of 5 clients are left",
    ),
    "peers whose shares are not held": (
        changed("mask", peers=lambda data: [*data["peers"], "z"]),
        "shares I do not hold",
    ),
    "a roster without me": (
        changed("share", roster=lambda data: dict(list(data["roster"].items())[1:])),
        "other keys of mine",
    ),
    "a roster with another's key as mine": (
        changed("share", roster=lambda data: dict.fromkeys(data["roster"], next(iter(data["roster"].values())))),
        "replays",
    ),
    "a replayed key": (
        changed("share", roster=lambda data: {**data["roster"], "z": [9, *list(data["roster"].values())[1][1:]]}),
        "replays",
    ),
    "a roster of two": (
        changed("share", roster=lambda data: dict(list(data["roster"].items())[:2])),
        "a roster of 2 among 5 clients",
    ),
    "keys that are none": (
        changed("share", roster=lambda data: {n: [v[0], "00", v[2], v[3]] for n, v in data["roster"].items()}),
        "keys of 32 bytes",
    ),
}


@pytest.mark.parametrize(("change", "reason"), ATTACKS.values(), ids=ATTACKS.keys())
def test_a_client_answers_no_server_that(change, reason):
    reasons = crooked_round(change)
    assert any(reason in one for one in reasons), reasons


def asked_again(kind, which="update", **about):
    """The answers of one client to a phase that is asked twice, the second time changed."""
    given = updates("abcde")
    aggregation = secure_aggregation()
    plan = masked_plan(aggregation, list(given))
    make = masked_clients(plan, aggregation, given)
    answers = []

    class Twice(InProcess):
        def receive(self, tasks, until=math.inf):
            first = min((id for id in self._due if id in tasks), key=lambda id: self._due[id][0])
            task = self._due[first][1]
            event = super().receive(tasks, until)
            if task.kind == kind and task.client == "b" and task.data.get("sum", which) == which:
                answers.extend([event, self.client("b").handle(replace(task, data={**task.data, **about}))])
            return event

    rounds(plan, Twice(list(given), make), 1, initial(plan, LIKE))
    return answers


def test_a_second_list_of_survivors_is_not_answered():
    """The server tells a client that all came through, and then that one was lost: both of its secrets would be known."""
    first, second = asked_again("unmask", survivors=["b", "a", "c", "d"], lost=["e"])
    assert set(first.data["shares"]) == set("abcde")
    assert "no list of survivors after the first" in second.refusal
    assert not second.data


@pytest.mark.parametrize(
    ("kind", "reason"), [("share", "given away before"), ("mask", "masked input was given before")]
)
def test_no_phase_is_answered_twice(kind, reason):
    first, second = asked_again(kind)
    assert not first.refusal
    assert reason in second.refusal


def test_two_lists_of_survivors_do_not_open_an_update():
    """Half of the clients hear that e came through, the other half that it was lost: neither secret has enough shares."""
    clients = 6
    names = [f"c{i}" for i in range(clients)]
    half = set(names[: clients // 2])

    def told(data, name):
        lost = [names[-1]] if name in half else []
        return [one for one in names if one not in lost], lost

    def change(task):
        if task.kind != "unmask" or task.data["sum"] != "update":
            return task
        survivors, lost = told(task.data, task.client)
        return replace(task, data={**task.data, "survivors": survivors, "lost": lost})

    held = {"seed": 0, "key": 0}

    class Counting(Crooked):
        def receive(self, tasks, until=math.inf):
            event = super().receive(tasks, until)
            if event.task.startswith("unmask") and event.task.endswith("update") and event.data:
                held["key" if event.client in half else "seed"] += 1
            return event

    given = updates(names)
    aggregation = secure_aggregation()
    plan = masked_plan(aggregation, names)
    fleet = Counting(names, masked_clients(plan, aggregation, given))
    fleet.change = change
    rounds(plan, fleet, 1, initial(plan, LIKE))
    assert max(held.values()) < threshold(clients, 0), held


def test_keys_of_an_attempt_are_of_no_use_for_another():
    given = updates("abc")
    aggregation = secure_aggregation()
    plan = masked_plan(aggregation, list(given))
    memories = {name: Memory() for name in given}
    make = masked_clients(plan, aggregation, given, memories=memories)
    rounds(plan, InProcess(list(given), make), 1, initial(plan, LIKE))
    before = next(iter(memories["a"].attempts.values()))
    rounds(plan, InProcess(list(given), make), 1, initial(plan, LIKE, round=1))
    (after,) = memories["a"].attempts.values()
    assert after.sealing.private != before.sealing.private
    assert after.sums["update"].seed != before.sums["update"].seed


def test_a_round_whose_sum_was_opened_is_not_summed_again():
    """A server that lost the sum asks again, and without one client: the difference would be that client's update."""
    given = updates("abcd")
    aggregation = secure_aggregation()
    plan = masked_plan(aggregation, list(given))
    make = masked_clients(plan, aggregation, given, memories={name: Memory() for name in given})
    rounds(plan, InProcess(list(given), make), 1, initial(plan, LIKE))
    heard = []
    again = rounds(plan, InProcess(list(given), make), 1, initial(plan, LIKE), heard.append)
    assert all("was opened before" in one.reason for one in heard if isinstance(one, Refused))
    assert any(isinstance(one, Abandoned) for one in heard)
    assert not again.params[UPDATE]["w"].any()


# What clients that do not follow the protocol can do ---------------------------------------------------------------------


class Lying(InProcess):
    """Changes what one client answers."""

    def receive(self, tasks, until=math.inf):
        event = super().receive(tasks, until)
        return self.change(event) if event.client == "c" and not isinstance(event, Dropped) else event


def lying_round(kind, change, which="update", count=5):
    given = updates([chr(97 + i) for i in range(count)])
    aggregation = secure_aggregation()
    plan = masked_plan(aggregation, list(given))
    fleet = Lying(list(given), masked_clients(plan, aggregation, given))

    def maybe(event):
        own = event.task.split(":")
        return change(event) if own[0] == kind and (kind in ("train", "share") or own[-1] == which) else event

    fleet.change = maybe
    heard = []
    state = rounds(plan, fleet, 1, initial(plan, LIKE), heard.append)
    return state.params[UPDATE], heard, {name: given[name] for name in given if name != "c"}, aggregation


def garbage(event):
    payload = event.payloads[UPDATE]
    return replace(event, payloads={UPDATE: payload._replace(main={**payload.main, "ring": payload.main["ring"][:-3]})})


def other_type(event):
    payload = event.payloads[UPDATE]
    return replace(
        event, payloads={UPDATE: payload._replace(main={**payload.main, "ring": payload.main["ring"].long()})}
    )


def other_scale(event):
    payload = event.payloads[UPDATE]
    return replace(event, payloads={UPDATE: payload._replace(main={**payload.main, "scale": torch.tensor(7.0)})})


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("mask", garbage, "has the shape"),
        ("mask", other_type, "has the type torch.int64"),
        ("mask", other_scale, "the scale 7 for 'update'"),
        ("mask", lambda event: replace(event, payloads={}), "update"),
        ("share", lambda event: replace(event, data={"shares": {}}), "shares for others than its neighbors"),
        ("share", lambda event: replace(event, data={}), "share"),
        ("train", lambda event: replace(event, data={"keys": [1, "zz", {}, {}]}), "non-hexadecimal"),
        ("train", lambda event: replace(event, data={"keys": [1, "00" * 32, {}, {}]}), "keys for"),
    ],
)
def test_a_client_that_sends_garbage_is_refused_and_the_others_are_summed(kind, change, reason):
    params, heard, others, aggregation = lying_round(kind, change)
    assert any(isinstance(one, Refused) and one.client == "c" and reason in one.reason for one in heard), heard
    assert close(params, exact(others, others), step_of(aggregation, updates("abcde")))


def test_a_client_that_gives_a_wrong_share_does_not_spoil_the_sum():
    """Seeds are committed to: a wrong share shows, and others are taken."""

    def wrong(event):
        return replace(event, data={"shares": dict.fromkeys(event.data["shares"], "A" * 44)})

    params, heard, _, aggregation = lying_round("unmask", wrong)
    given = updates("abcde")
    if any(isinstance(one, Abandoned) for one in heard):
        assert any("do not belong together" in one.reason for one in heard if isinstance(one, Abandoned))
    else:
        assert close(params, exact(given, given), step_of(aggregation, given))


def test_shares_that_are_sealed_for_somebody_else_are_refused_by_their_reader():
    def swapped(event):
        shares = event.data["shares"]
        return replace(event, data={"shares": dict(zip(shares, reversed(shares.values()), strict=True))})

    _, heard, _, _ = lying_round("share", swapped)
    assert any("sealed shares cannot be opened" in one.reason for one in heard if isinstance(one, Refused))


def test_a_range_that_is_none_of_counts_ends_the_round():
    def spoiled(event):
        payload = event.payloads["range"]
        ring = payload.main["ring"].clone()
        ring[0] ^= 1
        return replace(event, payloads={"range": payload._replace(main={"ring": ring})})

    params, heard, _, _ = lying_round("mask", spoiled, which="range")
    assert any(
        "none of counts" in one.reason or "not one of counts" in one.reason
        for one in heard
        if isinstance(one, Abandoned)
    )
    assert all(torch.equal(params[n], x) for n, x in LIKE.items())


def test_a_value_beyond_the_scale_is_not_sent():
    how = secure_aggregation(bits=8).hide(Stream(), 3).aggregate
    with pytest.raises(ValueError, match="beyond the scale"):
        how.words({"w": torch.tensor([2.0])}, how.scale(1.0), rng(0))


def test_a_weight_that_no_ring_holds_is_not_sent():
    how = secure_aggregation(bits=8).hide(Stream(), 3).aggregate
    with pytest.raises(ValueError, match="a weight that cannot be hidden"):
        how.words({"#weight/all": torch.tensor(1e9)}, 1.0, rng(0))


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_clients_open_no_sum(count):
    _, heard = masked_round(secure_aggregation(), updates("ab"), (("train", "a"),) if count == 1 else ())
    if count == 1:
        assert any("a sum of fewer than 2 is not opened" in one.reason for one in heard if isinstance(one, Abandoned))
    else:
        assert any(isinstance(one, Opened) for one in heard)


HELD_OUT = {name: {"loss": 1.0 + i, "standard_error": 0.25, "samples": 8.0} for i, name in enumerate("abcd")}


def evaluating(lost=(), fleet=None, samples=8):
    """An evaluation under masks of clients whose losses are 1, 2, 3 and 4; and the fleet, to ask again."""
    aggregation = secure_aggregation(survivors=3, metrics=["loss"])  # a client's own in training, and not here
    evaluated = aggregation.evaluated(len(HELD_OUT))
    plan = replace(
        masked_plan(aggregation, list(HELD_OUT)),
        evaluated=evaluated,
        evaluation=aggregation.exchange(evaluated, len(HELD_OUT)),
        attempt=aggregation.attempt,
    )
    memories = {name: Memory() for name in HELD_OUT}

    def client(name):
        work = as_sums(lambda *_: Done({}, {}, HELD_OUT[name] | {"patients": 7.0}, {}), lambda metrics: metrics)
        side = aggregation.party(name, len(HELD_OUT), memories[name])
        return Client(name, plan.hash, plan.streams, {"evaluate": work}, None, MemoryStore(), side, evaluated)

    fleet = fleet or Losing(list(HELD_OUT), client)
    fleet.lost = lost
    return evaluate(plan, initial(plan, LIKE), fleet, list(HELD_OUT), samples, final=True)[0], fleet


def everybody(*names):
    total = {name: sum(sums(HELD_OUT[one])[name] for one in names) for name in zeros()}
    return pytest.approx(read_back(total), rel=1e-6)


@pytest.mark.parametrize("phase", ["evaluate", "share", "update"])
def test_an_evaluation_is_a_sum_of_those_who_come_through(phase):
    found, _ = evaluating()
    assert (list(found.clients), found.absent) == (["everybody"], {})
    assert found.clients["everybody"] == everybody(*"abcd"), "and nothing else that a client measures"
    found, _ = evaluating((("mask", "b", phase) if phase == "update" else (phase, "b"),))
    assert list(found.absent) == ["b"]
    assert found.clients["everybody"] == everybody(*"acd")


def test_an_evaluation_of_too_few_is_not_opened():
    found, _ = evaluating((("evaluate", "a"), ("mask", "b", "update")))
    assert found.clients == {}
    assert math.isnan(found.mean)
    assert "a sum of fewer than 3 is not opened" in found.absent["everybody"]


def test_no_client_says_anything_of_its_own_in_an_evaluation():
    heard = []

    class Listening(Losing):
        def receive(self, tasks, until=math.inf):
            heard.append(super().receive(tasks, until))
            return heard[-1]

    _, fleet = evaluating()
    evaluating(fleet=Listening(list(HELD_OUT), fleet.client), samples=4)
    assert {one.task.partition(":")[0] for one in heard} == {"evaluate", "share", "mask", "unmask"}
    assert not any(one.metrics or one.weights for one in heard)
    assert not any("range" in one.task for one in heard), "where a client's largest sum stands would tell its loss"


def test_a_run_that_goes_on_evaluates_once_more_what_it_had_evaluated():
    first, fleet = evaluating()
    again, _ = evaluating(fleet=fleet)
    assert again.clients["everybody"] == pytest.approx(first.clients["everybody"], rel=1e-9)


def test_one_client_whose_losses_are_beyond_the_range_is_left_out_alone(monkeypatch):
    monkeypatch.setitem(HELD_OUT["c"], "loss", 1e7)
    found, _ = evaluating()
    assert "beyond the scale" in found.absent["c"]
    assert found.clients["everybody"] == everybody(*"abd")
