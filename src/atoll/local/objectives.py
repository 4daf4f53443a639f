"""Cross-entropy of a causal language model at the positions that have a label, and nowhere else.

The head (output embedding) of a small model costs as much as several layers, and its logits more memory than all of
them. So the model runs with its head set aside: hidden states are gathered at labeled positions first, then go through
the head a chunk at a time. With a frozen head the gradient of each token's loss is formed while its logits are at hand
(the idea of Liger's fused linear cross-entropy, arXiv 2410.10989, but kept per token, so that any weighting of tokens
works); a head that trains is recomputed chunk by chunk in the backward pass.

Some families change the logits after the head (Gemma caps them, Cohere and Granite scale them). The model itself shows
what it does: known numbers go in where the head was, and what comes out says what was done to them.

Fine-tuning on answers (SFT) and causal language modeling differ only in the label mask made when tokenizing: both are
`cross_entropy`.

Shapes: B rows, T positions, L labeled positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atoll.data.collate import IGNORE, Batch, language_model

CHUNK_ELEMENTS = 1 << 25
"""Logits formed at a time (64 MiB in bf16): many rows, because each product reads the whole head."""

BLOCK_ELEMENTS = 1 << 20
"""Logits in fp32 at a time (4 MiB): few, so that the passes over them stay in the cache."""

Elementwise = Callable[[Tensor], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The sum of the token losses (fp32 scalar) and how many there are; causal LM and SFT alike.

    The sum, not the mean: only the caller knows what to divide by (accumulation, weights by example).
    """
    losses, _ = token_losses(model, batch)
    return losses.sum(), losses.numel()


def token_losses(model: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The loss at each labeled position, fp32 [L], and the sample it belongs to, long [L] (index into batch.lengths).

    Logits are divided by the `temperature` first.

    Runs any transformers causal LM, plain or wrapped by PEFT; positions are in the order of the batch.
    """
    targets = batch.targets
    keep = targets != IGNORE
    rows, head = run_without_head(model, batch, keep)
    if temperature != 1:
        head = replace(head, after=partial(_cooled, after=head.after, temperature=temperature))
    return chunked_cross_entropy(rows, targets[keep], head), batch.owners[keep]


@dataclass(frozen=True)
class Head:
    """Hidden states [n, D] to logits [n, V]: the model's own head and what the family does to logits after it."""

    module: nn.Module
    after: Elementwise
    vocabulary: int

    def __call__(self, rows: Tensor) -> Tensor:
        return self.after(self.module(rows))

    def column(self, rows: Tensor, token: int) -> Tensor:
        """The logits of one token, fp32 [n]: rounded as the model's own are, those of different rows are often equal."""
        if type(self.module) is not nn.Linear:
            return self(rows)[:, token].float()
        bias = None if self.module.bias is None else self.module.bias[token, None].float()
        logits = nn.functional.linear(rows.float(), self.module.weight[token, None].float(), bias)
        return self.after(logits)[:, 0]

    def trained(self) -> tuple[Tensor, ...]:
        """Its parameters that train: none in most LoRA runs, the tied embedding in a full-parameter one."""
        return tuple(p for p in self.module.parameters() if p.requires_grad)


def chunked_cross_entropy(rows: Tensor, targets: Tensor, head: Head) -> Tensor:
    """-log softmax(head(rows))[targets], fp32 [L], from at most CHUNK_ELEMENTS logits at a time."""
    losses: Tensor = _ChunkedCrossEntropy.apply(rows, targets, head, *head.trained())  # type: ignore[no-untyped-call]
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of losses[i] reaches rows[i] alone: formed in the forward pass, weighted in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, head: Head, *trained: Tensor) -> Tensor:
        losses = rows.new_empty(len(rows), dtype=torch.float32)
        row_grads = torch.empty_like(rows) if ctx.needs_input_grad[0] and not trained else None
        for part in _chunks(len(rows), head):
            chunk = rows[part].detach().requires_grad_(row_grads is not None)
            with torch.set_grad_enabled(row_grads is not None):
                logits = head(chunk)
            losses[part], logit_grads = _loss_and_gradient(logits.detach(), targets[part], row_grads is not None)
            if row_grads is not None:
                (row_grads[part],) = torch.autograd.grad(logits, chunk, logit_grads)
        ctx.head, ctx.trained = head, trained
        ctx.save_for_backward(*(rows, targets) if trained else (row_grads,))
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            (row_grads,) = ctx.saved_tensors
            return (row_grads * loss_grads[:, None].to(row_grads.dtype), None, None)
        rows, targets = ctx.saved_tensors
        row_grads, *head_grads = _recompute(rows, targets, loss_grads, ctx.head, ctx.trained)
        return (row_grads, None, None, *head_grads)


