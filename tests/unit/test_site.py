"""A site without a network: what it answers to plans and tasks, to other versions, and to the same task again."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from atoll import messages, recipe, schema
from atoll.audit import AuditLog, verify
from atoll.build import build
from atoll.data.sources import ClientData
from atoll.errors import AtollError
from atoll.exchange import Dropped, Reply
from atoll.fleet.flower import certs
from atoll.fleet.flower.federation import Federation, counted, without_too_few
from atoll.fleet.flower.tasks import answer_to
from atoll.models.spaces import split
from atoll.params import equal
from atoll.policy import Policy, model_code, own_code, read
from atoll.privacy.party import Memory
from atoll.round import broadcast, initial
from atoll.site import Site, opened_task
from atoll.talk import envelope, opened

RECIPE = """
recipe: 1
name: asked
model: tiny:llama
data: {use: folders, path: ./nowhere, held_out: 0.2}
finetune: {rounds: 2, local_steps: 2, batch_size: 4, space: lora}
"""


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "asked.yaml"
    path.write_text(RECIPE)
    return recipe.resolve(str(path))


@pytest.fixture
def site(tmp_path, sites, shared_home, monkeypatch):
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    return Site(sites / "north.jsonl", Policy(), tmp_path / "state", lambda line: None)


def flat(message) -> list[bytearray]:
    """As it arrives."""
    return [bytearray(b"".join(part)) for part in message]


def ask(site: Site, *parts) -> list[bytearray]:
    """What the process does with a message."""
    message = flat(parts)
    said = site.urgent(message)
    return flat(site.answer(message) if said is None else said)


def prepare(site: Site, tree, name="clinic"):
    return opened(ask(site, envelope("plan", tree=tree, client=name, clients=["clinic", "school"])))


def task_of(site: Site, tree):
    """A training task of the plan, as an operator makes it."""
    plan = build(schema.validate(tree), tree, sources={n: ClientData((), ()) for n in ("clinic", "school")})
    state = initial(plan.rounds, split(site._ready[plan.hash].things.start, plan.recipe.finetune.personal)[0])
    (task,), _ = broadcast(plan.rounds, state, ["clinic"], 0.0)
    return task


def send(site: Site, task, run="r1"):
    head = envelope("task", run=run, plan=task.plan)
    return ask(site, head, messages.pack_broadcast(task.broadcast), messages.pack_task(task))


def test_a_plan_is_built_with_the_sites_own_data_and_its_work_leaves_a_line_in_the_log(site, tree):
    said = prepare(site, tree)
    assert said["kind"] == "ready"
    assert said["train"] + said["test"] == 40
    assert said["test"] > 0
    task = task_of(site, tree)
    answer = send(site, task)
    assert opened(answer)["kind"] == "event"
    reply = messages.unpack_event(answer[1])
    assert isinstance(reply, Reply)
    assert (reply.client, reply.task, reply.weights) == ("clinic", task.id, {"all": float(said["train"])})
    found = verify(site.folder / "audit.jsonl")
    assert (found.lines, found.bytes) == (1, len(answer[1]))


def test_what_a_plan_begins_with_comes_with_its_tasks_or_the_task_is_refused(site, tree):
    prepare(site, tree)
    task = task_of(site, tree)
    start = {"reference": site._ready[task.plan].things.start}
    head, sent, asked = envelope("task", run="r1", plan=task.plan), task.broadcast, messages.pack_task(task)
    said = ask(site, head, messages.pack_broadcast(sent), asked, messages.pack_fixed(start))
    assert "what the plan does not ask for" in opened(said)["reason"]
    tree = recipe.apply(recipe.apply(tree, "finetune.personal=[lora_A]"), "from=another-1")
    prepare(site, tree)
    task = task_of(site, tree)
    assert "comes without what the plan begins with" in opened(send(site, task))["reason"]
    head, asked = envelope("task", run="r1", plan=task.plan), messages.pack_task(task)
    said = ask(site, head, messages.pack_broadcast(task.broadcast), asked, messages.pack_fixed(start))
    assert not messages.unpack_event(said[1]).refusal
    for parts in ((), (messages.pack_broadcast(sent), asked, *2 * [messages.pack_fixed(start)])):
        with pytest.raises(ValueError, match="3 or 4 are needed"):
            opened_task(flat([head, *parts]))


def test_the_same_task_again_is_answered_and_not_worked_on_again(site, tree, monkeypatch):
    prepare(site, tree)
    task = task_of(site, tree)
    first = send(site, task)
    monkeypatch.setattr(site, "work", lambda head, task: pytest.fail("worked on twice"))
    assert send(site, task)[1] == first[1]
    assert ask(site, envelope("ask", run="r1", task=task.id))[1] == first[1]
    assert opened(ask(site, envelope("ask", run="another", task=task.id)))["kind"] == "unknown"
    assert verify(site.folder / "audit.jsonl").lines == 1


def test_a_task_that_is_being_worked_on_is_not_begun_again(site, tree):
    prepare(site, tree)
    task = task_of(site, tree)
    message = flat([envelope("task", run="r1"), messages.pack_broadcast(task.broadcast), messages.pack_task(task)])
    assert site.urgent(message) is None
    assert opened(flat(site.urgent(message)))["kind"] == "working"
    assert opened(flat(site.answer(message)))["kind"] == "event"


def later(task, sent_in_round):
    """The same client's task of a later round."""
    return replace(task, broadcast=replace(task.broadcast, round=sent_in_round))


