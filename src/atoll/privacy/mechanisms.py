"""Differential privacy of whole clients: who adds the noise, and to what.

    central      the server clips, sums, and adds noise to the sum before it divides; it is trusted with single updates
    local        each client clips and adds all the noise itself; the server is trusted with nothing
    distributed  each client clips and adds its share of the noise; secure aggregation shows the server the sum alone

One joint clip over everything a client sends (McMahan et al. 2018, arXiv 1710.06963), weights of 1, a public denominator
(the expected cohort), noise before any division: so one client changes the sum by at most the clip, whoever else takes
part, and an empty cohort releases noise like any other. The clip may follow the norms of the updates (`quantile`; Andrew et
al. 2021, arXiv 1905.03871), by a stream of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt

from atoll.aggregate.base import ALL, modality_of
from atoll.aggregate.mean import share
from atoll.data.media import MODALITIES
from atoll.errors import AtollError, closest
from atoll.exchange import NOT_THE_TASKS_FAULT, Done
from atoll.outer import Outer
from atoll.params import Params, clipped, global_norm
from atoll.privacy.accounting import LEAST_NOISE, MOST_NOISE, Release, epsilon, noise_for
from atoll.privacy.aliasing import slack
from atoll.privacy.ledger import ANY
from atoll.privacy.noise import with_noise
from atoll.privacy.protection import SLACK_SHARE, Mechanism, Samples, Where, beside_rounding
from atoll.stream import UPDATE, Stream

CLIP = "clip"
"""The stream of the adaptive clip."""

CLIP_SHARE = 0.1
"""Of the privacy that a round spends, what goes into following the clip: noise multipliers add up as 1 / z^2."""

CLIP_RATE = 0.2
"""Andrew et al.'s eta_C."""

LEAST_DELTA = 1e-12
"""Noise made of 53 bits ends at about 8.6 standard deviations: at a smaller delta that would be told."""

LARGEST_CLIP = 1e9
"""Beyond it nothing that trains is clipped, and sums with noise leave what float32 holds."""

LARGEST_LOG = math.log(LARGEST_CLIP)
"""Of an adaptive clip, and of one over it."""

TAILS = 6.0
"""Standard deviations of a client's share of the noise that the ring has room for; beyond, it wraps around, rarely."""


@dataclass(frozen=True)
class Cohorts:
    """What a mechanism must know of a plan."""

    release: Release
    """A round's, but for its noise: as whoever sees it sees the sampling."""
    expected: float
    """Clients in a round, on average: the public denominator."""
    noisy: int
    """The fewest honest clients whose shares of the noise are in a sum."""
    rounds: int


