"""DP-SGD in the local work: Opacus is the oracle of its gradients and of its account; and what leaves, what is entered,
what is refused."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from test_work import Regression, local, model, samples, start, task
from torch import nn

from atoll.data.sources import ClientData
from atoll.errors import AtollError
from atoll.local.corrections import CONTROL, scaffold
from atoll.local.optimizers import sgd
from atoll.local.private import clipped_sum, gradient_of, poisson, private
from atoll.local.work import Local, train
from atoll.models.spaces import full
from atoll.params import Params, equal, global_norm, subtract, zeros_like
from atoll.planning import plan
from atoll.privacy.accounting import Release, epsilon, worst
from atoll.privacy.examples import examples, rate
from atoll.privacy.ledger import Entry, Ledger, spent
from atoll.record.folder import find
from atoll.record.story import read_story
from atoll.stream import UPDATE
from support import Atoll

PRIVATE = "finetune.privacy={use: examples, clip: 0.5, delta: 1e-2, noise_multiplier: 1.0}"
UNIFORM = "finetune.weighting=uniform"


def per_sample(data: list[tuple[torch.Tensor, torch.Tensor]], clip: float) -> Params:
    """What Opacus makes of the samples as one batch, without noise: the sum of clipped gradients."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    net = GradSampleModule(model(), loss_reduction="sum")
    inner = torch.optim.SGD(net.parameters(), 0.1)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=len(data))
    x, y = torch.stack([a for a, _ in data]), torch.stack([b for _, b in data])
    ((net(x) - y).square() / 2).sum().backward()
    optimizer.clip_and_accumulate()
    return {name: p.summed_grad for name, p in net._module.named_parameters()}


@pytest.mark.parametrize("clip", [0.3, 1.0, 100.0])
def test_the_clipped_sum_is_that_of_opacus(clip: float):
    ours = clipped_sum(local(), samples(), clip)
    theirs = per_sample(samples(), clip)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("release", [Release(1.0, "poisson", 0.01, count=400), Release(0.8, "poisson", 0.05, count=60)])