def begun(site: Site, task, run="r1"):
    """A task that waits for the worker."""
    message = flat([envelope("task", run=run), messages.pack_broadcast(task.broadcast), messages.pack_task(task)])
    assert site.urgent(message) is None
    return message


def test_work_that_a_newer_task_replaces_is_not_done(site, tree):
    prepare(site, tree)
    task = task_of(site, tree)
    first, second = begun(site, task), begun(site, later(task, 1))
    said = opened(flat(site.answer(first)))
    assert (said["kind"], said["reason"]) == ("refused", "nobody waits for this any more")
    assert opened(flat(site.answer(second)))["kind"] == "event"


def test_another_run_replaces_nothing(site, tree):
    prepare(site, tree)
    task = task_of(site, tree)
    first, second = begun(site, task), begun(site, later(task, 1), run="r2")
    assert [opened(flat(site.answer(one)))["kind"] for one in (first, second)] == ["event", "event"]


def test_work_is_given_up_in_the_middle_when_its_run_is_cancelled(site, tree, monkeypatch):
    prepare(site, tree)
    task = task_of(site, tree)
    message, steps = begun(site, task), []

    def cancelling(tick):
        steps.append(tick.done)
        if tick.done == 1:
            assert opened(ask(site, envelope("cancel", run="r1")))["kind"] == "cancelled"
        still_wanted(tick)

    local, still_wanted = site._ready[task.plan].things.local, site._still_wanted
    monkeypatch.setitem(local.__dict__, "report", cancelling)
    answer = opened(flat(site.answer(message)))
    assert steps == [0, 1]  # of two local steps
    assert (answer["kind"], answer["reason"]) == ("refused", "nobody waits for this any more")
    assert opened(ask(site, envelope("ask", run="r1", task=task.id)))["kind"] == "unknown"
    monkeypatch.setitem(local.__dict__, "report", still_wanted)
    assert messages.unpack_event(send(site, task)[1]).refusal == "", "a run that is resumed gets its work"


def test_data_that_changed_are_read_anew_for_the_next_run(site, tree, tmp_path):
    own = tmp_path / "own.jsonl"
    lines = site.data.read_text().splitlines(keepends=True)
    own.write_text("".join(lines))
    site.data = own
    assert prepare(site, tree)["train"] + prepare(site, tree)["test"] == 40
    own.write_text("".join(lines[:30]))
    said = prepare(site, tree)
    assert said["train"] + said["test"] == 30


