"""What a judge finds the best answer takes the place of the data's own: FedBis' second stage.

The judge is what an earlier stage, or another run, came to. It is asked once, before the stage begins, about every question
that those who train hold to train on; those that it cannot read are left out. Held-out questions keep the answers that the
data chose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from atoll import parts
from atoll.build import Plan, rebuilt
from atoll.cache import Counting, Say, content_hash, once
from atoll.data.read import Record, Report, records
from atoll.data.sources import ClientSource
from atoll.data.tokenize import encode, shown_answers, with_answer
from atoll.errors import AtollError
from atoll.local.judges import Judge
from atoll.local.work import EVALUATION_BATCH
from atoll.outcome import place
from atoll.record.folder import RunFolder
from atoll.result import Result, load_result


def judged(ready: Plan, folder: RunFolder, say: Say) -> Plan:
    """The plan with the judge's choices in its data; as it is where it names no judge.

    They are kept in the run's folder, so that a resumed run learns the same.
    """
    judge = ready.recipe.judged_by
    if judge is None:
        return ready

    def make(partial: Path) -> None:
        partial.chmod(0o700)  # it holds what clients hold
        asked = asking(place(judge, folder), ready.recipe.finetune.context, say)
        for client, source in ready.sources.items():
            rewrite(client, source, partial / quoted(client), asked if client in ready.learners else None, say)

    made = once(folder.judged, make).absolute()
    paths = {client: str(made / quoted(client)) for client in ready.sources}
    tree = {**ready.tree, "data": {"use": "clients", "paths": paths, "held_out": 0.0}}
    return rebuilt(ready, tree)


@dataclass(frozen=True)
class Asking:
    """A judge at hand."""

    result: Result
    judge: Judge
    context: int

    @torch.no_grad()
    def __call__(self, each: list[Record]) -> list[Record]:
        """The records with the answer that the judge scores the highest, but for those that it cannot read."""
        model, tokenizer = self.result.model, self.result.tokenizer
        score = self.judge.scored_by(tokenizer)
        found = encode(each, tokenizer, self.judge.labels, Report(), context=self.context)
        samples = {one.record.row: one.sample for one in found}
        scores = score(model, list(samples.values()), lambda samples: {}) if samples else []
        of = dict(zip(samples, scores, strict=True))
        return [with_answer(one, best(one, self.order(one), of[one.row])) for one in each if one.row in of]

    def order(self, one: Record) -> Sequence[str]:
        """A record's choices as the judge's scores have them."""
        return shown_answers(one) if self.judge.labels == "selector" else one.choices


def best(one: Record, answers: Sequence[str], scores: Tensor) -> str:
    """The answer with the greatest score. Of equal ones some hash decides: their order knows which one the data chose."""
    asked = json.dumps([message["content"] for message in one.messages[:-1]])
    return max(zip(scores.tolist(), answers, strict=True), key=lambda pair: (pair[0], content_hash(asked, pair[1])))[1]


def asking(other: RunFolder, context: int, say: Say) -> Asking:
    """The judge that a run came to."""
    result = load_result(other, say)
    judge: Judge = parts.make("objective", result.outcome.recipe.finetune.objective, "finetune.objective")
    return Asking(result, judge, context)


def rewrite(client: str, source: Any, target: Path, asked: Asking | None, say: Say) -> None:
    """A client's records in a folder of their own, judged if somebody is asked."""
    if not isinstance(source, ClientSource):
        raise AtollError("a judge reads records, and this client has none", where="data", found=client)
    target.mkdir(parents=True)
    kept = None if source.rows is None else {int(row) for row in source.rows}
    each = [one for one in records(source.source, Report()) if kept is None or one.row in kept]
    if any(one.media for one in each):
        raise AtollError("a judge reads texts alone", where="data", found=f"pictures or sounds of {client}")
    train, test = ([one for one in each if one.split == split] for split in ("train", "test"))
    if asked:
        say(f"{client}: judging {len(train)} questions")
        judged = list(judge(train, asked, Counting(say, f"{client}, judged", len(train))))
        if left_out := len(train) - len(judged):
            say(f"{client}: {left_out} questions left out, which the judge cannot read")
        train = judged
    for split, some in {"train": train, "test": test}.items():
        (target / f"{split}.jsonl").write_text("".join(map(line, some)), encoding="utf-8")


def quoted(client: str) -> str:
    """The client's folder: no name leaves the run's, and no two share one."""
    return quote(client, safe="")


def judge(each: list[Record], asked: Asking, count: Counting) -> Iterator[Record]:
    """A batch at a time."""
    for at in range(0, len(each), EVALUATION_BATCH):
        batch = each[at : at + EVALUATION_BATCH]
        yield from asked(batch)
        count.more(len(batch))


def line(one: Record) -> str:
    """A record as JSON."""
    choices = {"choices": list(one.choices)} if one.choices else {}
    if one.form == "prompt_completion":
        prompt, completion = (message["content"] for message in one.messages)
        return json.dumps({"prompt": prompt, "completion": completion, **choices}, ensure_ascii=False) + "\n"
    return json.dumps({"messages": one.messages, **choices}, ensure_ascii=False) + "\n"
