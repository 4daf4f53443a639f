"""Machines that die, networks that go away: each caused, each ending in the result of the clients that were there."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest
from machines import NAMES, Federation, wait_until
from relay import Relay

from atoll.fleet.flower.calls import Gone
from atoll.fleet.flower.operator import Operator
from atoll.record.folder import RunFolder
from atoll.record.story import read_story

pytestmark = pytest.mark.network

SLOW = ("--set", "finetune.local_steps=150", "--set", "finetune.rounds=3", "--set", "evaluate.final_samples=4")
DEADLINE = ("--set", "finetune.schedule={use: synchronous, deadline: 25, quorum: 0.5, grace: 6}")


def begin(federation: Federation, name: str, *more: str):
    """A run over the federation, with rounds of several seconds."""
    return federation.start(
        name, "run", "mine.yaml", "--fleet", federation.address, "--set", f"name={name}", *SLOW, *more
    )


def wait_for_work(federation: Federation, name: str, before: int) -> None:
    """Until a site has begun one more first round than `before`."""
    wait_until(lambda: federation.said(name).count("round 0: train") > before, f"{name} to work")


def story(federation: Federation, name: str):
    return read_story(RunFolder(federation.folder / "runs" / f"{name}-1"))


def counted_once(found) -> bool:
    """No client's reply counts twice in a round."""
    return max(Counter((reply.round, reply.client) for reply in found.replies).values()) == 1


def test_a_client_killed_at_work_drops_out_of_its_round_and_comes_back_in_a_later_one(federation):
    before = federation.said("west").count("round 0: train")
    run = begin(federation, "killed", *DEADLINE)
    wait_for_work(federation, "west", before)
    federation.kill("west")
    wait_until(lambda: "round 1 done" in federation.said("killed"), "the first round to end")
    federation.join("west")
    assert run.wait(timeout=120) == 0, federation.said("killed")
    found = story(federation, "killed")
    assert found.ended.rounds == 3
    assert [m.client for m in found.missing if m.round == 0] == ["west"]
    assert {r.client for r in found.replies if r.round == 0} == {"north", "south"}
    assert "west" in {r.client for r in found.replies if r.round > 0}, "it came back"
    assert counted_once(found)


def test_a_client_that_starts_anew_within_the_round_does_its_task_again(federation):
    before = federation.said("west").count("round 0: train")
    run = begin(federation, "anew")
    wait_for_work(federation, "west", before)
    federation.kill("west")
    federation.join("west")
    assert run.wait(timeout=180) == 0, federation.said("anew")
    found = story(federation, "anew")
    assert [r.accepted for r in found.rounds] == [3, 3, 3]
    assert counted_once(found)


def test_a_server_killed_while_clients_work_comes_back_and_the_run_goes_on(federation):
    run = begin(federation, "headless")
    wait_until(lambda: "round 1 done" in federation.said("headless"), "the first round to end")
    federation.kill("server")
    time.sleep(2)
    federation.serve()
    assert run.wait(timeout=240) == 0, federation.said("headless")
    said = federation.said("headless")
    assert "is away" in said
    assert "back at" in said
    found = story(federation, "headless")
    assert [r.accepted for r in found.rounds] == [3, 3, 3]
    assert counted_once(found)


def test_a_server_that_comes_back_while_it_is_asked_who_is_there_is_not_taken_for_the_one_before(
    federation, monkeypatch
):
    operator = Operator(federation.address, federation.folder / "certs" / "operator", limit_bytes=1 << 30)
    listed, before = operator._listed, {name: federation.said(name).count("back at") for name in NAMES}

    def meanwhile():
        federation.kill("server")
        federation.serve()
        return listed()

    assert set(operator.sites()) == set(NAMES)
    monkeypatch.setattr(operator, "_listed", meanwhile)
    with pytest.raises(Gone):  # nobody has joined it yet: a run would take that for sites that are away
        operator.sites()
    operator.close()
    wait_until(lambda: all(federation.said(n).count("back at") > before[n] for n in NAMES), "the sites to be back")


def test_an_operator_killed_in_a_round_resumes_and_nothing_counts_twice(federation):
    begin(federation, "operator")
    wait_until(lambda: "round 1 done" in federation.said("operator"), "the first round to end")
    federation.kill("operator")
    done = federation.run("resume", "operator-1", timeout=180)
    assert done.returncode == 0, done.stderr
    found = story(federation, "operator")
    assert found.ended.rounds == 3
    assert [r.accepted for r in found.rounds] == [3, 3, 3]
    assert counted_once(found)


def test_a_client_that_is_stopped_for_a_while_is_waited_for(federation):
    run = begin(federation, "frozen")
    wait_until(lambda: "round 1 done" in federation.said("frozen"), "the first round to end")
    federation.running["south"].send_signal(signal.SIGSTOP)
    time.sleep(10)
    federation.running["south"].send_signal(signal.SIGCONT)
    assert run.wait(timeout=120) == 0, federation.said("frozen")
    found = story(federation, "frozen")
    assert [r.accepted for r in found.rounds] == [3, 3, 3]
    assert counted_once(found)


