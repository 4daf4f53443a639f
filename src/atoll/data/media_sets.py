"""Sets of pictures and sounds that package managers have, as records: `atoll data get tuxpaint|asterisk|emoji`.

    tuxpaint    Tux Paint's stamps: pictures with captions, some of them read out in English
    asterisk    Asterisk's telephone prompts: speech in four languages with its transcripts
    emoji       Noto's color emoji: pictures with the names that Unicode gives them

They are fetched into the cache and never shipped with Atoll. Whole media are held out, chosen by hash of their content, so
that no picture or sound is on both sides, whatever it is called.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.cache import Say, content_hash, file_hash, home, once, quiet
from atoll.data.media import MODALITIES, need
from atoll.debs import LANGUAGES, NOTO_EMOJI, TUXPAINT_STAMPS, Deb, asterisk_prompts, fetch_deb
from atoll.errors import AtollError, closest

NAMES = {"en": "English", "fr": "French", "es": "Spanish", "it": "Italian"}

LONGEST = 5.0
"""Seconds of a prompt."""

LONGEST_NAME = 30
"""Characters: longer captions are descriptions."""

HELD_OUT = 0.2


@dataclass(frozen=True)
class Picture:
    """A stamp: where it lies, its caption, what that shows, and its category."""

    path: Path
    caption: str
    shows: str
    category: str


@dataclass(frozen=True)
class Prompt:
    """A telephone prompt: where it lies, what is said, and in which language."""

    path: Path
    says: str
    language: str


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
        for modality in MODALITIES.values():
            column = modality.columns[0]
            if (medium := getattr(one, modality.name)) is not None:
                name = f"media/{file_hash(medium)[:16]}{medium.suffix}"
                if not (folder / name).exists():
                    shutil.copyfile(medium, folder / name)
                record[column] = [name]
        lines[one.held_out].append(json.dumps(record, ensure_ascii=False) + "\n")
    for held_out, name in ((False, "train"), (True, "test")):
        mixed = sorted(lines[held_out], key=content_hash)
        (folder / f"{name}.jsonl").write_text("".join(mixed), encoding="utf-8")


def stamps_in(folder: Path) -> Iterator[Picture]:
    """Every stamp whose caption in English is short enough for a name."""
    for text in sorted(folder.rglob("*.txt")):
        picture, category = text.with_suffix(".png"), text.relative_to(folder).parts[0]
        first = text.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        if picture.is_file() and first and len(name := thing(first[0])) <= LONGEST_NAME:
            yield Picture(picture, first[0].strip(), name, category)


def thing(caption: str) -> str:
    """A caption as the name of a thing.

    >>> thing("An albino peahen (a female peafowl, or peacock).")
    'albino peahen'
    """
    bare = re.sub(r"\s*\(.*?\)|[.!]\s*$", "", caption.strip()).strip(" .!")
    return re.sub(r"^(an?|the|some)\s+", "", bare, flags=re.IGNORECASE)


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


def held_out(medium: Path) -> bool:
    """Whether a medium is held out: a share of all, by the hash of its content."""
    return int(file_hash(medium)[:8], 16) < HELD_OUT * 2**32


def tuxpaint(say: Say = quiet) -> list[Asked]:
    """What each stamp shows; and what is said of those that are read out in English."""
    asked = []
    for one in stamps_in(fetch_deb(TUXPAINT_STAMPS, say) / "usr/share/tuxpaint/stamps"):
        out = held_out(one.path)
        asked.append(Asked("What is in the picture?", one.shows, out, image=one.path))
        spoken = one.path.with_name(f"{one.path.stem}_desc.ogg")
        if spoken.is_file():
            asked.append(Asked("What is said of the picture?", one.caption, out, image=one.path, audio=spoken))
    return asked


def asterisk(say: Say = quiet) -> list[Asked]:
    """What each prompt says, and in which language."""
    languages = list(NAMES.values())
    asked = []
    for one in (prompt for language in LANGUAGES for prompt in prompts_of(language, say)):
        out = held_out(one.path)
        asked.append(Asked("What is said?", one.says, out, audio=one.path))
        asked.append(Asked("Which language is spoken?", NAMES[one.language], out, audio=one.path, choices=languages))
    return asked


def emoji(say: Say = quiet) -> list[Asked]:
    """What each emoji shows, by the name of its character."""
    font = next(fetch_deb(NOTO_EMOJI, say).rglob("NotoColorEmoji.ttf"))
    pictures = once(home() / "data" / f"emoji-{NOTO_EMOJI.sha256[:12]}", lambda folder: write_glyphs(font, folder))
    named = ((path, unicodedata.name(chr(int(path.stem, 16)), "").lower()) for path in sorted(pictures.glob("*.png")))
    return [Asked("What does this emoji show?", name, held_out(path), image=path) for path, name in named if name]


def write_glyphs(font: Path, folder: Path) -> None:
    """The bitmaps of a color font's characters, a PNG each, named by the character's number in hexadecimal."""
    need("fontTools")
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    with TTFont(font, lazy=True) as opened:
        bitmaps = opened["CBDT"].strikeData[0]
        for number, glyph in opened.getBestCmap().items():
            if glyph in bitmaps and number > 0xFF:  # digits and signs of old have pictures too
                (folder / f"{number:x}.png").write_bytes(bitmaps[glyph].imageData)


@dataclass(frozen=True)
class MediaSet:
    """A set: its records, and where it is from."""

    ask: Callable[[Say], list[Asked]]
    debs: tuple[Deb, ...]


PROMPTS = tuple(deb for language in LANGUAGES for deb in asterisk_prompts(language))
SETS = {
    "tuxpaint": MediaSet(tuxpaint, (TUXPAINT_STAMPS,)),
    "asterisk": MediaSet(asterisk, PROMPTS),
    "emoji": MediaSet(emoji, (NOTO_EMOJI,)),
}


def get(name: str, folder: Path, say: Say = quiet) -> Path:
    """Writes a set's records and media into a new folder: train.jsonl, test.jsonl, media, SOURCES.md.

    Raises:
        AtollError: there is no such set, something lies in the folder, or the set cannot be fetched.
    """
    if name not in SETS:
        raise AtollError("there is no such set", found=name, allowed=", ".join(SETS), remedy=closest(name, SETS))
    if folder.exists() and any(folder.iterdir()):
        raise AtollError("something is there", where=str(folder), remedy="name a new folder: --to FOLDER")
    asked = SETS[name].ask(say)
    say(f"writing {len(asked)} records")
    write_site(folder, asked)
    (folder / "SOURCES.md").write_text(sources(SETS[name].debs), encoding="utf-8")
    return folder


def sources(debs: Iterable[Deb], more: Sequence[str] = ()) -> str:
    """What the data are and under which licenses; `more` are further rows of the table."""
    rows = [f"| Debian {deb.name} {deb.version} | {deb.license} |" for deb in debs]
    return "\n".join(["# Sources", "", "| source | license |", "|---|---|", *rows, *more, ""])
