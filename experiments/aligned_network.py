"""The recipe `align`, evaluated, over a network with secure aggregation, against the same in one process; and its card.

    PYTHONPATH=examples python experiments/aligned_network.py [--set align.rounds=2 align.local_steps=4]

Four sites as processes on this machine, each with its own preferences, with TLS and keys. Prints the card of the run over
the network, and the largest difference of the two results' parameters, stage by stage.

Owner: the maintainers of src/atoll/fleet. Expires with the first release.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from atoll.data.prepared_preferences import preference_sites
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.stream import UPDATE
from network import Demo

SITES = ("clinic", "desk", "museum", "school")
STAGES = "stages=[finetune, align, evaluate]"
MASKS = "finetune.exchange=secure-aggregation"


def main() -> None:
    """Two runs, and how they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    chosen = parser.parse_args()
    demo = Demo(Path(tempfile.mkdtemp(prefix="atoll-aligned-")))
    (demo.folder / "data").symlink_to(preference_sites())
    common = [STAGES, MASKS, "baselines=[]", *chosen.settings]

    def run(name: str, *where: str) -> RunFolder:
        started = time.monotonic()
        demo.call("run", "align", *where, *(word for one in (f"name={name}", *common) for word in ("--set", one)))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        return RunFolder(demo.folder / "runs" / f"{name}-1")

    try:
        far = run("network", "--fleet", demo.federate(SITES))
    finally:
        demo.close()
    near = run("one-process")
    print(far.card.read_text())
    for stage, ours, theirs in (("finetune", far.stage("finetune"), near.stage("finetune")), ("align", far, near)):
        there, here = (load_state(one.checkpoint).params[UPDATE] for one in (ours, theirs))
        largest = max(float((x - here[name]).abs().max()) for name, x in there.items())
        print(f"{stage}: largest difference between the network and one process: {largest:.2g}")


if __name__ == "__main__":
    main()
