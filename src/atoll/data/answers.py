"""A conversation as the model's template writes it, and where the answers stand in it.

Answer-only loss needs the characters of every assistant turn: its content and the token that ends the turn, nothing of
the header before it. Templates do not tell (few have generation markers), so they are asked up to three times, and no
reply is believed that the text does not bear out:

1. With a mark in place of each content. What stands between the marks is the frame, the same for every conversation with
   these roles; the text must be the frame with the contents in it. It fails where a template rewrites a content.
2. With a mark in place of one answer (earlier thinking is dropped, tool calls are added: elsewhere the text is the same).
3. For the prompt of one answer (its thinking is rewritten): the answer starts where the prompt ends. It must hold all
   that was said before; templates that write the system text into the *last* question (Mistral) write another prompt.

A conversation in which an answer is not found so has no spans: a search would find it in a question that quotes it.

Models without a template get `PLAIN`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atoll.data.formats import Message

Spans = list[tuple[int, int]]
"""Half-open ranges of characters."""

PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""The format for models without a chat template: the role on a line of its own, then the content; answers end with the
end-of-sequence token."""

_MARK = re.compile("\ue000(\\d+)\ue001")  # private use: no real text, no white space that a template would strip


@dataclass(frozen=True)
class Frame:
    """What a template writes around contents: `head`, then for each (message number, text after its content)."""

    head: str
    parts: tuple[tuple[int, str], ...]


class ChatFormat:
    """The chat template of a tokenizer, and what ends a turn in it.

    Example:
        >>> from atoll.models.tiny import byte_tokenizer
        >>> chat = ChatFormat(byte_tokenizer())
        >>> text, spans = chat.answers([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])
        >>> text
        '<|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n'
        >>> [text[start:stop] for start, stop in spans]
        ['4<|im_end|>']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN
        self._frame = lru_cache(maxsize=1024)(self._new_frame)
        self.turn_end = self._find_turn_end()

    def render(self, messages: list[Message], prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the next answer starts.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        return str(
            self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
            )
        )

    def answers(self, messages: list[Message]) -> tuple[str, Spans]:
        """The text of a conversation and the spans of its assistant turns; none if one of them is not found.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        text = self.render(messages)
        plain = all(message.keys() == {"role", "content"} for message in messages)
        found = self._by_frame(text, messages) if plain else None
        return text, self._one_by_one(text, messages) if found is None else found

    def _by_frame(self, text: str, messages: list[Message]) -> Spans | None:
        frame = self._frame(tuple(message["role"] for message in messages))
        if frame is None or not text.startswith(frame.head):
            return None
        spans, position = [], len(frame.head)
        for number, after in frame.parts:
            content = messages[number]["content"]
            written = (content, content.strip(), content.rstrip())
            shown = next((c for c in written if text.startswith(c + after, position)), None)
            if shown is None:
                return None
            position += len(shown)
            if messages[number]["role"] == "assistant":
                spans.append((position - len(shown), position + self._end(after, last=number == len(messages) - 1)))
            position += len(after)
        return spans if position == len(text) else None

    def _one_by_one(self, text: str, messages: list[Message]) -> Spans:
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        found = [self._by_mark(text, messages, n) or self._by_prompt(text, messages, n) for n in numbers]
        spans = [span for span in found if span is not None]
        return spans if len(spans) == len(numbers) else []

    def _by_mark(self, text: str, messages: list[Message], number: int) -> tuple[int, int] | None:
        one = {**messages[number], "content": _mark(number)}
        before, *rest = self.render([*messages[:number], one, *messages[number + 1 :]]).split(_mark(number))
        after = rest[0] if len(rest) == 1 else None
        if after is None or not text.startswith(before) or not text.endswith(after, len(before)):
            return None
        stop = len(text) - len(after) + self._end(after, last=number == len(messages) - 1)
        return (len(before), stop) if stop > len(before) else None

    def _by_prompt(self, text: str, messages: list[Message], number: int) -> tuple[int, int] | None:
        prompt = self.render(messages[:number], prompt=True)
        # the prompt may go on where this answer does not follow it ("<think>"): what both share is the prompt
        start = _shared(text, prompt)
        if start < self._said(prompt, messages[:number]):
            return None
        last = number == len(messages) - 1
        stop = len(text) if last else _shared(text, self.render(messages[: number + 2]))
        length = self._end(text[start:stop], last)
        return (start, start + length) if length else None

    def _said(self, prompt: str, messages: list[Message]) -> int:
        """How far into `prompt` its last content reaches; beyond its end where that is not known."""
        if not messages:
            return 0
        marked = [{**message, "content": _mark(number)} for number, message in enumerate(messages)]
        *said, header = _MARK.split(self.render(marked, prompt=True))
        return len(prompt) - len(header) if said and prompt.endswith(header) else len(prompt) + 1

    def _end(self, after: str, last: bool) -> int:
        """How many characters of `after` belong to the turn that it closes."""
        found = after.find(self.turn_end) if self.turn_end else -1
        if found >= 0:
            return found + len(self.turn_end)
        return len(after.rstrip()) if last else 0

    def _new_frame(self, roles: tuple[str, ...]) -> Frame | None:
        from jinja2 import TemplateError

        marked = [{"role": role, "content": _mark(number)} for number, role in enumerate(roles)]
        try:
            head, *rest = _MARK.split(self.render(marked))
        except TemplateError:
            return None
        parts = tuple((int(number), after) for number, after in zip(rest[::2], rest[1::2], strict=True))
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        shown = [number for number, _ in parts if roles[number] == "assistant"]
        return Frame(head, parts) if shown == answers else None  # other contents may be dropped: the text decides

    def _find_turn_end(self) -> str:
        """What follows an answer both in the middle and at the end of a conversation, without white space if it can."""
        frame = self._frame(("user", "assistant", "user", "assistant"))
        if frame is None:
            return str(self._tokenizer.eos_token or "")
        after = dict(frame.parts)
        shared = self._shared_tokens(after[1], after[3])
        return shared.rstrip() or shared

    def _shared_tokens(self, one: str, other: str) -> str:
        """The common beginning of two texts, in whole tokens: '<|end|>' and '<|user|>' share no '<|'."""
        encoded: Any = self._tokenizer([one, other], add_special_tokens=False, return_offsets_mapping=True)
        stop = 0
        for pair in zip(*encoded["input_ids"], *encoded["offset_mapping"], strict=False):
            if pair[0] != pair[1]:
                break
            stop = pair[2][1]
        return one[:stop]


def ends_of(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: of its turn, and of any text."""
    turn_end = ChatFormat(tokenizer).turn_end
    of_turn = tokenizer.convert_tokens_to_ids(turn_end) if turn_end else None
    if of_turn == tokenizer.unk_token_id and turn_end != tokenizer.unk_token:
        of_turn = None  # it is no token
    return sorted({tokenizer.eos_token_id, of_turn} - {None})


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _shared(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
