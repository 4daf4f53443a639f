"""A run and the names of attacks -> findings, which the run's folder keeps and its card shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atoll.cache import Say, quiet
from atoll.errors import AtollError, closest
from atoll.leakage.canaries import canaries
from atoll.leakage.inversion import Seen, inversion
from atoll.leakage.membership import membership
from atoll.leakage.subject import NotApplicable, Subject, open_run
from atoll.record.card import write_card
from atoll.record.folder import RunFolder
from atoll.record.leakage import Finding, Findings, read_findings, write_findings

ATTACKS = ("membership", "canaries", "inversion")


def attack(
    folder: RunFolder,
    named: Sequence[str] = (),
    samples: int = 64,
    codes: int = 512,
    say: Say = quiet,
    seen: Seen | None = None,
) -> Findings:
    """Attacks a finished run, and keeps what was found.

    Args:
        folder: the run's.
        named: attacks, of `ATTACKS`; without any, all that apply.
        samples: the most of each site.
        codes: how many a canary's code is ranked among, its own included.
        say: told what is going on.
        seen: what a protection of your own leaves of an update on its way to the server; rows of its own tell of it.

    Raises:
        AtollError: the run cannot be attacked, or a named attack does not apply to it.
    """
    refuse_arguments(named, samples, codes)
    subject = open_run(folder, say)
    works: dict[str, Callable[[], list[Finding]]] = {
        "membership": lambda: membership(subject, samples),
        "canaries": lambda: canaries(subject, codes),
        "inversion": lambda: inversion(subject, samples, seen),
    }
    rows: list[Finding] = []
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(named or ATTACKS):
        say(f"attack: {name}")
        try:
            rows += works[name]()
        except NotApplicable as reason:
            if named:
                raise
            skipped[name] = f"{reason.what}; {reason.details['remedy']}"
    found = Findings(rows, skipped)
    keep(folder, subject, found)
    return found


def keep(folder: RunFolder, subject: Subject, found: Findings) -> None:
    """Writes the findings, beside earlier ones of other attacks, and the card anew."""
    subject.say("writing the card")
    write_findings(folder, found.over(read_findings(folder)))
    write_card(folder)


def refuse_arguments(named: Sequence[str], samples: int, codes: int) -> None:
    """What cannot be done is told before a model is loaded."""
    for name in named:
        if name not in ATTACKS:
            raise AtollError("unknown attack", where="--attack", found=name, remedy=closest(name, ATTACKS))
    if samples < 1:
        raise AtollError(
            "no samples to attack", where="--samples", found=samples, allowed="1 or more", remedy="--samples 64"
        )
    if codes < 2:
        raise AtollError(
            "nothing to rank a code among", where="--candidates", found=codes, allowed="2 or more",
            remedy="--candidates 512",
        )  # fmt: skip
