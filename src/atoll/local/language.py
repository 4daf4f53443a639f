"""The objectives of language models. They differ in which tokens have a label, which is decided when data are tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.data.collate import IGNORE, Batch, choices_in, media_in, pack, packable, pad
from atoll.data.read import Labels
from atoll.errors import AtollError
from atoll.local.choices import Media, log_likelihoods, loss_of_own, share_of_best
from atoll.local.objectives import cross_entropy, token_losses
from atoll.local.work import Measured, Needs, Objective
from atoll.models.features import Features, features_of

MeanOver = Literal["tokens", "samples"]


@dataclass(frozen=True)
class Language:
    """Cross-entropy of a causal language model at labeled tokens."""

    labels: Labels
    mean_over: MeanOver = "tokens"

    @property
    def needs(self) -> Needs:
        """Samples, and no more."""
        return Needs(self.labels)

    def bind(self, model: nn.Module, tokenizer: Any) -> Objective:
        """The objective on this model: samples share one packed row where the family allows it."""
        refuse_without_text(tokenizer, self.labels)
        device = next(model.parameters()).device
        together, features = packable(model), features_of(model)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        media = reader(features)

        def collate(samples: Sequence[Any]) -> Batch:
            batch = pack(samples) if together else pad(samples, pad_id)
            return replace(batch, media=media(samples)).to(device)

        def measure(model: nn.Module, samples: Sequence[Any]) -> Measured:
            asked = [i for i, sample in enumerate(samples) if choices_in(sample)]
            found = dict(zip(asked, log_likelihoods(model, [samples[i] for i in asked], media), strict=True))
            right = [share_of_best(found[i], sample) if i in found else None for i, sample in enumerate(samples)]
            known = {i: loss for i in asked if (loss := loss_of_own(found[i], samples[i])) is not None}
            if rest := [i for i in range(len(samples)) if i not in known]:
                known |= zip(rest, _means(model, collate([samples[i] for i in rest])), strict=True)
            return Measured(torch.stack([known[i].float() for i in range(len(samples))]), right)

        loss, terms = (cross_entropy, _tokens) if self.mean_over == "tokens" else (_sum_of_means, _answered)
        return Objective(collate, loss, terms, measure, sees=features is not None)


def refuse_without_text(tokenizer: Any, objective: str) -> None:
    """Raises AtollError for a model without a tokenizer."""
    if tokenizer is None:
        raise AtollError(
            "a text objective needs a named model", where="finetune.objective", found=objective,
            remedy="a model made by a factory of yours needs an objective of yours: objective: module:factory",
        )  # fmt: skip


def reader(features: Features | None) -> Media:
    """What the model sees and hears of samples."""
    return lambda samples: features.of([one for sample in samples for one in media_in(sample)]) if features else {}


def sft(mean_over: MeanOver = "tokens") -> Language:
    """Supervised fine-tuning: the loss is on the answers alone.

    A step's loss is the mean over the `tokens` of all its answers, as TRL's; or over `samples`, of the mean over each one's
    tokens: where answers of one word and of a paragraph are mixed, the word then counts as much as the paragraph.
    """
    return Language("sft", mean_over)


def causal_lm() -> Language:
    """Causal language modeling: the loss is on every token."""
    return Language("causal_lm")


def _tokens(batch: Batch) -> int:
    return int((batch.targets != IGNORE).sum())


def _answered(batch: Batch) -> int:
    """Samples with a labeled token."""
    return int((torch.bincount(batch.owners[batch.targets != IGNORE]) > 0).sum())


def _sum_of_means(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    return _means(model, batch).sum(), _answered(batch)


def _means(model: nn.Module, batch: Batch) -> Tensor:
    """Of each sample the mean over its labeled tokens, fp32 [samples]; 0 where it has none."""
    losses, owners = token_losses(model, batch)
    sums = torch.zeros(len(batch.lengths), device=losses.device).index_add(0, owners, losses)
    return sums / torch.bincount(owners, minlength=len(batch.lengths)).clamp_min(1)
