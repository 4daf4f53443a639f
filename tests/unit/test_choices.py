"""Questions that allow certain answers: read, tokenized, and scored by which of them is the likeliest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, VOCABULARY, build, with_lora

import atoll
from atoll.data.collate import IGNORE, Choices, Sample, choices_in
from atoll.data.read import Report, open_source, records
from atoll.data.tokenize import prepare
from atoll.errors import AtollError
from atoll.local.choices import in_full, log_likelihoods
from atoll.local.language import sft
from atoll.models.fast import accelerate
from atoll.models.tiny import byte_tokenizer
from atoll.record.measured import measured
from atoll.record.story import read_story


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(seed: int, shared: int, lengths: tuple[int, ...]) -> Sample:
    """A sample of random tokens: choices of these lengths, of which the first token is not the answer's."""
    rng = np.random.default_rng(seed)
    rest = tuple(rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths)
    labeled = tuple(np.arange(n) > 0 if n > 2 else np.ones(n, bool) for n in lengths)
    beginning = rng.integers(3, VOCABULARY, shared).astype(np.int32)
    return Sample(beginning, beginning, (), Choices(shared, rest, labeled, 0))


@pytest.mark.parametrize("swapped", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_choices_that_share_a_question_are_as_likely_as_each_in_full(family: str, swapped: bool) -> None:
    model = with_lora(build(family)).eval() if swapped else build(family).eval()
    if swapped:
        accelerate(model)
    samples = [drawn(seed, 5 + 3 * seed, lengths) for seed, lengths in enumerate([(1, 1), (4, 1, 7), (3, 3, 3, 9)])]
    with torch.no_grad():
        found = log_likelihoods(model, samples, no_media)
        alone = [log_likelihoods(model, [sample], no_media)[0] for sample in samples]
        expected = in_full(model, samples, no_media)
        hands = [by_hand(model, sample) for sample in samples]
    for each in (alone, expected, hands):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_the_loss_of_a_question_is_that_of_its_answer_however_it_is_come_by(family: str) -> None:
    model = build(family).eval()
    samples = [answered(drawn(seed, 6, (4, 2, 5)), every) for seed, every in enumerate([False, True, False])]
    free = Sample(samples[0].ids, samples[0].labels)  # its loss is not known from the choices
    objective = sft().bind(model, byte_tokenizer())
    with torch.no_grad():
        found = objective.measure(model, [samples[0], free, *samples[1:]])
        expected = torch.stack([mean_by_hand(model, one) for one in (samples[0], free, *samples[1:])])
    torch.testing.assert_close(found.losses.double(), expected, rtol=1e-4, atol=1e-4)
    assert [right is None for right in found.right] == [False, True, False, False]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_long_question_beside_a_long_choice_does_not_leave_the_table_of_positions(family: str) -> None:
    model = build(family).eval()
    most = model.config.max_position_embeddings
    together = [drawn(0, most - 8, (1, 2)), drawn(1, 4, (most - 8, 3))]
    with torch.no_grad():
        found, expected = log_likelihoods(model, together, no_media), [by_hand(model, one) for one in together]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def answered(sample: Sample, every: bool) -> Sample:
    """With its own answer in its tokens, and the loss on that; or on every token."""
    choices = choices_in(sample)
    assert choices is not None
    ids = np.concatenate([sample.ids, choices.rest[0]])
    target = np.concatenate([np.full(len(sample.ids), every), choices.labeled[0] | every])
    return Sample(ids, np.where(target, ids, IGNORE).astype(np.int32), (), choices)


def mean_by_hand(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    ids = torch.from_numpy(sample.ids.astype(np.int64))
    log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
    return -torch.stack([log_p[at - 1, ids[at]] for at in range(1, len(ids)) if sample.labels[at] != IGNORE]).mean()


def no_media(samples: Any) -> dict[str, torch.Tensor]:
    return {}


def by_hand(model: torch.nn.Module, sample: Any) -> torch.Tensor:
    beginning, choices = sample[0], sample[3]
    found = []
    for rest, labeled in zip(choices.rest, choices.labeled, strict=True):
        ids = torch.from_numpy(np.concatenate([beginning, rest]).astype(np.int64))
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
        places = [len(beginning) + i for i, one in enumerate(labeled) if one]
        found.append(torch.stack([log_p[at - 1, ids[at]] for at in places]).sum())
    return torch.stack(found)


def test_choices_in_tokens_are_the_texts_with_each_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    options = ["a cat", "a dog", "a c"]
    folder = written(tmp_path / "data", "test", [chat("Which?", "a dog", choices=options), chat("Free?", "yes")])
    written(tmp_path / "data", "train", [chat("Which one?", "a cat", choices=options)])
    found = prepare(folder, tokenizer, 256, cache_root=tmp_path)
    (ids, _, media, choices), free = found.test
    assert media == ()
    assert choices_in(free) is None
    assert choices.right == 1
    texts = [tokenizer.decode(np.concatenate([ids[: choices.shared], rest])) for rest in choices.rest]
    assert texts == [tokenizer.apply_chat_template(chat("Which?", one)["messages"], tokenize=False) for one in options]
    answers = [tokenizer.decode(r[which]) for r, which in zip(choices.rest, choices.labeled, strict=True)]
    assert answers == ["cat<|im_end|>", "dog<|im_end|>", "c<|im_end|>"]  # what they share says nothing
    assert choices_in(found.train[0]) is None  # to train on it is its answer alone


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (["yes"], "choices that are not 2 to 100 different ones"),
        (["yes", "yes"], "choices that are not 2 to 100 different ones"),
        ([str(i) for i in range(101)], "choices that are not 2 to 100 different ones"),
        (["no", "perhaps"], "an answer that is not among its choices"),
    ],
)
def test_choices_that_cannot_be_scored_leave_their_record_out(tmp_path: Path, choices: list[str], reason: str) -> None:
    folder = written(tmp_path / "data", "data", [chat("Well?", "yes", choices=choices), chat("So?", "no")])
    report = Report()
    assert [one.messages[0]["content"] for one in records(open_source(folder), report)] == ["So?"]
    assert report.left_out == {reason: (1, "data/data.jsonl:1")}


