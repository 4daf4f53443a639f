"""Judges of answers: a reward model against TRL's, a selector against the letters' probabilities; both learn to choose."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_choices import by_hand, drawn
from test_preferences import moved, of_trl, pairs
from tiny_families import FAMILIES, assert_same_gradients, build, gradients, with_lora

import atoll
from atoll.data.collate import Sample
from atoll.data.read import Record, Report, open_source, records
from atoll.data.tokenize import NO_OTHER_ANSWER, TOO_MANY_ANSWERS, encode, lettered, prepare
from atoll.local.judges import Judge, logits_at_the_end, reward_model, selector
from atoll.local.objectives import Head
from atoll.models.fast import accelerate
from atoll.models.tiny import byte_tokenizer, tiny
from atoll.record.card import markdown
from atoll.record.measured import measured
from atoll.record.story import read_story

ASKED = (
    ("What is 2 + 2?", "It is 4.", "It is 5, I think."),
    ("And 3?", "Six, twice three.", "6"),
    ("Hi!", "Hello.", "?"),
)
TOKEN = 7


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_losses_and_gradients_of_the_reward_model_are_trls(tmp_path: Path) -> None:
    """TRL's head is the row of the end-of-sequence token here, in the place of one that begins at random."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    tokenizer = byte_tokenizer()
    ours = adapted(tiny("llama")[0])
    config = copy.deepcopy(tiny("llama")[0].config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    judge = LlamaForSequenceClassification(config)
    judge.model.load_state_dict(tiny("llama")[0].model.state_dict())
    row = tiny("llama")[0].get_output_embeddings().weight[tokenizer.eos_token_id]
    judge.score.weight = torch.nn.Parameter(row.detach()[None].clone(), requires_grad=False)
    theirs = adapted(judge)
    for (name, x), (other, y) in zip(named_lora(theirs), named_lora(ours), strict=True):
        assert name.split("model.model.")[-1] == other.split("model.model.")[-1]
        with torch.no_grad():
            y.copy_(x.add_(0.05 * torch.randn_like(x)))
    rows = [{"chosen": conversation(q, a), "rejected": conversation(q, b)} for q, a, b in ASKED]
    wanted = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
                          gradient_checkpointing=False, per_device_train_batch_size=3, max_length=None)  # fmt: skip
    trainer = RewardTrainer(theirs, args=wanted, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    tokens = list(trainer.train_dataset)
    theirs_loss = trainer.compute_loss(trainer.model, trainer.data_collator(tokens))
    samples = [of_trl({"prompt_ids": one["chosen_ids"][:1], "chosen_ids": one["chosen_ids"][1:],
                       "rejected_ids": one["rejected_ids"][1:]}) for one in tokens]  # fmt: skip
    objective = reward_model().bind(ours, tokenizer)
    ours_loss = objective.loss(ours, objective.collate(samples))[0] / len(samples)
    torch.testing.assert_close(ours_loss, theirs_loss, rtol=1e-5, atol=1e-6)
    short = {n.split("model.model.")[-1]: x for n, x in gradients(theirs, theirs_loss).items() if "lora" in n}
    found = {n.split("model.model.")[-1]: x for n, x in gradients(ours, ours_loss).items()}
    assert_same_gradients(found, short, tolerance=1e-5)


def question(sample: Sample) -> Sample:
    assert sample.choices
    return sample._replace(ids=sample.ids[: sample.choices.shared])


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))