@dataclass(frozen=True)
class OfClients:
    """A mechanism in a plan: its noise is known. See protection.py."""

    mechanism: Mechanism
    cohorts: Cohorts
    noise_multiplier: float
    slack: float = 0.0
    """In total variation, in a round: by how much the rounding of noise makes a sum differ; see aliasing.py."""

    @property
    def release(self) -> Release:
        """A round's."""
        return replace(self.cohorts.release, noise_multiplier=self.noise_multiplier)

    def epsilon(self, rounds: int) -> float:
        """After so many rounds."""
        made = [replace(self.release, count=rounds)] if rounds else []
        return beside_rounding(self, rounds, lambda delta: epsilon(made, delta))

    def releases(self, samples: Samples) -> dict[str, Release]:
        """One of all clients alike: how many samples they hold changes nothing."""
        return {ANY: self.release}

    def fits(self, samples: Samples) -> None:
        """Whatever the data are, they do: the plan was checked against the population."""

    @property
    def unit_noise(self) -> float:
        """Noise multiplier of the update, where the adaptive clip has its share."""
        return self.noise_multiplier / math.sqrt(1 - CLIP_SHARE) if self.mechanism.quantile else self.noise_multiplier

    @property
    def bit(self) -> float:
        """The most that one client changes the sum of the clip's bits."""
        quantile = self.mechanism.quantile or 0.5
        return max(quantile, 1 - quantile)

    @property
    def bit_noise(self) -> float:
        """Standard deviation of the noise on the sum of the clip's bits."""
        return self.noise_multiplier / math.sqrt(CLIP_SHARE) * self.bit

    def norm(self, params: Mapping[str, Params]) -> float:
        """The clip in a round, from what was broadcast."""
        return math.exp(float(params[CLIP]["log"])) if CLIP in params else self.mechanism.clip

    def std(self, stream: str, params: Mapping[str, Params]) -> float:
        """Of the noise on a sum."""
        return self.bit_noise if stream == CLIP else self.unit_noise * self.norm(params)

    def share_std(self, stream: str, params: Mapping[str, Params]) -> float:
        """Of the noise that a client adds."""
        parts = {"central": math.inf, "local": 1.0, "distributed": float(self.cohorts.noisy)}[self.mechanism.where]
        return self.std(stream, params) / math.sqrt(parts)

    def largest(self, stream: str, params: Mapping[str, Params]) -> float:
        """A bound on every value of a client's contribution, but for the noise's far tails; for the ring's scale."""
        bound = self.bit if stream == CLIP else self.norm(params)
        return bound + TAILS * self.share_std(stream, params)

    def range(self, stream: str) -> Callable[[Mapping[str, Params]], float] | None:
        """Where clients add noise, the bound on what they send with it: how large an update was must not be told."""
        if self.mechanism.where == "central" or self.noise_multiplier == 0:
            return None
        return partial(self.largest, stream)

    def streams(self, streams: Sequence[Stream]) -> tuple[Stream, ...]:
        """With the public denominator, what the server does to sums, and the adaptive clip's own stream."""
        with_clip = [*streams, clip_stream(self.mechanism)] if self.mechanism.quantile else streams
        return tuple(self._protected(stream) for stream in with_clip)

    def _protected(self, stream: Stream) -> Stream:
        shares = self.mechanism.holders  # noise is on every client's part in all groups: what divides them is public
        stream = replace(stream, aggregate=replace(share(self.cohorts.expected), group_of=modality_of, shares=shares))
        if self.mechanism.where != "central":
            return stream

        def release(total: Params, params: Mapping[str, Params]) -> Params:
            return with_noise(total, self.std(stream.name, params), snap=True)

        def bound(params: Mapping[str, Params]) -> float:
            return self.bit if stream.name == CLIP else self.norm(params)

        return replace(stream, release=release, bound=bound)

    def guarded(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A client's work, whose update is clipped and, as far as it is the client's to do, noised."""

        def protected(params: Mapping[str, Params], data: Any, state: Params, task: Any) -> Any:
            done = finite(work, params, data, state, task)
            norm = self.norm(params)
            updates = {UPDATE: clipped(done.updates[UPDATE], norm)}
            if self.mechanism.quantile:
                within = float(global_norm(done.updates[UPDATE]) <= norm)
                updates[CLIP] = {"log": torch.tensor([self.mechanism.quantile - within])}
            if self.mechanism.where == "distributed":  # what is rounded to a ring must not have been rounded before
                updates = {name: {n: x.double() for n, x in update.items()} for name, update in updates.items()}
            snap = self.mechanism.where == "local"
            noised = {name: with_noise(update, self.share_std(name, params), snap) for name, update in updates.items()}
            told = {name: value for name, value in done.metrics.items() if name in TELL_NOTHING}
            return done._replace(updates=noised, weights={ALL: 1.0}, metrics=told)

        return protected


TELL_NOTHING = frozenset({"steps", "seconds_in_steps"})
"""Metrics of work that are not made of the data."""


def finite(work: Callable[..., Any], params: Mapping[str, Params], data: Any, state: Params, task: Any) -> Any:
    """The work's result; zeros where it fails or is not finite. A refusal would tell of the data, and have no noise."""
    still = {name: torch.zeros_like(x) for name, x in params[UPDATE].items()}
    try:
        done = work(params, data, state, task)
    except NOT_THE_TASKS_FAULT:
        raise
    except Exception:  # whatever it says of the data
        return Done({UPDATE: still}, {ALL: 1.0}, {}, state)
    if math.isfinite(global_norm(done.updates[UPDATE])):
        return done
    return done._replace(updates={UPDATE: still}, state=state)


def clip_stream(mechanism: Mechanism) -> Stream:
    """The clip's logarithm, which falls by the share of updates within it and rises by `quantile` (Andrew et al. 2021).

    Departs from them in that each client sends quantile - bit and not 1/2 - bit: one that is lost moves the clip nowhere.
    """
    assert mechanism.quantile is not None

    def step(state: Params, params: Params, update: Params) -> tuple[Params, Params]:
        return state, {"log": (params["log"] + CLIP_RATE * update["log"]).clamp(-LARGEST_LOG, LARGEST_LOG)}

    start = {"log": torch.tensor([math.log(mechanism.clip)])}
    return Stream(CLIP, outer=Outer(lambda params: {}, step), initial=lambda params: dict(start), ages=False)


def protect(mechanism: Mechanism, cohorts: Cohorts) -> OfClients:
    """The mechanism with the noise that its budget takes, or that it names.

    Raises:
        AtollError: no noise reaches the budget, or the named noise exceeds it in the first round.
    """
    noise = mechanism.noise_multiplier
    if noise is None:
        assert mechanism.epsilon is not None
        noise = noise_for(
            mechanism.epsilon, mechanism.delta * (1 - SLACK_SHARE), replace(cohorts.release, count=cohorts.rounds)
        )
    made = OfClients(mechanism, cohorts, noise)
    if mechanism.epsilon is not None and made.epsilon(1) > mechanism.epsilon:
        raise AtollError(
            "the first round would pass the budget", where="finetune.privacy.noise_multiplier", found=noise,
            allowed=f"epsilon of at most {mechanism.epsilon:g}; one round takes {made.epsilon(1):.3g}",
            remedy="more noise, or leave noise_multiplier out: it is found from epsilon",
        )  # fmt: skip
    return made


def in_a_ring(made: OfClients, coordinates: int, bits: int) -> OfClients:
    """With what rounding to a ring costs. Raises AtollError where the noise is too small for so few bits."""
    mechanism = made.mechanism
    if mechanism.where != "distributed" or made.noise_multiplier == 0:
        return made
    share_of_clip = made.unit_noise / math.sqrt(made.cohorts.noisy)
    levels = share_of_clip / (1 + TAILS * share_of_clip) * ((1 << (bits - 1)) - 1)
    rounded = replace(made, slack=slack(levels, made.cohorts.noisy, coordinates))
    if math.isinf(rounded.epsilon(made.cohorts.rounds)):
        raise AtollError(
            "too few bits for so little noise", where="finetune.exchange.bits", found=bits,
            allowed="a client's noise of about 2 levels or more; here it is " + f"{levels:.2g}",
            remedy="more bits, or more noise (a smaller epsilon)",
        )  # fmt: skip
    return rounded


Clip = Annotated[float, Gt(0), Le(LARGEST_CLIP)]
Delta = Annotated[float, Ge(LEAST_DELTA), Lt(1)]
Budget = Annotated[float, Gt(0)] | None
Noise = Annotated[float, Ge(0), Le(MOST_NOISE)] | None
Quantile = Annotated[float, Gt(0), Lt(1)] | None
Holders = Mapping[str, Annotated[float, Ge(1e-6), Le(1)]] | None


def _mechanism(
    where: Where,
    clip: float,
    delta: float,
    epsilon: float | None,
    noise_multiplier: float | None,
    quantile: float | None,
    holders: Mapping[str, float] | None,
) -> Mechanism:
    if epsilon is None and noise_multiplier is None:
        raise AtollError(
            f"'{where}' lacks epsilon or noise_multiplier", where="finetune.privacy", found="neither",
            allowed="one of the two, or both",
            remedy=f"write {{use: {where}, clip: {clip:g}, delta: {delta:g}, epsilon: 8}}",
        )  # fmt: skip
    refuse_hardly_any(noise_multiplier)
    for name in holders or ():
        if name not in MODALITIES:
            raise AtollError(
                "unknown modality", where=f"finetune.privacy.holders.{name}", found=name,
                allowed=", ".join(MODALITIES), remedy=closest(name, MODALITIES),
            )  # fmt: skip
    return Mechanism(where, clip, delta, epsilon, noise_multiplier, quantile, dict(holders or {}))


def refuse_hardly_any(noise_multiplier: float | None) -> None:
    """Raises AtollError for noise that hides nothing, and whose account overflows. None at all is said plainly, by 0."""
    if noise_multiplier and noise_multiplier < LEAST_NOISE:
        raise AtollError(
            "hardly any noise", where="finetune.privacy.noise_multiplier", found=noise_multiplier,
            allowed=f"0, or {LEAST_NOISE:g} to {MOST_NOISE:g}", remedy="0 is the clip without noise",
        )  # fmt: skip


def none() -> None:
    """No noise: what is released tells what it tells."""


def central(
    clip: Clip,
    delta: Delta,
    epsilon: Budget = None,
    noise_multiplier: Noise = None,
    quantile: Quantile = None,
    holders: Holders = None,
) -> Mechanism:
    """Central differential privacy of clients: the server clips each update and adds noise to their sum.

    Source: McMahan et al. 2018 (arXiv 1710.06963), Algorithm 1 with fixed denominator.

    Args:
        clip: the largest Euclidean norm of a client's update; the first, where it follows a quantile.
        delta: at most 1 / population.
        epsilon: the budget of the run: its noise is found from it, and the run stops before it is passed.
        noise_multiplier: the noise's standard deviation over the clip.
        quantile: the share of updates that the clip shall leave as they are; it follows their norms then.
        holders: by modality, the share of the clients that hold it, told to everybody: what a connector's sum is divided by,
            so that it moves as far as if all held it, with as much more noise. 1 if not given.
    """
    return _mechanism("central", clip, delta, epsilon, noise_multiplier, quantile, holders)


def local(
    clip: Clip,
    delta: Delta,
    epsilon: Budget = None,
    noise_multiplier: Noise = None,
    quantile: Quantile = None,
    holders: Holders = None,
) -> Mechanism:
    """Local differential privacy of clients: each adds all the noise to its own update. Arguments as for `central`."""
    return _mechanism("local", clip, delta, epsilon, noise_multiplier, quantile, holders)


def distributed(
    clip: Clip,
    delta: Delta,
    epsilon: Budget = None,
    noise_multiplier: Noise = None,
    quantile: Quantile = None,
    holders: Holders = None,
) -> Mechanism:
    """Distributed differential privacy of clients: each adds a share of the noise, and the server sees the sum alone.

    Needs `exchange: secure-aggregation`. The shares are such that the fewest clients whose sum may be opened, less those
    who collude, bring all the noise. Departs from Kairouz et al. 2021 (arXiv 2102.06387) in that noise is added before
    rounding (privacy/aliasing.py). Arguments as for `central`.
    """
    return _mechanism("distributed", clip, delta, epsilon, noise_multiplier, quantile, holders)