def test_a_site_that_started_anew_says_that_it_is_not_ready(site, tree):
    prepare(site, tree)
    task = task_of(site, tree)
    site._ready.clear()
    assert opened(send(site, task))["kind"] == "unready"


def test_another_version_is_told_what_to_install(site):
    other = [json.dumps({"protocol": 99, "kind": "hello", "version": "9.9"}).encode()]
    said = opened(ask(site, other))
    assert said["kind"] == "refused"
    assert "protocol 99 (atoll 9.9)" in said["reason"]
    assert "install the same version" in said["reason"]


@pytest.mark.parametrize(
    "message",
    [
        [],
        [[b"{"]],
        [[b"[]"]],
        [envelope("nonsense")],
        [envelope("task", run="r1")],
        [envelope("task", run="r1"), [b"x" * 20], [b"y" * 20]],
        [envelope("plan", tree={}, client="c", clients=["c"])],
        [envelope("plan")],
    ],
)
def test_a_message_that_makes_no_sense_is_refused_and_the_site_goes_on(site, message):
    assert opened(ask(site, *message))["kind"] == "refused"
    assert opened(ask(site, envelope("hello")))["kind"] == "hello"


def test_a_run_may_not_be_called_so_that_its_state_leaves_the_folder(site, tree):
    prepare(site, tree)
    said = opened(send(site, task_of(site, tree), run="../../evil"))
    assert "a run named" in said["reason"]


@pytest.mark.parametrize(
    ("policy", "settings", "reason"),
    [
        (Policy(models=["smollm2-*"]), [], "models tiny:llama; this site allows smollm2-*"),
        (Policy(spaces=["full"]), [], "spaces lora; this site allows full"),
        (Policy(objectives=["causal-lm"]), [], "objectives sft; this site allows causal-lm"),
        (Policy(minimum_cohort=3), [], "2 clients a round; this site asks for at least 3"),
        (Policy(require=["clip"]), [], "no clip in finetune.up"),
        (
            Policy(require=[{"use": "clip", "norm": 1.0}]),
            ["finetune.up=[{use: clip, norm: 2.0}]"],
            "norm of at most 1.0",
        ),
        (
            Policy(require=["clip"]),
            ["finetune.up=[{use: clip, norm: 1.0}]", "finetune.correction=scaffold"],
            "correction scaffold, whose own stream leaves",
        ),
        (Policy(), ["finetune.up=[boom:boom]"], "code boom:boom; this site runs no code"),
        (Policy(), ["finetune.objective=boom:boom"], "code boom:boom"),
        (Policy(), ["model=boom:boom"], "code boom:boom"),
        (Policy(), ["finetune.optimizer=tiny:f"], "code tiny:f"),
        (Policy(), ["finetune.objective='ev il:f'"], "code ev il:f"),
        (Policy(), ["finetune.up=[{use: error-feedback, chain: [{use: 'tiny:f'}]}]"], "code tiny:f"),
    ],
)
def test_what_the_policy_forbids_is_refused_before_anything_is_imported(
    site, tree, policy, settings, reason, monkeypatch
):
    for setting in settings:
        tree = recipe.apply(tree, setting)
    monkeypatch.setattr("importlib.import_module", lambda name, package=None: pytest.fail(f"imported {name}"))
    if policy.minimum_cohort > 1:
        monkeypatch.undo()
    said = prepare(replace(site, policy=policy), tree)
    assert said["kind"] == "refused"
    assert reason in said["reason"]