def test_the_account_is_that_of_opacus(release: Release):
    from opacus.accountants import PRVAccountant, RDPAccountant

    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(release.noise_multiplier, release.rate, release.count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tight, loose = prv.get_epsilon(delta=1e-5), rdp.get_epsilon(delta=1e-5)
    ours = epsilon([release], 1e-5)
    assert ours == pytest.approx(tight, abs=0.02)  # PRV's default error is 0.01
    assert ours <= loose


def test_a_step_of_the_whole_data_without_noise_is_plain_sgd_on_clipped_gradients():
    """Four samples and batches of four: the rate is 1, and what is drawn is known."""
    data = samples(4)
    work = local(gradients=private(0.3, 0.0), local_steps=1)
    done = train(work, {UPDATE: start()}, ClientData(data, ()), {}, task())
    step = {name: -0.1 * x / 4 for name, x in clipped_sum(local(), data, 0.3).items()}
    assert all(torch.allclose(done.updates[UPDATE][name], step[name], atol=1e-6) for name in step)


def test_one_sample_more_changes_a_sum_by_at_most_the_clip():
    work, data = local(), samples(6)
    whole, without = clipped_sum(work, data, 0.3), clipped_sum(work, data[:-1], 0.3)
    assert global_norm(subtract(whole, without)) <= 0.3


class Dropping(nn.Module):
    """Dropout before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3] -> [B, 1]"""
        y: torch.Tensor = self.layer(self.drop(x))
        return y


def test_dropout_does_not_follow_the_recipes_seed():
    work = local(model=full().prepare(Dropping(), 0))
    trainable = work.space.trainable(work.model)
    seen = set()
    for _ in range(20):
        torch.manual_seed(7)
        seen.add(round(global_norm(gradient_of(work, samples(1)[0], trainable)), 6))
    assert len(seen) > 1


def noise_of(work: Local, data: list[tuple[torch.Tensor, torch.Tensor]]) -> Params:
    """One update by a rate of 1: minus the mean gradient, noise in it."""
    one_step = local(model=work.model, gradients=work.gradients, optimizer=sgd(1.0), local_steps=1)
    return train(one_step, {UPDATE: start()}, ClientData(data, ()), {}, task()).updates[UPDATE]


def test_the_noise_is_of_its_size_and_of_every_parameter():
    work = local(gradients=private(0.5, 2.0))
    exact = noise_of(local(gradients=private(0.5, 0.0)), samples(4))
    drawn = [subtract(noise_of(work, samples(4)), exact) for _ in range(400)]
    each = torch.stack([torch.cat([x.flatten() for x in one.values()]) for one in drawn])
    std = 2.0 * 0.5 / 4
    assert each.std().item() == pytest.approx(std, rel=0.08)
    assert (each.std(0) > 0.8 * std).all()
    assert each.mean().item() == pytest.approx(0, abs=5 * std / each.numel() ** 0.5)


def test_an_empty_batch_is_a_step_of_noise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("atoll.local.private.poisson", lambda count, rate: [])
    quiet = local(gradients=private(0.5, 0.0), local_steps=1)
    assert global_norm(train(quiet, {UPDATE: start()}, ClientData(samples(), ()), {}, task()).updates[UPDATE]) == 0
    assert global_norm(noise_of(local(gradients=private(0.5, 1.0)), samples())) > 0


def test_a_gradient_that_is_no_number_counts_as_zero_and_fails_nothing():
    work = local(objective=Regression(poison=-math.inf).bind(), gradients=private(0.5, 0.0), local_steps=1)
    assert global_norm(clipped_sum(work, samples(), 1.0)) == 0
    train(work, {UPDATE: start()}, ClientData(samples(), ()), {}, task())


def test_samples_are_drawn_by_themselves_at_the_rate():
    sizes = torch.tensor([float(len(poisson(100, 0.1))) for _ in range(2000)])
    assert sizes.mean().item() == pytest.approx(10, abs=0.4)
    assert sizes.var().item() == pytest.approx(9, rel=0.15)
    assert poisson(5, 1.0) == [0, 1, 2, 3, 4]
    assert poisson(5, 0.0) == []
    assert (rate(4, 3), rate(4, 16)) == (1.0, 0.25)


def test_two_runs_of_one_seed_draw_other_samples_and_other_noise():
    def update(noise: float) -> Params:
        work = local(gradients=private(0.5, noise))
        return train(work, {UPDATE: start()}, ClientData(samples(200), ()), {}, task()).updates[UPDATE]

    assert not equal(update(1.0), update(1.0))
    assert not equal(update(0.0), update(0.0))


def test_training_losses_do_not_leave():
    done = train(local(gradients=private(0.5, 1.0)), {UPDATE: start()}, ClientData(samples(), ()), {}, task())
    assert done.metrics.keys() == {"steps", "seconds_in_steps"}
    assert done.metrics["steps"] == 5


def test_scaffolds_stream_is_computed_from_what_is_private():
    """Its variates are (x - y) / (K eta): with an empty draw and no noise there is nothing in them."""
    params = {UPDATE: start(), CONTROL: zeros_like(start())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atoll.local.private.poisson", lambda count, rate: [])
        work = local(gradients=private(0.5, 0.0), correction=scaffold())
        done = train(work, params, ClientData(samples(), ()), {}, task())
    assert global_norm(done.updates[CONTROL]) == global_norm(done.state) == 0


def test_a_layer_with_running_statistics_is_refused():
    net = full().prepare(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), 0)
    with pytest.raises(AtollError, match="keeps statistics of samples"):
        next(private(1.0, 1.0)(local(model=net), samples(), 0))


def test_the_account_is_of_the_client_that_is_told_most():
    small, large = Release(1.0, "poisson", 0.1, count=10), Release(1.0, "poisson", 0.01, count=10)
    entries = [Entry("run", "plan", round, "example", (small, large), ("small", "large")) for round in range(2)]
    assert spent(entries, 1e-5) == epsilon([small, small], 1e-5)
    name, largest = worst({"small": [small], "large": [large]}, 1e-5)
    assert (name, largest) == ("small", epsilon([small], 1e-5))
    more = Release(1.0, "poisson", 0.01, count=3000)
    assert worst({"small": [small], "more": [more]}, 1e-5)[0] == "more"
    assert worst({}, 1e-5)[1] == spent([], 1e-5) == 0
    unnamed = [Entry("run", "plan", 0, "client", (Release(4.0), Release(4.0)))]
    assert spent(unnamed, 1e-5) == epsilon([Release(4.0, count=2)], 1e-5)


def test_a_ledger_gives_back_what_was_entered(tmp_path: Path):
    entry = Entry("run", "plan", 3, "example", (Release(1.0, "poisson", 0.1, count=10),), ("north",))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.enter(entry)
    assert list(ledger) == [entry]
    old = json.loads(ledger.path.read_text())
    del old["clients"]
    ledger.path.write_text(json.dumps(old) + "\n")
    assert [one.clients for one in ledger] == [()]


REFUSED = {
    "weights by examples": ([PRIVATE, "finetune.weighting=examples"], ["of examples", "finetune.weighting", "uniform"]),
    "no noise": (
        ["finetune.privacy={use: examples, clip: 1.0, delta: 1e-3, epsilon: 3}", UNIFORM],
        ["'examples' lacks 'noise_multiplier'", "finetune.privacy"],
    ),
    "delta": (
        ["finetune.privacy={use: examples, clip: 1.0, delta: 0.1, noise_multiplier: 1.0}", UNIFORM],
        ["delta is larger than 1 / the samples of", "finetune.privacy.delta", "0.1", "at most 1 / 3"],
    ),
    "budget": (
        ["finetune.privacy={use: examples, clip: 1.0, delta: 1e-2, noise_multiplier: 0.5, epsilon: 0.1}", UNIFORM],
        ["the first round would pass the budget of", "finetune.privacy.epsilon", "2 local steps at rate 0.138"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(atoll: Atoll, tiny: str, name: str):
    settings, says = REFUSED[name]
    said = atoll("run", tiny, *(word for one in settings for word in ("--set", one)))
    assert said.status == 1
    assert all(text in said.err for text in says), said.err


def test_a_plan_says_what_is_promised(atoll: Atoll, tiny: str):
    told = json.loads(atoll("plan", tiny, "--json", "--set", PRIVATE, "--set", UNIFORM).out)["privacy"]
    promise = told["guarantee"]
    assert (promise["unit"], promise["rate"], promise["about"]) == ("example", pytest.approx(4 / 30), True)
    assert promise["epsilon"] == epsilon([Release(1.0, "poisson", 4 / 30, count=4)], 1e-2)
    assert "noised by its client" in told["server_sees"]
    said = " ".join(atoll("plan", tiny, "--set", PRIVATE, "--set", UNIFORM).out.split())
    assert "of one example of a client (add-or-remove-one)" in said
    assert "not covered: held-out losses" in said


def test_a_private_run_enters_each_clients_release_and_tells_no_loss(atoll: Atoll, tiny: str):
    said = atoll("run", tiny, "--set", PRIVATE, "--set", UNIFORM)
    assert said.status == 0, said.err
    folder = find("tiny-1")
    entries, story = list(Ledger(folder.ledger)), read_story(folder)
    assert [entry.clients for entry in entries] == [("north", "south", "west")] * 2
    counts = story.started.samples
    assert [one.rate for one in entries[0].releases] == [4 / counts[name] for name in entries[0].clients]
    assert {one.count for one in entries[0].releases} == {2}
    assert (
        story.spent[-1].epsilon == spent(entries, 1e-2) == pytest.approx(story.started.privacy["guarantee"]["epsilon"])
    )
    assert all("loss" not in reply.metrics for reply in story.replies)
    assert math.isfinite(story.final.mean)


def test_a_budget_ends_the_run(atoll: Atoll, tiny: str):
    one = epsilon([Release(1.0, "poisson", 4 / 29, count=2)], 1e-2)  # of the site that holds out most
    budget = f"finetune.privacy.epsilon={one + 0.01}"
    said = atoll("run", tiny, "--set", PRIVATE, "--set", UNIFORM, "--set", budget)
    assert said.status == 0, said.err
    assert "the privacy budget" in said.err + said.out
    assert len(list(Ledger(find("tiny-1").ledger))) == 1


def test_under_masks_and_in_any_space(atoll: Atoll, tiny: str):
    settings = [
        PRIVATE,
        UNIFORM,
        "finetune.exchange=secure-aggregation",
        "finetune.space=ffa-lora",
        "finetune.rounds=1",
    ]
    said = atoll("run", tiny, *(word for one in settings for word in ("--set", one)))
    assert said.status == 0, said.err


def test_the_pooled_client_is_counted_by_everybodys_samples(
    tiny: str, shared_home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    from atoll.build import samples as trained_on

    pooled = plan(tiny, [PRIVATE, UNIFORM, "finetune.population=pooled"])
    assert trained_on(pooled, {"north": 30, "south": 20, "west": 10}) == {"pooled": 60}
    assert pooled.protection is not None
    assert pooled.protection.releases({"pooled": 60})["pooled"].rate == 4 / 60


def test_the_mechanism_is_what_the_recipe_says():
    made = examples(1.0, 1e-5, 0.8)
    assert (made.unit, made.epsilon, made.noise_multiplier) == ("example", None, 0.8)
