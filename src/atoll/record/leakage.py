"""What the tests of leakage found, as the run's folder keeps it: one number a line of a table, in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from atoll.cache import write_file
from atoll.record.folder import RunFolder

MODEL = "the model"
"""What everybody sees who may ask a released model, and who has it."""


@dataclass(frozen=True)
class Finding:
    """A number that an attack came to."""

    attack: str
    measure: str
    value: float | None
    """None where there are too few samples for it."""
    error: float | None
    """Its standard error."""
    chance: float | None
    """What guessing comes to."""
    of: str
    """What it rests on: `256 members, 256 non-members`."""
    sees: str = MODEL
    """What the attacker sees: the model, or of updates `one update, clipped, masked`."""


@dataclass(frozen=True)
class Findings:
    """All that is known of a run."""

    rows: Sequence[Finding]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Attack -> why it does not apply to the run, and what to do."""

    def over(self, before: Findings) -> Findings:
        """These findings, beside those `before` of other attacks, and of attackers who see something else."""
        now = {(row.attack, row.sees) for row in self.rows}
        rows = [row for row in before.rows if (row.attack, row.sees) not in now and row.attack not in self.skipped]
        made = {row.attack for row in self.rows}
        skipped = {name: why for name, why in before.skipped.items() if name not in made}
        return Findings([*rows, *self.rows], {**skipped, **self.skipped})


NOTHING_TESTED = Findings([])


def read_findings(folder: RunFolder) -> Findings:
    """What earlier tests found; nothing if there were none."""
    if not folder.leakage.exists():
        return NOTHING_TESTED
    kept = json.loads(folder.leakage.read_text(encoding="utf-8"))
    return Findings([Finding(**row) for row in kept["rows"]], kept["skipped"])


def write_findings(folder: RunFolder, found: Findings) -> None:
    """Keeps them beside the record."""
    write_file(folder.leakage, (json.dumps(asdict(found), indent=2) + "\n").encode())


def cells(row: Finding) -> list[str]:
    """A finding as people read it, in the columns of `COLUMNS`.

    >>> cells(Finding("membership", "AUC of the loss", 0.512, 0.025, 0.5, "256 members, 256 non-members"))
    ['membership', 'the model', 'AUC of the loss', '0.512 ± 0.025', '0.500', '256 members, 256 non-members']
    """
    value = "-" if row.value is None else f"{row.value:.3f}"
    return [
        row.attack,
        row.sees,
        row.measure,
        value if row.error is None else f"{value} ± {row.error:.3f}",
        "-" if row.chance is None else f"{row.chance:.3f}",
        row.of,
    ]


COLUMNS = ("attack", "sees", "measure", "found", "by chance", "of")
