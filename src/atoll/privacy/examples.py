"""Differential privacy of single examples: DP-SGD in the local work of each client.

What leaves a client is private already, whoever reads it: each local step is a Gaussian mechanism on a Poisson sample of
the client's own training samples (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1), and all else - the inner optimizer,
corrections, chains, sums, the outer step - is computed from its result. The gradients are local/private.py's.

The guarantee is each client's own, by its number n of samples: a rate of batch / n, as many releases as local steps. Two
data sets are neighbors if one sample of one is missing from the other; n itself is taken as known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le

from atoll.aggregate.base import ALL
from atoll.errors import AtollError
from atoll.params import Params
from atoll.privacy.accounting import MOST_NOISE, Release
from atoll.privacy.mechanisms import Budget, Clip, Delta
from atoll.privacy.protection import Mechanism, Samples, promise
from atoll.stream import Stream


def rate(batch: int, samples: int) -> float:
    """The chance of each sample to be drawn, so that `batch` are on average; a client with fewer draws all it has."""
    return min(1.0, batch / samples)


@dataclass(frozen=True)
class OfExamples:
    """DP-SGD in a plan. See protection.py."""

    mechanism: Mechanism
    noise_multiplier: float
    batch: int
    """Samples in a local step, on average."""
    steps: Callable[[int], int]
    """Samples of a client -> its local steps in a round."""
    slack: float = 0.0

    def releases(self, samples: Samples) -> dict[str, Release]:
        """One of each client's data. A client that a round does not ask is counted all the same."""
        return {
            name: Release(self.noise_multiplier, "poisson", rate(self.batch, count), count=self.steps(count))
            for name, count in samples.items()
        }

    def fits(self, samples: Samples) -> None:
        """Raises AtollError where delta is too large for a client, or the first round would pass the budget."""
        largest = max(samples, key=lambda name: samples[name], default=None)
        if largest is not None and self.mechanism.delta > 1 / samples[largest]:
            raise AtollError(
                f"delta is larger than 1 / the samples of {largest}", where="finetune.privacy.delta",
                found=self.mechanism.delta, allowed=f"at most 1 / {samples[largest]} = {1 / samples[largest]:.3g}",
                remedy="such a delta would allow to publish one sample as it is",
            )  # fmt: skip
        told = promise(self, 1, samples)
        if told and self.mechanism.epsilon is not None and told.epsilon > self.mechanism.epsilon:
            one = told.release
            raise AtollError(
                f"the first round would pass the budget of {told.client}", where="finetune.privacy.epsilon",
                found=self.mechanism.epsilon,
                allowed=f"at least {told.epsilon:.3g}, which {one.count} local steps at rate {one.rate:.3g} take",
                remedy="a larger noise_multiplier, fewer local steps, or a smaller batch",
            )  # fmt: skip

    def streams(self, streams: Sequence[Stream]) -> tuple[Stream, ...]:
        """As they are: the server has nothing to add."""
        return tuple(streams)

    def range(self, stream: str) -> Callable[[Mapping[str, Params]], float] | None:
        """Not known before; how large a private update is may be told."""
        return None

    def guarded(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """As it is, for its gradients are private. A weight of 0 would tell that no sample has a picture: all are 1."""

        def protected(*given: Any) -> Any:
            return work(*given)._replace(weights={ALL: 1.0})

        return protected


def examples(
    clip: Clip, delta: Delta, noise_multiplier: Annotated[float, Ge(0), Le(MOST_NOISE)], epsilon: Budget = None
) -> Mechanism:
    """Differential privacy of single examples: DP-SGD in the local work, private against the server too.

    Each local step draws every sample of the client by itself, clips each one's gradient over all that trains, and adds
    noise before the inner optimizer sees it. Training losses do not leave; held-out losses do and are not covered.
    Needs `weighting: uniform`. Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1.

    Args:
        clip: the largest Euclidean norm of a sample's gradient; their C.
        delta: at most 1 / the samples of the client that holds most.
        noise_multiplier: the noise's standard deviation over the clip. Rates depend on how much data each
            client holds, so it is not found from epsilon: `atoll plan` says what epsilon a noise_multiplier comes to.
        epsilon: the budget of the run, which stops before any client's is passed.
    """
    return Mechanism("examples", clip, delta, epsilon, noise_multiplier)