def _recompute(
    rows: Tensor, targets: Tensor, loss_grads: Tensor, head: Head, trained: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of sum(losses * loss_grads) to `rows` [L, D] and to each tensor of `trained`, chunk by chunk."""
    row_grads, totals = torch.empty_like(rows), tuple(torch.zeros_like(p) for p in trained)
    for part in _chunks(len(rows), head):
        chunk = rows[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = head(chunk)
        _, logit_grads = _loss_and_gradient(logits.detach(), targets[part], True, loss_grads[part, None])
        row_grads[part], *grads = torch.autograd.grad(logits, (chunk, *trained), logit_grads)
        for total, grad in zip(totals, grads, strict=True):
            total += grad
    return row_grads, *totals


def _chunks(rows: int, head: Head) -> Iterator[slice]:
    """Equal parts, each of at most CHUNK_ELEMENTS logits."""
    return _parts(rows, max(1, CHUNK_ELEMENTS // head.vocabulary))


def _parts(rows: int, most: int) -> Iterator[slice]:
    size = -(-rows // -(-rows // most)) if rows else 1
    return (slice(start, start + size) for start in range(0, rows, size))


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, with_gradient: bool, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Losses fp32 [n] of `logits` [n, V], and their gradient to the logits (softmax - one-hot) times `scale` [n, 1]."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    grads = torch.empty_like(logits) if with_gradient else None
    for part in _parts(len(logits), max(1, BLOCK_ELEMENTS // logits.shape[-1])):
        log_p, at_target = torch.log_softmax(logits[part], -1, dtype=torch.float32), targets[part, None]
        losses[part] = -log_p.gather(1, at_target).squeeze(1)
        if grads is not None:
            p = log_p.exp_()
            p.scatter_add_(1, at_target, p.new_full(at_target.shape, -1.0))
            grads[part] = p if scale is None else p.mul_(scale[part])
    return losses, grads


def run_without_head(model: nn.Module, batch: Batch, keep: Tensor, cache: Any = None) -> tuple[Tensor, Head]:
    """Hidden states [L, D] where `keep` [B, T] is true, and the head that makes logits of them.

    `cache` is transformers': the batch goes on from what lies there, and is added to it.
    """
    module = model.get_output_embeddings()  # type: ignore[operator]
    gathered: list[Tensor] = []
    probe = torch.linspace(-4, 4, 9, device=keep.device)[None]

    def gather(hidden: Tensor) -> Tensor:
        gathered.append(hidden[keep])
        return probe

    with _forward_replaced(module, gather):
        came_out = _forward(model, batch, cache)
    after = _after_head(model, probe, came_out)
    vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    if after is None:
        if cache is not None:
            cache.crop(cache.get_seq_length() - batch.input_ids.shape[1])
        return _forward(model, batch, cache)[keep], Head(nn.Identity(), _unchanged, vocabulary)
    return gathered[0], Head(module, after, vocabulary)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Elementwise) -> Iterator[None]:
    """`module` computes `forward` inside the block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _forward(model: nn.Module, batch: Batch, cache: Any = None) -> Tensor:
    """What the model returns as logits. Positions go where they are not 0, 1, 2, ...: not every family takes them."""
    takes = batch.packed or "position_ids" in inspect.signature(language_model(model).forward).parameters
    positions = {"position_ids": batch.position_ids} if takes and (batch.packed or batch.mask is not None) else {}
    masked = {} if batch.mask is None else {"attention_mask": batch.mask}
    media = {f"{name}_features": x for name, x in batch.media.items()}
    cached = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    logits: Tensor = model(input_ids=batch.input_ids, **cached, **positions, **masked, **media).logits
    return logits


def _after_head(model: nn.Module, probe: Tensor, came_out: Tensor) -> Elementwise | None:
    """What the family does to logits after the head, from what became of `probe`: nothing, or a scale and a cap.

    None where it is something else: the model must then make all its logits itself.
    """
    if torch.equal(came_out, probe):
        return _unchanged
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[operator, union-attr]
    uncapped = came_out if cap is None else torch.atanh(came_out / cap) * cap
    scale = float((uncapped * probe).sum() / (probe * probe).sum())
    after = partial(_scale_and_cap, scale=round(scale, 6), cap=cap)
    return after if torch.allclose(after(probe), came_out, rtol=1e-4) else None


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _cooled(logits: Tensor, after: Elementwise, temperature: float) -> Tensor:
    return after(logits) / temperature


def _scale_and_cap(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """cap * tanh(scale * logits / cap): Gemma (cap), Granite and Cohere (scale)."""
    scaled = logits if scale == 1 else logits * scale
    return scaled if cap is None else torch.tanh(scaled / cap) * cap
