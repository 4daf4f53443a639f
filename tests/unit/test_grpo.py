"""GRPO against TRL's, its rewards and what may go wrong in one of the user's own, and a model that learns from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import assert_same_gradients, build, gradients, with_lora
from torch import Tensor

import atoll
from atoll.data.collate import IGNORE, Sample
from atoll.errors import AtollError
from atoll.exchange import WorkFailed
from atoll.local.grpo import Told, advantages, answer_of, grpo, prompt_of
from atoll.local.rewards import OwnReward, exact, number
from atoll.models.tiny import byte_tokenizer, tiny
from atoll.record.card import markdown
from atoll.record.folder import find
from atoll.record.story import read_story
from atoll.record.views import summarize


def asked(questions: list[str], answer: str = "yes") -> list[Sample]:
    made = []
    for question in questions:
        prompt, rest = (np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in (question, answer))
        ids = np.concatenate([prompt, rest])
        made.append(Sample(ids, np.where(np.arange(len(ids)) < len(prompt), np.int32(IGNORE), ids)))
    return made


@pytest.mark.parametrize(("mean_over", "loss_type"), [("samples", "grpo"), ("tokens", "bnpo")])
def test_losses_and_gradients_are_trls(mean_over: str, loss_type: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    theirs, ours = (with_lora(tiny("llama")[0]).train() for _ in range(2))
    wanted = GRPOConfig(output_dir=str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to=[], num_generations=3,
                        per_device_train_batch_size=6, gradient_checkpointing=False, loss_type=loss_type, temperature=0.7,
                        max_completion_length=9, disable_tqdm=True)  # fmt: skip
    data = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    trainer = GRPOTrainer(theirs, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions), args=wanted,
                          train_dataset=data, processing_class=byte_tokenizer())  # fmt: skip
    part = grpo("exact", completions=3, most_tokens=9, temperature=0.7, beta=0.3, mean_over=mean_over)
    objective = bind(part, ours)
    torch.manual_seed(2)
    drawn = replace(objective.collate(asked(["one?", "and two?"])), advantages=torch.randn(6))
    with torch.no_grad():  # the model moves on from its reference and from what it was drawn with
        for model in (theirs, ours):
            torch.manual_seed(4)
            for name, x in sorted(model.named_parameters()):
                if ".default." in name:
                    x.add_(0.03 * torch.randn_like(x))
    total, count = objective.loss(ours, drawn)
    trainer.current_gradient_accumulation_steps = 1  # its loop would say so
    theirs_loss = trainer._compute_loss(theirs, as_trl(drawn, objective))
    torch.testing.assert_close(total / count, theirs_loss, rtol=1e-5, atol=1e-6)
    assert count == objective.terms(drawn)
    expected = {n: x for n, x in gradients(theirs, theirs_loss).items() if ".default." in n}
    assert_same_gradients(gradients(ours, total / count), expected, tolerance=1e-5)


def worth(completions: Any, answers: Any) -> list[float]:
    return [len(text) % 3 / 2 for text in completions]


def bind(part: Any, model: Any) -> Any:
    return replace(part, reward=worth).bind(model, byte_tokenizer())


def as_trl(drawn: Any, objective: Any) -> dict[str, Tensor]:
    """The same batch as TRL has it: prompts padded on the left, completions on the right."""
    batch = drawn.batch
    ids, targets = batch.input_ids.flatten(), batch.labels.flatten()
    at, rows, reference, taken = 0, [], list(torch.split(drawn.reference, completion_lengths(batch))), 0
    for length in batch.lengths:
        here = slice(at, at + length)
        start = int((targets[here] != IGNORE).nonzero()[0])
        rows.append((ids[here][:start], ids[here][start:], reference[taken]))
        at, taken = at + length, taken + 1
    wide, long = max(len(p) for p, _, _ in rows), max(len(c) for _, c, _ in rows)
    zero = {"prompt_ids": wide, "prompt_mask": wide, "completion_ids": long, "completion_mask": long}
    made = {name: torch.zeros(len(rows), width, dtype=torch.long) for name, width in zero.items()}
    made["ref_per_token_logps"] = torch.zeros(len(rows), long)
    for i, (prompt, completion, logps) in enumerate(rows):
        made["prompt_ids"][i, wide - len(prompt) :], made["prompt_mask"][i, wide - len(prompt) :] = prompt, 1
        made["completion_ids"][i, : len(completion)], made["completion_mask"][i, : len(completion)] = completion, 1
        made["ref_per_token_logps"][i, : len(completion)] = logps
    return made | {"advantages": drawn.advantages, "num_items_in_batch": made["completion_mask"].sum()}


def completion_lengths(batch: Any) -> list[int]:
    return torch.bincount(batch.owners[batch.targets != IGNORE]).tolist()


def test_advantages_are_trls() -> None:
    rewards = torch.rand(4, 5)
    mean, std = rewards.mean(1), rewards.std(1)
    expected = (rewards - mean[:, None]) / (std[:, None] + 1e-4)
    torch.testing.assert_close(advantages(rewards), expected)


def test_the_prompt_ends_where_the_last_answer_begins() -> None:
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer.encode("hi|a|ho|bc"), np.int32)
    labeled = np.array([0, 0, 0, 1, 0, 0, 0, 0, 1, 1], bool)
    sample = Sample(ids, np.where(labeled, ids, np.int32(IGNORE)))
    assert tokenizer.decode(prompt_of(sample).ids) == "hi|a|ho|"
    assert answer_of(sample, tokenizer) == "bc"


def test_rewards_that_are_shipped() -> None:
    assert exact()(["Yes. ", "no", "YES"], ["yes"] * 3) == [1.0, 0.0, 1.0]
    assert number()(["so 3 + 4 = 7", "8 or 7?", "none", "7.5"], ["7 (apples)"] * 4) == [1.0, 1.0, 0.0, 0.0]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import os, time\n"
        "def long(): return lambda said, right: [float(len(one)) for one in said]\n"
        "def loud():\n    os.system('echo hello')\n"
        "    return lambda said, right: (os.system('echo [1, [9.0]]; cat'), [float(len(one)) for one in said])[1]\n"
        "def parent(): return lambda said, right: os.system('sleep 60')\n"
        "def short(): return lambda said, right: [1.0]\n"
        "def odd(): return lambda said, right: ['much'] * len(said)\n"
        "def infinite(): return lambda said, right: [float('inf')] * len(said)\n"
        "def raising(): return lambda said, right: 1 / 0\n"
        "def hanging(): return lambda said, right: time.sleep(60)\n"
        "def dying(): return lambda said, right: os._exit(3)\n"
        "def nothing(): return lambda said, right: None\n"
        "def keyed(): return lambda said, right: dict(enumerate(said))\n"
        "def away():\n    if not os.fork():\n        os.setsid(); os.fork(); time.sleep(60)\n    time.sleep(60)\n"
        "def leaving(): return lambda said, right: away()\n"
        "def telling(): return lambda said, right: (open('pid', 'w').write(str(os.getpid())), time.sleep(60))\n"
    )


def test_a_reward_of_ones_own_runs_beside(mine: None) -> None:
    reward = OwnReward("mine:long")
    assert reward(["ab", "c"], ["", ""]) == [2.0, 1.0]
    assert reward(["abc\n\u2028d"], [""]) == [6.0], "whatever is in a text"
    loud = OwnReward("mine:loud")
    assert [loud([one], ["b"]) for one in ("a", "bb")] == [[1.0], [2.0]], "what it prints is no answer"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mine:short", "gave a list of 1 for 2 completions"),
        ("mine:odd", "gave no finite number for 2 of 2 completions"),
        ("mine:infinite", "gave no finite number for 2 of 2 completions"),
        ("mine:raising", "failed: ZeroDivisionError$"),
        ("mine:dying", "ended without an answer"),
        ("mine:nothing", "failed: TypeError"),
        ("mine:keyed", "failed: TypeError"),
        ("mine:missing", "failed: AttributeError"),
        ("nowhere:at_all", "failed: ModuleNotFoundError"),
    ],
)
def test_what_goes_wrong_in_a_reward_names_it(mine: None, name: str, what: str) -> None:
    with pytest.raises(WorkFailed, match=f"the reward {name} {what}"):
        OwnReward(name)(["a", "b"], ["", ""])


def test_a_reward_that_goes_wrong_in_the_same_way_is_told_at_length_once(
    mine: None, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = OwnReward("mine:raising")
    for _ in range(3):
        with pytest.raises(WorkFailed):
            reward(["a"], ["b"])
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1
    assert said.count("mine:raising: ZeroDivisionError: division by zero, as before") == 2


def test_what_a_reward_leaves_in_sessions_of_its_own_neither_holds_up_nor_stays(mine: None) -> None:
    reward, started = OwnReward("mine:leaving", seconds=2.0), time.monotonic()
    with pytest.raises(WorkFailed, match="gave no answer in 2 s"):
        reward(["a"], ["b"])
    assert time.monotonic() - started < 20
    mark = f"reward_process\0{reward.name}".encode()
    # what was killed is there until it is scheduled once more; left alone it would sleep for a minute
    until(lambda: not any(mark in read(path) for path in Path("/proc").glob("[0-9]*/cmdline")))


def read(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""


def test_a_reward_ends_with_a_run_that_was_killed(mine: None) -> None:
    asking = "from atoll.local.rewards import OwnReward; OwnReward('mine:telling', 60)(['a'], ['b'])"
    run = subprocess.Popen([sys.executable, "-c", asking])
    until(lambda: Path("pid").exists() and Path("pid").read_text())
    run.kill()
    run.wait()
    until(lambda: not Path(f"/proc/{Path('pid').read_text()}").exists())


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_answer_may_be_longer_than_a_pipe(mine: None) -> None:
    assert OwnReward("mine:long")(["a" * 3] * 60_000, [""] * 60_000) == [3.0] * 60_000


@pytest.mark.parametrize("name", ["mine:hanging", "mine:parent"])
def test_a_reward_that_hangs_is_ended_and_begun_again(mine: None, name: str) -> None:
    reward, started = OwnReward(name, seconds=2.0), time.monotonic()
    for _ in range(2):
        with pytest.raises(WorkFailed, match="gave no answer in 2 s"):
            reward(["a"], ["b"])
    assert time.monotonic() - started < 30
    assert reward.process is None


def test_what_cannot_be_rewarded_is_refused() -> None:
    with pytest.raises(AtollError, match="no such reward") as caught:
        grpo("exakt")
    assert "exact" in caught.value.details["remedy"]
    with pytest.raises(AtollError, match="a cache of keys and values"):
        grpo().bind(build("mamba"), byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere:at_all", "ModuleNotFoundError: No module named 'nowhere'"),
        ("mine:missing", "AttributeError: module 'mine' has no attribute 'missing'"),
        ("mine:needy", "TypeError: needy.. missing 1 required positional argument: 'what'"),
        ("mine:number", "TypeError: the factory gave float, which cannot be called"),
    ],
)
def test_a_reward_that_cannot_be_made_is_refused_with_the_plan(mine: None, name: str, why: str) -> None:
    with Path("mine.py").open("a") as file:
        file.write("def needy(what): pass\ndef number(): return 1.0\n")
    with pytest.raises(AtollError, match=f"the reward {name} cannot be made") as caught:
        OwnReward(name).refuse_unmade()
    assert re.match(why, caught.value.details["found"])
    assert caught.value.what == f"the reward {name} cannot be made", (
        "which is all that a site tells: the rest may quote data"
    )
    assert caught.value.details["where"] == "finetune.objective.reward"
    OwnReward("mine:raising").refuse_unmade()  # what it does with completions is found when it has some


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for site in ("north", "south"):
        rows = [{"prompt": f"{site} {i}?", "completion": "aa"} for i in range(20)]
        (tmp_path / "data" / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.py").write_text(
        "def a(): return lambda said, right: [sum(c.isascii() and c.islower() for c in one) / 6 for one in said]\n"
    )
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recipe: 1\nname: mine\nmodel: tiny:llama\ndata: {use: folders, path: ./data, held_out: 0.3}\n"
        "finetune:\n  rounds: 3\n  local_steps: 8\n  batch_size: 4\n  optimizer: {use: adamw, lr: 3e-2}\n"
        "  objective: {use: grpo, reward: 'letters:a', completions: 8, most_tokens: 6}\nevaluate: {every: 0}\n"
    )
    return path


def test_a_run_learns_what_is_rewarded_and_repeats(recipe: Path) -> None:
    stories = [read_story(atoll.run(recipe)) for _ in range(2)]
    assert all(story and story.base and story.final for story in stories)
    one, two = stories
    assert one.base.mean > 0.6, "a random model says anything"
    assert one.final.mean < 0.3, "and now mostly small letters"
    assert one.final.clients == two.final.clients
    assert all("accuracy" in told for told in one.final.clients.values())
    rewards = [reply.metrics["reward"] for reply in one.replies]
    assert 0 <= rewards[0] < rewards[-1] <= 1
    assert all(0 < reply.metrics["seconds_drawing"] < reply.metrics["seconds_in_steps"] for reply in one.replies)
    card = markdown("letters", one)
    assert "## Completions drawn" in card
    assert f"| {len(one.rounds)} | 0." in card


def test_what_is_told_of_draws_is_a_mean_over_completions_and_begins_anew() -> None:
    told = Told()
    told.add(completions=4, reward=2.0, seconds_drawing=1.5)
    told.add(completions=2, reward=1.0, seconds_drawing=0.5)
    assert told.take() == {"reward": 0.5, "seconds_drawing": 2.0}
    assert told.take() == {}


def test_a_site_that_tells_less_of_its_draws_spoils_no_card(recipe: Path) -> None:
    story = read_story(atoll.run(recipe, ["finetune.rounds=1"]))
    less = [replace(one, metrics={"reward": 0.5}) for one in story.replies[:1]]
    none = [replace(one, metrics={**one.metrics, "seconds_in_steps": 0.0}) for one in story.replies[1:]]
    assert "## Completions drawn" in markdown("letters", replace(story, replies=[*less, *none]))
    assert "## Completions drawn" not in markdown("letters", replace(story, replies=less))


def test_under_private_gradients_nothing_is_told_of_rewards(recipe: Path) -> None:
    private = ["finetune.privacy={use: examples, clip: 1.0, noise_multiplier: 1.0, delta: 1e-2}", "finetune.rounds=1",
               "finetune.weighting=uniform", "finetune.clip_norm=null"]  # fmt: skip
    story = read_story(atoll.run(recipe, private))
    assert story.replies
    assert not any("reward" in reply.metrics or "loss" in reply.metrics for reply in story.replies)


def test_a_run_whose_reward_always_fails_stops_and_goes_on_when_it_is_mended(recipe: Path) -> None:
    (recipe.parent / "letters.py").write_text("def a(): return lambda said, right: 1 / 0\n")
    with pytest.raises(AtollError, match="every client was refused 3 times") as caught:
        atoll.run(recipe, ["finetune.rounds=5"])
    assert "atoll resume mine-1" in caught.value.details["remedy"]
    folder = find("mine-1")
    story = read_story(folder)
    assert (len(story.rounds), story.ended, summarize(folder).state) == (3, None, "stopped")
    (recipe.parent / "letters.py").write_text("def a(): return lambda said, right: [1.0] * len(said)\n")
    atoll.resume("mine-1")
    story = read_story(folder)
    assert (len(story.rounds), len(story.replies), summarize(folder).state) == (5, 4, "finished")


def test_a_reward_that_fails_costs_its_client_the_round(recipe: Path) -> None:
    (recipe.parent / "letters.py").write_text("def a(): return lambda said, right: 1 / 0\n")
    folder = atoll.run(recipe, ["finetune.rounds=1"])
    story = read_story(folder)
    assert (story.ended.reason, summarize(folder).state) == ("finished", "failed")
    assert all("the reward letters:a failed: ZeroDivisionError" in one.reason for one in story.missing)
    assert {one.client for one in story.missing} >= {"north", "south"}
