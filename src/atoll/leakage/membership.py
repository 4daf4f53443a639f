"""Membership inference: was this sample trained on?

Members are training samples that went into an update, non-members held-out ones of the same sites.

Two scores, each higher for a likelier member:

    loss               - l(x; tuned)                   Yeom et al. 2018 (arXiv 1709.01604), adversary 1
    likelihood ratio   l(x; base) - l(x; tuned)        Carlini et al. 2022 (arXiv 2112.03570) with one reference model, which
                                                       is the base model, as in Mireshghallah et al. 2022 (arXiv 2203.03929)

l is the mean loss over a sample's labeled tokens. The second takes out how hard a sample is for any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atoll.data.sources import ClientData
from atoll.keys import rng
from atoll.leakage.scores import Floats, auc, auc_error, true_positives
from atoll.leakage.subject import NotApplicable, Subject
from atoll.record.leakage import Finding

NAME = "membership"
RATE = 0.01
"""Of false positives."""


def membership(subject: Subject, samples: int) -> list[Finding]:
    """Both scores over all sites, at most `samples` members of each and as many others.

    Raises:
        NotApplicable: no site that trained has held-out samples.
    """
    members, others = balanced(subject, samples)
    both = [*members, *others]
    tuned = subject.losses(subject.tuned, both, "membership, tuned model: samples")
    base = subject.losses(subject.base, both, "membership, base model: samples")
    count = len(members)
    scores = {"loss": -tuned, "likelihood ratio": base - tuned}
    return [row for name, score in scores.items() for row in measured(name, score[:count], score[count:])]


def balanced(subject: Subject, samples: int) -> tuple[list[Any], list[Any]]:
    """(members, others): as many of each site, drawn by key. Canaries are no members: they are made to be learned."""
    members: list[Any] = []
    others: list[Any] = []
    for name, data in subject.trained.items():
        read = ordinary(data.train, sorted(set(subject.read.get(name, ()))))
        count = min(samples, len(read), len(data.test))
        drawn = rng(subject.plan.recipe.seed, NAME, name)
        members += [data.train[int(i)] for i in drawn.permutation(read)[:count]]
        others += [data.test[int(i)] for i in drawn.permutation(len(data.test))[:count]]
    if not members:
        raise NotApplicable(
            "no site has held-out samples to tell members from", where="data",
            found=", ".join(f"{name}: {told(data)}" for name, data in subject.trained.items()),
            remedy="run again with data.held_out above 0, or with files named for it",
        )  # fmt: skip
    return members, others


def told(data: ClientData) -> str:
    """`30 training samples, 0 held out`."""
    return f"{len(data.train)} training samples, {len(data.test)} held out"


def ordinary(train: Sequence[Any], numbers: Sequence[int]) -> Sequence[int]:
    """Of these training samples those that were not planted, whose rows are negative."""
    rows = getattr(train, "rows", None)
    return numbers if rows is None else [number for number in numbers if rows[number] >= 0]


def measured(name: str, members: Floats, others: Floats) -> list[Finding]:
    """AUC, and the true positives at a low rate of false ones."""
    area, found = auc(members, others), true_positives(members, others, RATE)
    of = f"{len(members)} members, {len(others)} non-members"
    too_few = f"{len(others)} non-members; it takes {round(1 / RATE)}"
    return [
        Finding(NAME, f"{name}: AUC", area, auc_error(area, len(members), len(others)), 0.5, of),
        Finding(NAME, f"{name}: TPR at {RATE:.0%} FPR", found, None, RATE, too_few if found is None else of),
    ]
