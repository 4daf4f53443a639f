"""A client's records to token samples, once: later runs map the result into memory.

The cache is named by the content that made it - data, tokenizer, template, context, objective, this code's version - so
a changed file or template is never answered with old tokens, and an unchanged one never tokenized again. Records are
read, tokenized and written a batch at a time; memory does not grow with the data.

Samples longer than the context are left out and counted for `sft` and `preference` (a truncated answer teaches to break
off), and cut into windows for `causal_lm`.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from atoll.cache import Say, content_hash, file_hash, home, once, quiet, watched
from atoll.data.answers import PLAIN, ChatFormat, Spans
from atoll.data.collate import IGNORE, Choices, Sample
from atoll.data.files import content
from atoll.data.formats import NO_ANSWER
from atoll.data.media import Senses, Unusable, placed_media
from atoll.data.read import Labels, Record, Report, Source, media_of, open_source, records
from atoll.data.tokens import TokenDataset, TokenWriter, load
from atoll.errors import AtollError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 11
"""Raise it when the same input gives other tokens or another layout."""

TOO_LONG = "longer than the context"
TOO_SHORT = "a single token"
NO_OTHER_ANSWER = "no other answer to prefer its own to"
TOO_MANY_ANSWERS = "more answers than there are letters to show them under"
HIDDEN_ANSWER = "an answer that cannot be told from the rest in what the chat template writes"

MISPLACED = "places for pictures or sounds among its words that are not its media's"

NO_SENSES: Senses = {}

BATCH_CHARACTERS = 500_000
"""Text tokenized at a time: a few MB of tokens, enough to keep the tokenizer's threads busy."""


@dataclass(frozen=True)
class Prepared:
    """A client's token samples, what became of its records, and the name of the content (a hash)."""

    train: TokenDataset
    test: TokenDataset
    report: Report
    fingerprint: str


@dataclass(frozen=True)
class Encoded:
    """One record's tokens, int32 [length], and which of them have a loss, bool [length]."""

    ids: NDArray[np.int32]
    labeled: NDArray[np.bool_]
    record: Record
    choices: Choices | None = None

    @property
    def sample(self) -> Sample:
        """What an objective learns from."""
        return Sample(self.ids, np.where(self.labeled, self.ids, IGNORE), self.record.media, self.choices)

    def expanded(self, senses: Senses) -> Encoded:
        """With as many placeholders for each medium as it has tokens; none of them has a loss."""
        if not self.record.media:
            return self
        places = {sense.token_id: sense.tokens for sense in senses.values()}
        counts = np.array([places.get(int(one), 1) for one in self.ids])
        labeled = np.where(counts > 1, False, self.labeled)
        return replace(self, ids=np.repeat(self.ids, counts), labeled=np.repeat(labeled, counts))


def prepare(
    source: Source | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    objective: Labels = "sft",
    cache_root: Path | None = None,
    senses: Senses = NO_SENSES,
    say: Say = quiet,
) -> Prepared:
    """Tokenize a client's data, or map what an earlier call made of the same content.

    Args:
        source: a path, or what `open_source` found there.
        tokenizer: a fast tokenizer, with or without a chat template.
        context: the longest sample, in tokens.
        objective: `sft` puts the loss on answers only; `causal_lm` on every token; `preference` on the answers that a
            question allows, and records that allow one alone are left out; `selector` shows them under letters, and puts the
            loss on these.
        cache_root: the folder under which `tokens/` is kept; `atoll.cache.home()` if not given.
        senses: how the model takes pictures and sounds; records with others are left out.
        say: hears how many records have been read, where it takes long.

    Returns:
        Both splits may be empty: see `report.usable`.

    Raises:
        AtollError: the source cannot be read, or does not fit the objective.
    """
    source = source if isinstance(source, Source) else open_source(source)
    fingerprint = _fingerprint(source, tokenizer, context, objective, senses)
    target = (cache_root or home()) / "tokens" / fingerprint
    folder = once(target, lambda partial: _write(partial, source, tokenizer, context, objective, senses, say))
    train, test = (load(folder / split, source.path.parent) for split in ("train", "test"))
    return Prepared(train, test, _read_report(folder), fingerprint)


