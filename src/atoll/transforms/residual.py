"""Error feedback: what an inner chain loses this round is added to the update of the next.

With residual e, update x and decay d (the paper's algorithm has d = 1):

    p = x + d e;    send C(p);    e <- p - C(p)

Source: Seide et al. 2014; Karimireddy et al. 2019 (arXiv 1901.09847), Algorithm 1. Departs from it in `decay`, as in
SparseLoCo. The residual is client state: it counts only once the server has accepted the update (see client.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le

from atoll.params import Params, add, nested, subtract, under, zeros_like
from atoll.parts import Slot
from atoll.transforms.base import Encoded, Traits, Transform
from atoll.transforms.chain import Chain, Payload


@dataclass(frozen=True)
class ErrorFeedback:
    """See `error_feedback`."""

    inner: Chain
    decay: float

    @property
    def traits(self) -> Traits:
        """The inner chain's support; with a state, and with no bound: the residual breaks it."""
        return Traits(fixed_support=self.inner.traits.fixed_support, client_state=True)

    def init(self, like: Params) -> Params:
        """A residual of zero, and the inner chain's own state."""
        return nested("residual", zeros_like(like)) | nested("inner", self.inner.init(like))

    def encode(self, state: Params, x: Params, key: int) -> tuple[Params, Encoded]:
        """Adds the residual, encodes, and keeps what the receiver will not see."""
        wanted = add(x, under("residual", state), scale=self.decay)
        inner, payload = self.inner.encode(under("inner", state), wanted, key)
        residual = subtract(wanted, self.inner.decode(payload))
        side = {f"{i}/{name}": value for i, part in enumerate(payload.sides) for name, value in part.items()}
        return nested("residual", residual) | nested("inner", inner), Encoded(payload.main, side)

    def decode(self, encoded: Encoded) -> Params:
        """The inner chain's decoding."""
        sides = tuple(under(str(i), encoded.side) for i in range(len(self.inner.transforms)))
        return self.inner.decode(Payload(encoded.main, sides))


def error_feedback(
    chain: Annotated[Sequence[Transform], Slot("transform")], decay: Annotated[float, Gt(0), Le(1)] = 1.0
) -> ErrorFeedback:
    """Adds what `chain` lost in earlier rounds, times `decay`, to the update before encoding it."""
    return ErrorFeedback(Chain(tuple(chain)), decay)
