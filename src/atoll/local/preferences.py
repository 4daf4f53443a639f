"""Learning from preferences: of the answers that a question allows, one was chosen.

DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) needs no reward model. What a model rewards is how much likelier it finds
an answer than a reference does, and the chosen answer is to have the greatest reward:

    r(answer) = beta (log p(answer | question) - log p_ref(answer | question))
    loss = -log softmax(r)[chosen]

With two answers that is -log sigmoid(r(chosen) - r(rejected)); with more, it is S-DPO (Chen et al. 2024, arXiv 2406.09215).

The reference is the model as the stage found it: as it begins, or what the server sends where a run starts `from` another's
result. It is run once for each sample, whose log-likelihoods are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor, nn

from atoll.data.collate import Sample
from atoll.local.choices import choices_of, log_likelihoods, share_of_best
from atoll.local.language import reader, refuse_without_text
from atoll.local.reference import Reference
from atoll.local.work import Measured, Needs, Objective
from atoll.models.features import features_of


@dataclass(frozen=True)
class Asked:
    """A batch: samples, and what the reference says of their answers, float64 [choices] each."""

    samples: Sequence[Sample]
    reference: Sequence[Tensor]


@dataclass(frozen=True)
class DPO:
    """See the module's text."""

    beta: float
    needs = Needs("preference", reference=True, texts=2)

    def bind(self, model: nn.Module, tokenizer: Any) -> Objective:
        """The objective on this model; as it is now, it is the reference."""
        refuse_without_text(tokenizer, "dpo")
        features = features_of(model)
        reference = Reference(model, reader(features))

        def collate(samples: Sequence[Sample]) -> Asked:
            return Asked(samples, reference(model, samples))

        def rewards(found: Sequence[Tensor], batch: Asked) -> list[Tensor]:
            return [self.beta * (ours - theirs) for ours, theirs in zip(found, batch.reference, strict=True)]

        def loss(model: nn.Module, batch: Asked) -> tuple[Tensor, int]:
            found = rewards(log_likelihoods(model, batch.samples, reference.media), batch)
            return torch.stack(losses(found, batch.samples)).sum(), len(batch.samples)

        def measure(model: nn.Module, samples: Sequence[Sample]) -> Measured:
            batch = Asked(samples, reference(model, samples, together=True))
            still = reference.same(model)  # then nothing has gained on itself, whatever rounding says
            found = list(batch.reference) if still else log_likelihoods(model, samples, reference.media)
            rewarded = rewards(found, batch)
            right, best = (
                [share_of_best(*one) for one in zip(each, samples, strict=True)] for each in (found, rewarded)
            )
            return Measured(torch.stack(losses(rewarded, samples)), right, best)

        return Objective(collate, loss, lambda batch: len(batch.samples), measure, reference.take, features is not None)


def losses(rewards: Sequence[Tensor], samples: Sequence[Sample]) -> list[Tensor]:
    """-log softmax(rewards)[chosen] of each sample."""
    return [-torch.log_softmax(r, 0)[choices_of(sample).right] for r, sample in zip(rewards, samples, strict=True)]


def dpo(beta: Annotated[float, Gt(0)] = 0.1) -> DPO:
    """Direct preference optimization: the chosen answer gains on the others, measured against the model as it began.

    Args:
        beta: how much a log-likelihood's distance from the reference counts; a small one lets the model go further away.
    """
    return DPO(beta)
