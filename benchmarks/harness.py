"""Measures contestants in turn, A B A B ..., each in its own process and environment; each result is a file.

A claim is a list of cases; a case is what several contestants do with the same input. Every measurement is one JSON file
under results/, named by commit, case, contestant, configuration and repetition: what is there is not measured again, so a
run that was cut off goes on where it was, and a table can be made at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import MARK, end_marked

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SECONDS_A_MEASUREMENT = 600
DISTURBED = 0.5
"""Cores in use by others above which a measurement is made again, if there is still hope."""
TRIES = 3
PATIENCE_SECONDS = 120
OURS = "atoll"


@dataclass(frozen=True)
class Contestant:
    """Who measures what: a module of `environment` that calls `benchmarks.worker.serve`, and its configuration."""

    name: str
    module: str
    environment: str = OURS
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """Atoll runs where the harness runs, each peer in `.venv-PEER`."""
        return Path(sys.executable) if self.environment == OURS else ROOT / f".venv-{self.environment}" / "bin/python"

    @property
    def digest(self) -> str:
        """Names the configuration."""
        return hashlib.sha256(json.dumps([self.module, dict(self.config)], sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Case:
    """Contestants with the same work. `needs` makes the inputs they read before the first of them starts."""

    name: str
    contestants: tuple[Contestant, ...]
    needs: Callable[[], None] = lambda: None
    repeats: int = 5
    stay: bool = True
    """Whether a contestant's process stays for its next turn; else each measurement has a process of its own."""


@dataclass(frozen=True)
class Bar:
    """What a claim promises: a ratio to another contestant in the same case, or a number of our own."""

    claim: str
    case: str
    metric: str
    contestant: str
    against: str | None = None
    """The ratio is contestant / against, or the other way round where less is better."""
    at_least: float | None = None
    at_most: float | None = None
    less_is_better: bool = False
    plus: float = 0.0
    """Added to the other's number before it is compared: what we may take beyond it."""
    unit: str = "x"


@dataclass(frozen=True)
class Measurement:
    """One file of results."""

    commit: str
    case: str
    contestant: str
    config: Mapping[str, Any]
    repeat: int
    started: str
    busy: float
    """Cores that others used just before or just after, whichever was more."""
    versions: Mapping[str, str]
    result: Mapping[str, Any]
    discarded: Sequence[Mapping[str, Any]] = ()
    """Results of earlier tries, which others disturbed: whether to try again never depends on the result."""


def commit() -> str:
    """The last commit that changed the program or the benchmarks; with a digest of what is not committed yet."""
    paths = ["src", "benchmarks", ":!benchmarks/results", ":!*.md"]
    head = _git("log", "-1", "--format=%h", "--", *paths).strip()
    changes = _git("diff", "HEAD", "--", *paths) + _git("status", "--porcelain", "--", *paths)
    return head if not changes else f"{head}-{hashlib.sha256(changes.encode()).hexdigest()[:6]}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def path_of(at: str, case: Case, contestant: Contestant, repeat: int) -> Path:
    """Where a measurement's result lies."""
    return RESULTS / at / case.name / f"{contestant.name}-{contestant.digest}-{repeat}.json"


def read(at: str, case: Case, contestant: Contestant) -> list[Measurement]:
    """What was measured so far, in order."""
    files = (path_of(at, case, contestant, repeat) for repeat in range(case.repeats))
    return [Measurement(**json.loads(file.read_text())) for file in files if file.exists()]


def missing(at: str, case: Case) -> list[tuple[int, Contestant]]:
    """What is still to measure, in the order of measuring: every contestant once, then every contestant again."""
    turns = ((repeat, one) for repeat in range(case.repeats) for one in case.contestants)
    return [(repeat, one) for repeat, one in turns if not path_of(at, case, one, repeat).exists()]