def named_lora(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, x) for name, x in model.named_parameters() if "lora" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_is_the_logit_of_the_end_after_the_answer(family: str) -> None:
    model = moved(with_lora(build(family)))
    accelerate(model)
    samples = [drawn(seed, 5 + seed, lengths) for seed, lengths in enumerate([(1, 4), (3, 3, 3)])]
    each = []
    for sample in samples:
        assert sample.choices
        texts = [np.concatenate([sample.ids[: sample.choices.shared], rest]) for rest in sample.choices.rest]
        logits = [model(input_ids=torch.tensor(text)[None].long()).logits[0, -1, TOKEN] for text in texts]
        each.append(-torch.log_softmax(torch.stack(logits).float(), 0)[0])
    objective = Judge("mine", "preference", lambda tokenizer: partial(logits_at_the_end, token=TOKEN)).bind(
        model, byte_tokenizer()
    )
    found, count = objective.loss(model, objective.collate(samples))
    assert count == 2
    torch.testing.assert_close(found, torch.stack(each).sum(), rtol=1e-4, atol=1e-4)


def test_a_selector_is_asked_for_a_letter(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i}!"} for i in range(40)]
    (tmp_path / "site.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [lettered(one) for one in records(open_source(tmp_path / "site.jsonl"), Report())]
    assert {one.choices for one in found} == {("A", "B")}
    share = sum(one.messages[-1]["content"] == "A" for one in found) / len(found)
    assert 0.2 < share < 0.8, "the chosen answer stands at both places"
    first = found[0]
    *_, asked, answer = first.messages
    shown = asked["content"].split("\n")
    assert shown[0].startswith("What is ")
    assert {line[:2] for line in shown if line[1:2] == ":"} == {"A:", "B:"}
    right = next(line for line in shown if line.startswith(f"{answer['content']}: "))
    assert right[3:].startswith("It is ")
    model, tokenizer = with_lora(tiny("llama")[0]), byte_tokenizer()
    samples = list(prepare(tmp_path / "site.jsonl", tokenizer, 200, "selector", tmp_path).train)[:3]
    objective = selector().bind(model, tokenizer)
    expected = [-torch.log_softmax(by_hand(model, question(one)), 0)[one.choices.right] for one in samples]
    torch.testing.assert_close(objective.loss(model, samples)[0], torch.stack(expected).sum(), rtol=1e-4, atol=1e-4)


def test_what_shows_no_answers_is_left_out() -> None:
    one = Record(
        "prompt_completion", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "train", 0, "x"
    )
    report = Report(read=1)
    assert (
        list(encode([one, one._replace(choices=tuple(map(str, range(30))))], byte_tokenizer(), "selector", report))
        == []
    )
    assert {why: count for why, (count, _) in report.left_out.items()} == {NO_OTHER_ANSWER: 1, TOO_MANY_ANSWERS: 1}


@pytest.mark.parametrize("objective", ["reward-model", "selector"])
def test_a_federation_learns_to_judge(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    pairs(tmp_path / "data")
    (tmp_path / "mine.yaml").write_text(
        f"recipe: 1\nname: mine\nmodel: tiny:llama\ndata: {{use: folders, path: {tmp_path}/data, held_out: 0.3}}\n"
        f"finetune: {{objective: {objective}, rounds: 3, local_steps: 8, optimizer: {{use: adamw, lr: 1e-2}}}}\n"
    )
    folder = atoll.run(tmp_path / "mine.yaml")
    story = read_story(folder)
    tables = measured(story)
    assert tables.accuracy is None, "a judge answers no questions itself"
    assert tables.reward_accuracy
    assert "## Reward accuracy" in markdown("mine-1", story)
    first, last = (story.base.clients["north"]["loss"], story.final.clients["north"]["loss"])
    assert last < first
    if objective == "reward-model":
        assert story.final.clients["north"]["reward_accuracy"] == 1.0


def test_rewards_of_a_model_in_bfloat16_are_told_apart() -> None:
    head = Head(torch.nn.Linear(64, 100, bias=False, dtype=torch.bfloat16), lambda x: x, 100)
    with torch.no_grad():
        head.module.weight.fill_(1.0)  # type: ignore[union-attr, operator]
    rows = torch.ones(2, 64, dtype=torch.bfloat16)
    rows[1, 0] += 2**-7
    assert len(set(head(rows)[:, 7].tolist())) == 1
    assert head.column(rows, 7).tolist() == [64.0, 64.0 + 2**-7]
