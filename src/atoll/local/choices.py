"""How likely each answer is that a question allows, with what all of them begin with computed once.

    log p(choice | question) = sum over the choice's tokens t_i of log p(t_i | question, t_1 ... t_{i-1})

The question's keys and values are computed once and repeated for its choices, which then go through the model together:
eight choices of five tokens after a question of a hundred are 140 tokens, in the place of 840. Families that keep a
recurrent state in the place of keys and values are given every text in full, and so are models that train with gradient
checkpointing, which keeps none.

Source of the measure: likelihood scoring as in Brown et al. 2020 (arXiv 2005.14165), 2.4, without a length's division.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.data.collate import IGNORE, Batch, Choices, Sample, choices_in, language_model, pad, pad_first
from atoll.local.objectives import chunked_cross_entropy, run_without_head, token_losses

Media = Callable[[Sequence[Sample]], Mapping[str, Tensor]]
"""The features of samples' media, by modality."""

MOST_ROWS = 64
"""Choices that go through the model together: the keys and values of their questions are repeated for each."""


def log_likelihoods(model: nn.Module, samples: Sequence[Sample], media: Media) -> list[Tensor]:
    """Of each sample the log-likelihood of each of its choices, float64 [choices]; gradients go through where they are on.

    Args:
        model: any transformers causal LM, plain or wrapped by PEFT.
        samples: all of them with choices.
        media: what the model sees and hears of samples.
    """
    score = together if shares(model) else in_full
    return in_parts(samples, lambda some: score(model, some, media))


def in_parts(samples: Sequence[Sample], score: Callable[[list[Sample]], Sequence[Tensor]]) -> list[Tensor]:
    """The scores of samples' choices, of as many samples at a time as go through a model together."""
    order = sorted(range(len(samples)), key=lambda i: shape(samples[i]))  # those of a size together: little padding
    found: dict[int, Tensor] = {}
    for part in parts(order, [len(choices_of(sample).rest) for sample in samples]):
        found |= zip(part, score([samples[i] for i in part]), strict=True)
    return [found[i] for i in range(len(samples))]


def share_of_best(scores: Tensor, sample: Sample) -> float:
    """1 if the sample's own answer has the greatest score, 0 if another has; a guess's share of those that have it.

    >>> shown = Sample(np.array([1]), np.array([1]), (), Choices(1, (), (), right=0))
    >>> [share_of_best(torch.tensor(scores), shown) for scores in ([3.0, 1.0], [1.0, 3.0], [2.0, 2.0])]
    [1.0, 0.0, 0.5]
    """
    best = scores == scores.max()
    return float(best[choices_of(sample).right]) / int(best.sum())


def loss_of_own(scores: Tensor, sample: Sample) -> Tensor | None:
    """The mean loss over the sample's labeled tokens, where these are its own answer's; None where it has others, too.

    >>> ids = np.array([7, 8, 9], np.int32)
    >>> choices = Choices(1, (ids[1:], ids[:1]), (np.array([True, True]), np.array([True])), right=0)
    >>> answer, all_of_it = np.array([IGNORE, 8, 9], np.int32), ids
    >>> [loss_of_own(torch.tensor([-3.0, -1.0]), Sample(ids, labels, (), choices)) for labels in (answer, all_of_it)]
    [tensor(1.5000), None]
    """
    choices = choices_of(sample)
    own = labels_of(choices, choices.rest[choices.right], choices.labeled[choices.right])
    return -scores[choices.right] / int((own != IGNORE).sum()) if np.array_equal(own, sample.labels) else None


def shape(sample: Sample) -> tuple[int, int]:
    """The longest choice, and the question, in tokens."""
    choices = choices_of(sample)
    return max(map(len, choices.rest)), choices.shared


