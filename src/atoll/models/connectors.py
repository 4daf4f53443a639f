"""Connectors: from an encoder's features to tokens of the language model's width.

    features [media, T, F] -> [media, K + 2, D]: a learned start, K tokens, a learned end

`mlp` is LLaVA's (Liu et al. 2023, arXiv 2310.03744), over means of neighboring features; `resampler` has learned queries
that look at the features (Perceiver; Alayrac et al. 2022, arXiv 2204.14198); `alignment` writes each token as a mixture of
the language model's own embeddings (Macaw-LLM; Lyu et al. 2023, arXiv 2306.09093). All end in a norm that puts its tokens
about the mean of those embeddings, spread as they are: what the model hears first lies where what it knows lies. (That mean
is two thirds as long as an embedding of SmolLM2-135M; tokens about zero were learned later, see docs/log.md.)

Shapes: T features, F their width, D the language model's width, K tokens, V rows of its embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from atoll import parts
from atoll.errors import AtollError

Count = Annotated[int, Ge(1), Le(65536)]


class MakeConnector(Protocol):
    """What a recipe's `connector` is: a connector that does not know its encoder yet."""

    @property
    def marks(self) -> int:
        """Tokens beside K: a learned start and end, before and after a norm; 0 where the body is all there is."""
        ...

    def tokens(self, positions: int) -> int:
        """K, of an encoder with so many features."""
        ...

    def body(self, positions: int, features: int, width: int) -> nn.Module:
        """The module from features [media, T, F], and the embeddings [V, D], to [media, K, D]."""
        ...


class Connector(nn.Module):
    """A connector with its marks: [media, T, F] -> [media, K + 2, D]; K of one without.

    In the place of a medium that is missing, and of a share `dropout` of them while it trains, stands a learned `null`.
    """

    def __init__(self, make: MakeConnector, positions: int, features: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.body = make.body(positions, features, width)
        self.null = nn.Parameter(torch.zeros(width))
        self.marked = make.marks > 0
        if self.marked:
            self.norm = nn.LayerNorm(width)
            self.start = nn.Parameter(torch.zeros(width))
            self.end = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """In the type of its own parameters; `embeddings` [V, D] are the language model's.

        A medium whose features are no numbers is missing.
        """
        missing = features.isnan().flatten(1).all(1)
        tokens = self.body(features.masked_fill(missing[:, None, None], 0).to(self.null.dtype), embeddings)
        if self.marked:
            tokens = self.norm(tokens)
        if self.training and self.dropout:
            missing = missing | (torch.rand(len(features), device=features.device) < self.dropout)
        tokens = torch.where(missing[:, None, None], self.null, tokens)
        if not self.marked:
            return tokens
        ends = (mark.expand(len(tokens), 1, -1) for mark in (self.start, self.end))
        return torch.cat([next(ends), tokens, next(ends)], dim=1)

    @torch.no_grad()
    def start_like(self, embeddings: Tensor) -> None:
        """Tokens spread about the mean of the rows of `embeddings` [V, D] as they are; marks and null are that mean."""
        rows = embeddings.float()
        mean = rows.mean(0)
        if self.marked:
            self.norm.weight.fill_(float((rows - mean).square().mean().sqrt()))
            self.norm.bias.copy_(mean)
        for mark in (self.start, self.end, self.null) if self.marked else (self.null,):
            mark.copy_(mean)


@dataclass(frozen=True)
class MLP:
    """See `mlp`."""

    pool: int
    marks = 2

    def tokens(self, positions: int) -> int:
        """One for each `pool` neighboring features, the last of fewer."""
        return math.ceil(positions / self.pool)

    def body(self, positions: int, features: int, width: int) -> nn.Module:
        """Norm, linear, GELU, linear."""
        layers = [nn.LayerNorm(features), nn.Linear(features, width), nn.GELU(), nn.Linear(width, width)]
        return Pooled(self.pool, *layers)


@dataclass(frozen=True)
class Llava:
    """See `llava`."""

    of: str
    marks = 0

    def tokens(self, positions: int) -> int:
        """One for each feature."""
        return positions

    def body(self, positions: int, features: int, width: int) -> nn.Module:
        """Linear, GELU, linear."""
        return Pooled(1, nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))


class Pooled(nn.Module):
    """Layers over means of `size` neighboring features; a last group of fewer is the mean of those."""

    def __init__(self, size: int, *layers: nn.Module) -> None:
        super().__init__()
        self.size, self.layers = size, nn.Sequential(*layers)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """[media, T, F] -> [media, ceil(T / size), D]."""
        means = nn.functional.avg_pool1d(features.transpose(1, 2), self.size, ceil_mode=True).transpose(1, 2)
        found: Tensor = self.layers(means)
        return found


