"""Causal attention over packed samples, by hand: two batched products and a softmax for each group of equal lengths.

transformers marks packed samples by a [T, T] mask over the whole row, so attention costs the square of the batch; and on a
CPU the backward pass of `scaled_dot_product_attention` in bf16 takes six times as long as these few products. Both
interfaces of transformers are used: a mask function that hands a `Layout` (where samples start, how far back they look)
from the model to its layers in place of a mask, and an attention function that reads it. What a layout cannot say
(padding, what comes after a cache) becomes the usual mask, which is done by hand, too, where gradients are wanted; and with
the usual SDPA attention where they are not.

The products follow Vaswani et al. 2017 (softmax(Q K^T * scale) V), grouped as in Ainslie et al. 2023: the G query heads
that share one key head are rows of one product, and keys are never repeated.

Shapes: B rows, T positions, S samples of a group, n tokens of the longest, H = K * G heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

NAME = "atoll"
"""How transformers knows the attention and the mask function."""

ROUND = 32
"""Samples are padded to a multiple of this (16 for the shortest): a softmax over whole vectors takes half the time of
one with a rest, and equal sizes share one product."""

LONG = 1024
"""Beyond this many tokens the probabilities kept for the backward pass (n^2) cost more than SDPA's slow kernel."""


@dataclass(frozen=True)
class Group:
    """S samples of n slots each, side by side in the `span` of the slots."""

    samples: int
    n: int
    span: slice


@dataclass(frozen=True)
class Layout:
    """Where the samples of a [B, T] batch lie, in place of a mask; they look `window` tokens back, or all the way (None).

    Attention works on slots: the samples sorted by size, each padded to its group's n. `token` [slots] is the token in
    each slot, padding repeating its sample's last; `slot` [B*T] is the slot of each token; `padding` lists the slots
    without one. All three are None where slots and tokens are the same.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    window: int | None
    device: torch.device
    groups: tuple[Group, ...]
    token: Tensor | None
    slot: Tensor | None
    padding: Tensor | None

    def slots(self, heads_first: Tensor) -> Tensor:
        """[B, H, T, d] to [slots, H, d]; a view, where slots are tokens and the heads were split off [B, T, H*d]."""
        tokens = heads_first.transpose(1, 2).flatten(0, 1)
        return tokens if self.token is None else tokens.index_select(0, self.token)

    def tokens(self, slots: Tensor) -> Tensor:
        """[slots, H, d] to [B, T, H, d], padding left out."""
        tokens = slots if self.slot is None else slots.index_select(0, self.slot)
        return tokens.view(*self.shape, *slots.shape[1:])

    def dense(self) -> Tensor:
        """The same as a mask, bool [B, 1, T, T]: true where a query (row) may look at a key (column)."""
        rows, width = self.shape
        lengths = torch.tensor(self.lengths, device=self.device)
        sample = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths).view(rows, 1, width)
        return ((sample.transpose(1, 2) == sample) & _allowed(width, self.window, self.device))[:, None]


def layout_of(shape: tuple[int, int], lengths: tuple[int, ...], window: int | None, device: torch.device) -> Layout:
    """The layout of samples of `lengths` that fill a batch of `shape` in order, no sample across two rows."""
    sizes = [-(-n // ROUND) * ROUND if n > ROUND // 2 else ROUND // 2 for n in lengths]
    starts = [0, *accumulate(lengths)]
    ordered = sorted(range(len(lengths)), key=sizes.__getitem__)
    groups, filled = [], 0
    for n, members in groupby(ordered, key=sizes.__getitem__):
        count = len(list(members))
        groups.append(Group(count, n, slice(filled, filled + count * n)))
        filled += count * n
    if filled == starts[-1] and ordered == sorted(ordered):
        return Layout(shape, lengths, window, device, tuple(groups), None, None, None)
    size, length, start = (torch.tensor([part[i] for i in ordered]) for part in (sizes, lengths, starts))
    place = torch.arange(filled) - (size.cumsum(0) - size).repeat_interleave(size)
    length, start = length.repeat_interleave(size), start.repeat_interleave(size)
    token = start + torch.minimum(place, length - 1)
    real = place < length
    slot = torch.empty(starts[-1], dtype=torch.long)
    slot[token[real]] = real.nonzero().flatten()
    moved = (part.to(device) for part in (token, slot, (~real).nonzero().flatten()))
    return Layout(shape, lengths, window, device, tuple(groups), *moved)


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
    if _softcap(kwargs.get("config")) is not None:
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, **kwargs
    )
    return mask


def _softcap(config: Any) -> float | None:
    return getattr(config, "attn_logit_softcapping", None)


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
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, T, d], key and value [B, K, T, d] to [B, T, H, d].

    Raises:
        NotImplementedError: for what no way here computes (sinks, biases): `accelerate` leaves such models alone.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    beyond = [name for name in ("s_aux", "position_bias", "head_mask") if kwargs.get(name) is not None]
    if beyond:
        raise NotImplementedError(f"attention with {', '.join(beyond)}")
    layout, scale = attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layout, Layout) and dropout == 0:
        if softcap is not None or (query.device.type == "cpu" and max(layout.lengths) <= LONG):
            return by_hand(query, key, value, layout, scale, softcap), None
        return by_sdpa(query, key, value, layout, scale), None
    mask = layout.dense() if isinstance(layout, Layout) else layout
    if softcap is None and dropout == 0 and mask is not None and worth_it(query, key, mask):
        return masked_by_hand(query, key, value, mask, scale), None
    if softcap is not None:
        return _capped(query, key, value, mask, scale, softcap, dropout), None
    output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scale, **kwargs)
    return output, None


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, dropout: float
) -> Tensor:
    """Gemma 2's attention with any mask (bool, true where a query may look), as plain operations."""
    per_key = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(per_key, 1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    p = nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return (p @ value).transpose(1, 2)


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, softcap: float | None = None
) -> Tensor:
    """Each group by two batched products and a softmax; its probabilities are kept for the backward pass.

    `softcap` bends the scores s to softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118, section 2).
    """
    output: Tensor = _Attention.apply(query, key, value, layout, scale, softcap)  # type: ignore[no-untyped-call]
    return output