@pytest.mark.parametrize(
    "settings",
    [
        ["sinks=[{use: 'os:system', command: 'touch %s'}]"],
        ["fleet={use: 'os:system', command: 'touch %s'}"],
        ["from=[one-1, two-1]", "fuse={by: {use: 'os:system', command: 'touch %s'}}"],
    ],
)
def test_what_a_plan_names_for_the_operator_is_not_made_at_a_site(site, tree, tmp_path, settings):
    made = tmp_path / "made"
    for setting in settings:
        tree = recipe.apply(tree, setting.replace("%s", str(made)))
    said = prepare(site, tree)
    assert said["kind"] == "ready"
    assert not made.exists()


@pytest.mark.parametrize(
    "changes", [{"task": "train:0:school"}, {"client": "school"}, {"task": "train:7:clinic"}], ids=str
)
def test_an_answer_that_speaks_of_another_task_or_in_anothers_name_is_not_taken(site, tree, changes):
    prepare(site, tree)
    task = task_of(site, tree)
    reply = messages.unpack_event(send(site, task)[1])
    assert answer_to(task, reply) is reply
    with pytest.raises(ValueError, match="in the name of"):
        answer_to(task, replace(reply, **changes))
    with pytest.raises(ValueError, match="in the name of"):
        answer_to(task, replace(Dropped("clinic", task.id), **changes))


@pytest.mark.parametrize("said", [{"kind": "ready", "train": 10**400, "test": 1}, {"kind": "ready"}, {"kind": "event"}])
def test_a_site_whose_answer_to_a_plan_makes_no_sense_does_not_take_part(said):
    assert "cannot be read" in counted(said)


def test_a_site_that_asks_for_more_clients_than_are_ready_is_left_out_and_so_is_who_then_lacks_it():
    said = {
        name: {"kind": "ready", "train": 5, "test": 1, "least": least}
        for name, least in zip("abcd", (1, 2, 4, 3), strict=True)
    }
    heard = {**said, "e": "refused"}
    left = without_too_few({name: counted(one) for name, one in heard.items()}, heard, float)
    assert [name for name, one in left.items() if not isinstance(one, str)] == ["a", "b", "c", "d"]
    heard = {**said, "a": "refused"}
    left = without_too_few({name: counted(one) for name, one in heard.items()}, heard, float)
    assert left["c"] == "asks for 4 clients a round; 3 answer, of 3 that are ready"
    assert left["d"] == "asks for 3 clients a round; 2 answer, of 2 that are ready"
    assert left["b"] == "asks for 2 clients a round; 1 answer, of 1 that are ready"


def test_sums_are_hidden_among_those_who_are_ready_and_not_those_who_were_asked(site, tree, tmp_path, monkeypatch):
    tree = tree | {"finetune": tree["finetune"] | {"exchange": "secure-aggregation"}}
    there = {name: replace(site, folder=tmp_path / name) for name in "abcd"}
    there["e"] = replace(site, folder=tmp_path / "e", policy=Policy(spaces=["full"]))
    federation = Federation("nowhere:1", tmp_path, say=lambda line: None)

    def asked(messages, wait):
        heard = {name: opened(ask(there[name], message)) for name, message in messages.items()}
        return {name: said if said["kind"] == "ready" else said["reason"] for name, said in heard.items()}

    monkeypatch.setattr(federation, "sites", lambda: dict.fromkeys(there, 1))
    monkeypatch.setattr(federation, "_asked", asked)
    monkeypatch.setattr(federation, "connected", nullcontext)
    ours = build(schema.validate(tree), tree, sources=dict.fromkeys("abcd", ClientData((), ())))
    prepared = federation.prepare(ours.hash, tree, ours.shapes.identity, float)
    ready = [name for name, said in prepared.clients.items() if not isinstance(said, str)]
    assert ready == ["a", "b", "c", "d"]
    for name in ready:
        (agreed,) = there[name]._ready.values()
        assert rings(agreed.plan) == rings(ours)
        assert agreed.plan.side(name, Memory()).terms == ours.side(name, Memory()).terms