def measure(at: str, case: Case, deadline: float) -> bool:
    """Measures what is missing of a case until the deadline (of time.monotonic); tells whether it is complete."""
    todo = missing(at, case)
    if not todo:
        return True
    case.needs()
    with ExitStack() as processes:
        workers: dict[str, Worker] = {}
        for repeat, contestant in todo:
            if time.monotonic() > deadline:
                return False
            if not case.stay:
                with worker(contestant) as process:
                    _measure_once(at, case, contestant, repeat, process)
                continue
            if contestant.name not in workers:
                workers[contestant.name] = processes.enter_context(worker(contestant))
            _measure_once(at, case, contestant, repeat, workers[contestant.name])
    return True


def _measure_once(at: str, case: Case, contestant: Contestant, repeat: int, process: Worker) -> None:
    discarded: list[Mapping[str, Any]] = []
    for last in (False,) * (TRIES - 1) + (True,):
        before, started = quiet(), time.strftime("%Y-%m-%dT%H:%M:%S")
        result = process.ask({})
        busy = max(before, cores_in_use(after=1.0))
        note = "" if busy <= DISTURBED else f" (others used {busy:.1f} cores)"
        print(f"  {case.name} {contestant.name} {repeat + 1}/{case.repeats}: {_brief(result)}{note}", flush=True)
        if last or not note:
            break
        discarded.append(result)
    done = Measurement(
        at, case.name, contestant.name, contestant.config, repeat, started, busy, process.versions, result, discarded
    )
    path = path_of(at, case, contestant, repeat)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(done.__dict__, indent=1) + "\n")


def quiet() -> float:
    """Waits for a while until nobody else uses the machine; gives the cores that are in use all the same."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (busy := cores_in_use()) > DISTURBED and time.monotonic() < deadline:
        time.sleep(2)
    return busy


def cores_in_use(after: float = 0.0, seconds: float = 0.5) -> float:
    """Cores that all processes together use during `seconds`; contestants that wait use none."""
    time.sleep(after)
    before = _busy_seconds()
    time.sleep(seconds)
    return (_busy_seconds() - before) / seconds


def _busy_seconds() -> float:
    """Processor seconds that were used, summed over cores (Linux; 0 elsewhere)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _brief(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(result.items())[:4])


class Failed(RuntimeError):
    """A contestant could not measure; its log says why."""


@dataclass
class Worker:
    """A contestant's process."""

    process: subprocess.Popen[str]
    log: Path
    versions: Mapping[str, str] = field(default_factory=dict)

    def ask(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a line and waits for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(data), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._failed("ended") from error
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(SECONDS_A_MEASUREMENT):
                raise self._failed(f"gave no answer in {SECONDS_A_MEASUREMENT} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._failed("ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, how: str) -> Failed:
        return Failed(f"{self.log.stem} {how}; the end of {self.log}:\n" + self.log.read_text()[-2000:])


@contextmanager
def worker(contestant: Contestant) -> Iterator[Worker]:
    """The contestant's process, ready to measure. It ends with the block, and everything it has started with it."""
    if not contestant.python.exists():
        peer = contestant.environment
        raise Failed(f"there is no environment for {peer}: python -m benchmarks.peers.setup {peer}")
    log = inputs() / "logs" / f"{contestant.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(8)
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(contestant.python), "-m", contestant.module], cwd=ROOT, env=environment(contestant, mark), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
    try:
        started = Worker(process, log)
        started.versions = started.ask(contestant.config)["versions"]
        yield started
    finally:
        _end(process, mark)


def _end(process: subprocess.Popen[str], mark: str) -> None:
    """Lets the process end by itself, then ends what is left of its group, and of those that bear its mark."""
    assert process.stdin is not None
    with suppress(subprocess.TimeoutExpired, BrokenPipeError):
        process.stdin.close()
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_marked(mark)


def inputs() -> Path:
    """The folder of what contestants read; it may be deleted at any time."""
    from atoll.cache import home

    folder = home() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(contestant: Contestant, mark: str) -> dict[str, str]:
    """Our contestants see this working tree's program, wherever an environment was installed from."""
    own = f"{ROOT / 'src'}{os.pathsep}{ROOT}" if contestant.environment == OURS else str(ROOT)
    settings = {
        "PYTHONPATH": own,
        MARK: mark,
        "BENCHMARK_INPUTS": str(inputs()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(inputs() / "flwr-home"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {**os.environ, **settings}
