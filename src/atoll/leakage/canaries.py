"""Canary exposure: has the model learned a secret that a few training records hold?

The true code of each canary is ranked by its loss among others drawn at random; exposure is log2(codes) - log2(rank), in
bits. A model that has learned a code ranks it first: log2(codes) bits. Of codes it never saw, as of the base model, the
mean is about 1.44 bits.

Source: Carlini et al. 2019 (arXiv 1802.08232), section 4. A code's loss is its log-perplexity: the sum over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atoll.data.canaries import code, draw
from atoll.data.collate import IGNORE, Sample
from atoll.data.read import Planted, Report, planted_records
from atoll.data.sources import ClientSource, planted_in
from atoll.data.tokenize import encode
from atoll.errors import AtollError
from atoll.keys import rng
from atoll.leakage.scores import expected_exposure, exposure, mean_and_error, rank_of
from atoll.leakage.subject import NotApplicable, Subject
from atoll.params import Params
from atoll.record.leakage import Finding

NAME = "canaries"


def canaries(subject: Subject, codes: int) -> list[Finding]:
    """Mean exposure of the run's canaries, of as many that no record holds, and of the run's under the base model.

    Raises:
        NotApplicable: the run's data have no canaries.
        AtollError: there are fewer codes than are to be ranked.
    """
    inserted = inserted_in(subject)
    digits = min(len(one.answer) for one in inserted)
    if codes > 10**digits:
        raise AtollError(
            "more codes to rank than there are", where="--candidates", found=codes, allowed=f"2 to {10**digits}",
            remedy="rank fewer, or run again with more data.digits",
        )  # fmt: skip
    control = draw(len(inserted), digits, subject.plan.recipe.seed, "control")
    count, most = len(inserted), f"among {codes} codes: at most {exposure(1, codes):.1f}"
    read = f"{count} canaries, read {times_read(subject) / count:.1f} times each, {most}"
    cases = {
        "exposure in bits": (subject.tuned, inserted, read),
        "exposure in bits, not inserted": (subject.tuned, control, f"{count} canaries, {most}"),
        "exposure in bits, base model": (subject.base, inserted, f"{count} canaries, {most}"),
    }
    rows = []
    for measure, (params, found, of) in cases.items():
        bits = [one_exposure(subject, params, canary, codes, measure) for canary in found]
        rows.append(Finding(NAME, measure, *mean_and_error(np.array(bits)), expected_exposure(codes), of))
    return rows


def times_read(subject: Subject) -> int:
    """How often a planted sample was in a batch: a short run may never come to one."""
    rows: dict[str, Any] = {name: data.train.rows for name, data in subject.trained.items()}  # type: ignore[attr-defined]
    return sum(int((rows[name][numbers] < 0).sum()) for name, numbers in subject.read.items())


def inserted_in(subject: Subject) -> list[Planted]:
    """The canaries among what the model was trained on, each once: the recipe makes the same ones again."""
    sources = [subject.plan.sources[name] for name in subject.trained]
    found = dict.fromkeys(one for source in sources if isinstance(source, ClientSource) for one in planted_in(source))
    if not found:
        raise NotApplicable(
            "no canaries in the run's data", where="data",
            remedy="run again with data: {use: with-canaries, inner: DATA}, DATA being what stands there now",
        )  # fmt: skip
    return list(found)


def one_exposure(subject: Subject, params: Params, canary: Planted, codes: int, measure: str) -> float:
    """A canary's exposure among `codes` codes, its own included."""
    others = other_codes(canary, codes - 1)
    samples = encoded(subject, [canary, *(canary._replace(answer=other) for other in others)])
    mean = subject.losses(params, samples, f"{measure}: codes of one canary")
    total = mean * np.array([int((labels[1:] != IGNORE).sum()) for _, labels, *_ in samples])
    return exposure(rank_of(total[0], total[1:]), codes)


def other_codes(canary: Planted, count: int) -> list[str]:
    """Different codes of the same length, drawn by the canary's question, without its own."""
    drawn, digits = rng("codes", canary.question), len(canary.answer)
    found: dict[str, None] = {}
    while len(found) < count:
        if (other := code(drawn, digits)) != canary.answer:
            found[other] = None
    return list(found)


def encoded(subject: Subject, planted: Sequence[Planted]) -> list[Sample]:
    """Canaries as training saw them: the same format, template and labels."""
    form: Any = next(report.form for report in subject.things.reports.values() if report.form)
    labels = subject.plan.needs.labels
    made = encode(planted_records(planted, form), subject.things.tokenizer, labels, Report())
    return [Sample(one.ids, np.where(one.labeled, one.ids, np.int32(IGNORE))) for one in made]