def rings(plan):
    return [stream.aggregate.ring.bits for stream in (*plan.rounds.streams, *plan.rounds.evaluated)]


def test_the_clients_that_answer_a_round_are_counted_and_not_those_that_are_ready():
    heard = {name: {"kind": "ready", "train": 5, "test": 1, "least": 3} for name in "abcd"}
    left = without_too_few({name: counted(one) for name, one in heard.items()}, heard, lambda ready: ready / 2)
    assert all("asks for 3 clients a round" in one for one in left.values())


def test_what_is_wrong_with_the_owners_data_stays_with_the_owner(site, tree, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": "Patient Jane Doe"}\n')
    said, site.data = [], bad
    site.say = said.append
    answer = prepare(site, tree)
    assert answer["kind"] == "refused"
    assert "Jane" not in answer["reason"]
    assert str(tmp_path) not in answer["reason"]
    assert any("Jane" in line for line in said)


@pytest.mark.parametrize("odd", [{"tree": 5}, {"clients": 5}, {"tree": {"recipe": 1, "data": {"held_out": [1]}}}])
def test_a_plan_of_odd_types_is_refused_and_the_site_goes_on(site, tree, odd):
    about = {"tree": tree, "client": "clinic", "clients": ["clinic"]} | odd
    assert opened(ask(site, envelope("plan", **about)))["kind"] == "refused"
    assert prepare(site, tree)["kind"] == "ready"


def test_a_task_that_cannot_be_read_is_not_worked_on_for_ever(site, tree):
    prepare(site, tree)
    task = task_of(site, tree)
    assert opened(ask(site, envelope("task", run="r1"), [b"x" * 16], messages.pack_task(task)))["kind"] == "refused"
    assert opened(ask(site, envelope("ask", run="r1", task=task.id)))["kind"] == "unknown"


def test_a_policy_lets_named_code_and_a_clipped_chain_through():
    written = {"up": [{"use": "clip", "norm": 1.0}], "objective": "mine:part"}
    assert list(own_code(written)) == ["mine:part"]
    assert list(own_code(model_code("tiny:llama"))) == []
    assert list(own_code(model_code({"use": "mine:model"}))) == ["mine:model"]


def test_metrics_that_may_not_leave_stay():
    heard = Policy(metrics=["steps"]).may_leave({"loss": 1.0, "samples": 4.0, "steps": 2.0, "patients": 7.0})
    assert heard == {"samples": 4.0, "steps": 2.0}, "a held-out loss is a metric like any other"


def test_a_policy_with_a_word_that_is_none_is_named(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("modles: [x]\n")
    with pytest.raises(AtollError, match="modles"):
        read(path)
    with pytest.raises(AtollError, match="no such policy"):
        read(tmp_path / "none.yaml")
    path.write_text("exchanges: [secure-agregation]\n")
    with pytest.raises(AtollError, match="did you mean 'secure-aggregation'"):
        read(path)
    path.write_text("exchanges: ['secure-*']\nobjectives: ['mine:loss', sft]\nspaces: ['*']\n")
    assert read(path).exchanges == ["secure-*"]


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for n in range(4):
        log.wrote("r1", "plan", f"train:{n}:north", [b"payload", bytes([n])])
    return log


def test_an_audit_log_goes_on_where_it_was(log):
    before = verify(log.path)
    AuditLog(log.path).wrote("r2", "plan", "train:0:north", [b"more"])
    after = verify(log.path)
    assert (after.lines, after.bytes) == (5, before.bytes + 4)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace('"bytes": 8', '"bytes": 9'), *lines[2:]], 2),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:3], lines[2], lines[3]], 4),
        (lambda lines: [*lines, "{"], 5),
        (lambda lines: [lines[0], "", *lines[1:]], 2),
    ],
    ids=["changed", "taken out", "swapped", "repeated", "cut off", "blank"],
)
def test_damage_to_an_audit_log_is_found_where_it_is(log, damage, line):
    log.path.write_text("\n".join(damage(log.path.read_text().splitlines())) + "\n")
    with pytest.raises(AtollError, match="damaged") as told:
        verify(log.path)
    assert told.value.details["where"] == f"{log.path}:{line}"
    with pytest.raises(AtollError, match="damaged"):
        AuditLog(log.path)
    assert log.last not in ("", None)


