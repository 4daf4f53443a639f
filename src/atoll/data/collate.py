"""Tokenized samples to batches: packed end to end in one row, or padded to one length.

A packed row holds no padding, so no work is spent on it. Positions restart at each sample, and that is how transformers
and `atoll.models.fast` know where one sample ends: no token attends to another sample's. Families that keep a recurrent
state or compute positions for themselves cannot be packed; `packable` finds out by running the model.

Shapes: B rows, T positions. labels[i] of a sample is the target token at position i, as in
transformers, and IGNORE where there is no loss. `Batch.targets` does the shift, once, for every objective.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.errors import AtollError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from atoll.data.media import Medium


@dataclass(frozen=True)
class Choices:
    """The answers that a sample's question allows: its text with each of them begins with the same tokens."""

    shared: int
    """How many those are: the first of the sample's own."""
    rest: tuple[NDArray[np.int32], ...]
    """What comes after them, of each choice; at least one token."""
    labeled: tuple[NDArray[np.bool_], ...]
    """Which of those are the answer's."""
    right: int
    """The choice that is the sample's answer."""


class Sample(NamedTuple):
    """What an objective of language models learns from."""

    ids: NDArray[np.int32]
    """Its tokens [n]."""
    labels: NDArray[np.int32]
    """The targets among them [n]; IGNORE where there is no loss."""
    media: tuple[Medium, ...] = ()
    """Its pictures and sounds, in the order of their placeholders."""
    choices: Choices | None = None
    """The answers that it allows; None where it allows any."""


def media_in(sample: Any) -> tuple[Medium, ...]:
    """The pictures and sounds of a sample; none where it is of a kind of the user's own."""
    return sample.media if isinstance(sample, Sample) else ()


def choices_in(sample: Any) -> Choices | None:
    """The answers that a sample allows; None where it allows any, or is of a kind of the user's own."""
    return sample.choices if isinstance(sample, Sample) else None


IGNORE = -100
"""The label of a position without loss, as in torch and transformers."""


@dataclass(frozen=True)
class Batch:
    """Samples ready for a model: `input_ids`, `labels`, `position_ids` are long [B, T].

    `lengths` holds the number of tokens of each sample in the order given; `packed` says whether they share one row.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    packed: bool
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """Features by modality, [media, T, F], in the order of their placeholders."""
    mask: Tensor | None = None
    """Which positions count where padding comes first, those in a cache before them: long [B, cached + T]."""

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @cached_property
    def targets(self) -> Tensor:
        """The token to predict at each position, long [B, T]: the next label; IGNORE at the last of a sample."""
        targets = torch.full_like(self.labels, IGNORE)
        starts = self.position_ids[:, 1:] == 0
        targets[:, :-1] = self.labels[:, 1:].masked_fill(starts, IGNORE)
        return targets

    @cached_property
    def owners(self) -> Tensor:
        """The sample each position belongs to, long [B, T] (padding belongs to the sample before it)."""
        return ((self.position_ids == 0).flatten().cumsum(0) - 1).view_as(self.position_ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            media={name: x.to(device) for name, x in self.media.items()},
            mask=None if self.mask is None else self.mask.to(device),
        )


def pack(samples: Sequence[Sample]) -> Batch:
    """Lay samples end to end in one row [1, sum of n], positions restarting at 0 in each.

    >>> one, two = np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)
    >>> batch = pack([Sample(one, one), Sample(two, two)])
    >>> batch.position_ids.tolist(), batch.targets.tolist()
    ([[0, 1, 2, 0, 1]], [[6, 7, -100, 9, -100]])
    """
    lengths = _lengths(samples)
    positions = np.concatenate([np.arange(n) for n in lengths])
    ids, labels = (np.concatenate([sample[part] for sample in samples]) for part in (0, 1))
    return Batch(_row(ids), _row(labels), _row(positions), lengths, packed=True)


def pad(samples: Sequence[Sample], pad_id: int) -> Batch:
    """One row per sample [B, longest n], padded on the right with `pad_id` (no label there).

    Padding after the sample is invisible to a causal model, so no attention mask is needed.

    >>> one, two = np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)
    >>> pad([Sample(one, one), Sample(two, two)], pad_id=0).input_ids.tolist()
    [[5, 6, 7], [8, 9, 0]]
    """
    lengths = _lengths(samples)
    ids = np.full((len(samples), max(lengths)), pad_id, np.int64)
    labels = np.full_like(ids, IGNORE)
    for row, (sample_ids, sample_labels, *_) in enumerate(samples):
        ids[row, : lengths[row]] = sample_ids
        labels[row, : lengths[row]] = sample_labels
    positions = np.broadcast_to(np.arange(max(lengths)), ids.shape).copy()
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), lengths, packed=False)


def pad_first(texts: Sequence[NDArray[np.int32]]) -> Batch:
    """One row per text [B, longest n], padded on the left: all end at the same place, where something may follow.

    >>> batch = pad_first([np.array([5, 6, 7], np.int32), np.array([8], np.int32)])
    >>> batch.input_ids.tolist(), batch.mask.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]])
    """
    ids, mask = padded(texts, 0, first=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids, torch.full_like(ids, IGNORE), positions, tuple(map(len, texts)), packed=False, mask=mask)


def padded(rows: Sequence[Any], pad_id: int, first: bool) -> tuple[Tensor, Tensor]:
    """Rows of one length, with padding first or last; and where there is none, both long [rows, longest].

    >>> [x.tolist() for x in padded([[5, 6], [7]], 0, first=True)]
    [[[5, 6], [0, 7]], [[1, 1], [0, 1]]]
    """
    width = max(map(len, rows))
    ids, mask = (torch.full((len(rows), width), value) for value in (pad_id, 0))
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if first else slice(len(row))
        ids[i, where], mask[i, where] = torch.as_tensor(np.asarray(row, np.int64)), 1
    return ids, mask


def _lengths(samples: Sequence[Sample]) -> tuple[int, ...]:
    lengths = tuple(len(sample[0]) for sample in samples)
    if not lengths or min(lengths) == 0:
        raise AtollError(
            "a batch needs at least one sample, and each sample at least one token",
            found=f"lengths {list(lengths)}",
            remedy="leave empty samples out when tokenizing",
        )
    return lengths


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]


def language_model(model: nn.Module) -> Any:
    """The causal language model inside a PEFT wrapper, and beside encoders."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return getattr(inner, "language_model", inner)


def packable(model: nn.Module) -> bool:
    """Whether samples packed in one row get from `model` what they get alone, asked of the model, not of a list.

    Three forward passes over five tokens. The second sample must not change with the first (nearly to the bit, as the
    shapes are the same), and must be close to what it is alone (other shapes, other rounding).
    """
    inner = language_model(model)
    takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
    if not takes_positions or getattr(inner, "_is_stateful", False):
        return False
    first, other, second = (_probe(tokens) for tokens in ([1, 2, 3], [4, 3, 1], [2, 4]))
    with evaluating(model), torch.no_grad():
        after_first = _logits(model, pack([first, second]))[-2:]
        after_other = _logits(model, pack([other, second]))[-2:]
        alone = _logits(model, pack([second]))
    size = alone.abs().max()
    unaware = bool((after_first - after_other).abs().max() <= 1e-5 * size)
    return unaware and bool((after_first - alone).abs().max() <= 0.05 * size)


def _probe(tokens: list[int]) -> Sample:
    ids = np.array(tokens, np.int32)
    return Sample(ids, ids)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    batch = batch.to(next(model.parameters()).device)
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    logits: Tensor = output.logits[0].float()
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