def test_choices_of_another_type_stop_with_their_place(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", "data", [chat("Well?", "yes", choices=[1, 2])])
    with pytest.raises(AtollError, match="choices has the wrong type") as caught:
        list(records(open_source(folder), Report()))
    assert "data.jsonl:1" in str(caught.value)
    assert "a list of strings" in str(caught.value)


def test_choices_of_a_csv_cell_and_of_prompt_and_completion(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion,choices\nWell?,yes,"[""yes"", ""no""]"\n')
    [one] = records(open_source(path), Report())
    assert one.choices == ("yes", "no")


def test_a_run_tells_how_many_questions_it_answers_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for site in ("east", "west"):
        for name in ("train", "test"):
            asked = [chat(f"Is it {name} {i}?", "yes", choices=["yes", "no", "maybe"]) for i in range(12)]
            written(tmp_path / site, name, [*asked, chat("Say something", f"{site}, {name}")])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "recipe: 1\nname: mine\nmodel: tiny:llama\n"
        f"data: {{use: clients, paths: {{east: {tmp_path}/east, west: {tmp_path}/west}}}}\n"
        "finetune: {rounds: 3, local_steps: 8, batch_size: 4, optimizer: {use: adamw, lr: 0.02}}\n"
        "baselines: [local]\n"
    )
    folder = atoll.run(recipe)
    story = read_story(folder)
    base_of_east = replace(story.base, clients={"east": story.base.clients["east"]})
    late = measured(replace(story, evaluations=[base_of_east, story.final]))
    for table in (late.accuracy, late.loss):
        assert table.columns == ["east", "west"], "a site that told nothing at first stays in"
        assert dict(table.rows)["base"][1] is None
        assert None not in dict(table.rows)["federated"]
    found = measured(story)
    assert [name for name, _ in found.accuracy.rows] == ["chance", "base", "east alone", "west alone", "federated"]
    chance, base, *_, federated = (cells[0] for _, cells in found.accuracy.rows)
    assert chance == (pytest.approx(1 / 3), 0.0)
    assert 0 <= base[0] <= 1
    assert federated[0] == 1.0  # always the same answer
    assert found.accuracy_by_modality is None
    assert "| accuracy | east | west | mean |" in folder.card.read_text()


@pytest.mark.parametrize(("prompt", "choices", "reason"), [
    ("1", ["0", "1"], "choices whose texts begin with different tokens"),
    ("Which?", ["yes", "no " * 90], "longer than the context"),
])  # fmt: skip
def test_choices_that_cannot_be_compared_leave_their_record_out(tmp_path, prompt, choices, reason) -> None:
    tokenizer = merging_tokenizer()
    row = {"prompt": prompt, "completion": choices[0], "choices": choices}
    folder = written(tmp_path / "data", "test", [row, {"prompt": "Well?", "completion": "yes"}])
    written(tmp_path / "data", "train", [{"prompt": "So?", "completion": "no"}])
    found = prepare(folder, tokenizer, 64, cache_root=tmp_path)
    assert list(found.report.left_out) == [reason]
    assert len(found.test) == 1


def test_what_melts_into_the_question_counts_for_every_choice(tmp_path) -> None:
    """The question ends in 1: `10` is one token, `15` two, and both begin after the same tokens."""
    tokenizer = merging_tokenizer()
    row = {"prompt": "It is 1", "completion": "0", "choices": ["0", "5"]}
    folder = written(tmp_path / "data", "test", [row])
    written(tmp_path / "data", "train", [{"prompt": "So?", "completion": "no"}])
    [sample] = prepare(folder, tokenizer, 64, cache_root=tmp_path).test
    choices = choices_in(sample)
    said = [tokenizer.decode(rest[which]) for rest, which in zip(choices.rest, choices.labeled, strict=True)]
    assert said == ["10<|im_end|>", "15<|im_end|>"]


def merging_tokenizer() -> Any:
    """Bytes, with one merge: 1 and 0 are one token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = byte_tokenizer()
    told = json.loads(plain.backend_tokenizer.to_str())
    told["model"]["vocab"]["10"] = 400
    told["model"]["merges"] = [["1", "0"]]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)), eos_token="<|im_end|>")
    made.pad_token = "<|im_end|>"
    return made
