"""Masks and noise over a network: the sum is that of one process, the operator sees no update, sites keep accounts."""

from __future__ import annotations

import json

import pytest
from machines import wait_until

from atoll.params import equal
from atoll.privacy.ledger import Ledger
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.record.story import read_story
from atoll.stream import UPDATE

pytestmark = pytest.mark.network

MASKS = ("--set", "finetune.exchange=secure-aggregation")
NOISE = (
    "--set",
    "finetune.privacy={use: distributed, clip: 0.1, delta: 0.01, noise_multiplier: 2.0}",
    "--set",
    "finetune.weighting=uniform",
)


def folder(federation, name):
    return RunFolder(federation.folder / "runs" / name)


def test_masked_sites_give_what_one_process_gives(federation):
    """Words of a ring sum up to the same in any order, so not even the order of answers matters."""
    done = federation.run("run", "mine.yaml", "--fleet", federation.address, *MASKS)
    assert done.returncode == 0, done.stderr
    assert "the sum of 3 clients is open" in done.stderr
    alone = federation.run("run", "mine.yaml", *MASKS, "--set", "name=alone")
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (load_state(folder(federation, n).checkpoint).params[UPDATE] for n in ("net-1", "alone-1"))
    assert equal(ours, theirs)
    assert any(float(x.abs().max()) > 1e-3 for n, x in theirs.items() if "lora_B" in n), "something was learned"
    shown = federation.run("audit", "show", "state/north/audit.jsonl", "--json")
    kinds = [line["task"].split(":")[0] for line in json.loads(shown.stdout)]
    ranged = ["share", "mask", "unmask", "mask", "unmask"]  # the range first, then the update
    assert kinds[:10] == ["evaluate", "share", "mask", "unmask", "train", *ranged]
    assert not any(reply.metrics for reply in read_story(folder(federation, "net-1")).replies)


def test_a_site_that_dies_at_work_is_not_in_the_sum(federation):
    before = federation.said("west").count("round 0: train")
    run = federation.start(
        "masked", "run", "mine.yaml", "--fleet", federation.address, *MASKS, "--set", "name=lost", "--set",
        "finetune.schedule={use: synchronous, deadline: 20}", "--set", "finetune.local_steps=40",
    )  # fmt: skip
    wait_until(lambda: federation.said("west").count("round 0: train") > before, "west to work")
    federation.kill("west")
    wait_until(lambda: "round 1 done" in federation.said("masked"), "the first round to end", 90)
    federation.join("west")
    assert run.wait(timeout=180) == 0, federation.said("masked")
    found = read_story(folder(federation, "lost-1"))
    assert {reply.client for reply in found.replies if reply.round == 0} == {"north", "south"}
    assert "the sum of 2 clients is open" in federation.said("masked")


def test_an_operator_who_dies_in_a_masked_round_goes_on_with_new_keys(federation):
    before = federation.said("north").count("round 1: train")
    federation.start(
        "killed", "run", "mine.yaml", "--fleet", federation.address, *MASKS, "--set", "name=killed", "--set",
        "finetune.local_steps=30",
    )  # fmt: skip
    wait_until(lambda: federation.said("north").count("round 1: train") > before, "the second round")
    federation.kill("killed")
    done = federation.run("resume", "killed-1", timeout=180)
    assert done.returncode == 0, done.stderr
    alone = federation.run(
        "run", "mine.yaml", *MASKS, "--set", "name=calm", "--set", "finetune.local_steps=30", timeout=180
    )
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (load_state(folder(federation, n).checkpoint).params[UPDATE] for n in ("killed-1", "calm-1"))
    assert equal(ours, theirs)


def test_noise_shares_over_a_network_and_a_sites_own_account(federation):
    done = federation.run("run", "mine.yaml", "--fleet", federation.address, *MASKS, *NOISE, "--set", "name=noised")
    assert done.returncode == 0, done.stderr
    mine = list(Ledger(federation.folder / "state/north/ledger.jsonl"))
    assert [entry.round for entry in mine] == [0, 1, 2]
    assert {entry.releases[0].noise_multiplier for entry in mine} == {2.0}
    shown = federation.run("ledger", "noised-1", "state/north/ledger.jsonl", "--delta", "0.01", "--json")
    run, site, together = json.loads(shown.stdout)
    assert run["epsilon"] == site["epsilon"] < together["epsilon"]


def test_a_site_whose_budget_is_spent_takes_no_part(federation):
    """The owner's account goes over all runs: after one run there is room for a round or two and no more."""
    federation.stop("north")
    policy = federation.folder / "spent.yaml"
    policy.write_text("privacy: {epsilon: 2.4, delta: 0.01}\nexchanges: [secure-aggregation]\n")
    federation.join("north", "--policy", str(policy))
    done = federation.run("run", "mine.yaml", "--fleet", federation.address, *MASKS, *NOISE, "--set", "name=more")
    assert "privacy budget is spent" in done.stderr
    clear = federation.run("run", "mine.yaml", "--fleet", federation.address, "--set", "name=clear")
    assert "privacy none; this site gives the operator no update without differential privacy" in clear.stderr
    assert "exchanges plain; this site allows secure-aggregation" in clear.stderr
