"""Over a network: time to a loss with a client four times slower; a run in which a fifth of the clients dies every round.

    PYTHONPATH=examples python experiments/network_schedules.py slow|deaths

Sites are processes on this machine, over TLS with keys. The slow one is stopped for three quarters of each 0.4 s. In
`deaths` one of five sites is killed while it works, and joins again, over and over for 20 rounds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean
from typing import Any

from network import Demo

SITES = ("north", "south", "west", "east", "center")
RECIPE = """
recipe: 1
name: net
model: tiny:llama
data: {{use: folders, path: ./data}}
finetune: {{rounds: {rounds}, local_steps: {steps}, batch_size: 4, schedule: {schedule}}}
evaluate: {{every: 0, final_samples: 8}}
"""


def federation(count: int) -> tuple[Demo, str]:
    """A server and `count` sites with small chats of their own."""
    demo = Demo(Path(tempfile.mkdtemp(prefix="atoll-")))
    (demo.folder / "data").mkdir()
    for k, name in enumerate(SITES[:count]):
        chats = [[f"{name}: what is {i} + {k}?", f"It is {i + k}."] for i in range(60)]
        lines = [json.dumps({"prompt": question, "completion": answer}) for question, answer in chats]
        (demo.folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return demo, demo.federate(SITES[:count], ".jsonl")


def slowed(process: subprocess.Popen[bytes], over: threading.Event) -> None:
    """Lets a process have a quarter of its time."""
    while not over.is_set():
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.1)


def run(demo: Demo, address: str, name: str, rounds: int, steps: int, schedule: str) -> list[dict[str, object]]:
    """A run's events."""
    (demo.folder / f"{name}.yaml").write_text(RECIPE.format(rounds=rounds, steps=steps, schedule=schedule))
    demo.call("run", f"{name}.yaml", "--fleet", address, "--set", f"name={name}")
    record = demo.folder / "runs" / f"{name}-1" / "record.jsonl"
    return [json.loads(line) for line in record.read_text().splitlines()]


def slow() -> None:
    """Synchronous and buffered rounds with the same number of updates."""
    demo, address = federation(3)
    over = threading.Event()
    threading.Thread(target=slowed, args=(demo.running["west"], over), daemon=True).start()
    try:
        for name, rounds, schedule in (
            ("sync", 8, "synchronous"),
            ("buffered", 12, "{use: buffered, concurrency: 3, buffer: 2}"),
        ):
            events = run(demo, address, name, rounds, 60, schedule)
            report(name, events)
    finally:
        over.set()
        time.sleep(0.5)
        demo.close()


def report(name: str, events: list[dict[str, Any]], goal: float = 3.2) -> None:
    """When the mean of the last three losses that came was below the goal, from the first round's start."""
    replies = [e for e in events if e["event"] == "Replied"]
    start = next(float(e["time"]) for e in events if e["event"] == "Evaluated")
    means = [
        (r["time"], mean(float(x["loss"]) for x in replies[i - 2 : i + 1])) for i, r in enumerate(replies) if i >= 2
    ]
    reached = next((float(at) - start for at, loss in means if loss < goal), float("nan"))
    final = next(e for e in reversed(events) if e["event"] == "Evaluated")["mean"]
    whole = float(replies[-1]["time"]) - start
    print(
        f"{name}: loss {goal} after {reached:.1f} s; {len(replies)} updates in {whole:.1f} s; held-out {final:.3f}",
        flush=True,
    )


def deaths() -> None:
    """One of five killed at work in every round of 20, against the undisturbed run."""
    demo, address = federation(5)
    schedule = "{use: synchronous, deadline: 30, quorum: 0.8, grace: 1}"
    over = threading.Event()
    killed: list[str] = []

    def kill() -> None:
        draw = random.Random(0)
        while not over.is_set():
            name = draw.choice(SITES)
            log, before = demo.folder / f"{name}.log", (demo.folder / f"{name}.log").read_text().count(": train")
            while log.read_text().count(": train") <= before and not over.is_set():
                time.sleep(0.02)
            if over.is_set():
                return
            demo.running[name].send_signal(signal.SIGKILL)
            demo.running[name].wait()
            killed.append(name)
            demo.join(address, name, ".jsonl")

    try:
        calm = run(demo, address, "calm", 20, 60, schedule)
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        events = run(demo, address, "deaths", 20, 60, schedule)
        over.set()
        thread.join(timeout=30)
    finally:
        over.set()
        demo.close()
    for name, heard in (("calm", calm), ("deaths", events)):
        ended = [e for e in heard if e["event"] == "RoundEnded"]
        final = next(e for e in reversed(heard) if e["event"] == "Evaluated")["mean"]
        accepted = [e["accepted"] for e in ended]
        print(f"{name}: {len(ended)} rounds, accepted {accepted}, held-out {final:.3f}")
    print(f"killed {len(killed)} times: {', '.join(killed)}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    {"slow": slow, "deaths": deaths}[sys.argv[1]]()
