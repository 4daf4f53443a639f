"""What each connector is worth: a finished run's scores by modality, with the module of one modality as it was at the start.

    python experiments/modality_ablation.py RUN [RUN...] [--samples 100]

Prints, for each run, held-out loss and accuracy by modality of the whole result, and of the result with each modality's
parameters withheld, over all its clients' held-out samples; accuracy with its standard error.

Owner: the maintainers of src/atoll/models. Expires with the first release.
"""

from __future__ import annotations

import argparse
import sys
import time

from atoll.aggregate.base import ALL, modality_of
from atoll.assemble import Assembly, assemble
from atoll.evaluate import summary
from atoll.exchange import Broadcast, Task
from atoll.local.work import evaluate
from atoll.outcome import outcome
from atoll.params import Params
from atoll.planning import plan_again
from atoll.record.events import Evaluated
from atoll.record.folder import find
from atoll.record.measured import ACCURACY, LOSS, over_clients
from atoll.stream import UPDATE


def scores(things: Assembly, params: Params, samples: int) -> Evaluated:
    """What the clients say of these params."""
    clients = {}
    for name, data in things.data.items():
        task = Task("evaluate", name, "", Broadcast(0, {}), 0, data={"samples": samples})
        clients[name] = evaluate(things.local, {UPDATE: params}, data, {}, task).metrics
    return summary(0, True, clients, {}, 0, 0, time.perf_counter())


def line(name: str, found: Evaluated, modalities: list[str]) -> str:
    """A row in Markdown: loss, and accuracy."""
    cells = []
    for measure in (LOSS, ACCURACY):
        for modality in modalities:
            cell = over_clients(found, modality, measure)
            cells.append("-" if cell is None else f"{cell[0]:.3f} ± {cell[1]:.3f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Evaluates each run's result, whole and with each modality withheld."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--samples", type=int, default=100)
    chosen = parser.parse_args()
    for name in chosen.runs:
        folder = find(name)
        things = assemble(plan_again(folder), lambda line: print(line, file=sys.stderr))
        tuned = outcome(folder).params
        groups = sorted({modality_of(key) for key in tuned} - {ALL})
        modalities = sorted(["text", *groups])
        heads = [f"{measure.name}, {one}" for measure in (LOSS, ACCURACY) for one in modalities]
        print(f"\n{folder.name}\n\n| withheld | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
        print(line("nothing", scores(things, tuned, chosen.samples), modalities), flush=True)
        for group in groups:
            without = {key: things.start[key] if modality_of(key) == group else x for key, x in tuned.items()}
            print(line(group, scores(things, without, chosen.samples), modalities), flush=True)


if __name__ == "__main__":
    main()
