"""What training would see of a folder: format, counts, lengths, what is left out and why, and samples with their loss.

Behind `atoll data FOLDER`. It reads and tokenizes by the same functions as a run, without writing to the cache.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atoll.cache import Say, quiet, watched
from atoll.data.media import MODALITIES, Medium, Senses
from atoll.data.read import HELD_OUT, LABELS, Labels, Record, Report, open_source, records
from atoll.data.tokenize import COMPARING, NO_SENSES, Encoded, encode, fit

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
        objective: `sft` for chats and completions, `causal_lm` for plain text, `preference` for preferences.
        context: the longest sample, in tokens.
        report: the format, and how many records were read, kept, and left out for which reason.
        samples: number of samples in each split; long plain texts give several.
        lengths: quantile -> tokens of a record, those longer than the context included.
        tokens: tokens in all samples.
        labeled_tokens: those with a loss.
        shown: the first samples, token by token; places of a medium are one.
        shown_media: the files that stand there.
        media: modality -> pictures or sounds in all samples.
    """

    path: str
    files: dict[str, str]
    objective: Labels
    context: int
    report: Report
    samples: dict[str, int]
    lengths: dict[float, int]
    tokens: int
    labeled_tokens: int
    shown: tuple[tuple[Token, ...], ...]
    shown_media: tuple[tuple[str, ...], ...] = ()
    shown_choices: tuple[tuple[str, ...], ...] = ()
    """Of each shown sample the answers that its own is preferred to, where answers are compared."""
    media: Mapping[str, int] = field(default_factory=dict)

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
    objective: Labels | None = None,
    senses: Senses = NO_SENSES,
    say: Say = quiet,
    held_out: float = HELD_OUT,
) -> Preview:
    """Read and tokenize everything at `path` once, and keep what tells how training would see it.

    Args:
        path: a client's file or folder.
        tokenizer: a fast tokenizer.
        context: the longest sample, in tokens.
        show: how many samples to keep token by token.
        objective: where the loss is; by the data's format if not given.
        senses: how the model takes pictures and sounds; records with others are left out.
        say: hears how many records have been read, where it takes long.
        held_out: the share of records kept for evaluation where no file is named for it, in [0, 1).

    Raises:
        AtollError: the source cannot be read.
    """
    source = open_source(path, held_out)
    report = Report()
    found = watched(records(source, report), say, "records read")
    first = list(islice(found, 1))
    objective = objective or (LABELS[first[0].form] if first else "sft")
    samples, lengths, totals = {"train": 0, "test": 0}, array("q"), np.zeros(2, np.int64)
    shown: list[tuple[Token, ...]] = []
    shown_media: list[tuple[str, ...]] = []
    shown_choices: list[tuple[str, ...]] = []
    media: Counter[str] = Counter()
    for encoded in encode(chain(first, found), tokenizer, objective, report, senses, context):
        lengths.append(len(encoded.ids))
        for start, stop in fit(encoded, context, objective, report):
            samples[encoded.record.split] += 1
            totals += stop - start, encoded.labeled[start:stop].sum()
            media.update(one.modality for one in encoded.record.media)
            if len(shown) < show:
                shown.append(tuple(_once(_tokens(encoded, start, stop, tokenizer))))
                shown_media.append(tuple(_named(one, source.path.parent) for one in encoded.record.media))
                shown_choices.append(_others(encoded.record) if objective in COMPARING else ())
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
        shown_media=tuple(shown_media),
        shown_choices=tuple(shown_choices),
        media=dict(media),
    )


def _named(medium: Medium, root: Path) -> str:
    return f"{medium.modality}: {medium.path.relative_to(root) if medium.path else 'missing'}"


def _others(record: Record) -> tuple[str, ...]:
    """The answers that a record's question allows beside its own."""
    return tuple(one for one in record.choices if one != record.messages[-1]["content"])


def _once(tokens: Iterable[Token]) -> Iterator[Token]:
    """The places of one medium as one, with their number."""
    places = {one.placeholder for one in MODALITIES.values()}
    for text, same in groupby(tokens, key=lambda token: token.text if token.text in places else None):
        run = list(same)
        yield from run if text is None else [Token(f"{text} x {len(run)}", False)]


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
    shown = preview.shown, preview.shown_media, preview.shown_choices
    return Group(
        table,
        *(
            Panel(_marked(*sample), title=f"sample {number}: {_meaning(preview.objective)}", title_align="left")
            for number, sample in enumerate(zip(*shown, strict=True), 1)
        ),
    )


def _meaning(objective: Labels) -> str:
    """What the colors of a sample say."""
    return "green is chosen, red is not" if objective in COMPARING else "the loss is on the green part"


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
        ("samples", f"{preview.samples['train']} train, {preview.samples['test']} test{_none_held_out(preview)}"),
        ("tokens", f"{preview.tokens}, {preview.labeled_share:.1%} with a loss, context {preview.context}"),
        ("length", ", ".join(f"{q:.0%}: {length}" for q, length in preview.lengths.items()) or "-"),
        *([("media", ", ".join(f"{n} {name}" for name, n in preview.media.items()))] if preview.media else []),
        *([] if preview.tokens else [("usable", "no: a run leaves this client out")]),
    ]


def _none_held_out(preview: Preview) -> str:
    """Of few records a share drawn by content may be none: nothing then says how good the model is there."""
    none = preview.samples["train"] and not preview.samples["test"]
    return ": none is held out, so nothing is measured here; raise held_out, or name a file test.jsonl" if none else ""


def _marked(sample: tuple[Token, ...], media: tuple[str, ...], others: tuple[str, ...]) -> Text:
    from rich.text import Text

    marked = Text("".join(f"{one}\n" for one in media), style="cyan")
    for labeled, run in groupby(sample, key=lambda token: token.labeled):
        marked.append("".join(token.text for token in run), style="bold green" if labeled else "dim")
    for one in others:
        marked.append(f"\nor: {one}", style="red")
    return marked