def parts(order: Sequence[int], rows: Sequence[int]) -> Iterator[list[int]]:
    """Samples in this order, as many at a time as have `MOST_ROWS` choices; at least one.

    >>> list(parts([2, 0, 1], rows=[60, 5, 3]))
    [[2, 0], [1]]
    """
    part: list[int] = []
    for one in order:
        if part and sum(rows[i] for i in [*part, one]) > MOST_ROWS:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def together(model: nn.Module, samples: Sequence[Sample], media: Media) -> list[Tensor]:
    """See `log_likelihoods`."""
    from transformers import DynamicCache

    each = [choices_of(sample) for sample in samples]
    device = next(model.parameters()).device
    questions = pad_first([sample.ids[: one.shared] for sample, one in zip(samples, each, strict=True)])
    questions = replace(questions, media=media(samples)).to(device)
    last = torch.zeros_like(questions.input_ids, dtype=torch.bool)
    last[:, -1] = True
    cache = DynamicCache(config=language_model(model).config)
    before_first, head = run_without_head(model, questions, last, cache)
    counts = [len(one.rest) for one in each]
    sample_of = torch.arange(len(samples), device=device).repeat_interleave(torch.tensor(counts, device=device))
    cache.batch_select_indices(sample_of)
    rest = after(questions, each, sample_of)
    scored, first = rest.targets != IGNORE, rest.labels[:, 0] != IGNORE
    before_others, _ = run_without_head(model, rest, scored, cache)
    hidden = torch.cat([before_first[sample_of[first]], before_others])
    targets = torch.cat([rest.labels[first, 0], rest.targets[scored]])
    rows = torch.cat([first.nonzero()[:, 0], scored.nonzero()[:, 0]])
    losses = chunked_cross_entropy(hidden, targets, head).double()
    return list(torch.split(-losses.new_zeros(len(sample_of)).index_add(0, rows, losses), counts))


def after(questions: Batch, each: Sequence[Choices], sample_of: Tensor) -> Batch:
    """What comes after the questions, a row a choice, padded on the right."""
    texts = [pair for one in each for pair in zip(one.rest, one.labeled, strict=True)]
    batch = pad([Sample(ids, np.where(labeled, ids, IGNORE)) for ids, labeled in texts], pad_id=0).to(sample_of.device)
    assert questions.mask is not None
    own = torch.tensor(batch.lengths, device=sample_of.device)[:, None]
    mask = torch.cat([questions.mask[sample_of], (batch.position_ids < own).long()], dim=1)
    lengths = torch.tensor(questions.lengths, device=sample_of.device)[sample_of]
    positions = batch.position_ids.minimum(own - 1)  # padding stands at the last: a table of positions may end there
    return replace(batch, mask=mask, position_ids=positions + lengths[:, None])


def choices_of(sample: Sample) -> Choices:
    """The sample's choices, of one that has some."""
    choices = choices_in(sample)
    assert choices is not None
    return choices


def in_full(model: nn.Module, samples: Sequence[Sample], media: Media) -> list[Tensor]:
    """The same from every text in full, a row each."""
    texts = texts_of(samples)
    batch = replace(pad(texts, pad_id=0), media=media(texts)).to(next(model.parameters()).device)
    losses, owners = token_losses(model, batch)
    sums = -losses.double().new_zeros(len(texts)).index_add(0, owners, losses.double())
    return list(torch.split(sums, [len(choices_of(sample).rest) for sample in samples]))


def texts_of(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample's question with each of its choices, which has the loss."""
    return [
        Sample(np.concatenate([sample.ids[: one.shared], ids]), labels_of(one, ids, labeled), sample.media)
        for sample, one in ((sample, choices_of(sample)) for sample in samples)
        for ids, labeled in zip(one.rest, one.labeled, strict=True)
    ]


def labels_of(choices: Choices, ids: NDArray[np.int32], labeled: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Of a question with one of its choices."""
    return np.concatenate([np.full(choices.shared, IGNORE, np.int32), np.where(labeled, ids, np.int32(IGNORE))])


def shares(model: nn.Module) -> bool:
    """Whether what choices have in common can be computed once: by keys and values that are kept, and can be repeated.

    A family with a recurrent state has none; a model that forgets activations while it trains forgets these, too.
    """
    from transformers import DynamicCache

    inner = language_model(model)
    forgets = model.training and any(getattr(one, "gradient_checkpointing", False) for one in inner.modules())
    if getattr(inner, "_is_stateful", False) or forgets:
        return False
    return all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=inner.config).layers)
