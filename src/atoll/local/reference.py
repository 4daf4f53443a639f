"""The reference that an objective measures against: a model as it was, and what it said of answers.

It is run once for each sample. What it said is known by the content of what trains, and shared by all that refer to it: a
run and its baselines ask it once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from atoll.data.collate import Sample, evaluating
from atoll.local.choices import Media, choices_of, log_likelihoods
from atoll.wire import content

Said = dict[bytes, Sequence[Tensor]]
"""By samples that were asked about together, the log-likelihoods of their answers, float64 [choices] each."""

_SAID: WeakKeyDictionary[nn.Module, OrderedDict[str, Said]] = WeakKeyDictionary()
"""By model, and by the content of what trains in it."""

REMEMBERED = 2
"""References of a model whose words are kept."""


class Reference:
    """A model as it was: what trains in it, and what it said of each sample that it was asked about.

    What it said is kept beside the model, by content: all objectives that refer to the same params share it.
    """

    def __init__(self, model: nn.Module, media: Media) -> None:
        self.media = media
        self.params: dict[str, Tensor] = {}
        self.said: Said = {}
        self.take(model)

    def same(self, model: nn.Module) -> bool:
        """Whether the model is now what it was."""
        return all(name in self.params and torch.equal(x, self.params[name]) for name, x in trained(model))

    def take(self, model: nn.Module) -> None:
        """The model as it is now."""
        if not self.same(model):
            self.params = {name: x.detach().clone() for name, x in trained(model)}
            self.said = said_by(model, content(self.params))

    def __call__(self, model: nn.Module, samples: Sequence[Sample], together: bool = False) -> Sequence[Tensor]:
        """The log-likelihoods of each sample's answers, float64 [choices].

        What is said of a sample depends in its last bits on who is asked about beside it, and must not depend on what was
        asked before. So samples to train on, whose batches are drawn, are asked about one by one; those that are held out
        may be asked about `together`, and what is said is then known by the whole batch.
        """
        each = [samples] if together else [[sample] for sample in samples]
        named = {b"".join(map(identity, some)): some for some in each}
        new = {name: some for name, some in named.items() if name not in self.said}
        if new:
            with self.in_place(model), evaluating(model), torch.no_grad():
                for name, some in new.items():
                    self.said[name] = log_likelihoods(model, some, self.media)
        return [one for some in each for one in self.said[b"".join(map(identity, some))]]

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model is the reference inside the block."""
        now = {name: x.detach().clone() for name, x in trained(model)}
        put(model, self.params)
        try:
            yield
        finally:
            put(model, now)


def said_by(model: nn.Module, params: str) -> Said:
    """What the model said when these were its params; what it said with older ones is forgotten."""
    kept = _SAID.setdefault(model, OrderedDict())
    said = kept.setdefault(params, {})
    kept.move_to_end(params)
    while len(kept) > REMEMBERED:
        kept.popitem(last=False)
    return said


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, by name."""
    return ((name, x) for name, x in model.named_parameters() if x.requires_grad)


@torch.no_grad()
def put(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Writes what trains."""
    for name, x in trained(model):
        x.copy_(params[name])


def identity(sample: Sample) -> bytes:
    """Names what a sample asks and allows."""
    choices = choices_of(sample)
    arrays = (sample.ids[: choices.shared], *choices.rest, *choices.labeled)
    said = [one.tobytes() for one in arrays] + [medium.key.encode() for medium in sample.media]
    return blake2b(b"".join(len(one).to_bytes(8) + one for one in said), digest_size=16).digest()
