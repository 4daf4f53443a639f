"""Attacks on a finished run: each succeeds where it must, and fails where nothing has leaked."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import atoll as package
from atoll.data.canaries import draw, with_canaries
from atoll.data.partition import iid
from atoll.data.read import Planted, Report, open_source, records
from atoll.data.sources import ClientData, clients, digest, folders, partitioned, planted_in
from atoll.errors import AtollError
from atoll.estimate import counts
from atoll.leakage.attack import attack
from atoll.leakage.canaries import canaries, inserted_in, other_codes
from atoll.leakage.inversion import inversion, moved_rows, updates
from atoll.leakage.membership import balanced, membership
from atoll.leakage.scores import auc, auc_error, expected_exposure, exposure, first_of, rank_of, true_positives
from atoll.leakage.seen import overheard
from atoll.leakage.subject import Counting, NotApplicable, Subject, open_run, replies_that_count
from atoll.local.language import Language
from atoll.local.work import Objective
from atoll.params import Params
from atoll.record.events import EVERYBODY, Missing, Replied, read_events
from atoll.record.folder import RunFolder
from atoll.record.leakage import Finding, read_findings
from support import Atoll

OVERFIT = """\
recipe: 1
extends: methods/fedavg
name: overfit
model: tiny:llama
data:
  use: with-canaries
  inner: {{use: folders, path: {path}}}
  count: 3
  repeats: 4
  digits: 5
finetune:
  space: full
  optimizer: {{use: adamw, lr: 1e-2}}
  rounds: 3
  local_steps: 60
  batch_size: 8
  context: 128
evaluate: {{start: false, every: 0, final_samples: 4}}
"""
CODES = 64


def word(drawn: random.Random) -> str:
    return "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=10))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites whose answers are random words: held-out ones cannot be known."""
    root, drawn = tmp_path_factory.mktemp("words"), random.Random(0)
    for site, split, count in [(s, *split) for s in ("east", "west") for split in (("train", 12), ("test", 12))]:
        (root / site).mkdir(exist_ok=True)
        rows = [{"prompt": f"Word {word(drawn)}?", "completion": word(drawn)} for _ in range(count)]
        (root / site / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def overfit(tmp_path_factory: pytest.TempPathFactory, shared_home: Path, words: Path) -> Iterator[RunFolder]:
    """A run of a tiny model that knows its training samples by heart."""
    root = tmp_path_factory.mktemp("overfit")
    (root / "overfit.yaml").write_text(OVERFIT.format(path=words))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(shared_home))
        patch.setenv("ATOLL_RUNS", str(root / "runs"))
        yield package.run(root / "overfit.yaml")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def subject(overfit: RunFolder) -> Subject:
    return open_run(overfit, lambda line: None)


@pytest.fixture(scope="module")
def untrained(subject: Subject) -> Subject:
    """The same run if it had learned nothing."""
    return replace(subject, tuned=subject.base)


def by_measure(rows: list[Finding]) -> dict[str, Finding]:
    return {row.measure: row for row in rows}


# Scores.


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    members, others = drawn.integers(0, 6, 17).astype(float), drawn.integers(0, 5, 11).astype(float)
    wins = [1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others]
    assert auc(members, others) == pytest.approx(sum(wins) / len(wins))


def test_error_of_an_auc_is_that_of_many_draws() -> None:
    drawn = np.random.default_rng(0)
    areas = [auc(drawn.exponential(3.0, 40), drawn.exponential(1.0, 60)) for _ in range(2000)]
    assert auc_error(float(np.mean(areas)), 40, 60) == pytest.approx(np.std(areas), rel=0.05)


def test_true_positives_keep_the_rate() -> None:
    drawn = np.random.default_rng(0)
    others = drawn.normal(size=1000)
    threshold = np.sort(others)[-11]
    assert (others > threshold).mean() == 0.01
    members = drawn.normal(1.0, size=1000)
    assert true_positives(members, others, 0.01) == (members > threshold).mean()
    assert true_positives(members, others[:99], 0.01) is None
    assert true_positives(members, np.zeros(100), 0.01) == (members > 0).mean()