def _write(
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    objective: Labels,
    senses: Senses,
    say: Say,
) -> None:
    folder.chmod(0o700)  # tokens are text to whoever has the tokenizer: nobody else reads a client's
    report, root = Report(), source.path.parent
    with TokenWriter(folder / "train", root) as train, TokenWriter(folder / "test", root) as test:
        found = watched(records(source, report), say, f"records read of {source.path.name}")
        for encoded in encode(found, tokenizer, objective, report, senses, context):
            writer = train if encoded.record.split == "train" else test
            for start, stop in fit(encoded, context, objective, report):
                part = encoded.ids[start:stop], encoded.labeled[start:stop]
                writer.add(*part, encoded.record.row, encoded.record.media, encoded.choices)
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1))
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def _read_report(folder: Path) -> Report:
    stored = json.loads((folder / "report.json").read_text())
    left_out = {reason: (count, place) for reason, (count, place) in stored["left_out"].items()}
    return Report(stored["form"], stored["read"], left_out, tuple(stored["unused_columns"]))


def encode(
    found: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    objective: Labels,
    report: Report,
    senses: Senses = NO_SENSES,
    context: int = 2**31,
) -> Iterator[Encoded]:
    """Tokenize records, a batch at a time, with the loss where the objective puts it.

    A prompt and its completion are a user's and an assistant's turn if the tokenizer has a chat template, else one
    text. Plain text, and a completion without a template, are closed with the end-of-sequence token. A conversation
    that the template refuses is counted in `report`, and so are media that cannot be read, or not by the model.

    Raises:
        AtollError: the tokenizer cannot say where its tokens stand; plain text for `sft`.
    """
    if not tokenizer.is_fast:
        raise AtollError(
            "the tokenizer does not say where its tokens stand in the text",
            found=type(tokenizer).__name__,
            allowed="a fast tokenizer (tokenizer.json)",
        )
    chat = ChatFormat(tokenizer)
    if objective == "selector":
        found = (lettered(one) for one in found if enough_letters(one, report))
    for batch in _batches(placed for one in found if (placed := _with_places(one, senses, report))):
        written = [
            (record, *text) for record in batch if (text := _written(record, tokenizer, chat, objective, report))
        ]
        if written:
            for encoded in _encode(written, tokenizer, objective):
                if misplaced(encoded, senses):
                    report.leave_out(MISPLACED, encoded.record.place)
                    continue
                one = encoded.expanded(senses)
                if not scored(one.record, objective):
                    yield one
                elif choices := _choices(one.record, tokenizer, chat, senses, report, context):
                    yield replace(one, choices=choices)


def misplaced(encoded: Encoded, senses: Senses) -> bool:
    """Whether the tokens have other places than the record has media: words may make one, or a template lose one."""
    held = Counter(medium.modality for medium in encoded.record.media)
    return any(int((encoded.ids == sense.token_id).sum()) != held[name] for name, sense in senses.items())


COMPARING: tuple[Labels, ...] = ("preference", "selector")
"""Objectives that compare the answers which a question allows."""

LETTERS = string.ascii_uppercase


def enough_letters(record: Record, report: Report) -> bool:
    """Whether each of a record's choices can have a letter of its own; counted in `report` if not."""
    if len(record.choices) > len(LETTERS):
        report.leave_out(TOO_MANY_ANSWERS, record.place)
    return len(record.choices) <= len(LETTERS)


def lettered(record: Record) -> Record:
    """The record as a question which of its answers is the best, shown under letters in the order of their hashes."""
    if len(record.choices) < 2 or len(record.messages) < 2:
        return record._replace(choices=())
    *before, asked, answer = record.messages
    shown = shown_answers(record)
    answers = "\n".join(f"{letter}: {one}" for letter, one in zip(LETTERS, shown, strict=False))
    letters = tuple(LETTERS[: len(shown)])
    question = f"{asked['content']}\n\n{answers}\n\nWhich answer is the best one: {', '.join(letters)}?\n"
    right = {**answer, "content": letters[shown.index(answer["content"])]}
    return record._replace(messages=[*before, {**asked, "content": question}, right], choices=letters)


def shown_answers(record: Record) -> list[str]:
    """A record's choices in the order in which a selector is shown them: that of their hashes."""
    return sorted(record.choices, key=partial(content_hash, record.messages[-2]["content"]))


def scored(record: Record, objective: Labels) -> bool:
    """Whether a record's choices are ever looked at: `sft` trains on its answer alone."""
    return objective in COMPARING or (bool(record.choices) and record.split == "test" and objective == "sft")


