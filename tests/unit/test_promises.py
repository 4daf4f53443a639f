"""What plans, sites and ledgers promise, each held to by one assertion: what a change must not quietly take away."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import START, fedavg_work, toy_fleet, toy_plan

import atoll as package
import atoll.statement
from atoll.errors import AtollError
from atoll.exchange import Done, WorkFailed
from atoll.params import global_norm
from atoll.policy import Policy, read
from atoll.privacy.accounting import Release, epsilon, noise_for
from atoll.privacy.ledger import Entry, Ledger, possible, spending, spent
from atoll.privacy.mechanisms import CLIP, Cohorts, Mechanism, protect
from atoll.privacy.party import Memory, Party
from atoll.round import initial, run_round
from atoll.schedule import synchronous
from atoll.site import Site, for_one_who_was_asked
from atoll.stream import UPDATE
from support import Atoll

DISTRIBUTED = "finetune.privacy={use: distributed, clip: 1, delta: 0.01, noise_multiplier: 1}"
CENTRAL = "finetune.privacy={use: central, clip: 1, delta: 0.01, noise_multiplier: 1}"


def planned(tiny: str, *settings: str):
    return package.plan(tiny, ["finetune.weighting=uniform", *settings])


def masks(**settings: int) -> str:
    return "finetune.exchange={use: secure-aggregation, " + ", ".join(f"{k}: {v}" for k, v in settings.items()) + "}"


@pytest.fixture(autouse=True)
def cache(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))


def test_clients_who_collude_bring_no_noise(tiny: str) -> None:
    plain, held = (planned(tiny, DISTRIBUTED, masks(survivors=3, colluding=n)).protection for n in (0, 1))
    assert (plain.cohorts.noisy, held.cohorts.noisy) == (3, 2)
    assert held.share_std(UPDATE, {}) == pytest.approx(plain.share_std(UPDATE, {}) * math.sqrt(3 / 2))


def test_a_round_of_fewer_than_a_sum_needs_is_not_put_together(tiny: str) -> None:
    assert planned(tiny, masks(survivors=3)).rounds.least == 3


def test_noised_words_are_rounded_in_secret(tiny: str) -> None:
    hidden, bare = (
        planned(tiny, masks(survivors=2), *more).rounds.streams[0].aggregate for more in ([DISTRIBUTED], [])
    )
    assert (hidden.private_rounding, bare.private_rounding) == (True, False)


def test_where_the_server_knows_whom_it_asked_only_what_one_sends_is_hidden(tiny: str) -> None:
    said = package.statement.statement(planned(tiny, DISTRIBUTED, masks(survivors=3)), {})["guarantee"]
    assert said["adjacency"].startswith("zero-out")
    assert "who takes no part" in said["holds_against"]
    none = planned(tiny, "finetune.privacy={use: local, clip: 1, delta: 0.01, noise_multiplier: 0}")
    assert package.statement.server_sees(none) == "every update by itself"


def of_clients(**settings: float):
    mechanism = Mechanism("local", 1.0, 0.01, None, 1.0, **settings)
    return protect(mechanism, Cohorts(Release(1.0), 3.0, 1, 4))


def test_nothing_made_of_the_data_leaves_beside_a_noised_update() -> None:
    work = of_clients().guarded(
        lambda *_: Done({UPDATE: {"w": torch.ones(3)}}, {"all": 5.0}, {"loss": 1.0, "steps": 2.0}, {})
    )
    done = work({UPDATE: {"w": torch.zeros(3)}}, None, {}, None)
    assert (done.metrics, done.weights) == ({"steps": 2.0}, {"all": 1.0})


def test_work_that_fails_tells_nothing_of_it() -> None:
    def fails(*_: object) -> Done:
        raise WorkFailed("the loss is nan")

    done = of_clients().guarded(fails)({UPDATE: {"w": torch.zeros(500)}}, None, {}, None)
    assert 0.5 < float(done.updates[UPDATE]["w"].std()) < 2


def test_the_bit_of_an_adaptive_clip_has_noise_of_its_own() -> None:
    made = of_clients(quantile=0.5)
    assert made.bit_noise == pytest.approx(made.noise_multiplier / math.sqrt(0.1) * 0.5)
    assert made.unit_noise == pytest.approx(made.noise_multiplier / math.sqrt(0.9))
    assert 1 / made.noise_multiplier**2 == pytest.approx((0.5 / made.bit_noise) ** 2 + 1 / made.unit_noise**2)


def test_an_adaptive_clip_stays_a_number() -> None:
    (clip,) = (s for s in of_clients(quantile=0.5).streams([]) if s.name == CLIP)
    for jump in (1e9, -1e9):
        _, after = clip.outer.step({}, {"log": torch.zeros(1)}, {"log": torch.tensor([jump])})
        assert math.isfinite(math.exp(float(after["log"])))


ENTRY = Entry("r", "p", 0, "client", (Release(2.0, "poisson", 0.1),))


def test_a_sites_own_ledger_knows_no_sampling_that_it_is_asked_in() -> None:
    assert for_one_who_was_asked(ENTRY).releases == (Release(2.0),)


def test_what_hides_a_client_hides_an_example_half_as_well() -> None:
    of_example = Entry("r", "p", 1, "example", (Release(4.0),))
    whole = Entry("r", "p", 0, "client", (Release(2.0),))
    assert spent([whole, of_example], 1e-5) == pytest.approx(epsilon([Release(1.0), Release(4.0)], 1e-5))


def test_ledgers_of_the_same_data_add_up_whatever_the_clients_are_called() -> None:
    def of(name: str, noise: float) -> list[Entry]:
        return [Entry("r", "p", 0, "example", (Release(noise), Release(9.0)), (name, "other"))]

    def together(*ledgers: list[Entry]) -> float:
        return float(spending({str(i): one for i, one in enumerate(ledgers)}, 1e-5)[-1]["epsilon"])

    both = epsilon([Release(1.0), Release(2.0)], 1e-5)
    assert together(of("north", 1.0), of("pooled", 2.0)) == pytest.approx(both)
    assert together(of("north", 1.0), of("north", 2.0)) == pytest.approx(both)


@pytest.mark.parametrize("changes", [
    {"noise_multiplier": 0.0}, {"noise_multiplier": 1e-200}, {"noise_multiplier": math.inf}, {"rate": 1.1}, {"count": 0},
    {"sampling": "uniform"}, {"sampling": "nobody"}, {"count": 1.5},
], ids=str)  # fmt: skip
def test_numbers_that_no_release_has_are_no_entry(changes: dict[str, object]) -> None:
    assert possible(Release(2.0))
    assert not possible(replace(Release(2.0), **changes))


@pytest.mark.parametrize("left", ["", "{}", '{"run": "r", "clients": [["x"]]}', "[" * 100_000])
def test_a_ledger_that_lost_entries_adds_up_to_nothing_known(atoll: Atoll, tmp_path: Path, left: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).enter(ENTRY)
    assert atoll("ledger", str(path), "--delta", "1e-5").status == 0
    path.write_text(left)
    said = atoll("ledger", str(path), "--delta", "1e-5")
    assert said.status == 1, said
    assert "lost entries" in said.err or "no account" in said.err
    assert atoll("ledger", str(path), "--delta", "nan").status == 1


@pytest.mark.parametrize("privacy", [
    "{use: local, clip: 1, delta: 0.01, noise_multiplier: 0}",
    "{use: local, clip: 1, delta: 0.01, epsilon: .inf}",
    "{use: examples, clip: 1, delta: 0.01, noise_multiplier: 0}",
])  # fmt: skip
def test_a_site_with_a_budget_takes_no_part_without_noise(tmp_path: Path, sites: Path, tiny: str, privacy: str) -> None:
    from atoll.site import Ready, Unwilling

    plan = planned(tiny, f"finetune.privacy={privacy}")
    bounded = Site(
        sites / "north.jsonl", Policy(privacy={"epsilon": 8, "delta": 1e-5}), tmp_path / "state", lambda line: None
    )
    with pytest.raises(Unwilling, match="its epsilon is infinite"):
        bounded.spend("run", Ready("north", plan, None), 0)
    free = replace(bounded, policy=Policy())
    free.spend("run", Ready("north", plan, None), 0)


def test_a_sites_minimum_cohort_is_its_own_to_keep_under_masks(tmp_path: Path, sites: Path, tiny: str) -> None:
    side = planned(tiny, masks(survivors=2)).side("north", Memory())
    careful = Site(sites / "north.jsonl", Policy(minimum_cohort=3), tmp_path / "state", lambda line: None).careful(side)
    assert isinstance(careful, Party)
    assert (side.terms.survivors, careful.terms.survivors) == (2, 3)


def test_those_who_are_away_are_drawn_like_all_others() -> None:
    plan = toy_plan(schedule=synchronous(cohort=1))
    fleet = toy_fleet(plan, fedavg_work())
    everybody = frozenset(fleet.clients())
    fleet.clients = lambda: ["north"]  # type: ignore[method-assign]
    plan = replace(plan, population=everybody)
    state, heard = initial(plan, START), []
    for _ in range(30):
        before = len(heard)
        state = run_round(plan, state, fleet, heard.append)
        assert len(heard) - before <= 1
    assert 2 <= len(heard) <= 22, "one of three is drawn in a third of the rounds, who else is there or not"
    few = replace(plan, population=None, schedule=synchronous(cohort=3))
    run_round(few, initial(few, START), fleet, heard.append)  # asks who is there


@pytest.mark.parametrize("cohorts", [Release(1.0, "poisson", 1e-4), Release(1.0)])
def test_a_budget_that_hardly_any_noise_keeps_is_kept(cohorts: Release) -> None:
    assert noise_for(1e20, 0.01, replace(cohorts, count=2)) == pytest.approx(1e-3, rel=10)


MISTAKES = {
    "a quorum as text": ([masks(survivors=2), "finetune.schedule={use: synchronous, quorum: '0.9'}"], ""),
    "hardly any noise": (
        ["finetune.privacy={use: central, clip: 1, delta: 0.01, noise_multiplier: 1e-9}"], "hardly any noise",
    ),
    "a delta that noise cannot keep": (
        ["finetune.privacy={use: local, clip: 1, delta: 1e-30, epsilon: 8}"], "0.000000000001",
    ),
    "pooled twice": (["finetune.population=pooled", "baselines=[pooled]"], "a pooled run has no baselines"),
    "noise of another kind under masks": (
        [masks(bits=12), "finetune.privacy={use: local, clip: 1, delta: 0.01, noise_multiplier: 1}",
         "finetune.up=[{use: gaussian-noise, std: 10}]"], "what one client does to its noised update",
    ),
    "a server's noise under masks": ([masks(bits=12), CENTRAL], "--set finetune.privacy.use=distributed"),
    "few who are drawn": (
        [masks(survivors=2), "finetune.schedule={use: poisson, rate: 0.3}"], "a larger cohort, fewer survivors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_cannot_be_promised_is_told(atoll: Atoll, tiny: str, settings: list[str], said: str) -> None:
    heard = atoll("plan", tiny, *(word for one in ("finetune.weighting=uniform", *settings) for word in ("--set", one)))
    assert heard.status == (1 if said else 0), heard
    assert said in " ".join(heard.err.split())


@pytest.mark.parametrize("require", ["[clp]", "[{norm: 1}]", "[{use: clip, nrom: 1}]", "[{use: clip, norm: -1}]"])
def test_a_policy_that_requires_what_there_is_not_is_told(tmp_path: Path, require: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"require: {require}\n")
    with pytest.raises(AtollError):
        read(path)
    path.write_text("require: [{use: clip, norm: 1.0}]\n")
    assert read(path).require == [{"use": "clip", "norm": 1.0}]


def test_a_pooled_private_run_can_be_attacked(atoll: Atoll, tiny: str) -> None:
    private = "finetune.privacy={use: examples, clip: 1, delta: 0.01, noise_multiplier: 1}"
    settings = ("finetune.weighting=uniform", "finetune.population=pooled", private, "finetune.rounds=1", "name=pooled")
    assert atoll("run", tiny, *(word for one in settings for word in ("--set", one))).status == 0
    said = atoll("leakage", "pooled-1", "--attack", "membership", "--samples", "4", "--json")
    assert said.status == 0, said.err
    assert json.loads(said.out)


def test_a_clipped_update_is_within_its_bound() -> None:
    from atoll.params import clipped

    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        update = {"a": torch.randn(997, generator=draw), "b": torch.randn(3, 5, generator=draw)}
        assert global_norm(clipped(update, 0.1)) <= 0.1
