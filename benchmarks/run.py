"""Measures claims: `python -m benchmarks.run [CLAIM ...] [--minutes 10]`, again until it says that all is measured."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from types import ModuleType

from benchmarks.harness import Failed, commit, measure

CLAIMS = (
    "cli",
    "mean",
    "overhead",
    "simulation",
    "training",
    "gpu",
    "tuning",
    "network",
    "masks",
    "multimodal",
    "preferences",
)


def claim(name: str) -> ModuleType:
    """The module of a claim: `cases(tiny)` and `BARS`."""
    return importlib.import_module(f"benchmarks.{name}")


def main() -> int:
    """0 when everything is measured, 75 when time ran out (run it again), 1 when a contestant failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("claims", nargs="*", default=CLAIMS, help=f"some of: {', '.join(CLAIMS)}")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing new after this long")
    parser.add_argument("--tiny", action="store_true", help="small sizes: tries the code, says nothing of speed")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contestants end with this process
    deadline = time.monotonic() + 60 * chosen.minutes
    at, failed = ("tiny" if chosen.tiny else commit()), False
    for name in chosen.claims:
        print(f"{name} at {at}", flush=True)
        for case in claim(name).cases(chosen.tiny):
            try:
                if not measure(at, case, deadline):
                    print("time is up; run it again to go on")
                    return 75
            except Failed as error:
                print(f"FAILED {case.name}: {error}", flush=True)
                failed = True
    print("all is measured: python -m benchmarks.table" if not failed else "some failed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
