"""Corrections: what a method does to local gradients, and what it sends beside the update.

    adjust(parameters, start)              changes .grad in place, before each local step
    conclude(after, start, moved) -> ...   at the end: updates of the method's own streams, and the client's new state

FedProx and L1 need the first alone; SCAFFOLD both, a stream and client state. (A class per paper elsewhere; here functions.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import torch
from annotated_types import Gt
from torch import nn

from atoll.params import Params, add, subtract, zeros_like
from atoll.stream import UPDATE, Stream


class Start(NamedTuple):
    """Where the local work started: the broadcast's params per stream, the client's state, and what trains in the base."""

    params: Mapping[str, Params]
    state: Params
    base: Params


class Correction(NamedTuple):
    """See the module's text. `moved` is the sum of the local learning rates, so that steps can be told from distance."""

    adjust: Callable[[Mapping[str, nn.Parameter], Start], None] = lambda parameters, start: None
    conclude: Callable[[Params, Start, float], tuple[dict[str, Params], Params]] = lambda after, start, moved: ({}, {})
    streams: tuple[Stream, ...] = ()
    needs_plain_sgd: bool = False
    """Whether (before - after) / moved must be a mean gradient, which only plain SGD gives."""


def none() -> Correction:
    """Plain local training."""
    return Correction()


def proximal(mu: Annotated[float, Gt(0)] = 0.01) -> Correction:
    """FedProx: adds mu (w - w_t) to the gradient, that of mu / 2 |w - w_t|^2.

    Source: Li et al. 2020 (arXiv 1812.06127), Algorithm 2. The reported loss is without the term.
    """

    def adjust(parameters: Mapping[str, nn.Parameter], start: Start) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start.params[UPDATE][name], alpha=mu)

    return Correction(adjust)


def l1(strength: Annotated[float, Gt(0)] = 1e-4) -> Correction:
    """Keeps most of what is learned at zero: adds strength sign(w - w_base), the gradient of strength |w - w_base|_1.

    What is sparse can be fused with something else: PAFT's fine-tuning (Pentyala et al. 2024, arXiv 2406.17923, eq. 3). The
    reported loss is without the term.
    """

    def adjust(parameters: Mapping[str, nn.Parameter], start: Start) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(torch.sign(parameter.detach() - start.base[name]), alpha=strength)

    return Correction(adjust)


CONTROL = "control"


def scaffold() -> Correction:
    """SCAFFOLD: gradients corrected by the difference of the server's and the client's control variates.

    Source: Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1 with option II:

        g <- g - c_k + c;      c_k+ = c_k - c + (x - y_k) / (K eta);      the server adds mean(c_k+ - c_k) |S| / N to c

    x is the broadcast, y_k the result, K eta our `moved`. The server's `control` stream adds up the replies and divides by
    N: mean(...) |S| / N, and c stays the mean of all c_k whoever takes part, is lost on the way or comes late.
    """

    def adjust(parameters: Mapping[str, nn.Parameter], start: Start) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(start.params[CONTROL][name])
                if start.state:
                    parameter.grad.sub_(start.state[name])

    def conclude(after: Params, start: Start, moved: float) -> tuple[dict[str, Params], Params]:
        before, own = start.params[UPDATE], start.state or zeros_like(start.params[CONTROL])
        if not moved:  # every step had a learning rate of zero: nothing is known of the gradient
            return {CONTROL: zeros_like(own)}, own
        drift = {name: torch.sub(before[name], x) / moved for name, x in after.items()}
        new = add(subtract(own, start.params[CONTROL]), drift)
        return {CONTROL: subtract(new, own)}, new

    return Correction(adjust, conclude, (Stream(CONTROL, initial=zeros_like, ages=False),), needs_plain_sgd=True)
