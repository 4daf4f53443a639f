"""Causal attention over packed samples, by hand: two batched products and a softmax for each group of equal lengths.

transformers marks packed samples by a [T, T] mask over the whole row, so attention costs the square of the batch; and on a
CPU the backward pass of `scaled_dot_product_attention` in bf16 takes six times as long as these few products. Both
interfaces of transformers are used: a mask function that hands a `Layout` (where samples start, how far back they look)
from the model to its layers in place of a mask, and an attention function that reads it. What a layout cannot say
(padding masks, caches while generating, bidirectional blocks) becomes the usual mask and the usual SDPA attention.

The products follow Vaswani et al. 2017 (softmax(Q K^T * scale) V), grouped as in Ainslie et al. 2023: the G query heads
that share one key head are rows of one product, and keys are never repeated.

Shapes: B rows, T positions, S samples of a group, n tokens of the longest, H = K * G heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

NAME = "atoll"
"""How transformers knows the attention and the mask function."""

ROUND = 16
"""Samples whose lengths round up to the same multiple share a product: a little padding for far fewer small products."""

LONG = 1024
"""Beyond this many tokens the probabilities kept for the backward pass (n^2) cost more than SDPA's slow kernel."""


@dataclass(frozen=True)
class Group:
    """S samples padded to n tokens: where to find them among the B*T tokens of a batch.

    `rows` [S*n] repeats each sample's last token in place of padding; `real` [S*n] marks what is not padding. Both are
    None where the samples lie side by side and have equal lengths: then they are the `span`.
    """

    samples: int
    n: int
    span: slice
    rows: Tensor | None = None
    real: Tensor | None = None

    def take(self, tokens: Tensor) -> Tensor:
        """[B*T, ...] to [S, n, ...]."""
        picked = tokens[self.span] if self.rows is None else tokens.index_select(0, self.rows)
        return picked.view(self.samples, self.n, *tokens.shape[1:])

    def take_gradient(self, tokens: Tensor) -> Tensor:
        """`take`, with zeros in place of padding."""
        picked = self.take(tokens)
        if self.real is None:
            return picked
        return picked.mul_(self.real.view(self.samples, self.n, *[1] * (tokens.ndim - 1)))

    def put(self, tokens: Tensor, values: Tensor) -> None:
        """Write `values` [S, n, ...] to their places in `tokens` [B*T, ...], padding left out."""
        if self.rows is None or self.real is None:
            tokens[self.span].view_as(values).copy_(values)
        else:
            tokens.index_copy_(0, self.rows[self.real], values.flatten(0, 1)[self.real])


@dataclass(frozen=True)
class Layout:
    """Where the samples of a [B, T] batch start, in place of a mask; `window` tokens back, all where None."""

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    window: int | None
    device: torch.device
    groups: tuple[Group, ...]

    def dense(self) -> Tensor:
        """The same as a mask, bool [B, 1, T, T]: true where a query (row) may look at a key (column)."""
        rows, width = self.shape
        owner = torch.arange(len(self.lengths), device=self.device).repeat_interleave(
            torch.tensor(self.lengths, device=self.device)
        )
        owner = owner.view(rows, 1, width)
        back = torch.arange(width, device=self.device)[:, None] - torch.arange(width, device=self.device)
        near = (back >= 0) if self.window is None else (back >= 0) & (back < self.window)
        return ((owner.transpose(1, 2) == owner) & near)[:, None]