def test_a_reply_is_the_same_as_the_clients_own(site, tree, sites):
    """The site adds nothing and takes nothing away but metrics."""
    prepare(site, tree)
    task = task_of(site, tree)
    (ready,) = site._ready.values()
    direct = site.client("r2", ready).handle(task)
    over = messages.unpack_event(send(site, task)[1])
    assert equal(over.payloads["update"].main, direct.payloads["update"].main)


def test_a_crash_in_the_middle_of_a_line_does_not_lock_the_site_out(log):
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"at": 1, "run": "r')
    AuditLog(log.path).wrote("r1", "plan", "train:9:north", [b"next"])
    assert verify(log.path).lines == 5


def test_what_cannot_be_noted_does_not_leave_and_the_site_goes_on(site, tree, monkeypatch):
    prepare(site, tree)
    task = task_of(site, tree)

    def full(*args):
        raise OSError(28, "No space left on device: patient Smith")

    monkeypatch.setattr(AuditLog, "wrote", full)
    answer = send(site, task)
    assert len(answer) == 1
    assert opened(answer)["kind"] == "refused"
    assert "Smith" not in opened(answer)["reason"]
    monkeypatch.undo()
    assert opened(send(site, task))["kind"] == "event"


def test_an_error_that_quotes_data_stays_at_the_site(site, tree):
    prepare(site, tree)
    task = task_of(site, tree)
    (ready,) = site._ready.values()
    said = []
    site.say = said.append

    class Poisoned(list):
        def __getitem__(self, index):
            raise KeyError("patient Smith")

    ready.things.data["clinic"] = ClientData(Poisoned(range(8)), ())
    reply = messages.unpack_event(send(site, task)[1])
    assert reply.refusal == "KeyError; the site's own log says more"
    assert any("patient Smith" in line for line in said)


def test_another_base_model_at_the_site_is_refused(site, tree):
    said = opened(ask(site, envelope("plan", tree=tree, model="0" * 32, client="clinic", clients=["clinic"])))
    assert said["kind"] == "refused"
    assert "another base model" in said["reason"]


@pytest.mark.parametrize("kind", ["junk", "private", "twice"])
def test_a_file_that_is_no_sites_public_key_is_not_enrolled(tmp_path, kind):
    certs.init(tmp_path, ["localhost"])
    certs.site(tmp_path, "first")
    given = {
        "junk": b"junk",
        "private": (tmp_path / "sites" / "first" / "site.key").read_bytes(),
        "twice": (tmp_path / "server" / "clients" / "first.pub").read_bytes(),
    }
    reason = {"junk": "not a site's public key", "private": "a private key", "twice": "enrolled already"}
    with pytest.raises(AtollError, match="key") as told:
        certs.site(tmp_path, "second", given[kind])
    assert reason[kind] in str(told.value)
    assert not (tmp_path / "server" / "clients" / "second.pub").exists()


@pytest.mark.parametrize(
    ("allowed", "model", "broken"),
    [
        (["org/name"], "org/name@0123abc", False),
        (["org/*"], "org/name@0123abc", False),
        (["org/name@0123abc"], "org/name@0123abc", False),
        (["org/name@0123abc"], "org/name@4567def", True),
        (["org/name"], "other/name@org/name", True),
    ],
)
def test_an_owner_need_not_name_a_models_commit(tree, allowed, model, broken):
    written = schema.validate(recipe.apply(tree, f"model={model}"))
    assert bool(Policy(models=allowed).broken_by(written)) is broken
