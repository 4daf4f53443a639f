"""What training would see of a folder: format, counts, lengths, what is left out and why, and samples with their loss.

Behind `atoll data FOLDER`. It reads and tokenizes by the same functions as a run, without writing to the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atoll.data.read import Report, open_source, records
from atoll.data.tokenize import Encoded, Objective, encode, fit

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Token:
    """A token as text, and whether there is a loss on it.

    Of the tokens that share one character, the last has the text and the others are empty.
    """

    text: str
    labeled: bool


@dataclass(frozen=True)
class Preview:
    """A folder as training would see it.

    Attributes:
        path: where it lies.
        files: the data files, with the split each names ("" where the split is by content).
        objective: `sft` for chats and completions, `causal_lm` for plain text.
        context: the longest sample, in tokens.
        report: the format, and how many records were read, kept, and left out for which reason.
        samples: number of samples in each split; long plain texts give several.
        lengths: quantile -> tokens of a record, those longer than the context included.
        tokens: tokens in all samples.
        labeled_tokens: those with a loss.
        shown: the first samples, token by token.
    """

    path: str
    files: dict[str, str]
    objective: Objective
    context: int
    report: Report
    samples: dict[str, int]
    lengths: dict[float, int]
    tokens: int
    labeled_tokens: int
    shown: tuple[tuple[Token, ...], ...]

    @property
    def labeled_share(self) -> float:
        """Tokens with a loss over all tokens; 0 where there are none."""
        return self.labeled_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`: each shown sample is a list of [text, labeled]."""
        return asdict(self) | {
            "report": asdict(self.report) | {"kept": self.report.kept},
            "labeled_share": self.labeled_share,
            "shown": [[[token.text, token.labeled] for token in sample] for sample in self.shown],
        }


def preview(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    show: int = 3,
    objective: Objective | None = None,
) -> Preview:
    """Read and tokenize everything at `path` once, and keep what tells how training would see it.

    Args:
        path: a client's file or folder.
        tokenizer: a fast tokenizer.
        context: the longest sample, in tokens.
        show: how many samples to keep token by token.
        objective: where the loss is; by the data's format if not given.

    Raises:
        AtollError: the source cannot be read.
    """
    source = open_source(path)
    report = Report()
    found = records(source, report)
    first = list(islice(found, 1))
    objective = objective or ("causal_lm" if first and first[0].form == "text" else "sft")
    samples, lengths, totals = {"train": 0, "test": 0}, array("q"), np.zeros(2, np.int64)
    shown: list[tuple[Token, ...]] = []
    for encoded in encode(chain(first, found), tokenizer, objective, report):
        lengths.append(len(encoded.ids))
        for start, stop in fit(encoded, context, objective, report):
            samples[encoded.record.split] += 1
            totals += stop - start, encoded.labeled[start:stop].sum()
            if len(shown) < show:
                shown.append(tuple(_tokens(encoded, start, stop, tokenizer)))
    return Preview(
        path=str(path),
        files={str(file.relative_to(source.path.parent)): split or "" for file, split in source.files},
        objective=objective,
        context=context,
        report=report,
        samples=samples,
        lengths={q: int(np.quantile(lengths, q, method="nearest")) for q in QUANTILES} if lengths else {},
        tokens=int(totals[0]),
        labeled_tokens=int(totals[1]),
        shown=tuple(shown),
    )


def _tokens(encoded: Encoded, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Token]:
    """Tokens as text, each decoded behind the ones before it: alone, some would lose a space or half a character."""
    ids = encoded.ids[start:stop].tolist()
    before = after = 0
    for at, labeled in enumerate(encoded.labeled[start:stop].tolist(), 1):
        known = str(tokenizer.decode(ids[before:after]))
        text = str(tokenizer.decode(ids[before:at]))
        if text.endswith("\ufffd") and at < len(ids):
            yield Token("", labeled)
        else:
            yield Token(text[len(known) :], labeled)
            before, after = after, at


def render(preview: Preview) -> RenderableType:
    """The preview for a terminal: the facts, then the samples with the labeled tokens in bold green."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in _facts(preview):
        table.add_row(name, value)
    return Group(
        table,
        *(
            Panel(_marked(sample), title=f"sample {number}: the loss is on the green part", title_align="left")
            for number, sample in enumerate(preview.shown, 1)
        ),
    )


def _facts(preview: Preview) -> list[tuple[str, str]]:
    report = preview.report
    left_out = [f"{count} {reason}, first at {place}" for reason, (count, place) in report.left_out.items()]
    return [
        ("path", preview.path),
        ("files", "\n".join(f"{name} ({split})" if split else name for name, split in preview.files.items())),
        ("format", f"{report.form or 'unknown'}, objective {preview.objective}"),
        ("unused columns", ", ".join(report.unused_columns) or "none"),
        ("records", f"{report.kept} kept of {report.read}"),
        ("left out", "\n".join(left_out) or "none"),
        ("samples", f"{preview.samples['train']} train, {preview.samples['test']} test"),
        ("tokens", f"{preview.tokens}, {preview.labeled_share:.1%} with a loss, context {preview.context}"),
        ("length", ", ".join(f"{q:.0%}: {length}" for q, length in preview.lengths.items()) or "-"),
        *([] if preview.tokens else [("usable", "no: a run leaves this client out")]),
    ]


def _marked(sample: tuple[Token, ...]) -> Text:
    from rich.text import Text

    marked = Text()
    for labeled, run in groupby(sample, key=lambda token: token.labeled):
        marked.append("".join(token.text for token in run), style="bold green" if labeled else "dim")
    return marked
