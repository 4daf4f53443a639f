"""A conversation as the model's template writes it, and where the answers stand in it.

Answer-only loss needs the characters of every assistant turn: its content and the token that ends the turn, nothing of
the header before it. Templates do not tell (few have generation markers), so they are asked twice. First with a mark in
place of each content: what stands between the marks is the frame, the same for every conversation with these roles, and
the text must be the frame with the contents in it. Where that fails, because the template rewrites contents (drops the
thinking of earlier turns, adds tool calls), the answer starts where the prompt for it ends, and ends with the token that
ends turns.

Models without a template get `PLAIN`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atoll.data.read import Message

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
        """The text of a conversation and the spans of its assistant turns.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        text = self.render(messages)
        plain = all(message.keys() == {"role", "content"} for message in messages)
        found = self._by_frame(text, messages) if plain else None
        return text, self._by_prompt(text, messages) if found is None else found

    def _by_frame(self, text: str, messages: list[Message]) -> Spans | None:
        frame = self._frame(tuple(message["role"] for message in messages))
        if frame is None or not text.startswith(frame.head):
            return None
        spans, position = [], len(frame.head)
        for number, after in frame.parts:
            content = messages[number]["content"]
            shown = next((c for c in (content, content.strip()) if text.startswith(c + after, position)), None)
            if shown is None:
                return None
            position += len(shown)
            if messages[number]["role"] == "assistant":
                spans.append((position - len(shown), position + self._end(after, last=number == len(messages) - 1)))
            position += len(after)
        return spans if position == len(text) else None

    def _by_prompt(self, text: str, messages: list[Message]) -> Spans:
        return [
            self._span_by_prompt(text, messages, number)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _span_by_prompt(self, text: str, messages: list[Message], number: int) -> tuple[int, int]:
        # the prompt may go on where this answer does not follow it ("<think>"): what both share is the prompt
        start = _shared(text, self.render(messages[:number], prompt=True))
        last = number == len(messages) - 1
        stop = len(text) if last else _shared(text, self.render(messages[: number + 2]))
        return start, start + self._end(text[start:stop], last)

    def _end(self, after: str, last: bool) -> int:
        """How many characters of `after` belong to the turn that it closes."""
        found = after.find(self.turn_end) if self.turn_end else -1
        if found >= 0:
            return found + len(self.turn_end)
        return len(after.rstrip()) if last else 0

    def _new_frame(self, roles: tuple[str, ...]) -> Frame | None:
        from jinja2 import TemplateError

        marked = [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]
        try:
            head, *rest = _MARK.split(self.render(marked))
        except TemplateError:
            return None
        parts = tuple((int(number), after) for number, after in zip(rest[::2], rest[1::2], strict=True))
        return Frame(head, parts) if {number for number, _ in parts} == set(range(len(roles))) else None

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


def _shared(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
