"""Tokenizing: the loss lies on the answers and nothing else, whatever the template; done once, and in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.data.answers import ChatFormat
from atoll.data.collate import IGNORE, Sample
from atoll.data.formats import NO_ANSWER, Message
from atoll.data.read import open_source
from atoll.data.tokenize import TOO_LONG, TOO_MANY_ANSWERS, TOO_SHORT, Prepared, prepare, prompting
from atoll.data.tokens import TokenWriter, load
from atoll.errors import AtollError
from atoll.models.tiny import byte_tokenizer

CHATML = byte_tokenizer().chat_template

# The templates below are the published ones, shortened to what decides where text stands. Each with its special tokens.
TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "chatml": (CHATML, []),
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        [],
    ),
    "llama3": (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'assistant' %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
    ),
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "qwen3": (
        "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'assistant' %}"
        "{% set reasoning = '' %}{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0]"
        ".split('<think>')[-1].strip('\n') %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}"
        "{{ content + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        [],
    ),
    "r1": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<User>' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '<Assistant>' + message['content'].split('</think>')[-1] + eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}",
        ["<User>", "<Assistant>", "<think>", "</think>"],
    ),
    "eos_at_the_end_only": (
        "{% for message in messages %}{{ '\n### ' + message['role'] + ': ' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n### assistant: ' }}{% else %}{{ eos_token }}{% endif %}",
        [],
    ),
    "lines": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        [],
    ),
    "none": ("", []),
}
ENDS = {
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "eos_at_the_end_only": "",
    "lines": "\n",
}


def tokenizer_for(name: str) -> Any:
    template, special = TEMPLATES[name]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template or None
    return tokenizer


def turns(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Prepare = Callable[..., Prepared]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Write rows, then `prepare` them, by default with the byte tokenizer, nothing held out."""
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))

    def run(rows: list[Any], tokenizer: Any = None, context: int = 256, **others: Any) -> Prepared:
        source = open_source(write(tmp_path / "a.jsonl", rows), held_out=others.pop("held_out", 0.0))
        return prepare(source, tokenizer or byte_tokenizer(), context, cache_root=tmp_path / "cache", **others)

    return run


def labeled_runs(sample: Sample, tokenizer: Any) -> list[str]:
    """The text of each run of labeled tokens."""
    ids, labels, *_ = sample
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORE, [False]]).astype(int)))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


# Answer-only loss


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_is_on_every_answer_and_its_end_and_nowhere_else(name: str, prepared: Prepare) -> None:
    tokenizer = tokenizer_for(name)
    # the answers stand in the questions too, and one is a word of the headers: a search for them would go wrong
    chat = turns("user é yes?", "user", "yes, assistant: yes\nbye", "yes é 漢\n\nbye")
    [sample] = prepared([{"messages": chat}], tokenizer).train
    end = ENDS.get(name, "<|im_end|>")
    last = "<|im_end|>" if name == "eos_at_the_end_only" else end
    assert labeled_runs(sample, tokenizer) == ["user" + end, "yes é 漢\n\nbye" + last]
    text = ChatFormat(tokenizer).render(chat)
    assert sample[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(st.text(st.sampled_from("ab \n<|_>:é漢"), min_size=1), min_size=2, max_size=6))
