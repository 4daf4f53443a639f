"""Formats of records: which a row has, what it says, and what is wrong with it.

What makes a row unreadable for what it is raises AtollError with its place; what is wrong with one record alone raises
Unusable, with the reason for which it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from atoll.data.files import Row, parse_json
from atoll.data.media import COLUMNS as MEDIA_COLUMNS
from atoll.data.media import Unusable, without_parts
from atoll.errors import AtollError, closest

Form = Literal["preference", "chat", "prompt_completion", "text"]
Message = dict[str, Any]

COLUMNS: dict[Form, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that make a format; the first format whose columns are all there is the one."""

FORMS = " | ".join(" + ".join(columns) for columns in COLUMNS.values())
ROLES = ("system", "developer", "user", "assistant", "tool")

NO_ANSWER = "no answer"
NO_PROMPT = "no prompt"
NOT_A_CHOICE = "an answer that is not among its choices"
EQUAL_ANSWERS = "equal answers, of which neither can be preferred"
MORE_THAN_WORDS = "answers that are more than words: calls of tools, or thoughts"
UNLIKE_BEFORE = "answers that are not one turn of the assistant each, after the same messages"
CHOICES = "choices"
"""The column that names the answers which a question allows: it is then scored by which of them is the likeliest."""
MOST_CHOICES = 100
EMPTY_TEXT = "empty text"


def known_columns(form: str) -> tuple[str, ...]:
    """That are read of records of this format."""
    columns = next((columns for name, columns in COLUMNS.items() if name == form), ())
    more = {"preference": ("prompt",), "text": ()}.get(form, (CHOICES,))
    return (*columns, *MEDIA_COLUMNS, *more)


def form_of(row: Row) -> Form | None:
    """The first format whose columns are all in a row; None where there is none."""
    return next((form for form, columns in COLUMNS.items() if all(name in row for name in columns)), None)


def renaming(row: Row, place: str) -> str:
    """How columns that are none of a format's would become some."""
    known = [name for columns in COLUMNS.values() for name in columns]
    near = {name: get_close_matches(str(name).lower(), known, n=1, cutoff=0.6) for name in row if name not in known}
    hints = [f"did you mean '{match[0]}' where it says '{name}'?" for name, match in near.items() if match]
    if ".csv:" in place:
        hints.append("the first line of a CSV names its columns, such as prompt,completion")
    return "; ".join(hints) or "name the columns so, and add what is missing"


class Content(NamedTuple):
    """What a row says."""

    messages: list[Message]
    choices: tuple[str, ...] = ()


def content_of(form: Form, row: Row, place: str) -> Content:
    """The record's messages, and the answers that it allows. Raises Unusable with the reason to leave it out."""
    found = form_of(row)
    if found != form and (found or not any(name in row for name in COLUMNS[form])):
        raise AtollError(
            "formats are mixed",
            where=place,
            found=f"{found or 'no known format'} (columns {', '.join(map(str, row))})",
            allowed=f"{form} as in the file's other records",
            remedy="put each format into a file of its own, or convert to one" if found else renaming(row, place),
        )
    return _CHECKS[form](row, place)


def _chat(row: Row, place: str) -> Content:
    messages = row["messages"]
    if isinstance(messages, str):  # a CSV cell can only hold a chat as JSON text
        messages = _parsed(messages, place, "messages", "a JSON list of {role, content}")
    chat = _messages(messages, "messages", place)
    answers = [message for message in chat if message["role"] == "assistant"]
    if not answers or not all(_answered(message) for message in answers):
        raise Unusable(NO_ANSWER)
    return Content(chat, _choices(row, chat, place))


def _messages(messages: object, column: str, place: str) -> list[Message]:
    if not isinstance(messages, list):
        raise _wrong_type(column, messages, "a list of {role, content}", place)
    return [_message(message, f"{place}, {column}, message {number}") for number, message in enumerate(messages, 1)]


