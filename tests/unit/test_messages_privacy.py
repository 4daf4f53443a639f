"""What privacy and masks do not go with is refused before anything runs: what, where, what was found, what is allowed."""

from __future__ import annotations

import json

import pytest

import atoll as package
from support import Atoll

PRIVACY = "finetune.privacy={{use: {}, clip: {}, delta: {}{}}}"
CENTRAL = PRIVACY.format("central", 1, 0.01, ", noise_multiplier: 1")
DISTRIBUTED = PRIVACY.format("distributed", 1, 0.01, ", noise_multiplier: 1")
MASKS = "finetune.exchange=secure-aggregation"
UNIFORM = "finetune.weighting=uniform"


def exchange(**settings: int) -> str:
    return "finetune.exchange={use: secure-aggregation, " + ", ".join(f"{k}: {v}" for k, v in settings.items()) + "}"


def schedule(text: str) -> str:
    return f"finetune.schedule={{use: {text}}}"


MISTAKES = {
    "no budget": ([PRIVACY.format("central", 1, 0.01, ", epsilon: 0")], "privacy.epsilon", "0", "greater than 0"),
    "neither": ([PRIVACY.format("local", 1, 0.01, "")], "finetune.privacy", "neither", "write {use: local, clip: 1"),
    "large delta": ([PRIVACY.format("central", 1, 0.5, ", epsilon: 8")], "privacy.delta", "0.5", "privacy.delta=0.3"),
    "delta 0": ([PRIVACY.format("central", 1, 0, ", epsilon: 8")], "privacy.delta", "0", "greater than or equal to"),
    "delta 1": ([PRIVACY.format("central", 1, 1, ", epsilon: 8")], "privacy.delta", "1", "less than 1"),
    "clip 0": ([PRIVACY.format("central", 0, 0.01, ", epsilon: 8")], "privacy.clip", "0", "greater than 0"),
    "quantile 0": ([PRIVACY.format("central", 1, 0.01, ", epsilon: 8, quantile: 0")], "quantile", "0", "greater than 0"),
    "less than no noise": (
        [PRIVACY.format("central", 1, 0.01, ", noise_multiplier: -1")],
        "noise_multiplier", "-1", "greater than or equal to 0",
    ),
    "more noise than a number holds": (
        [PRIVACY.format("central", 1, 0.01, ", noise_multiplier: 1e200")],
        "noise_multiplier", "1e+200", "less than or equal to 10000",
    ),
    "an endless clip": ([PRIVACY.format("local", ".inf", 0.01, ", epsilon: 8")], "privacy.clip", "inf", "less than or"),
    "a budget of less than a round": (
        [PRIVACY.format("central", 1, 0.01, ", epsilon: 0.5, noise_multiplier: 1")],
        "privacy.noise_multiplier", "1.0", "epsilon of at most 0.5; one round takes 2.32",
    ),
    "shares without masks": ([DISTRIBUTED], "finetune.exchange", "plain", "secure-aggregation"),
    "a server's noise under masks": ([CENTRAL, MASKS], "finetune.privacy", "central", "distributed, local"),
    "scaffold": (
        [CENTRAL, "finetune.correction=scaffold", "finetune.optimizer=sgd", "finetune.clip_norm=null"],
        "finetune.correction", "scaffold", "none, proximal, l1",
    ),
    "late replies": (
        [CENTRAL, schedule("synchronous, late: take")], "finetune.schedule", "late=take", "synchronous, poisson",
    ),
    "a quorum": (
        [CENTRAL, schedule("synchronous, quorum: 0.5")], "finetune.schedule", "quorum=0.5", "synchronous, poisson",
    ),
    "a buffer": (
        [CENTRAL, schedule("buffered, concurrency: 2, buffer: 1")], "finetune.schedule", "buffered", "synchronous, poisson",
    ),
    "weights": ([CENTRAL, "finetune.weighting=examples"], "finetune.weighting", "examples", "uniform"),
    "a transform after the noise": (
        [DISTRIBUTED, MASKS, "finetune.up=[{use: clip, norm: 1}]"], "finetune.up", "clip", "[]: what one client does",
    ),
    "topk": ([MASKS, "finetune.up=[{use: topk, fraction: 0.1}]"], "finetune.up[0]", "topk", "lower the rank of the space"),
    "int8": ([MASKS, "finetune.up=[int8]"], "finetune.up[0]", "int8", "finetune.exchange.bits quantizes"),
    "error-feedback": (
        [MASKS, "finetune.up=[{use: error-feedback, chain: [{use: topk, fraction: 0.1}]}]"],
        "finetune.up[0]", "error-feedback", "leave it out",
    ),
    "a quorum of too few": (
        [MASKS, schedule("synchronous, quorum: 0.3")], "finetune.schedule.quorum", "0.3", "2 of 3 clients",
    ),
    "a central server's noise and a budget": ([CENTRAL, MASKS], "finetune.privacy", "central", "distributed, local"),
    "buffered": (
        [MASKS, schedule("buffered, concurrency: 2, buffer: 2")], "finetune.schedule", "buffered", "synchronous without",
    ),
    "late": ([MASKS, schedule("synchronous, late: take")], "finetune.schedule", "late=take", "synchronous without"),
    "processes": ([MASKS, "fleet=processes"], "fleet", "processes", "fleet: inprocess"),
    "processes inside": ([MASKS, "fleet={use: faults, inner: processes}"], "fleet", "processes", "fleet: inprocess"),
    "survivors beyond the population": ([exchange(survivors=4)], "exchange.survivors", "4", "2 to 3, the clients"),
    "survivors beyond the cohort": (
        [exchange(survivors=3), schedule("synchronous, cohort: 2")], "exchange.survivors", "3", "2 to 2, the clients",
    ),
    "too many who collude": ([exchange(colluding=2)], "exchange.colluding", "4", "2 to 3, the clients of a round"),
    "one client a round": ([MASKS, schedule("synchronous, cohort: 1")], "exchange", "2", "`exchange: plain`"),
    "one survivor": ([exchange(survivors=1)], "exchange.survivors", "1", "greater than or equal to 2"),
    "few bits for the noise": ([exchange(bits=4), DISTRIBUTED], "exchange.bits", "4", "about 2 levels or more"),
    "3 bits": ([exchange(bits=3)], "exchange.bits", "3", "greater than or equal to 4"),
    "64 bits": ([exchange(bits=64)], "exchange.bits", "64", "less than or equal to 32"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "where", "found", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_does_not_go_together_is_refused(
    atoll: Atoll, tiny: str, settings: list[str], where: str, found: str, says: str
) -> None:
    given = [text for setting in (UNIFORM, *settings) for text in ("--set", setting)]
    said = atoll("plan", tiny, *given)
    assert (said.status, said.out) == (1, ""), said
    told = " ".join(said.err.split())
    for text in (where, f"found: {found}" if found[0].isdigit() else found, says):
        assert text in told, (text, told)


def test_one_client_alone_has_no_masks(atoll: Atoll, tiny: str, sites) -> None:
    alone = "data={use: clients, paths: {a: " + str(sites / "north.jsonl") + "}}"
    said = atoll("plan", tiny, "--set", MASKS, "--set", alone)
    assert said.status == 1
    assert "a round has one client" in said.err


def warned(atoll: Atoll, tiny: str, *settings: str) -> str:
    given = [text for setting in (UNIFORM, *settings) for text in ("--set", setting)]
    return " | ".join(json.loads(atoll("plan", tiny, "--json", *given).out)["warnings"])


def test_noise_on_both_factors_is_warned_of_and_on_one_is_not(atoll: Atoll, tiny: str) -> None:
    assert "noise on both of LoRA's factors" in warned(atoll, tiny, CENTRAL)
    assert "noise on both" not in warned(atoll, tiny)
    assert "noise on both" not in warned(atoll, tiny, CENTRAL, "finetune.space={use: ffa-lora, rank: 2}")


# What sampling hides ----------------------------------------------------------------------------------------------------


def sampling(tiny: str, *settings: str) -> str:
    plan = package.plan(tiny, [UNIFORM, *settings])
    assert plan.protection
    return plan.protection.release.sampling


def test_sampling_counts_where_the_server_is_trusted_and_every_reply_is_of_its_round(tiny: str) -> None:
    assert sampling(tiny, CENTRAL, schedule("poisson, rate: 0.5")) == "poisson"
    assert sampling(tiny, CENTRAL, schedule("synchronous, cohort: 2")) == "uniform"
    assert sampling(tiny, DISTRIBUTED, MASKS, schedule("poisson, rate: 0.7")) == "everyone"
    local = PRIVACY.format("local", 1, 0.01, ", noise_multiplier: 1")
    assert sampling(tiny, local, schedule("poisson, rate: 0.5")) == "everyone"


def test_cohorts_that_hide_their_members_do_not_follow_from_the_seed(tiny: str) -> None:
    names = [f"c{i}" for i in range(40)]

    def drawn(*settings: str) -> list[list[str]]:
        plan = package.plan(tiny, [UNIFORM, schedule("poisson, rate: 0.5"), *settings])
        return [plan.rounds.schedule.sample(names, [], 7) for _ in range(2)]

    one, other = drawn(CENTRAL)
    assert one != other
    one, other = drawn()
    assert one == other
