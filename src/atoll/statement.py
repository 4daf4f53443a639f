"""What a plan says of privacy: what the server sees, whose presence is hidden, and by how much."""

from __future__ import annotations

from typing import Any

from atoll.aggregate.base import ALL, modality_of
from atoll.build import Plan
from atoll.privacy.protection import Protection, Samples, promise
from atoll.schedule import cohort_sizes
from atoll.stream import UPDATE


def statement(plan: Plan, samples: Samples, about: bool = False) -> dict[str, Any]:
    """As plain data, for `atoll plan --json`, the record and the card.

    `samples` are empty where they are not known; `about`: they are records, of which some may make no sample or several.
    """
    promised = guarantee(plan.protection, plan.recipe.finetune.rounds, samples)
    if promised and plan.protection and plan.protection.mechanism.unit == "example":
        promised["about"] = about
    runs = [one.name for one in plan.recipe.stands_on if one.run]
    if promised and runs:
        promised["not_covered"] += f"; what {', '.join(runs)}, which it stands on, has spent (`atoll ledger` adds up)"
    if promised and any(one.protection for one in plan.before.values()):
        promised["not_covered"] += "; what the stages before it spend, which the budget counts"
    return {"server_sees": server_sees(plan), "guarantee": promised}


def server_sees(plan: Plan) -> str:
    """What becomes known to an honest but curious server."""
    noise = plan.protection is not None and plan.protection.noise_multiplier > 0
    noised = noise and plan.protection.mechanism.where in ("local", "examples")  # type: ignore[union-attr]
    if plan.exchange is None:
        return "every update by itself" + (", noised by its client" if noised else "")
    asked, _ = cohort_sizes(plan.rounds.schedule, len(plan.trainers))
    apart = f", also if up to {plan.exchange.colluding} of them collude with it" if plan.exchange.colluding else ""
    allowed = f"; of single clients also {', '.join(plan.exchange.metrics)}" if plan.exchange.metrics else ""
    ranged = plan.protection is not None and plan.protection.range(UPDATE) is not None
    ranges = "" if ranged else ", and how many clients' largest values lie in which quarter of an octave"
    return (
        f"who takes part, and sums of at least {plan.exchange.least(asked)} updates{apart}{ranges}{allowed};"
        f" {EVALUATED[bool(plan.rounds.evaluated)]}{few_hold(plan)}"
    )


EVALUATED = {
    True: "of held-out losses and accuracies it hears sums over the clients that have them, who may be few",
    False: "it also hears each client's held-out loss and accuracy",
}


def few_hold(plan: Plan) -> str:
    """What masks do not hide of a modality that few hold: the others' parts of its sum are zero."""
    if all(modality_of(name) == ALL for name in plan.trains or ()):
        return ""
    of = "what is held out of a modality" if plan.protection else "a connector, and what is held out of its modality,"
    return f"; the sum of {of} is over those who hold it, who may be few or one, and it learns how many"


def guarantee(protection: Protection | None, rounds: int, samples: Samples) -> dict[str, Any] | None:
    """The promise of differential privacy, if all rounds are run; None where there is none, as without noise."""
    if protection is None or protection.noise_multiplier == 0:
        return None
    mechanism, told = protection.mechanism, promise(protection, rounds, samples)
    return {
        "unit": mechanism.unit,
        "mechanism": mechanism.where,
        "adjacency": ADJACENCY.get(mechanism.where) or (told.release.adjacency if told else "add-or-remove-one"),
        "holds_against": HOLDS_AGAINST[mechanism.where],
        "not_covered": NOT_COVERED[mechanism.unit],
        "epsilon": told.epsilon if told else None,
        "most_told_of": told.client if told else "",
        "delta": mechanism.delta,
        "budget": mechanism.epsilon,
        "rounds": rounds,
        "clip": mechanism.clip,
        "noise_multiplier": protection.noise_multiplier,
        "sampling": told.release.sampling if told else "poisson",
        "rate": told.release.rate if told else None,
    }


ADJACENCY = dict.fromkeys(("local", "distributed"), "zero-out: what it sends, not that it takes part")
"""Where the server is among those whom a promise holds against: it knows whom it asked and who answered."""

HOLDS_AGAINST = {
    "central": "everybody but the server, as long as nobody is told who took part in which round",
    "local": "everybody, the server included",
    "distributed": (
        "everybody who takes no part, the server included, as far as it follows the protocol; a client that takes part"
        " knows its own share of the noise, which `colluding: 1` makes up for"
    ),
    "examples": "everybody, the server included, as long as it asks each client for no more rounds than these",
}

NOT_COVERED = {
    "client": "held-out losses, which no noise is added to, and whatever is decided by them, such as when to stop",
    "example": (
        "held-out losses, how many samples a client holds, whether any of them has a picture or a sound, and how long it"
        " works; a text that was cut into several samples is several examples"
    ),
}