def worth_it(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    """Whether gradients of bool-masked attention on a CPU are wanted, of so few keys that its probabilities may be kept."""
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return wanted and query.device.type == "cpu" and mask.dtype == torch.bool and key.shape[2] <= LONG


def masked_by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same two products of [B, H, T, d] with n keys, for a mask [B, 1, T, n] that says where queries may look.

    A query that may look nowhere, which stands on padding, looks everywhere alike: its output is finite, and nobody's. Keys
    are padded to whole vectors: the backward pass of torch's softmax rounds a rest as the number of threads has it.
    """
    rest = -key.shape[2] % (ROUND // 2)
    key, value = (nn.functional.pad(x, (0, 0, 0, rest)) for x in (key, value))
    output: Tensor = _Masked.apply(query, key, value, nn.functional.pad(mask, (0, rest)), scale)  # type: ignore[no-untyped-call]
    return output


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Each group by torch's own kernel: no mask is needed where there is no window."""
    q, k, v = (layout.slots(x) for x in (query, key, value))
    parts = []
    for group in layout.groups:
        windowed = layout.window is not None and layout.window < group.n
        mask = _allowed(group.n, layout.window, query.device) if windowed else None
        q_n, k_n, v_n = (x[group.span].view(group.samples, group.n, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        part = nn.functional.scaled_dot_product_attention(
            q_n, k_n, v_n, mask, scale=scale, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return layout.tokens(torch.cat(parts))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, softcap: float | None
    ) -> Tensor:
        slots, key_heads = [layout.slots(x) for x in (query, key, value)], key.shape[1]
        output = query.new_empty(len(slots[0]), query.shape[1], value.shape[-1])
        saved: list[Tensor | None] = []
        for group in layout.groups:
            q, k, v = (_by_key_head(x, group, key_heads) for x in slots)
            mask, bent = _mask(q, k, layout.window), None
            if softcap is None:
                p = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
            else:
                bent = torch.baddbmm(mask, q, k.transpose(1, 2), beta=0, alpha=scale / softcap).tanh_()
                p = torch.add(mask, bent, alpha=softcap).softmax(-1)
            _put(output, torch.bmm(p, v), group, key_heads)
            saved += (q, k, v, p, bent)
        ctx.layout, ctx.scale, ctx.key_heads = layout, scale, key_heads
        ctx.save_for_backward(*saved)
        return layout.tokens(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, key_heads = ctx.layout, ctx.key_heads
        d_output = layout.slots(grad.transpose(1, 2))
        if layout.padding is not None:
            d_output.index_fill_(0, layout.padding, 0)
        saved = ctx.saved_tensors
        heads = (grad.shape[2], key_heads, key_heads)
        grads = [grad.new_empty(len(d_output), h, x.shape[-1]) for h, x in zip(heads, saved[:3], strict=True)]
        for i, group in enumerate(layout.groups):
            q, k, v, p, bent = saved[5 * i : 5 * i + 5]
            do = _by_key_head(d_output, group, key_heads)
            ds = torch._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), p, -1, p.dtype)
            if bent is not None:
                ds.addcmul_(ds, bent.square(), value=-1)
            dq = torch.baddbmm(q, ds, k, beta=0, alpha=ctx.scale)
            dk = torch.baddbmm(k, ds.transpose(1, 2), q, beta=0, alpha=ctx.scale)
            for total, part in zip(grads, (dq, dk, torch.bmm(p.transpose(1, 2), do)), strict=True):
                _put(total, part, group, key_heads)
        dq, dk, dv = (layout.tokens(total).transpose(1, 2) for total in grads)
        return dq, dk, dv, None, None, None


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        (rows, heads, count, _), key_heads = query.shape, key.shape[1]
        q = query.reshape(
            rows * key_heads, -1, query.shape[-1]
        )  # the heads that share a key head are rows of one product
        k, v = key.flatten(0, 1), value.flatten(0, 1)
        hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
        spread = (
            hidden[:, :, None].expand(rows, key_heads, heads // key_heads, count, -1).reshape(len(q), q.shape[1], -1)
        )
        p = torch.baddbmm(spread, q, k.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return torch.bmm(p, v).view(rows, heads, count, -1).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        do = grad.transpose(1, 2).reshape(len(q), q.shape[1], -1)
        ds = torch._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), p, -1, p.dtype)
        dq = torch.baddbmm(q, ds, k, beta=0, alpha=ctx.scale)
        dk = torch.baddbmm(k, ds.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        grads = zip((dq, dk, torch.bmm(p.transpose(1, 2), do)), ctx.shapes, strict=True)
        return *(x.view(shape) for x, shape in grads), None, None


def _by_key_head(slots: Tensor, group: Group, key_heads: int) -> Tensor:
    """The group's part of [slots, H, d] as [S*K, n*G, d]."""
    samples = slots[group.span].view(group.samples, group.n, key_heads, -1, slots.shape[-1])
    return samples.transpose(1, 2).reshape(group.samples * key_heads, -1, slots.shape[-1])


def _put(slots: Tensor, values: Tensor, group: Group, key_heads: int) -> None:
    """Write values [S*K, n*G, d] to the group's part of [slots, H, d]."""
    samples = slots[group.span].view(group.samples, group.n, key_heads, -1, slots.shape[-1])
    samples.copy_(values.view(group.samples, key_heads, group.n, -1, slots.shape[-1]).transpose(1, 2))


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
