"""The multimodal recipe over a network with secure aggregation, against the same in one process, masked and in the clear.

    PYTHONPATH=examples python experiments/multimodal_network.py [--set finetune.rounds=2 finetune.local_steps=4]

Four sites as processes on this machine, each with its own modality, with TLS and keys. Prints the largest difference of the
results' parameters, and held-out loss and accuracy by modality of all three runs.

Owner: the maintainers of src/atoll/models. Expires with the first release.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from atoll.data.prepared_media import multimodal_sites
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.record.measured import ACCURACY, LOSS, by_modality
from atoll.record.story import read_story
from atoll.stream import UPDATE
from network import Demo

SITES = ("gallery", "library", "school", "station")
MASKS = "finetune.exchange=secure-aggregation"


def main() -> None:
    """Three runs, and how they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    chosen = parser.parse_args()
    demo = Demo(Path(tempfile.mkdtemp(prefix="atoll-multimodal-")))
    (demo.folder / "data").symlink_to(multimodal_sites())
    common = ["baselines=[]", *chosen.settings]

    def run(name: str, *more: str, where: tuple[str, ...] = ()) -> RunFolder:
        started = time.monotonic()
        settings = [f"name={name}", *common, *more]
        demo.call("run", "multimodal", *where, *(word for one in settings for word in ("--set", one)))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        return RunFolder(demo.folder / "runs" / f"{name}-1")

    try:
        network = run("network", MASKS, where=("--fleet", demo.federate(SITES)))
    finally:
        demo.close()
    runs = {"network, masked": network, "one process, masked": run("masked", MASKS), "in the clear": run("clear")}
    params = {name: load_state(folder.checkpoint).params[UPDATE] for name, folder in runs.items()}
    for name, mine in params.items():
        largest = max(float((x - params["in the clear"][key]).abs().max()) for key, x in mine.items())
        story = read_story(runs[name])
        assert story is not None
        for table in filter(None, (by_modality(story, measure) for measure in (LOSS, ACCURACY))):
            for model, cells in table.rows:
                shown = ", ".join(f"{site} {one[0]:.4f}" for site, one in zip(table.columns, cells, strict=True) if one)
                print(f"{name}: {table.measure.name} of {model}: {shown}")
        print(f"{name}: largest difference from the clear: {largest:.2g}")


if __name__ == "__main__":
    main()