def test_exposure_of_a_code_that_is_not_known() -> None:
    assert expected_exposure(4096) == pytest.approx(math.log2(math.e), abs=0.01)
    drawn = np.random.default_rng(0)
    ranks = [rank_of(one[0], one[1:]) for one in drawn.normal(size=(4000, 64))]
    assert np.mean([exposure(rank, 64) for rank in ranks]) == pytest.approx(expected_exposure(64), abs=0.08)
    assert rank_of(1.0, np.array([0.5, 1.0, 1.0, 2.0])) == 3.0


def test_equal_candidates_are_guessed_among() -> None:
    assert first_of(np.zeros(8), 3) == 1 / 8


# Canaries in the data.


def test_canaries_are_trained_on_and_never_held_out(words: Path) -> None:
    plain, wrapped = folders(str(words)), with_canaries(folders(str(words)), 2, 3, 6, ["east"])
    found = list(records(wrapped["east"].source, Report()))
    added = [record for record in found if record.row < 0]
    assert len(added) == 6
    assert {record.split for record in added} == {"train"}
    assert [record for record in found if record.row >= 0] == list(records(plain["east"].source, Report()))
    assert wrapped["west"] == plain["west"]
    assert digest(wrapped["east"]) != digest(plain["east"])
    assert len({digest(with_canaries(folders(str(words)), seed=seed)["east"]) for seed in (0, 1)}) == 2
    assert counts(wrapped)["east"].train == 12 + 6  # type: ignore[union-attr]


def test_canaries_take_the_format_of_the_records(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "A note."}\n')
    wrapped = with_canaries(clients({"notes": str(tmp_path / "notes.jsonl")}, held_out=0.0), count=1, repeats=1)
    *_, last = records(wrapped["notes"].source, Report())
    (canary,) = draw(1, 6, 0)
    assert last.messages == [{"content": f"{canary.question}\n{canary.answer}"}]
    (tmp_path / "notes.jsonl").write_text("")
    assert not list(records(wrapped["notes"].source, Report()))


def test_simulated_clients_go_on_sharing_a_source(words: Path) -> None:
    dealt = partitioned(str(words / "east"), iid(3))
    wrapped = with_canaries(dealt, 2, 1, 6, ["client-1"])
    assert len({client.source for client in wrapped.values()}) == 1
    assert [len(planted_in(wrapped[name])) for name in dealt] == [0, 2, 0]
    assert [counts(wrapped)[name].train for name in dealt] == [  # type: ignore[union-attr]
        one.train + extra for one, extra in zip(counts(dealt).values(), (0, 2, 0), strict=True) if one
    ]
    twice = with_canaries(wrapped, 1, 1, 6, ["client-1"], seed=1)
    assert len(set(planted_in(twice["client-1"]))) == 3


def test_canaries_are_drawn_by_name_alone() -> None:
    assert draw(3, 6, 0) == draw(3, 6, 0)
    assert draw(3, 6, 0)[:2] == draw(2, 6, 0)
    assert not {one.answer for one in draw(3, 6, 0)} & {one.answer for one in draw(3, 6, 1)}
    assert all(len(one.answer) == 9 and one.answer.isdigit() for one in draw(20, 9, 0))


def test_canaries_need_records_and_known_clients(words: Path) -> None:
    with pytest.raises(AtollError, match="canaries are added to records"):
        with_canaries({"a": ClientData([1], [2])})
    with pytest.raises(AtollError, match="unknown client") as told:
        with_canaries(folders(str(words)), clients=["eats"])
    assert told.value.details["remedy"] == "did you mean 'east'?"


# Attacks that must succeed, and the same where nothing was learned.


