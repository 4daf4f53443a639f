"""Tasks of the Language Model Evaluation Harness on a run's models: `atoll evaluate RUN --tasks lm-eval:arc_easy`.

A name that the harness knows, or a YAML file of one's own as it reads them (`lm-eval:./mine.yaml`). It asks as it always
does, without the model's chat template, and its measures are told as they are: numbers may be laid beside published ones.
The questions are read where the task says they lie: in `datasets`' cache, or in files.

Source: Gao et al., A framework for few-shot language model evaluation, https://zenodo.org/records/12608602
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from atoll.cache import Counting, Say
from atoll.data.prepared_tasks import YAML
from atoll.errors import AtollError
from atoll.local.work import EVALUATION_BATCH
from atoll.record.tasks import Mean
from atoll.result import Result
from atoll.schema import HARNESS

FEWSHOT_SEED = 1234
"""The harness's own default."""

RESAMPLED = 200
"""Bootstrap samples for the error of a measure that is no mean."""

Ask = Callable[[Counting], Iterator[tuple[str, Mean]]]
"""Asks the model as it is; gives its measures."""


def by_harness(result: Result, name: str, most: int, say: Say) -> Ask:
    """A task of the harness.

    Raises:
        AtollError: it cannot read the task's questions, or ask them.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = load(name, say)
    model = HFLM(pretrained=result.model, tokenizer=result.tokenizer, batch_size=EVALUATION_BATCH)

    def ask(count: Counting) -> Iterator[tuple[str, Mean]]:
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # all models see the same examples
        try:
            found = evaluate(model, loaded, limit=most, bootstrap_iters=RESAMPLED, log_samples=False)
        except Exception as error:  # of a task's own code, on records that are not as it thinks
            raise AtollError(
                "lm-eval cannot ask the task", where="tasks", found=f"{name}: {type(error).__name__}: {error}",
                remedy="look at its records and at what it makes of them",
            ) from error  # fmt: skip
        count.more(max(one["effective"] for one in found["n-samples"].values()))
        for task, measures in found["results"].items():
            counted = found["n-samples"].get(task, {}).get("effective", measures.get("sample_len", 0))
            alone = len(found["results"]) == 1
            yield from ((one if alone else f"{task}: {one}", mean) for one, mean in means(measures, int(counted)))

    return ask


def load(name: str, say: Say) -> Any:
    """The harness's task, with its questions."""
    from lm_eval.tasks import TaskManager

    asked = name.removeprefix(HARNESS)
    own = asked.endswith(YAML)
    say(f"{name}: looking for its questions")
    manager = TaskManager(include_defaults=not own)
    try:
        return manager.load([os.path.abspath(asked) if own else asked])
    except Exception as error:  # whatever a task's code and a hub that is out of reach come to
        raise AtollError(
            "lm-eval cannot load the task", where="tasks", found=f"{name}: {type(error).__name__}: {error}",
            remedy="bring its data into the cache of `datasets`, or name local files in a YAML of your own",
        ) from error  # fmt: skip


def means(measures: Mapping[str, Any], counted: int) -> Iterator[tuple[str, Mean]]:
    """The harness's measures, `acc,none` and `acc_stderr,none`, as means with their errors; those without one have none.

    >>> given = {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": 0.1, "bleu,strict": 3, "bleu_stderr,strict": "N/A"}
    >>> [(name, mean.value, mean.error) for name, mean in means(given, 8)]
    [('acc', 0.5, 0.1), ('bleu, strict', 3.0, None)]
    """
    for key, value in measures.items():
        measure, _, kind = key.partition(",")
        if kind and not measure.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            error = measures.get(f"{measure}_stderr,{kind}")
            told = float(error) if isinstance(error, int | float) else None
            yield measure if kind == "none" else f"{measure}, {kind}", Mean(float(value), told, counted)
