"""Judges of answers: of those that a question allows, the chosen one is to have the greatest score.

    loss = -log softmax(scores)[chosen]

With two answers that is -log sigmoid(score(chosen) - score(rejected)), Bradley and Terry's (Christiano et al. 2017, arXiv
1706.03741). A judge answers no questions itself: what it says of answers is what another model learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atoll.data.collate import Sample, pad
from atoll.data.read import Labels
from atoll.errors import AtollError
from atoll.local.choices import Media, choices_of, in_parts, log_likelihoods, share_of_best, texts_of
from atoll.local.language import reader, refuse_without_text
from atoll.local.objectives import run_without_head
from atoll.local.preferences import losses
from atoll.local.work import Measured, Needs, Objective
from atoll.models.features import features_of

Score = Callable[[nn.Module, Sequence[Sample], Media], Sequence[Tensor]]
"""(model, samples, media) -> of each sample the scores of its answers, [choices]."""


@dataclass(frozen=True)
class Judge:
    """See the module's text."""

    name: str
    labels: Labels
    scored_by: Callable[[Any], Score]
    """The tokenizer -> how answers are scored."""

    @property
    def needs(self) -> Needs:
        """Of a preference both answers go through the model, of a selector's question one text."""
        return Needs(self.labels, texts=2 if self.labels == "preference" else 1)

    def bind(self, model: nn.Module, tokenizer: Any) -> Objective:
        """The objective on this model."""
        refuse_without_text(tokenizer, self.name)
        features, score = features_of(model), self.scored_by(tokenizer)
        media = reader(features)

        def each(model: nn.Module, samples: Sequence[Sample]) -> tuple[Tensor, Sequence[Tensor]]:
            found = score(model, samples, media)
            return torch.stack(losses(found, samples)), found

        def loss(model: nn.Module, samples: Sequence[Sample]) -> tuple[Tensor, int]:
            return each(model, samples)[0].sum(), len(samples)

        def measure(model: nn.Module, samples: Sequence[Sample]) -> Measured:
            told, found = each(model, samples)
            return Measured(told, (), [share_of_best(*one) for one in zip(found, samples, strict=True)])

        return Objective(list, loss, len, measure, sees=features is not None)


def reward_model() -> Judge:
    """A model of rewards: an answer's is the logit of the end-of-sequence token after its last one.

    So the head is a row of the model's own, and what trains is the space that the recipe names. TRL's RewardTrainer has the
    same loss, and a head of its own, which begins at random.
    """
    return Judge("reward-model", "preference", lambda tokenizer: partial(logits_at_the_end, token=end_of(tokenizer)))


def selector() -> Judge:
    """A selector, as FedBis has it: a question shows the answers under letters, and the letter of the chosen one is right.

    Source: Wu et al. 2024 (arXiv 2411.15038), where two answers are shown. The score is a letter's log-likelihood.
    """
    return Judge("selector", "selector", lambda tokenizer: log_likelihoods)


def end_of(tokenizer: Any) -> int:
    """The token that ends a text. Raises AtollError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise AtollError(
            "a reward is the logit of the token that ends a text", where="finetune.objective",
            found="a tokenizer without one", remedy="objective: selector needs none",
        )  # fmt: skip
    return int(tokenizer.eos_token_id)


def logits_at_the_end(model: nn.Module, samples: Sequence[Sample], media: Media, token: int) -> Sequence[Tensor]:
    """The logit of `token` after the last labeled token of each answer, fp32 [choices] for each sample."""
    return in_parts(samples, lambda some: _logits_at_the_end(model, some, media, token))


def _logits_at_the_end(model: nn.Module, samples: Sequence[Sample], media: Media, token: int) -> Sequence[Tensor]:
    texts = texts_of(samples)
    batch = replace(pad(texts, pad_id=0), media=media(texts)).to(next(model.parameters()).device)
    last = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, text in enumerate(texts):
        last[row, int(np.flatnonzero(text.labels >= 0)[-1])] = True
    hidden, head = run_without_head(model, batch, last)
    return torch.split(head.column(hidden, token), [len(choices_of(sample).rest) for sample in samples])
