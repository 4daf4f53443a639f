"""Rewards that can be verified: what a completion is worth, told by its text and the answer that the data have.

    reward(completions, answers) -> one number each; 1 is right, and what is less is worth less

A reward of the user's own (`module:factory`) runs in a process of its own, since what it does with a model's words nobody
knows: it may raise, hang, or end the process. It has a deadline, and what goes wrong is a refusal that names it.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.errors import AtollError, closest
from atoll.exchange import WorkFailed

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(completions, the data's answers) -> what each completion is worth."""


def exact() -> Reward:
    """1 where a completion is the answer, but for case, white space and a full stop at its end; else 0."""
    return lambda completions, answers: [float(bare(c) == bare(a)) for c, a in zip(completions, answers, strict=True)]


def number() -> Reward:
    """1 where the last number of a completion is the last one of the answer; else 0."""
    return lambda completions, answers: [float(same(c, a)) for c, a in zip(completions, answers, strict=True)]


def same(completion: str, answer: str) -> bool:
    """Whether both end with the same number.

    >>> same("3 + 4 = 7 apples.", "7.0"), same("1,200", "1200 (km)"), same("10-20", "20"), same("seven", "7")
    (True, True, True, False)
    """
    found, wanted = last_number(completion), last_number(answer)
    return found is not None and found == wanted


def last_number(text: str) -> float | None:
    """The last number in a text, if there is one."""
    found = re.findall(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))|\d+", text)
    numbers = [one for one in found if any(map(str.isdigit, one))]
    return float(numbers[-1].replace(",", "")) if numbers else None


def bare(text: str) -> str:
    """A text without what does not count.

    >>> bare(" B. lazy\\n."), bare("True.")
    ('b. lazy', 'true')
    """
    return " ".join(text.casefold().split()).rstrip(" .")


SHIPPED: dict[str, Callable[[], Reward]] = {"exact": exact, "number": number}

LARGEST = 1e30
"""Of a reward, either way."""

PIECE = 1 << 16
"""Bytes written to a pipe, or read from it, at a time."""

DEADLINE = 30.0
"""Seconds that a reward of the user's own has for a batch."""


@dataclass
class OwnReward:
    """A reward of the user's own, in a process that is started when it is first asked and again after it was ended."""

    name: str
    """`module:factory`, which takes no arguments and gives a `Reward`."""
    seconds: float = DEADLINE
    asked: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Raises WorkFailed, with the reward's name, for whatever goes wrong in it.

        What an error says may quote data, so no more than its kind is told; the rest is in the log of who runs this.
        """
        said = self._said(list(completions), list(answers))
        if isinstance(said, str):
            raise WorkFailed(f"the reward {self.name} failed: {said}")
        return checked(said, len(completions), self.name)

    def refuse_unmade(self) -> None:
        """Has the process make the reward, and asks it nothing. Raises AtollError, which quotes what went wrong as found."""
        try:
            why = self._said(None, None)
        except WorkFailed as error:
            why = str(error)
        if why:
            raise AtollError(
                f"the reward {self.name} cannot be made", where="finetune.objective.reward", found=why,
                allowed="module:factory, of a module in the current folder or an installed package; the factory takes no "
                "arguments, and gives a function (completions, answers) -> numbers",
            )  # fmt: skip

    def _said(self, completions: list[str] | None, answers: list[str] | None) -> Any:
        """The process' answer. Raises WorkFailed where it gives none."""
        self.asked += 1
        try:
            number, said = json.loads(self._ask(json.dumps([self.asked, completions, answers])))
            assert number == self.asked
        except (ValueError, TypeError, LookupError, AssertionError):
            self.close()  # whatever it writes from now on answers nothing
            raise WorkFailed(f"the reward {self.name} ended without an answer") from None
        except BaseException:
            self.close()
            raise
        return said

    def _ask(self, line: str) -> str:
        """A line for a line. Raises WorkFailed where none comes in time."""
        try:
            return line_for(self._started(), line, self.seconds)
        except TimeoutError:
            raise WorkFailed(f"the reward {self.name} gave no answer in {self.seconds:g} s") from None
        except OSError:  # it has ended
            return ""

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            path = os.pathsep.join(dict.fromkeys([*filter(None, sys.path), os.getcwd()]))
            self.process = subprocess.Popen(
                [sys.executable, "-m", "atoll.local.reward_process", self.name], start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
        return self.process

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            end(self.process)
            self.process.wait()
            self.process = None

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def line_for(process: subprocess.Popen[bytes], line: str, seconds: float) -> str:
    """The line that a process answers to a line; as much as there is of it where the process ends.

    Both ways have a deadline: whoever else holds the pipes, a child that the process has left behind, can hold up neither.

    Raises:
        TimeoutError: no whole line came in `seconds`.
        OSError: the process takes nothing any more.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    end, left, said = time.monotonic() + seconds, memoryview(line.encode() + b"\n"), bytearray()
    while not said.endswith(b"\n"):
        giving = [process.stdin] if left else []
        come, taken, _ = select.select([process.stdout], giving, [], max(0.0, end - time.monotonic()))
        if not (come or taken):
            raise TimeoutError
        if taken:
            left = left[os.write(process.stdin.fileno(), left[:PIECE]) :]
        if come:
            if not (piece := os.read(process.stdout.fileno(), PIECE)):
                break
            said += piece
    return said.decode(errors="replace")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it has started, also in sessions of their own."""
    for pid in descendants(process.pid):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All that a process has started and that are still there, where the system tells: on Linux.

    A reward's process takes in what its children leave behind, so that none is missing here.
    """
    found = []
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, file.read_text().split()):
                found += [*descendants(child), child]
    return found


def checked(found: Any, count: int, name: str) -> list[float]:
    """A finite number for each completion. Raises WorkFailed."""
    if not isinstance(found, list) or len(found) != count:
        said = f"a list of {len(found)}" if isinstance(found, list) else type(found).__name__
        raise WorkFailed(f"the reward {name} gave {said} for {count} completions")
    odd = [one for one in found if not isinstance(one, int | float) or not abs(one) <= LARGEST]
    if odd:
        raise WorkFailed(f"the reward {name} gave no finite number for {len(odd)} of {count} completions")
    return [float(one) for one in found]


def reward_of(name: str, seconds: float) -> Reward:
    """A shipped reward by its name, or the user's own. Raises AtollError for one that there is not."""
    if ":" in name:
        return OwnReward(name, seconds)
    if name not in SHIPPED:
        raise AtollError(
            "there is no such reward", where="finetune.objective.reward", found=name,
            allowed=f"{', '.join(SHIPPED)}, or module:factory", remedy=closest(name, SHIPPED),
        )  # fmt: skip
    return SHIPPED[name]()
