"""How likely each answer is that a question allows, with what all of them begin with computed once.

    log p(choice | question) = sum over the choice's tokens t_i of log p(t_i | question, t_1 ... t_{i-1})

The question's keys and values are computed once and repeated for the choices, which then go through the model together:
eight choices of five tokens after a question of a hundred are 140 tokens, in the place of 840. Families that keep a
recurrent state in the place of keys and values are given every text in full.

Source of the measure: likelihood scoring as in Brown et al. 2020 (arXiv 2005.14165), 2.4, without a length's division.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atoll.data.collate import IGNORE, Batch, Choices, language_model, pad
from atoll.local.objectives import token_losses


def log_likelihoods(model: nn.Module, question: Batch, choices: Choices) -> Tensor:
    """The log-likelihood of each choice, float64 [choices].

    Args:
        model: any transformers causal LM, plain or wrapped by PEFT.
        question: the one sample that is the beginning of all the choices' texts, `choices.shared` tokens.
        choices: what comes after it.
    """
    if getattr(language_model(model), "_is_stateful", False):
        return in_full(model, question, choices)
    media = {f"{name}_features": x for name, x in question.media.items()}
    asked: Any = model(input_ids=question.input_ids, use_cache=True, **media, **_last_alone(model))
    if not hasattr(asked.past_key_values, "batch_repeat_interleave"):
        return in_full(model, question, choices)
    count, device = len(choices.rest), question.input_ids.device
    cache = asked.past_key_values
    cache.batch_repeat_interleave(count)
    ids, labels = rows(choices)
    answer: Any = model(input_ids=ids.to(device), past_key_values=cache, use_cache=True)
    logits = torch.cat([asked.logits[:, -1:].expand(count, -1, -1), answer.logits[:, :-1]], dim=1)
    return summed(logits, labels.to(device))


def rows(choices: Choices) -> tuple[Tensor, Tensor]:
    """What comes after the question, a row a choice, padded on the right: tokens and labels, long [choices, longest]."""
    samples = [
        (ids, np.where(labeled, ids, IGNORE)) for ids, labeled in zip(choices.rest, choices.labeled, strict=True)
    ]
    batch = pad(samples, pad_id=0)
    return batch.input_ids, batch.labels


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probabilities [rows, n, V] of the labels [rows, n], summed over each row's."""
    log_p = torch.log_softmax(logits.float(), -1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return log_p.double().masked_fill(labels == IGNORE, 0).sum(1)


def in_full(model: nn.Module, question: Batch, choices: Choices) -> Tensor:
    """The same from every text in full, one at a time."""
    beginning = question.input_ids[0].cpu().numpy()
    found = []
    for ids, labeled in zip(choices.rest, choices.labeled, strict=True):
        text = np.concatenate([beginning, ids])
        labels = np.concatenate([np.full(len(beginning), IGNORE), np.where(labeled, ids, IGNORE)])
        batch = pad([(text, labels)], pad_id=0).to(question.input_ids.device)
        batch = Batch(batch.input_ids, batch.labels, batch.position_ids, batch.lengths, False, question.media)
        found.append(-token_losses(model, batch)[0].double().sum())
    return torch.stack(found)


def _last_alone(model: nn.Module) -> dict[str, int]:
    """Logits of the last position alone, where the family can."""
    takes = "logits_to_keep" in inspect.signature(language_model(model).forward).parameters
    return {"logits_to_keep": 1} if takes else {}