class Resampler(nn.Module):
    """See `resampler`."""

    def __init__(self, queries: int, heads: int, features: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) / width**0.5)
        self.norm, self.key_value = nn.LayerNorm(features), nn.Linear(features, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Every query looks at all features of its medium."""
        seen = self.key_value(self.norm(features))
        queries = self.queries.expand(len(features), -1, -1)
        tokens = queries + self.attention(queries, seen, seen, need_weights=False)[0]
        found: Tensor = tokens + self.mlp(tokens)
        return found


@dataclass(frozen=True)
class MakeResampler:
    """See `resampler`."""

    queries: int
    heads: int
    marks = 2

    def tokens(self, positions: int) -> int:
        """As many as queries."""
        return self.queries

    def body(self, positions: int, features: int, width: int) -> nn.Module:
        """One layer of attention, then an MLP."""
        return Resampler(self.queries, dividing(width, self.heads), features, width)


class Alignment(nn.Module):
    """See `alignment`."""

    def __init__(self, stride: int, heads: int, anchors: int | None, features: int, width: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.reduce = nn.Conv1d(features, width, kernel_size=stride, stride=stride)
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Queries of neighboring features, keys and values of the rows of the embeddings, or of every so manieth of them."""
        if self.anchors is not None and self.anchors < len(embeddings):
            rows = torch.linspace(0, len(embeddings) - 1, self.anchors, device=embeddings.device).round().long()
            embeddings = embeddings[rows]
        known = embeddings.detach().to(features.dtype)[None]
        queries = self.norm(self.reduce(features.transpose(1, 2)).transpose(1, 2)).flatten(0, 1)[None]
        found: Tensor = self.attention(queries, known, known, need_weights=False)[0]
        return found.reshape(len(features), -1, found.shape[-1])


@dataclass(frozen=True)
class MakeAlignment:
    """See `alignment`."""

    stride: int
    heads: int
    anchors: int | None
    marks = 2

    def tokens(self, positions: int) -> int:
        """One for each `stride` neighboring features; a last group of fewer is left out."""
        return max(1, positions // self.stride)

    def body(self, positions: int, features: int, width: int) -> nn.Module:
        """Convolution, norm, attention over the embeddings."""
        return Alignment(min(self.stride, positions), dividing(width, self.heads), self.anchors, features, width)


def dividing(width: int, heads: int) -> int:
    """The most heads, of at most so many, that divide a width."""
    return next(n for n in range(min(heads, width), 0, -1) if width % n == 0)


def alignment(
    stride: Annotated[int, Ge(1), Le(65536)] = 7,
    heads: Annotated[int, Ge(1)] = 1,
    anchors: Annotated[int, Ge(2)] | None = None,
) -> MakeAlignment:
    """A convolution over `stride` neighboring features, then attention whose keys and values are the model's embeddings.

    Source: Lyu et al. 2023, Macaw-LLM (arXiv 2306.09093), Section 3.2, equations 5 to 7. Attention over all V rows is exact;
    over `anchors` of them, evenly spaced among the V, it costs anchors / V of that.
    """
    return MakeAlignment(stride, heads, anchors)


def mlp(pool: Count = 1) -> MLP:
    """Two linear layers over each feature, or over the mean of each `pool` neighboring ones.

    Source: Liu et al. 2023, LLaVA-1.5 (arXiv 2310.03744), Section 3.
    """
    return MLP(pool)


def llava(of: str = "") -> Llava:
    """Two linear layers, as in a ready-made model of the LLaVA family, a folder or hub id: training goes on from its own."""
    return Llava(of)


def resampler(queries: Count = 8, heads: Count = 8) -> MakeResampler:
    """Learned queries that look at all features of a medium, whatever their number.

    Source: Alayrac et al. 2022, Flamingo (arXiv 2204.14198), the Perceiver resampler, of one layer. As many `heads` as
    divide the language model's width, at most these.
    """
    return MakeResampler(queries, heads)


def make_connector(written: Mapping[str, Any], where: str = "connector") -> MakeConnector:
    """A connector as a recipe or a saved model's configuration says it: of a shipped kind, for no code is run from there.

    Raises:
        AtollError: it names code, or no kind that there is.
    """
    part = parts.spec(dict(written), where)
    if ":" in part.use:
        raise AtollError(
            "a connector is of a shipped kind: saved models are made again from their configuration, which runs no code",
            where=where, found=part.use, allowed=", ".join(parts.SLOTS["connector"]),
        )  # fmt: skip
    made: MakeConnector = parts.make("connector", dict(written), where)
    return made