def test_members_are_told_from_others(subject: Subject) -> None:
    found = by_measure(membership(subject, 64))
    assert found["loss: AUC"].value > 0.95  # type: ignore[operator]
    assert found["likelihood ratio: AUC"].value > 0.95  # type: ignore[operator]
    assert found["loss: AUC"].of == "24 members, 24 non-members"
    assert found["loss: TPR at 1% FPR"].value is None
    assert found["loss: TPR at 1% FPR"].of == "24 non-members; it takes 100"


def test_members_of_a_model_that_has_learned_nothing_are_not(untrained: Subject) -> None:
    found = by_measure(membership(untrained, 64))
    loss = found["loss: AUC"]
    assert abs(loss.value - 0.5) < 3 * loss.error  # type: ignore[operator]
    assert found["likelihood ratio: AUC"].value == 0.5


def test_members_are_balanced_drawn_by_key_and_no_canaries(subject: Subject) -> None:
    members, others = balanced(subject, 5)
    assert len(members) == len(others) == 10
    again, _ = balanced(subject, 5)
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(members, again, strict=True))
    everybody, _ = balanced(subject, 1000)
    assert len(everybody) == 24
    assert not any("access code" in subject.things.tokenizer.decode(ids) for ids, *_ in everybody)


@pytest.mark.parametrize("population", ["all", "pooled"])
def test_members_are_samples_that_went_into_updates(
    atoll: Atoll, tiny: str, population: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collated: set[bytes] = set()
    bind = Language.bind

    def watched(self: Language, model: Any, tokenizer: Any) -> Objective:
        bound = bind(self, model, tokenizer)

        def collate(samples: Sequence[Any]) -> Any:
            collated.update(ids.tobytes() for ids, *_ in samples)
            return bound.collate(samples)

        return bound._replace(collate=collate)

    monkeypatch.setattr(Language, "bind", watched)
    cohort = "finetune.schedule={use: synchronous, cohort: 2}" if population == "all" else "finetune.rounds=3"
    work = ["finetune.local_steps=3", "finetune.accumulate=2", f"finetune.population={population}", cohort]
    folder = package.run(tiny, ["evaluate={start: false, every: 0}", "data.held_out=0", *work])
    went_in = set(collated)
    subject = open_run(folder, lambda line: None)
    samples = {name: data.train for name, data in subject.things.data.items()}
    assert {samples[name][number][0].tobytes() for name, all in subject.read.items() for number in all} == went_in
    assert len(went_in) < sum(map(len, samples.values()))


def test_canaries_that_were_learned_are_exposed_and_others_are_not(subject: Subject) -> None:
    found = by_measure(canaries(subject, CODES))
    inserted, control, base = (
        found[name].value
        for name in ("exposure in bits", "exposure in bits, not inserted", "exposure in bits, base model")
    )
    assert inserted == math.log2(CODES)
    assert control < 3.5  # type: ignore[operator]  # three draws whose mean is 1.4
    assert base < 3.5  # type: ignore[operator]
    assert found["exposure in bits"].chance == pytest.approx(1.4, abs=0.1)


def test_a_model_that_has_learned_nothing_exposes_nothing(untrained: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    many = draw(24, 5, "others")
    monkeypatch.setattr("atoll.leakage.canaries.inserted_in", lambda subject: many)
    for row in canaries(untrained, 32):
        assert row.value == pytest.approx(expected_exposure(32), abs=0.9)


def test_it_is_told_how_often_canaries_were_read(subject: Subject) -> None:
    read = by_measure(canaries(subject, 2))["exposure in bits"].of
    times = sum("access code" in subject.things.tokenizer.decode(subject.things.data[name].train[number][0])
                for name, numbers in subject.read.items() for number in numbers)  # fmt: skip
    assert times > 3 * 8
    assert f"read {times / 3:.1f} times each" in read


def test_canaries_are_those_of_the_recipe(subject: Subject) -> None:
    assert inserted_in(subject) == draw(3, 5, 0)
    others = other_codes(Planted("?", "12345"), 200)
    assert len({*others, "12345"}) == 201


def test_an_update_gives_its_sample_away(subject: Subject) -> None:
    found = by_measure(inversion(subject, 64))
    matching = found["matching: true sample first"]
    assert matching.value == 1.0
    assert matching.chance == 1 / 16
    assert matching.of == "8 updates of one sample, 16 candidates each"
    assert found["tokens: precision"].value == 1.0
    assert found["tokens: recall"].value > 0.9  # type: ignore[operator]  # the last token comes after the last loss


def test_what_cannot_be_seen_is_not_matched(subject: Subject) -> None:
    def constant(update: Params) -> Params:
        return {name: torch.ones_like(x) for name, x in update.items()}

    def uniform(update: Params) -> Params:
        return {name: torch.rand(x.shape, generator=drawn) - 0.5 for name, x in update.items()}

    drawn = torch.Generator().manual_seed(0)
    hidden = by_measure(inversion(subject, 64, seen=lambda update: {name: x * 0 for name, x in update.items()}))
    assert hidden["matching: true sample first"].value == pytest.approx(1 / 16)
    assert hidden["tokens: recall"].value == 0.0
    for seen in (constant, uniform):
        masked = by_measure(inversion(subject, 64, seen=seen))
        assert masked["matching: true sample first"].value <= 0.5  # type: ignore[operator]
        assert masked["tokens: precision"].value < 0.2  # type: ignore[operator]


def test_clipping_hides_nothing(subject: Subject) -> None:
    def clipped(update: Params) -> Params:
        return {name: x * 1e-3 for name, x in update.items()}

    assert by_measure(inversion(subject, 1, seen=clipped))["matching: true sample first"].value == 1.0


def test_weight_decay_moves_no_row() -> None:
    before = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    update = -0.01 * before
    update[2] += torch.tensor([0.1, 0.0, -0.1, 0.1])
    assert moved_rows(update, before) == {2}
    assert moved_rows(torch.zeros(6, 4), before) == set()


# What the server sees under a run's own protection, beside the same in the clear.

MASKS = "finetune.exchange=secure-aggregation"
SHARES = "finetune.privacy={use: distributed, clip: 0.2, delta: 0.05, noise_multiplier: 20}"
MATCHING = "matching: true sample first"


@pytest.fixture
def protected(atoll: Atoll, tmp_path: Path, words: Path) -> Callable[..., Subject]:
    """A run of one round under some protection, to attack."""

    def opened(*settings: str) -> Subject:
        path = tmp_path / "protected.yaml"
        path.write_text(OVERFIT.format(path=words))
        short = ["finetune.rounds=1", "finetune.local_steps=2", "finetune.weighting=uniform"]
        return open_run(package.run(path, [*short, *settings]), lambda line: None)

    return opened


def by_view(rows: Sequence[Finding], measure: str = MATCHING) -> dict[str, Finding]:
    """The rows of one measure by what the attacker sees; each view once."""
    chosen = [row for row in rows if row.measure == measure]
    assert len({row.sees for row in chosen}) == len(chosen)
    return {row.sees: row for row in chosen}


@pytest.fixture
def more_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates are attacked, so that chance can be told from anything else."""
    monkeypatch.setattr("atoll.leakage.inversion.TRIALS", 16)


@pytest.mark.usefixtures("more_trials")
def test_masks_hide_an_update_and_not_the_sum(protected: Callable[..., Subject]) -> None:
    rows = inversion(protected(MASKS), 64)
    found = by_view(rows)
    assert list(found) == ["one update, in the clear", "one update, masked", "the sum of 2 updates"]
    clear, masked, together = found.values()
    assert clear.value == 1.0
    assert masked.of == "32 updates of one sample, 16 candidates each"
    assert masked.value <= 9 / 32  # type: ignore[operator]  # a guess has more once in 20000 times
    assert together.value > 0.9  # type: ignore[operator]
    tokens = by_view(rows, "tokens: precision")
    assert tokens["one update, in the clear"].value == 1.0
    assert tokens["one update, masked"].value < 0.2  # type: ignore[operator]
    assert 0.4 < tokens["the sum of 2 updates"].value < 1.0  # type: ignore[operator]


def test_a_share_of_noise_is_under_the_masks(protected: Callable[..., Subject]) -> None:
    found = by_view(inversion(protected(MASKS, SHARES), 64))
    clear, masked, together = found.values()
    assert list(found)[1:] == ["one update, clipped, noised, masked", "the sum of 2 updates, noised"]
    assert clear.value == 1.0
    assert masked.value <= 0.5  # type: ignore[operator]
    assert together.value <= 0.5  # type: ignore[operator]


@pytest.mark.usefixtures("more_trials")
def test_local_noise_hides_an_update_if_there_is_enough_of_it(protected: Callable[..., Subject]) -> None:
    subject = protected("finetune.privacy={use: local, clip: 0.2, delta: 0.05, noise_multiplier: 50}")
    clear, noised = by_view(inversion(subject, 64)).values()
    assert (clear.value, noised.sees) == (1.0, "one update, clipped, noised")
    assert noised.value <= 9 / 32  # type: ignore[operator]
    mechanism = subject.plan.protection
    assert mechanism is not None
    little = replace(subject, plan=replace(subject.plan, protection=replace(mechanism, noise_multiplier=0.01)))
    assert by_view(inversion(little, 64))["one update, clipped, noised"].value == 1.0


def test_a_server_that_adds_the_noise_sees_updates(protected: Callable[..., Subject]) -> None:
    found = by_view(
        inversion(protected("finetune.privacy={use: central, clip: 0.01, delta: 0.05, noise_multiplier: 1}"), 64)
    )
    assert {view: row.value for view, row in found.items()} == {
        "one update, in the clear": 1.0,
        "one update, clipped": 1.0,
    }


def test_the_sum_is_that_of_the_samples(protected: Callable[..., Subject], tmp_path: Path) -> None:
    """What is overheard under masks is no update, and sums up to the mean of the updates."""
    subject = protected(MASKS)
    samples = {name: data.train[0] for name, data in subject.trained.items()}
    views = dict(overheard(subject, samples, RunFolder(tmp_path)))
    each = [next(updates(subject, name, [sample], Counting(print, "", 1))) for name, sample in samples.items()]
    largest = max(float(x.abs().max()) for update in each for x in update.values())
    for view in views.values():
        opened = view["the sum of 2 updates"]
        assert opened.keys() == each[0].keys() == view["one update, masked"].keys()
        for name, x in opened.items():
            assert torch.allclose(x, (each[0][name] + each[1][name]) / 2, atol=2 * largest / 2**14)
        assert max(float(x.abs().max()) for x in view["one update, masked"].values()) > 1.5 * largest


@pytest.mark.parametrize("law", ["{use: synchronous, cohort: 2}", "{use: poisson, rate: 0.7}"])
def test_cohorts_are_as_large_as_the_runs(atoll: Atoll, tiny: str, law: str) -> None:
    folder = package.run(tiny, [MASKS, f"finetune.schedule={law}", "finetune.rounds=1"])
    found = by_view(attack(folder, ["inversion"], samples=2).rows)
    assert found["the sum of 2 updates"].of.startswith("6 updates of one sample")


def test_members_under_masks_are_samples_of_sums_that_were_opened(atoll: Atoll, tiny: str) -> None:
    """Replies bring no metrics there, tasks are named by attempts; an abandoned round leaves nothing in the model."""
    settings = [MASKS, "data.held_out=0.25", "finetune.local_steps=1"]
    folder = package.run(tiny, settings)
    read = {name: len(all) for name, all in open_run(folder, lambda line: None).read.items()}
    assert read == dict.fromkeys(("north", "south", "west"), 2 * 4)
    plain = package.run(tiny, settings[1:])
    assert open_run(plain, lambda line: None).read == open_run(folder, lambda line: None).read
    events = list(read_events(folder.record))
    lost = [
        *events,
        Missing(1, EVERYBODY, "the masks stay on", refused=False),
        Missing(0, "north", "late", refused=False),
    ]
    kept = [one for one in events if isinstance(one, Replied) and one.round == 0]
    assert list(replies_that_count(lost, read.keys())) == kept
    assert len(kept) == 3


def test_a_round_that_comes_to_nothing_is_told(
    protected: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoll.leakage.seen.cohorts", lambda names, size: [names[:1]])
    with pytest.raises(NotApplicable, match="came to nothing") as told:
        inversion(protected(MASKS), 1)
    assert "a sum of fewer than 2 is not opened" in told.value.details["found"]


def test_rows_of_a_protection_of_ones_own_stand_beside_the_others(copied: RunFolder, shared_home: Path) -> None:
    def halved(update: Params) -> Params:
        return {name: x / 2 for name, x in update.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(shared_home))
        attack(copied, ["inversion"], samples=1, seen=halved)
        attack(copied, ["inversion"], samples=2)
    kept = by_view(read_findings(copied).rows)
    assert {view: row.of[:1] for view, row in kept.items()} == {
        "one update, halved": "2",
        "one update, in the clear": "4",
    }


def test_card_and_table_have_rows_of_both_kinds(atoll: Atoll, tiny: str) -> None:
    folder = package.run(tiny, [MASKS, "finetune.rounds=1"])
    said = atoll("leakage", "--attack", "inversion", "--samples", "1")
    assert said.status == 0, said.err
    views = ("one update, in the clear", "one update, masked", "the sum of 3 updates")
    assert list(by_view(read_findings(folder).rows)) == list(views)
    card = atoll("card").out
    for view in views:
        assert any(view in line and MATCHING in line for line in said.out.splitlines())
        assert f"| inversion | {view} | {MATCHING} | " in card


# The command.


@pytest.fixture
def copied(overfit: RunFolder, tmp_path: Path) -> RunFolder:
    """The run where the command finds it."""
    return RunFolder(Path(shutil.copytree(overfit.path, tmp_path / "runs" / "overfit-1")))


def test_command_shows_and_keeps_what_was_found(atoll: Atoll, copied: RunFolder) -> None:
    said = atoll("leakage", "latest", "--samples", "6", "--candidates", "8")
    assert said.status == 0, said.err
    assert said.out.splitlines()[0].split() == ["attack", "sees", "measure", "found", "by", "chance", "of"]
    assert {line.split()[0] for line in said.out.splitlines()[1:]} == {"membership", "canaries", "inversion"}
    before = read_findings(copied)
    assert len(before.rows) == 4 + 3 + 3
    data = json.loads(atoll("leakage", "--attack", "membership", "--samples", "3", "--json").out)
    assert data["rows"][0]["of"] == "6 members, 6 non-members"
    after = read_findings(copied)
    assert [row for row in after.rows if row.attack != "membership"] == [
        row for row in before.rows if row.attack != "membership"
    ]
    card = atoll("card").out
    assert "## Leakage" in card
    assert "| membership | the model | loss: AUC | 1.000" in card
    assert "6 members, 6 non-members" in card


def test_a_run_without_canaries_says_how_to_have_them(atoll: Atoll, finished: Path, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(finished, tmp_path / "runs" / "tiny-1")))
    said = atoll("leakage", "tiny-1", "--samples", "2")
    assert said.status == 0, said.err
    assert "canaries is skipped: no canaries in the run's data; run again with" in said.out
    rows = read_findings(folder).rows
    assert {row.attack for row in rows} == {"membership", "inversion"}
    assert "matching: true sample first" in {row.measure for row in rows}
    assert not any(row.measure.startswith("tokens") for row in rows)  # LoRA leaves the embedding as it is
    assert "use: with-canaries" in atoll("card", "tiny-1").out
    named = atoll("leakage", "tiny-1", "--attack", "canaries")
    assert named.status == 1
    assert "use: with-canaries" in named.err


def test_a_baseline_was_trained_on_its_own_client(finished: Path, tmp_path: Path, shared_home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(shared_home))
        root = RunFolder(Path(shutil.copytree(finished, tmp_path / "tiny-1")))
        assert list(open_run(root.baseline("local-west"), lambda line: None).trained) == ["west"]
        assert len(open_run(root.baseline("pooled"), lambda line: None).trained) == 3


def test_nothing_held_out(atoll: Atoll, tiny: str) -> None:
    assert atoll("run", tiny, "--set", "data.held_out=0", "--set", "finetune.rounds=1").status == 0
    said = atoll("leakage", "--attack", "membership")
    assert said.status == 1
    assert "no site has held-out samples to tell members from" in said.err
    assert "north: 40 training samples, 0 held out" in said.err
    assert "data.held_out above 0" in said.err
    said = atoll("leakage", "--samples", "1")
    assert said.status == 0
    assert "membership is skipped: no site has held-out samples" in said.out


def test_mistakes_on_the_command_line(atoll: Atoll, copied: RunFolder) -> None:
    for arguments, told in {
        ("overfit-2",): "there is no such run",
        ("latest", "--samples", "0"): "no samples to attack",
        ("latest", "--candidates", "1"): "nothing to rank a code among",
        ("latest", "--attack", "membershp"): "did you mean 'membership'?",
        ("latest", "--attack", "canaries", "--candidates", "200000"): "more codes to rank than there are",
    }.items():
        said = atoll("leakage", *arguments)
        assert said.status == 1
        assert told in said.err
        assert "remedy:" in said.err


def test_a_run_that_is_not_finished(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    def impatient(event: object) -> None:
        if type(event).__name__ == "RoundEnded":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package.run(tiny, sinks=[impatient])
    assert "the run has no result yet" in atoll("leakage", "tiny-1").err
    shutil.rmtree(tmp_path / "runs")

    def later(event: object) -> None:
        if type(event).__name__ == "RoundEnded" and event.round == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package.run(tiny, sinks=[later])
    said = atoll("leakage", "tiny-1")
    assert said.status == 1
    assert "the run is not finished" in said.err
    assert "after round 1 of 2, stopped" in said.err
    assert "`atoll resume tiny-1`" in said.err


def test_data_that_have_changed(copied: RunFolder, tmp_path: Path, words: Path, shared_home: Path) -> None:
    mine = Path(shutil.copytree(words, tmp_path / "words"))
    copied.recipe.write_text(copied.recipe.read_text().replace(str(words), str(mine)))
    with (mine / "east" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "Why?", "completion": "Since."}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(shared_home))
        with pytest.raises(AtollError, match="the clients' data have changed"):
            attack(copied)


def test_a_model_of_the_users_own(atoll: Atoll, copied: RunFolder) -> None:
    text = copied.recipe.read_text()
    copied.recipe.write_text(text.replace("tiny:llama", "mine:model"))
    said = atoll("leakage", "overfit-1")
    assert said.status == 1
    assert "the model comes from a factory" in said.err
    assert "mine:model" in said.err


def test_a_run_over_a_network(atoll: Atoll, copied: RunFolder) -> None:
    fleet = "fleet: {use: flower, server: '127.0.0.1:9', keys: certs}\n"
    copied.recipe.write_text(copied.recipe.read_text() + fleet)
    said = atoll("leakage", "overfit-1")
    assert said.status == 1
    assert "the run's samples are at its sites" in said.err


def test_canary_source_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    source = replace(open_source(tmp_path / "a.jsonl", 0.0), planted=(Planted("Q2", "1"), Planted("Q3", "2")))
    report = Report()
    assert [record.row for record in records(source, report)] == [0, -1, -2]
    assert (report.read, report.kept) == (3, 3)