def _choices(
    record: Record, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, senses: Senses, report: Report, context: int
) -> Choices | None:
    """The record's choices in tokens; None, counted in `report`, if they cannot be compared."""
    if not record.choices:
        report.leave_out(NO_OTHER_ANSWER, record.place)
        return None
    written = []
    for choice in record.choices:
        placed = _with_places(with_answer(record, choice), senses, report, read=False)
        text = placed and _written(placed, tokenizer, chat, "sft", report)
        if placed is None or text is None:
            return None
        written.append((placed, *text))
    each = [one.expanded(senses) for one in _encode(written, tokenizer, "sft")]
    longest = min(len(one.ids) for one in each) - 1  # something is left of each
    same = np.all([one.ids[:longest] == each[0].ids[:longest] for one in each], axis=0)
    shared = int(np.argmin(same)) if not same.all() else longest
    rest = tuple(one.ids[shared:] for one in each)
    places = [sense.token_id for sense in senses.values()]
    if shared == 0:
        reason = "choices whose texts begin with different tokens"
    elif max(len(one.ids) for one in each) > context:
        reason = TOO_LONG
    elif any(np.isin(one, places).any() for one in rest):
        reason = "choices with a place for a picture or a sound"
    else:
        # where an answer melts into the question's last token, that counts too: all choices are of the same question
        ends = (int(np.flatnonzero(one.labeled)[-1]) + 1 - shared for one in each)
        labeled = tuple(np.arange(len(ids)) < end for ids, end in zip(rest, ends, strict=True))
        return Choices(shared, rest, labeled, record.choices.index(record.messages[-1]["content"]))
    report.leave_out(reason, record.place)
    return None


def with_answer(record: Record, answer: str) -> Record:
    """The record with another answer to its last question."""
    return record._replace(messages=[*record.messages[:-1], {**record.messages[-1], "content": answer}])


def _with_places(record: Record, senses: Senses, report: Report, read: bool = True) -> Record | None:
    """The record with a placeholder in its text for every medium; None if one of them cannot be used, or be `read`."""
    if not senses and not record.media:
        return record
    try:
        for medium in record.media:
            if medium.modality not in senses:
                raise Unusable(f"{medium.modality} that this model cannot take")
            if medium.path is not None and read:
                senses[medium.modality].read(medium)
        return record._replace(messages=placed_media(record.messages, record.media, senses))
    except Unusable as reason:
        report.leave_out(str(reason), record.place)
        return None


def _encode(
    written: list[tuple[Record, str, Spans]], tokenizer: PreTrainedTokenizerBase, objective: Labels
) -> Iterator[Encoded]:
    form = written[0][0].form
    templated = bool(tokenizer.chat_template) and form != "text"  # a template writes special tokens itself
    closed = not templated and form in ("prompt_completion", "text")
    tokens: Any = tokenizer(
        [text for _, text, _ in written],
        add_special_tokens=not templated,
        return_offsets_mapping=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    for (record, _, spans), ids, offsets in zip(written, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        labeled = np.ones(len(ids), bool) if objective == "causal_lm" else _in_spans(offsets, spans)
        ids, labeled = _close(ids, labeled, tokenizer.eos_token_id) if closed else (ids, labeled)
        yield Encoded(np.asarray(ids, np.int32), labeled, record)


def prompting(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Sample]:
    """A question -> its tokens up to where the answer begins, as those of a prompt that is trained on."""
    chat, templated = ChatFormat(tokenizer), bool(tokenizer.chat_template)

    def prompt(question: str) -> Sample:
        text = chat.render([{"role": "user", "content": question}], prompt=True) if templated else question
        tokens: Any = tokenizer(text, add_special_tokens=not templated)
        ids = tokens["input_ids"]
        ids = ids[:-1] if not templated and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        return Sample(np.array(ids, np.int32), np.full(len(ids), IGNORE, np.int32))

    return prompt


def _written(
    record: Record, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, objective: Labels, report: Report
) -> tuple[str, Spans] | None:
    """The record's text and the spans of its answers; None if the template refuses it."""
    from jinja2 import TemplateError

    refuse_plain_text(record, objective)
    if record.form == "text":
        return record.messages[0]["content"], []
    if record.form == "prompt_completion" and not tokenizer.chat_template:
        prompt, completion = (message["content"] for message in record.messages)
        return prompt + completion, [(len(prompt), len(prompt + completion))]
    try:
        text, spans = chat.answers(record.messages)
    except TemplateError as error:
        report.leave_out(f"refused by the chat template ({error})", record.place)
        return None
    if not spans and objective != "causal_lm":
        report.leave_out(HIDDEN_ANSWER, record.place)
        return None
    return text, spans


def refuse_plain_text(record: Record, objective: Labels) -> None:
    """Raise AtollError for a record without answers where the objective learns from answers alone."""
    if record.form == "text" and objective != "causal_lm":
        raise AtollError(
            "plain text has no answers to train on",
            where=record.place,
            found=f"records with 'text', labels {objective}",
            allowed="prompt, chosen and rejected" if objective in COMPARING else "messages, or prompt and completion",
            remedy="finetune.objective=causal-lm learns from every token",
        )


def _in_spans(offsets: list[tuple[int, int]], spans: Spans) -> NDArray[np.bool_]:
    """Which tokens hold a character of a span, bool [length]; one that straddles its edge does.

    Tokenizers that trim blanks out of offsets report a token of blanks as an empty range at its end: it is inside, too.
    """
    bounds = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))  # twice as fast as np.array here
    start, stop = bounds[::2], bounds[1::2]
    labeled = np.zeros(len(offsets), bool)
    for first, last in spans:
        labeled |= (start < last) & (stop > first)
    return labeled


