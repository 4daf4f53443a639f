"""What a plan says of privacy: what the server sees, whose presence is hidden, and by how much."""

from __future__ import annotations

from typing import Any

from atoll.build import Plan, cohort_sizes
from atoll.privacy.mechanisms import Protection


def statement(plan: Plan) -> dict[str, Any]:
    """As plain data, for `atoll plan --json`, the record and the card."""
    return {"server_sees": server_sees(plan), "guarantee": guarantee(plan.protection, plan.recipe.finetune.rounds)}


def server_sees(plan: Plan) -> str:
    """What becomes known to an honest but curious server."""
    noised = plan.protection is not None and plan.protection.mechanism.where == "local"
    if plan.exchange is None:
        return "every update by itself" + (", noised by its client" if noised else "")
    asked, _ = cohort_sizes(plan.rounds.schedule, len(plan.trainers))
    apart = f" and, with clients who collude, up to {plan.exchange.colluding}" if plan.exchange.colluding else ""
    allowed = f"; of single clients also {', '.join(plan.exchange.metrics)}" if plan.exchange.metrics else ""
    ranges = "" if plan.protection and plan.protection.noise_multiplier else ", and where their largest values stand"
    return (
        f"who takes part, and sums of at least {plan.exchange.least(asked)} updates{apart}{ranges}{allowed};"
        " held-out losses are each client's"
    )


def guarantee(protection: Protection | None, rounds: int) -> dict[str, Any] | None:
    """The promise of differential privacy, if all rounds are run; None where there is none."""
    if protection is None:
        return None
    mechanism, release = protection.mechanism, protection.release
    return {
        "unit": "client",
        "mechanism": mechanism.where,
        "adjacency": release.adjacency,
        "holds_against": HOLDS_AGAINST[mechanism.where],
        "epsilon": protection.epsilon(rounds),
        "delta": mechanism.delta,
        "budget": mechanism.epsilon,
        "rounds": rounds,
        "clip": mechanism.clip,
        "noise_multiplier": protection.noise_multiplier,
        "sampling": release.sampling,
        "rate": release.rate,
    }


HOLDS_AGAINST = {
    "central": "everybody but the server, as long as nobody is told who took part in which round",
    "local": "everybody, the server included",
    "distributed": "everybody, the server included, as far as it follows the protocol",
}