@pytest.mark.parametrize("late", ["drop", "take"])
def test_a_slow_client_is_late_and_its_update_is_dropped_or_taken(federation, late):
    schedule = f"{{use: synchronous, quorum: 0.6, grace: 0.5, late: {late}, deadline: 60}}"
    before = federation.said("south").count("round 0: train")
    run = begin(federation, late, "--set", f"finetune.schedule={schedule}", "--set", "finetune.rounds=6")
    wait_for_work(federation, "south", before)
    federation.running["south"].send_signal(signal.SIGSTOP)
    wait_until(lambda: "round 1 done" in federation.said(late), "the first round to end")
    federation.running["south"].send_signal(signal.SIGCONT)
    assert run.wait(timeout=120) == 0, federation.said(late)
    found = story(federation, late)
    assert found.ended.rounds == 6
    first = {r.client for r in found.replies if r.round == 0}
    assert first == {"north", "west"}
    stale = [r for r in found.replies if r.staleness > 0]
    assert bool(stale) == (late == "take")
    assert all("before the round closed" in m.reason for m in found.missing if m.round == 0)
    assert counted_once(found)


def test_buffered_rounds_do_not_wait_for_a_slow_client(federation):
    schedule = "finetune.schedule={use: buffered, concurrency: 3, buffer: 2, exponent: 0.5}"
    run = begin(federation, "buffered", "--set", schedule, "--set", "finetune.rounds=8")
    wait_until(lambda: "round 1 done" in federation.said("buffered"), "the first round to end")
    while run.poll() is None:  # a quarter of its time
        federation.running["west"].send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        federation.running["west"].send_signal(signal.SIGCONT)
        time.sleep(0.1)
    assert run.returncode == 0, federation.said("buffered")
    found = story(federation, "buffered")
    replies = Counter(reply.client for reply in found.replies)
    assert [r.accepted for r in found.rounds] == [2] * 8
    assert replies["west"] < min(replies["north"], replies["south"])
    assert any(reply.staleness > 0 for reply in found.replies)
    assert counted_once(found)


def test_a_site_that_comes_after_the_run_began_takes_part_from_then_on(federation):
    federation.stop("west")
    run = begin(federation, "newcomer", "--set", "finetune.rounds=8")
    wait_until(lambda: "round 1 done" in federation.said("newcomer"), "the first round to end")
    federation.join("west")
    assert run.wait(timeout=180) == 0, federation.said("newcomer")
    assert "west takes part from now on" in federation.said("newcomer")
    found = story(federation, "newcomer")
    assert {r.client for r in found.replies if r.round == 0} == {"north", "south"}
    assert {r.client for r in found.replies if r.round == 7} == {"north", "south", "west"}
    assert [r.refused + r.dropped for r in found.rounds] == [0] * 8


def test_a_line_that_is_dark_for_half_a_minute_loses_no_round(federation):
    relay = Relay(federation.port)
    federation.stop("west")
    federation.join("west", address=f"127.0.0.2:{federation.port}", HTTPS_PROXY=relay.address)
    assert relay.asked[0] == f"127.0.0.2:{federation.port}", "it goes through the proxy"
    run = begin(federation, "dark")
    wait_until(lambda: "round 1 done" in federation.said("dark"), "the first round to end")
    relay.lit.clear()
    time.sleep(30)
    relay.lit.set()
    assert run.wait(timeout=180) == 0, federation.said("dark")
    found = story(federation, "dark")
    assert [r.accepted for r in found.rounds] == [3, 3, 3]
    assert counted_once(found)
    federation.stop("west")
    relay.close()
    federation.join("west")


def test_work_is_given_up_when_the_operator_leaves(federation):
    before = federation.said("north").count("round 0: train")
    run = begin(federation, "given-up", "--set", "finetune.local_steps=100000")
    wait_for_work(federation, "north", before)
    time.sleep(2)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 130, federation.said("given-up")
    begin(federation, "after").wait(timeout=120)
    assert [r.accepted for r in story(federation, "after").rounds] == [3, 3, 3], "the sites are free"


def test_a_server_whose_disk_is_full_serves_and_an_operator_whose_disk_is_full_goes_on_later(federation):
    federation.fill_disk("server")
    run = begin(federation, "full")
    wait_until(lambda: "round 1 done" in federation.said("full"), "the first round to end")
    federation.fill_disk("full")
    assert run.wait(timeout=120) == 1, federation.said("full")
    assert "no space on disk; the run is whole up to its last checkpoint" in federation.said("full")
    assert "`atoll resume full-1`" in federation.said("full")
    done = federation.run("resume", "full-1", timeout=180)
    assert done.returncode == 0, done.stderr
    assert [r.accepted for r in story(federation, "full").rounds] == [3, 3, 3]
