"""Clipping: the update is scaled down to a Euclidean norm of at most `norm`, over all its tensors together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from atoll.params import Params, clipped
from atoll.transforms.base import Encoded, Stateless, Traits


@dataclass(frozen=True)
class Clip(Stateless):
    """See `clip`."""

    norm: float
    traits = Traits(summable=True, fixed_support=True, bounded=True)

    def encode(self, state: Params, x: Params, key: int) -> tuple[Params, Encoded]:
        """Scales by min(1, norm / |x|)."""
        return state, Encoded(clipped(x, self.norm), {})

    def decode(self, encoded: Encoded) -> Params:
        """Nothing to undo."""
        return encoded.main


def clip(norm: Annotated[float, Gt(0)]) -> Clip:
    """Scales the update down to a Euclidean norm of at most `norm`.

    Source: Abadi et al. 2016 (arXiv 1607.00133), the clipping step, applied to a client's whole update as in McMahan et
    al. 2018 (arXiv 1710.06963).
    """
    return Clip(norm)
