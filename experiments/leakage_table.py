"""What attacks find with protection off and on, side by side: the quickstart with canaries, as it is and protected.

    python experiments/leakage_table.py [off] [masks] [masks-noise]

Makes the runs that are named (all of them without a name), each only as far as it is not there yet: it may be stopped at
any time and started again. Then makes the attacks that were not made, and prints one table of all that are there.

Owner: the maintainers of src/atoll/leakage. Expires with the first release, which shall print such a table by a command.
"""

from __future__ import annotations

import sys

import atoll
from atoll.errors import AtollError
from atoll.leakage.attack import ATTACKS, attack
from atoll.record.folder import RunFolder, find
from atoll.record.leakage import Finding, cells, read_findings
from atoll.run import resume

COMMON = [
    "data={use: with-canaries, inner: four-sites, count: 4, repeats: 50}",
    "evaluate.start=false",
    "baselines=[]",
]
PROTECTED: dict[str, list[str]] = {
    "off": [],
    "masks": ["finetune.exchange=secure-aggregation"],
    "masks-noise": [
        "finetune.space=ffa-lora",
        "finetune.exchange={use: secure-aggregation, bits: 8}",
        "finetune.privacy={use: distributed, clip: 0.2, epsilon: 8, delta: 0.05}",
    ],
}

SAMPLES = 24
"""Of each site that membership looks at: an attack shall take minutes on two cores."""

CODES = 64
"""That a canary's is ranked among: 6 bits at most."""


def say(line: str) -> None:
    """On stderr, beside the table."""
    print(line, file=sys.stderr, flush=True)


def existing(name: str) -> RunFolder | None:
    """The run of this protection, if it was begun."""
    try:
        return find(f"leakage-{name}-1")
    except AtollError:
        return None


def finished(name: str) -> RunFolder:
    """The run, made or gone on with as far as it is needed."""
    folder = existing(name)
    if folder is None:
        return atoll.run("quickstart", [*COMMON, *PROTECTED[name], f"name=leakage-{name}"], say=say)
    return folder if folder.card.exists() else resume(folder.name, say=say)


def table(found: dict[str, list[Finding]]) -> list[str]:
    """One line for each attack, what it sees, and measure; one column for each run."""
    rows = {(row.attack, row.sees, row.measure): row.chance for rows in found.values() for row in rows}
    values = {(name, row.attack, row.sees, row.measure): cells(row)[3] for name in found for row in found[name]}
    head = ["attack", "sees", "measure", "by chance", *found]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        chance = "-" if rows[row] is None else f"{rows[row]:.3f}"
        lines.append([*row, chance, *(values.get((name, *row), "") for name in found)])
    return [f"| {' | '.join(line)} |" for line in lines]


def main(named: list[str]) -> None:
    """The named runs, their attacks, and the table of all that are there."""
    for name in named or PROTECTED:
        say(f"{name}: {' '.join(PROTECTED[name]) or 'as it is'}")
        run = finished(name)
        for one in ATTACKS:
            if one not in {row.attack for row in read_findings(run).rows}:
                attack(run, [one], SAMPLES, CODES, say)
    attacked = {name: folder for name in PROTECTED if (folder := existing(name)) and folder.leakage.exists()}
    print("\n".join(table({name: list(read_findings(folder).rows) for name, folder in attacked.items()})))


if __name__ == "__main__":
    main(sys.argv[1:])