def _close(ids: list[int], labeled: NDArray[np.bool_], eos: int | None) -> tuple[list[int], NDArray[np.bool_]]:
    if eos is None:
        return ids, labeled
    if not ids or ids[-1] != eos:
        ids, labeled = [*ids, eos], np.append(labeled, True)
    labeled[-1] = True
    return ids, labeled


def _batches(found: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in found:
        batch.append(record)
        size += sum(len(message["content"]) for message in record.messages)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def fit(encoded: Encoded, context: int, objective: Labels, report: Report) -> list[tuple[int, int]]:
    """The ranges of tokens to keep: the whole sample, windows of `context`, or none, counted in `report`.

    A window of a single token predicts nothing and is dropped.
    """
    length = len(encoded.ids)
    if length < 2:
        reason = TOO_SHORT
    elif length > context and encoded.record.media:
        reason = TOO_LONG  # a window would have places without their media
    elif objective == "causal_lm":
        edges = [*range(0, length, context), length]
        return [(start, stop) for start, stop in pairwise(edges) if stop - start > 1]
    elif length > context:
        reason = TOO_LONG
    elif not encoded.labeled.any():
        reason = NO_ANSWER
    else:
        return [(0, length)]
    report.leave_out(reason, encoded.record.place)
    return []


def _fingerprint(
    source: Source, tokenizer: PreTrainedTokenizerBase, context: int, objective: str, senses: Senses
) -> str:
    taken = {name: asdict(sense) for name, sense in sorted(senses.items())}
    return content_hash(json.dumps([VERSION, source_hash(source), context, objective, taken, *_identity(tokenizer)]))


def source_hash(source: Source) -> str:
    """Names what a source holds: bytes of files and media, names, splits, the share held out, what is planted or misses."""
    facts: list[Any] = [
        source.path.name,
        source.held_out,
        *source.planted,
        *((source.missing and [source.missing]) or []),
    ]
    for path, split in source.files:
        facts += [(str(part.relative_to(source.path.parent)), split, file_hash(part)) for part in content(path)]
        facts += [(medium.modality, medium.key) for medium in media_of(path)]
    return content_hash(json.dumps(facts, default=str))


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides a tokenizer's output."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [_definition(tokenizer), special, tokenizer.chat_template or PLAIN]


_definitions: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()


def _definition(tokenizer: PreTrainedTokenizerBase) -> str:
    """The hash of a tokenizer's vocabulary and steps, without the truncation and padding that its last call left.

    It takes a quarter of a second, so it is kept for the next client, for as long as nothing visible changes.
    """
    if not tokenizer.is_fast:
        return type(tokenizer).__name__
    core: Any = tokenizer.backend_tokenizer
    visible = repr([len(tokenizer), core.normalizer, core.pre_tokenizer, core.post_processor])
    known = _definitions.get(tokenizer)
    if known is None or known[0] != visible:
        definition = json.loads(core.to_str()) | {"truncation": None, "padding": None}
        known = _definitions[tokenizer] = (visible, content_hash(json.dumps(definition)))
    return known[1]