def _preference(row: Row, place: str) -> Content:
    """A chosen and a rejected answer to the same prompt, each a text, its message, or the whole conversation."""
    prompt = _turns(row.get("prompt"), "prompt", "user", place)
    chosen, rejected = (_side(row, name, prompt, place) for name in COLUMNS["preference"])
    if chosen[:-1] != rejected[:-1] or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise Unusable(UNLIKE_BEFORE)
    if not any(_answered(message) for message in chosen[:-1]):
        raise Unusable(NO_PROMPT)
    if {*chosen[-1], *rejected[-1]} != {"role", "content"}:
        raise Unusable(MORE_THAN_WORDS)
    answers = chosen[-1]["content"], rejected[-1]["content"]
    if answers[0] == answers[1]:
        raise Unusable(EQUAL_ANSWERS)
    return Content(chosen, answers)


def _side(row: Row, name: str, prompt: list[Message], place: str) -> list[Message]:
    """The conversation with one of the answers. Raises Unusable where there is none."""
    said = _turns(row.get(name), name, "assistant", place)
    if not said or not _answered(said[-1]):
        raise Unusable(f"no {name} answer")
    return said if said[: len(prompt)] == prompt else prompt + said  # many sets repeat the prompt in both sides


def _turns(value: object, column: str, role: str, place: str) -> list[Message]:
    """A text as a turn of this role, or a list of messages."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # a CSV cell; or an answer that is JSON itself
        with suppress(ValueError):
            parsed = parse_json(value)
            said = isinstance(parsed, list) and all(
                isinstance(x, dict) and {"role", "content"} <= x.keys() for x in parsed
            )
            value = parsed if said else value
    if isinstance(value, str | None):
        return [{"role": role, "content": value}] if value else []
    return _messages(value, column, place)


def _choices(row: Row, messages: list[Message], place: str) -> tuple[str, ...]:
    """The answers that a record allows. Raises Unusable where its own is not among them."""
    found = row.get(CHOICES)
    if found == "":
        return ()
    if isinstance(found, str):  # a CSV cell
        found = _parsed(found, place, CHOICES, "a JSON list of strings")
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise _wrong_type(CHOICES, found, "a list of strings", place)
    if not 2 <= len(set(found)) == len(found) <= MOST_CHOICES:
        raise Unusable(f"choices that are not 2 to {MOST_CHOICES} different ones")
    if messages[-1].get("role") != "assistant" or messages[-1]["content"] not in found:
        raise Unusable(NOT_A_CHOICE)
    return tuple(found)


def _message(message: object, place: str) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise _wrong_type("a message", message, "{role, content}", place)
    role, content = message["role"], without_parts(message["content"], place)
    if role not in ROLES:
        raise AtollError(
            "unknown role", where=place, found=role, allowed=", ".join(ROLES), remedy=closest(str(role), ROLES)
        )
    if not isinstance(content, str | None):
        raise _wrong_type("content", content, "a string", place)
    # columnar files fill keys that a message does not have with None
    return {key: value for key, value in message.items() if value is not None} | {"content": content or ""}


def _answered(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _prompt_completion(row: Row, place: str) -> Content:
    prompt, completion = _string(row, "prompt", place), _string(row, "completion", place)
    if not completion.strip():
        raise Unusable(NO_ANSWER)
    if not prompt.strip():
        raise Unusable(NO_PROMPT)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Content(messages, _choices(row, messages, place))


def _text(row: Row, place: str) -> Content:
    text = _string(row, "text", place)
    if not text.strip():
        raise Unusable(EMPTY_TEXT)
    return Content([{"content": text}])


_CHECKS: dict[Form, Callable[[Row, str], Content]] = {
    "preference": _preference,
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "text": _text,
}


def _string(row: Row, name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str | None):
        raise _wrong_type(name, value, "a string", place)
    return value or ""


def _parsed(text: str, place: str, column: str, allowed: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _wrong_type(column, text, f"{allowed} ({error})", place) from None


def _wrong_type(what: str, value: object, allowed: str, place: str) -> AtollError:
    return AtollError(
        f"{what} has the wrong type", where=place, found=f"{type(value).__name__}: {str(value)[:60]}", allowed=allowed
    )
