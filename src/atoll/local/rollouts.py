"""Rollouts: several completions of each prompt, sampled from the model as it is.

A prompt goes through the model once; its keys and values are repeated for its completions, which then grow together, a token
of each at a time. Those that have ended leave when there are enough of them, so that what is left is not slowed down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.data.collate import IGNORE, Batch, Sample, evaluating, language_model, pad_first
from atoll.exchange import WorkFailed
from atoll.local.choices import Media, shares
from atoll.local.objectives import run_without_head

LEAVE = 0.75
"""Where fewer than this share of the rows are still growing, the others leave."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    each: int
    """Completions of a prompt."""
    most_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    ends: Sequence[int]
    """Tokens that end a completion; they belong to it."""
    banned: Sequence[int] = ()
    """Tokens that are never drawn: the places of pictures and sounds."""


@torch.no_grad()
def rollouts(model: nn.Module, prompts: Sequence[Sample], media: Media, how: Sampling) -> list[list[NDArray[np.int32]]]:
    """Of each prompt its completions, drawn with torch's global generator.

    Args:
        model: any transformers causal LM with a cache of keys and values, plain or wrapped by PEFT.
        prompts: their tokens; labels are not looked at.
        media: what the model sees and hears of prompts.
        how: see `Sampling`.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    questions = pad_first([sample.ids for sample in prompts])
    questions = replace(questions, media=media(prompts)).to(device)
    last = torch.zeros_like(questions.input_ids, dtype=torch.bool)
    last[:, -1] = True
    cache = DynamicCache(config=language_model(model).config)
    with evaluating(model):
        hidden, head = run_without_head(model, questions, last, cache)
        growing = torch.arange(len(prompts), device=device).repeat_interleave(how.each)
        cache.batch_select_indices(growing)
        assert questions.mask is not None
        mask, position = questions.mask[growing], torch.tensor(questions.lengths, device=device)[growing]
        said: list[list[int]] = [[] for _ in growing]
        rows = list(range(len(said)))  # of the batch: whose completion each is
        logits = head(hidden)[growing]
        while True:
            logits[:, list(how.banned)] = -torch.inf
            tokens = drawn(logits, how.temperature)
            going = [add(said[row], int(token), how) for row, token in zip(rows, tokens, strict=True)]
            if not any(going):
                return grouped(said, how.each)
            if sum(going) <= LEAVE * len(going):
                stay = torch.tensor([i for i, on in enumerate(going) if on], device=device)
                cache.batch_select_indices(stay)
                mask, position, tokens, rows = mask[stay], position[stay], tokens[stay], [rows[i] for i in stay]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            hidden, head = run_without_head(model, step(tokens, position, mask), tokens[:, None] >= 0, cache)
            logits, position = head(hidden), position + 1


def completed(model: nn.Module, prompts: Sequence[Sample], how: Sampling) -> list[NDArray[np.int32]]:
    """The likeliest completion of each prompt, in any family: one that keeps no keys and values writes one at a time."""
    if shares(model):
        return [one for (one,) in rollouts(model, prompts, lambda samples: {}, how)]
    return [alone(model, prompt, how) for prompt in prompts]


@torch.no_grad()
def alone(model: nn.Module, prompt: Sample, how: Sampling) -> NDArray[np.int32]:
    """One completion, by transformers."""
    ids = torch.tensor(prompt.ids, device=next(model.parameters()).device).long()[None]
    most = {"max_new_tokens": how.most_tokens, "eos_token_id": list(how.ends) or None, "pad_token_id": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with evaluating(model):
        out: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **most, **greedy)  # type: ignore[operator]
    return out[0, ids.shape[1] :].cpu().numpy().astype(np.int32)


def drawn(logits: Tensor, temperature: float) -> Tensor:
    """A token of each row of `logits` [rows, V]: long [rows]. Raises WorkFailed where there is nothing to choose by."""
    if not (logits < torch.inf).all():
        raise WorkFailed("the loss is not a number, and neither are the model's logits")
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1)[:, 0]


def add(said: list[int], token: int, how: Sampling) -> bool:
    """Takes a token in, where the completion has not ended; whether it goes on."""
    if said and (said[-1] in how.ends or len(said) == how.most_tokens):
        return False
    said.append(token)
    return token not in how.ends and len(said) < how.most_tokens


def step(tokens: Tensor, position: Tensor, mask: Tensor) -> Batch:
    """One more token of each row, at its place."""
    ids = tokens[:, None]
    return Batch(ids, torch.full_like(ids, IGNORE), position[:, None], (1,) * len(ids), packed=False, mask=mask)


def grouped(said: Sequence[Sequence[int]], each: int) -> list[list[NDArray[np.int32]]]:
    """Completions by prompt."""
    flat = [np.array(one, np.int32) for one in said]
    return [flat[at : at + each] for at in range(0, len(flat), each)]