def layout_of(shape: tuple[int, int], lengths: tuple[int, ...], window: int | None, device: torch.device) -> Layout:
    """The layout of samples of `lengths` that fill a batch of `shape` in order, no sample across two rows."""
    by_size: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for n in lengths:
        by_size.setdefault(-(-n // ROUND), []).append((start, n))
        start += n
    return Layout(shape, lengths, window, device, tuple(_group(members, device) for members in by_size.values()))


def _group(members: list[tuple[int, int]], device: torch.device) -> Group:
    (first, n), (last, last_n) = members[0], members[-1]
    span = slice(first, last + last_n)
    if all(start == first + i * n and length == n for i, (start, length) in enumerate(members)):
        return Group(len(members), n, span)
    starts, lengths = (torch.tensor(part, device=device)[:, None] for part in zip(*members, strict=True))
    longest = max(length for _, length in members)
    place = torch.arange(longest, device=device)
    rows = starts + torch.minimum(place, lengths - 1)
    return Group(len(members), longest, span, rows.flatten(), (place < lengths).flatten())


def mask_or_layout(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Layout | Tensor | None:
    """transformers' mask function: a layout where samples are causal and side by side, SDPA's mask elsewhere."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function: Callable[..., Any] = mask_function or causal_mask_function
    device, window = torch.device(kwargs.get("device", "cpu")), kwargs.get("local_size")
    whole = q_length == kv_length and q_offset == 0 and kv_offset == 0
    if whole and attention_mask is None and not kwargs.get("use_vmap"):
        lengths = _sample_lengths(function, batch_size, q_length, window, device)
        if lengths is not None:
            return layout_of((batch_size, q_length), lengths, window, device)
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, **kwargs
    )
    return mask


def _sample_lengths(
    allowed: Callable[..., Any], rows: int, width: int, window: int | None, device: torch.device
) -> tuple[int, ...] | None:
    """The lengths of the samples that `allowed(row, head, query, key)` keeps apart; None where it is no such mask.

    A token starts a sample if it may not look at the one before it. That it looks back as far as the start of its
    sample (or the window) and no further, and never ahead, is checked for every token.
    """
    row = torch.arange(rows, device=device)[:, None].expand(rows, width)
    place = torch.arange(width, device=device).expand(rows, width)

    def looks_at(key: Tensor) -> Tensor:
        seen: Tensor = allowed(row, 0, place, key.clamp(0, width - 1))
        return seen.expand(rows, width) & (key >= 0) & (key < width)

    starts = ~looks_at(place - 1)
    start = torch.where(starts, place, 0).cummax(1).values
    furthest = start if window is None else torch.maximum(start, place - window + 1)
    if not (looks_at(place) & looks_at(furthest) & ~looks_at(furthest - 1) & ~looks_at(place + 1)).all():
        return None
    begins = starts.flatten().nonzero().flatten().tolist()
    return tuple(b - a for a, b in zip(begins, [*begins[1:], rows * width], strict=True))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, T, d], key and value [B, K, T, d] to [B, T, H, d].

    Raises:
        NotImplementedError: for what neither way computes (logit caps, sinks): `accelerate` leaves such models alone.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    beyond = [name for name in ("softcap", "s_aux", "position_bias", "head_mask") if kwargs.get(name) is not None]
    if beyond:
        raise NotImplementedError(f"attention with {', '.join(beyond)}")
    layout = attention_mask
    if not isinstance(layout, Layout) or dropout > 0:
        mask = layout.dense() if isinstance(layout, Layout) else layout
        output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = by_hand if query.device.type == "cpu" and max(layout.lengths) <= LONG else by_sdpa
    return kernel(query, key, value, layout, scale), None


def by_hand(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Each group by two batched products and a softmax; its probabilities are kept for the backward pass."""
    output: Tensor = _Attention.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    return output


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Each group by torch's own kernel: no mask is needed where there is no window."""
    output = query.new_zeros(query.shape[0] * query.shape[2], query.shape[1], value.shape[-1])
    parts = []
    for group in layout.groups:
        q, k, v = (group.take(_tokens(x)).transpose(1, 2) for x in (query, key, value))
        windowed = layout.window is not None and layout.window < group.n
        mask = _allowed(group.n, layout.window, query.device) if windowed else None
        o = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append((group, o.transpose(1, 2)))
    for group, part in parts:
        group.put(output, part)
    return output.view(query.shape[0], query.shape[2], *output.shape[1:])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        rows, heads, width, _ = query.shape
        output = query.new_empty(rows * width, heads, value.shape[-1])
        saved: list[Tensor] = []
        for group in layout.groups:
            q, k, v = _by_key_head(group, key.shape[1], query, key, value)
            p = torch.baddbmm(_mask(q, k, layout.window), q, k.transpose(1, 2), alpha=scale).softmax(-1)
            group.put(output, _by_token(torch.bmm(p, v), group, key.shape[1], heads))
            saved += (q, k, v, p)
        ctx.layout, ctx.scale, ctx.shapes = layout, scale, (query.shape, key.shape, value.shape)
        ctx.save_for_backward(*saved)
        return output.view(rows, width, heads, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [grad.new_empty(s[0] * s[2], s[1], s[3]) for s in ctx.shapes]
        key_heads, tokens = ctx.shapes[1][1], grad.flatten(0, 1)
        for group, (q, k, v, p) in zip(ctx.layout.groups, _fours(ctx.saved_tensors), strict=True):
            do = _rows_of(group.take_gradient(tokens), key_heads)
            dp = torch.bmm(do, v.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq = torch.baddbmm(q, ds, k, beta=0, alpha=ctx.scale)
            dk = torch.baddbmm(k, ds.transpose(1, 2), q, beta=0, alpha=ctx.scale)
            dv = torch.bmm(p.transpose(1, 2), do)
            for total, part in zip(grads, (dq, dk, dv), strict=True):
                group.put(total, _by_token(part, group, key_heads, total.shape[1]))
        dq, dk, dv = (
            total.view(s[0], s[2], s[1], s[3]).transpose(1, 2) for total, s in zip(grads, ctx.shapes, strict=True)
        )
        return dq, dk, dv, None, None


def _fours(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    return (tensors[i : i + 4] for i in range(0, len(tensors), 4))


def _tokens(heads_first: Tensor) -> Tensor:
    """[B, H, T, d] to [B*T, H, d]: a view, where the heads were split off a [B, T, H*d] tensor."""
    return heads_first.transpose(1, 2).flatten(0, 1)


def _by_key_head(group: Group, key_heads: int, *heads_first: Tensor) -> tuple[Tensor, ...]:
    """Each [B, H, T, d] to [S*K, n*G, d], its samples of `group` and its heads by the key head they share."""
    return tuple(_rows_of(group.take(_tokens(x)), key_heads) for x in heads_first)


def _rows_of(samples: Tensor, key_heads: int) -> Tensor:
    """[S, n, H, d] to [S*K, n*G, d]."""
    count, n, heads, size = samples.shape
    by_key_head = samples.view(count, n, key_heads, heads // key_heads, size).transpose(1, 2)
    return by_key_head.reshape(count * key_heads, -1, size)


def _by_token(values: Tensor, group: Group, key_heads: int, heads: int) -> Tensor:
    """[S*K, n*G, d] to [S, n, H, d]."""
    split = values.view(group.samples, key_heads, group.n, heads // key_heads, -1)
    return split.transpose(1, 2).reshape(group.samples, group.n, heads, -1)


def _mask(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """0 where a query may look and -inf where not, [S*K, n*G, n] expanded from one [n*G, n]."""
    n, per_key = k.shape[1], q.shape[1] // k.shape[1]
    room = 1 << (n - 1).bit_length()
    return _additive(room, per_key, window, q.dtype, q.device)[: n * per_key, :n].expand(len(q), -1, -1)


@lru_cache(maxsize=32)
def _additive(n: int, per_key: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    hidden = ~_allowed(n, window, device).repeat_interleave(per_key, 0)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


@lru_cache(maxsize=32)
def _allowed(n: int, window: int | None, device: torch.device) -> Tensor:
    """Causal, and no more than `window` tokens back: bool [n, n]."""
    allowed = torch.ones(n, n, dtype=torch.bool, device=device).tril_()
    return allowed if window is None else allowed.triu_(1 - window)
