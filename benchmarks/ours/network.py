"""Our federation on loopback: `atoll server`, `atoll join` for each site, and a run or a single update over them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from atoll.record.events import RoundEnded, read_events
from atoll.record.folder import RunFolder
from benchmarks.ours.runs import common, write
from benchmarks.processes import HOST, Processes, free_port
from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, peak_rss_bytes, rss_bytes, serve

ATOLL = (sys.executable, "-m", "atoll")
TRANSFER = (sys.executable, "-m", "benchmarks.ours.transfer")


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each measurement has a federation of its own, so that none waits beside the other contestants."""
    return {"rounds": rounds, "update": update}[config["what"]](config)


@dataclass
class Server:
    """A server that listens, and the processes of its federation."""

    processes: Processes
    folder: Path
    keys: Path
    address: str
    process: int


@contextmanager
def server(config: Mapping[str, Any]) -> Iterator[Server]:
    """A server that sites may join; it ends with the block, and all that was started at its processes."""
    keys, address = inputs_folder() / config["keys"], f"{HOST}:{free_port()}"
    with tempfile.TemporaryDirectory() as name, Processes(Path(name), surroundings(Path(name))) as processes:
        command = [*ATOLL, "server", "--listen", address, "--certs", str(keys / "server")]
        enrolled = [f"{path.stem} may join" for path in (keys / "server" / "clients").iterdir()]
        process = processes.start("server", command, *enrolled)
        yield Server(processes, Path(name), keys, address, process)


def surroundings(folder: Path) -> dict[str, str]:
    """One thread for each of so many processes."""
    return {"OMP_NUM_THREADS": "1", "ATOLL_RUNS": str(folder / "runs")}


def rounds(config: Mapping[str, Any]) -> Measure:
    """A round's seconds less its local work, by the record; and by the clock, with checkpoints between rounds."""

    def measure() -> Mapping[str, Any]:
        with server(config) as at:
            join(at, config["clients"])
            write(recipe(config), at.folder / "recipe.yaml")
            certs = str(at.keys / "operator")
            at.processes.call(*ATOLL, "run", "recipe.yaml", "--fleet", at.address, "--certs", certs)
            record = RunFolder(at.folder / "runs" / "network-1").record
            ended = [event for event in read_events(record) if isinstance(event, RoundEnded)]
        return summed_up(ended, config)

    return measure


def join(at: Server, clients: int) -> None:
    """Sites with a chat each, whose owners allow the benchmark's objective."""
    (at.folder / "data").mkdir()
    write({"code": ["benchmarks.ours.parts:Pause"]}, at.folder / "policy.yaml")
    for i in range(clients):
        chat = [{"role": "user", "content": f"{i} + 1"}, {"role": "assistant", "content": f"{i + 1}"}]
        (at.folder / "data" / f"site-{i}.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
        own = ["--data", f"data/site-{i}.jsonl", "--state", f"state/site-{i}", "--policy", "policy.yaml"]
        command = [*ATOLL, "join", at.address, "--certs", str(at.keys / "sites" / f"site-{i}"), *own]
        at.processes.start(f"site-{i}", command, "joined")


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA on the tiny Llama, of a rank that makes the adapter as large as is wanted; one local step, which pauses."""
    finetune = {
        "rounds": config["rounds"],
        "objective": {"use": "benchmarks.ours.parts:Pause", "seconds": config["pause"]},
        "space": {"use": "lora", "rank": config["rank"], "alpha": config["rank"]},
        "optimizer": {"use": "sgd", "lr": 0.001},
        "clip_norm": None,
        "batch_size": 1,
        "local_steps": 1,
    }
    data = {"use": "folders", "path": "./data", "held_out": 0.0}
    return {**common("network"), "model": "tiny:llama", "data": data, "finetune": finetune}


def summed_up(ended: list[RoundEnded], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rounds after the first. Raises RuntimeError where a client did not take part in one."""
    if [event.accepted for event in ended] != [config["clients"]] * config["rounds"]:
        raise RuntimeError(f"rounds were not whole: {ended}")
    later = ended[1:]
    elapsed, local = ended[-1].clock - ended[0].clock, sum(event.spans["local_steps"] for event in later)
    return {
        "seconds": median(event.spans["outside"] for event in later),
        "first_round_seconds": ended[0].spans["outside"],
        "with_checkpoint_seconds": (elapsed - local) / len(later),
        "mb_up": median(event.bytes_up for event in later) / config["clients"] / 1e6,
    }


def update(config: Mapping[str, Any]) -> Measure:
    """One update from a site that has it in memory to an operator that adds it to a total."""
    size = (str(config["tensors"]), str(config["bytes"]))

    def measure() -> Mapping[str, Any]:
        with server(config) as at:
            own = (at.address, str(at.keys / "sites" / "site-0"), str(at.folder / "state"))
            site = at.processes.start("site", [*TRANSFER, "site", *own, *size], "ready")
            watched = {"site": site, "server": at.process}
            before = {end: rss_bytes(process) for end, process in watched.items()}
            said = at.processes.call(*TRANSFER, "operator", at.address, str(at.keys / "operator"), *size)
            extra = {f"{end}_extra_mb": (peak_rss_bytes(watched[end]) - before[end]) / 1e6 for end in watched}
        return {**json.loads(said), **extra}

    return measure


if __name__ == "__main__":
    serve(prepare, ("atoll", "torch", "flwr"))