def test_what_precedes_an_answer_is_the_prompt_a_model_is_given(name: str, contents: list[str]) -> None:
    """The oracle is the template's own generation prompt: what generation starts from must end where the span starts."""
    chat = turns(*(content.strip() or "x" for content in contents))[: len(contents) // 2 * 2]
    form = ChatFormat(tokenizer_for(name))
    text, spans = form.answers(chat)
    answers = [(number, message["content"]) for number, message in enumerate(chat) if message["role"] == "assistant"]
    assert len(spans) == len(answers)
    for (number, content), (start, stop) in zip(answers, spans, strict=True):
        assert text[start:stop].startswith(content)
        if name not in ("qwen3", "r1", "mistral"):  # these write something else between prompt and answer
            assert text[:start] == form.render(chat[:number], prompt=True)


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_blanks_that_the_template_trims_do_not_move_the_loss(name: str, prepared: Prepare) -> None:
    tokenizer = tokenizer_for(name)
    [sample] = prepared([{"messages": turns(" q ", "\n a", "r\n", "b  ")}], tokenizer).train
    assert labeled_runs(sample, tokenizer) == ["a" + ENDS[name], "b" + ENDS[name]]


def test_the_system_prompt_of_the_template_stays_and_carries_no_loss(prepared: Prepare) -> None:
    tokenizer = tokenizer_for("smollm2")
    [sample] = prepared([{"prompt": "2+2?", "completion": "4"}], tokenizer).train
    assert "You are a helpful AI assistant" in tokenizer.decode(sample[0])
    assert labeled_runs(sample, tokenizer) == ["4<|im_end|>"]


def test_thinking_that_the_template_drops_or_rewrites_does_not_move_the_loss(prepared: Prepare) -> None:
    tokenizer = tokenizer_for("qwen3")
    chat = turns("2+2?", "<think>\neasy\n</think>\n\n4", "3+3?", "<think>hard</think>6")
    [sample] = prepared([{"messages": chat}], tokenizer).train
    assert labeled_runs(sample, tokenizer) == ["4<|im_end|>", "<think>\nhard\n</think>\n\n6<|im_end|>"]


def test_thinking_that_the_prompt_opens_but_the_text_lacks(prepared: Prepare) -> None:
    tokenizer = tokenizer_for("r1")
    [sample] = prepared([{"messages": turns("a", "<think>x</think>b", "c", "<think>y</think>d")}], tokenizer).train
    assert labeled_runs(sample, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_tool_calls_are_part_of_the_answer(prepared: Prepare) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "message['content'] + '<|im_end|>\n'",
        "message['content'] + ('<call>' + message['tool_calls'][0]['name'] if message['tool_calls'] else '')"
        " + '<|im_end|>\n'",
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}
    chat = [turns("time?")[0], call, {"role": "tool", "content": "noon"}, {"role": "assistant", "content": "It's noon"}]
    [sample] = prepared([{"messages": chat}], tokenizer).train
    assert labeled_runs(sample, tokenizer) == ["<call>clock<|im_end|>", "It's noon<|im_end|>"]


def test_an_answer_of_blanks_between_words_keeps_its_blanks(prepared: Prepare) -> None:
    """GPT-2's post-processor trims blanks out of the offsets; the tokens of blanks must have a loss all the same."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    [sample] = prepared([{"prompt": "  q  ", "completion": "a   b  "}], tokenizer).train
    assert labeled_runs(sample, tokenizer) == ["a   b  <|im_end|>"]


def test_conversations_that_the_template_refuses_are_counted(prepared: Prepare) -> None:
    system = [{"role": "system", "content": "be brief"}, *turns("q", "a")]
    result = prepared([{"messages": turns("q", "a")}, {"messages": system}], tokenizer_for("gemma"))
    assert result.report.left_out == {"refused by the chat template (System role not supported)": (1, "a.jsonl:2")}
    assert (len(result.train), result.report.kept) == (1, 1)


# Forms and objectives


def test_without_a_template_a_completion_follows_its_prompt(prepared: Prepare) -> None:
    tokenizer = tokenizer_for("none")
    [sample] = prepared([{"prompt": "2+2=", "completion": "4"}], tokenizer).train
    assert tokenizer.decode(sample[0]) == "2+2=4<|im_end|>"
    assert labeled_runs(sample, tokenizer) == ["4<|im_end|>"]


def test_special_tokens_that_the_tokenizer_adds_frame_a_completion_once(prepared: Prepare) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_for("none")
    ends = [("<|im_start|>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", pair=None, special_tokens=ends
    )
    [sample] = prepared([{"prompt": "2+2=", "completion": "4"}], tokenizer).train
    assert tokenizer.decode(sample[0]) == "<|im_start|>2+2=4<|im_end|>"
    assert labeled_runs(sample, tokenizer) == ["4<|im_end|>"]


def test_plain_text_is_cut_into_windows_that_give_the_text_back(prepared: Prepare) -> None:
    tokenizer = byte_tokenizer()
    texts = ["a" * 10, "word é " * 9, "x"]
    result = prepared([{"text": text} for text in texts], tokenizer, context=16, objective="causal_lm")
    documents: dict[int, list[int]] = {}
    for row, (ids, labels, *_) in zip(result.train.rows, result.train, strict=True):
        assert 1 < len(ids) <= 16
        assert (ids == labels).all()
        documents.setdefault(int(row), []).extend(ids)
    assert [tokenizer.decode(ids) for ids in documents.values()] == [text + "<|im_end|>" for text in texts]
    assert (result.report.kept, result.report.form) == (3, "text")


def test_a_last_window_of_one_token_is_dropped(prepared: Prepare) -> None:
    result = prepared([{"text": "a" * 16}], context=8, objective="causal_lm")  # 16 and the end: 8 + 8 + 1
    assert result.train.lengths.tolist() == [8, 8]


def test_a_record_of_one_token_is_counted(prepared: Prepare) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    result = prepared([{"text": "a"}], tokenizer, objective="causal_lm")
    assert result.report.left_out == {TOO_SHORT: (1, "a.jsonl:1")}


def test_causal_lm_on_chats_labels_every_token(prepared: Prepare) -> None:
    [(ids, labels, *_)] = prepared([{"messages": turns("q", "a")}], objective="causal_lm").train
    assert (ids == labels).all()


def test_plain_text_has_no_answers(prepared: Prepare) -> None:
    with pytest.raises(AtollError, match="no answers") as caught:
        prepared([{"text": "x"}])
    assert "causal-lm" in str(caught.value)


def test_samples_longer_than_the_context_are_left_out_never_cut(prepared: Prepare) -> None:
    rows = [{"prompt": "q" * 5, "completion": "a"}, {"prompt": "q" * 6, "completion": "a"}]
    length = len(prepared(rows[:1]).train[0][0])
    result = prepared(rows, context=length)
    assert result.train.lengths.tolist() == [length]
    assert result.report.left_out == {TOO_LONG: (1, "a.jsonl:2")}


def test_answers_that_the_tokenizer_removes_are_no_answers(prepared: Prepare) -> None:
    from tokenizers import normalizers

    tokenizer = tokenizer_for("lines")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    result = prepared([{"prompt": "question", "completion": "zzz"}], tokenizer)
    assert result.report.left_out == {NO_ANSWER: (1, "a.jsonl:1")}
    assert not result.report.usable
    assert (len(result.train), len(result.test), result.train.tokens) == (0, 0, 0)


def test_slow_tokenizers_are_refused(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(AtollError, match="where its tokens stand"):
        prepared([{"prompt": "q", "completion": "a"}], tokenizer)


# The cache

ROWS = [{"prompt": f"{n} + {n}?", "completion": f"it is {2 * n}"} for n in range(300)]


def test_the_second_call_does_not_tokenize(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    rows = [*ROWS, {"prompt": "q", "completion": ""}]
    first = prepared(rows, tokenizer, held_out=0.3)
    tokenizer = byte_tokenizer()  # the same, but for the settings that a call leaves in it
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", refuse)
    second = prepared(rows, tokenizer, held_out=0.3)
    assert second.report == first.report
    assert second.fingerprint == first.fingerprint
    assert len(second.test) > 0
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert [a.ids.tolist() for a in one] == [b.ids.tolist() for b in other]


def test_the_cache_is_at_home_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))
    result = prepare(write(tmp_path / "a.jsonl", ROWS), byte_tokenizer(), 256)
    assert (tmp_path / "home" / "tokens" / result.fingerprint / "report.json").is_file()


def test_every_input_changes_the_fingerprint(prepared: Prepare) -> None:
    plain, system = tokenizer_for("chatml"), tokenizer_for("smollm2")
    larger = tokenizer_for("chatml")
    larger.add_tokens(["it is"])
    results = [
        prepared(ROWS, plain),
        prepared(ROWS[:-1], plain),
        prepared(ROWS, system),
        prepared(ROWS, larger),
        prepared(ROWS, plain, context=255),
        prepared(ROWS, plain, objective="causal_lm"),
        prepared(ROWS, plain, held_out=0.5),
    ]
    assert len({result.fingerprint for result in results}) == len(results)


def test_a_tokenizer_that_changes_between_calls_changes_the_fingerprint(prepared: Prepare) -> None:
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    fingerprints = {prepared(ROWS, tokenizer).fingerprint}
    tokenizer.add_tokens(["it is"])
    fingerprints.add(prepared(ROWS, tokenizer).fingerprint)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    fingerprints.add(prepared(ROWS, tokenizer).fingerprint)
    tokenizer.chat_template = TEMPLATES["smollm2"][0]
    fingerprints.add(prepared(ROWS, tokenizer).fingerprint)
    assert len(fingerprints) == 4


def test_a_failed_call_leaves_nothing_behind(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="mixed"):
        prepared([*ROWS, {"text": "x"}])
    assert not [path for path in (tmp_path / "cache" / "tokens").rglob("*") if path.suffix in (".npy", ".json")]


def test_many_batches_give_what_one_gives(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [one.ids.tolist() for one in prepared(ROWS).train]
    monkeypatch.setattr("atoll.data.tokenize.BATCH_CHARACTERS", 40)
    monkeypatch.setattr("atoll.data.tokenize.VERSION", -1)
    assert [one.ids.tolist() for one in prepared(ROWS).train] == whole


@given(
    samples=st.lists(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=40), max_size=20
    )
)
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, samples: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("tokens") / "train"
    with TokenWriter(folder) as writer:
        for row, sample in enumerate(samples):
            ids, labeled = zip(*sample, strict=True)
            writer.add(np.array(ids), np.array(labeled), row * 2)
    data = load(folder)
    assert len(data) == len(samples)
    for (ids, labels, *_), sample in zip(data, samples, strict=True):
        assert (ids.dtype, labels.dtype) == (np.int32, np.int32)
        assert ids.tolist() == [token for token, _ in sample]
        assert labels.tolist() == [token if labeled else IGNORE for token, labeled in sample]
    assert data.tokens == sum(map(len, samples))
    assert data.labeled_tokens == sum(labeled for sample in samples for _, labeled in sample)
    assert data.rows.tolist() == [row * 2 for row in range(len(samples))]


def test_a_selection_shares_the_arrays_and_counts_its_own(prepared: Prepare) -> None:
    data = prepared(ROWS).train
    part = data.select([5, 1, 299])
    assert part.rows.tolist() == [5, 1, 299]
    assert part[0][0].tolist() == data[5][0].tolist()
    assert part[-1][0].tolist() == data[299][0].tolist()
    assert part.tokens == sum(len(data[index][0]) for index in (5, 1, 299))
    assert part.select([2]).rows.tolist() == data[299:].rows.tolist() == [299]
    assert part.ids is data.ids
    assert isinstance(data.ids, np.memmap)
    with pytest.raises(IndexError):
        part[3]


def test_a_sample_may_be_changed_without_changing_the_file(prepared: Prepare) -> None:
    data = prepared(ROWS).train
    ids, *_ = data[0]
    before = ids.tolist()
    ids[:] = 0
    assert data[0][0].tolist() == before


@pytest.mark.real
def test_smollm2_learns_the_answer_and_where_it_ends(tmp_path: Path) -> None:
    from atoll.models.load import load_model

    _, tokenizer = load_model("smollm2-135m")
    chat = turns("What is 2 + 2?", " It is 4,\n\nor 四.", "Thanks!", "You're welcome.")
    source = open_source(write(tmp_path / "a.jsonl", [{"messages": chat}]), held_out=0.0)
    [sample] = prepare(source, tokenizer, 256, cache_root=tmp_path).train
    assert "helpful AI assistant named SmolLM" in tokenizer.decode(sample[0])
    assert labeled_runs(sample, tokenizer) == [chat[1]["content"] + "<|im_end|>", chat[3]["content"] + "<|im_end|>"]
    prompt = tokenizer.apply_chat_template(chat[:3], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert sample[0][: len(ids)].tolist() == ids  # what generation starts from is what training conditioned on


@pytest.mark.parametrize("templated", [True, False], ids=["a chat model", "a model of plain text"])
def test_a_question_is_asked_as_prompts_are_trained_on(templated: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if templated else None
    (tmp_path / "a.jsonl").write_text('{"prompt": "Who is it? ", "completion": "I."}\n')
    (trained,) = prepare(open_source(tmp_path, 0.0), tokenizer, 100, "sft").train
    asked = prompting(tokenizer)("Who is it? ")
    answer = int(np.flatnonzero(trained.labels != IGNORE)[0])
    assert asked.ids.tolist() == trained.ids[:answer].tolist()


def test_a_selector_is_shown_no_more_answers_than_there_are_letters(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "completion": "0", "choices": [str(i) for i in range(27)]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"choices": ["0", "1"]}) + "\n")
    found = prepare(open_source(tmp_path, 0.0), byte_tokenizer(), 1000, "selector")
    assert len(found.train) == 1
    assert {reason: count for reason, (count, _) in found.report.left_out.items()} == {TOO_MANY_ANSWERS: 1}
