"""A run's models on public tasks: what it has learned beside its own data, and what it has forgotten.

Where a question has choices, the model's answer is the likeliest of them (local/choices.py). Where it has none, the model
writes one, the likeliest token each time. It is compared with those that are right: exactly, but for case, punctuation and
articles (as SQuAD does, Rajpurkar et al. 2016, arXiv 1606.05250), and by ROUGE-L (Lin 2004), the best of the right ones.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice

import torch

from atoll import recipe
from atoll.build import sources_of
from atoll.cache import Counting, Say, quiet
from atoll.data.answers import ends_of
from atoll.data.collate import Sample
from atoll.data.files import jsonl_rows
from atoll.data.prepared_tasks import TASKS, open_questions, refuse_unasked, task
from atoll.data.read import Report, records
from atoll.data.sources import ClientSource
from atoll.data.tokenize import prepare, prompting
from atoll.errors import AtollError
from atoll.exchange import WorkFailed
from atoll.harness import Ask, by_harness
from atoll.local.language import sft
from atoll.local.rollouts import Sampling, completed
from atoll.local.work import EVALUATION_BATCH, answered, summed, told
from atoll.metrics import Named
from atoll.models.features import features_of, places
from atoll.models.spaces import write
from atoll.outcome import outcome, place
from atoll.params import Params
from atoll.record.card import write_card
from atoll.record.folder import RunFolder
from atoll.record.measured import after
from atoll.record.tasks import TUNED, Mean, Score, write_scores
from atoll.result import Result, load_result
from atoll.schema import HARNESS

CONTEXT = 1024
"""Tokens of a question with its longest choice; longer ones are left out and counted."""

MOST_TOKENS = 32
"""Of an answer that is written."""


def evaluate_tasks(
    folder: RunFolder, names: Sequence[str], most: int, say: Say = quiet, where: str = "--tasks"
) -> list[Score]:
    """Measures a run's model, its base and what came of the stages between on tasks; the run's folder and card keep it.

    Args:
        folder: the run's.
        names: of tasks.
        most: questions of each task, at most: the first in the order of their hashes.
        say: told before each slow step.
        where: the tasks are named, for messages.

    Raises:
        AtollError: there is no such task, or the run has no result.
    """
    if not names:
        raise AtollError("no task is named", where=where, allowed=", ".join(TASKS), remedy="boolq,openbookqa")
    refuse_unasked(names, where)
    result, seen = load_result(folder, say), trained_on(folder, say)
    found = []
    for name in names:
        measured = scores(result, models(folder, result), name, most, seen, say)
        write_scores(folder, measured)
        found += measured
    write_card(folder)
    return found


def models(folder: RunFolder, result: Result) -> dict[str, Params]:
    """What trains, by the name of the model that it makes: the base, after each stage, and the result."""
    mine = result.outcome
    before = map(outcome, folder.earlier())
    alike = [one for one in before if (one.progress.base, one.space) == (mine.progress.base, mine.space)]
    between = {after(one.folder.path.name): {**result.base, **one.params} for one in alike}
    return {"base": result.base, **between, TUNED: {**result.base, **result.tuned}}


def trained_on(folder: RunFolder, say: Say = quiet) -> set[str]:
    """What the run, its stages and the runs it stands on were asked in training: public sets are trained on, too."""
    found: set[str] = set()
    for one in beneath(folder):
        try:
            sources = sources_of(recipe.read(str(one.recipe))[0])
            here = {source.source for source in sources.values() if isinstance(source, ClientSource)}
            for record in (record for source in here for record in records(source, Report())):
                if record.split == "train":
                    found |= {message["content"] for message in record.messages if message.get("role") == "user"}
        except AtollError as error:  # elsewhere, or no longer what they were
            say(f"{one.name}: what it was trained on cannot be read, and may be among the questions ({error.what})")
    return found


def beneath(folder: RunFolder) -> list[RunFolder]:
    """A run with its stages and the runs that they begin with or are judged by, and those beneath them, as far as known."""
    found, open_ = list[RunFolder](), [folder]
    while open_:
        one = open_.pop()
        if one in found:
            continue
        found.append(one)
        open_ += one.earlier()
        for other in recipe.read(str(one.recipe))[0].stands_on:
            with suppress(AtollError):  # a run that is gone
                open_.append(place(other, one))
    return found


def scores(
    result: Result, each: Mapping[str, Params], name: str, most: int, seen: Collection[str], say: Say
) -> list[Score]:
    """Of every model on a task, but for questions that were `seen`."""
    if name.startswith(HARNESS):
        of = by_harness(result, name, most, say)
    else:
        of = (written if TASKS[name].written else chosen)(result, name, most, seen, say)
    found = []
    for model, params in each.items():
        write(result.space, result.model, params)
        say(f"{name}, {model}")
        try:
            told = [*of(Counting(say, f"{name}, {model}", most))]
        except WorkFailed as error:
            raise AtollError(
                "the model cannot answer", where=f"{result.outcome.folder.name}: {name}", found=f"{model}: {error}",
                remedy="a smaller rate, and finetune.clip_norm, keep a model from diverging",
            ) from error  # fmt: skip
        found += [Score(name, measure, model, *mean, result.outcome.rounds, most) for measure, mean in told]
    result.use(base=False)
    return found


def chosen(result: Result, name: str, most: int, seen: Collection[str], say: Say) -> Ask:
    """Questions with choices, but for those that were `seen`."""
    objective = sft().bind(result.model, result.tokenizer)
    source = task(name, say)
    found = prepare(source, result.tokenizer, longest(result), "sft", say=say).test
    asked = [one["prompt"] for _, one in jsonl_rows(source.files[0][0])]
    samples = found.select([at for at, row in enumerate(found.rows) if asked[row] not in seen][:most])
    refuse_none(samples, name, result)

    @torch.no_grad()
    def ask(count: Counting) -> Iterator[tuple[str, Mean]]:
        result.model.eval()
        losses, answers = [], []
        for batch in batches(samples):
            found = objective.measure(result.model, batch)
            losses.append(found.losses.cpu())
            answers += answered(batch, found)
            count.more(len(batch))
        of = told(torch.cat(losses).double(), answers)
        yield "accuracy", Mean(of["accuracy"], of["accuracy_error"], int(of["questions"]), of["chance"])
        yield "loss", Mean(of["loss"], of["standard_error"], int(of["samples"]))

    return ask


def written(result: Result, name: str, most: int, seen: Collection[str], say: Say) -> Ask:
    """Questions whose answers are written, but for those that were `seen`."""
    prompt = prompting(result.tokenizer)
    asked = ((one, prompt(one.prompt)) for one in open_questions(name, say) if one.prompt not in seen)
    short = [*islice((pair for pair in asked if len(pair[1].ids) <= longest(result) - MOST_TOKENS), most)]
    questions, prompts = [one for one, _ in short], [ids for _, ids in short]
    refuse_none(prompts, name, result)
    how = Sampling(1, MOST_TOKENS, 0.0, ends_of(result.tokenizer), places(features_of(result.model)))

    def ask(count: Counting) -> Iterator[tuple[str, Mean]]:
        answers: list[str] = []
        for batch in batches(prompts):
            ids = completed(result.model, batch, how)
            answers += [result.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
            count.more(len(batch))
        for measure, score in {"exact match": exact_match, "ROUGE-L": rouge()}.items():
            each = [score(answer, one.references) for answer, one in zip(answers, questions, strict=True)]
            of = summed(torch.tensor(each, dtype=torch.float64), Named("mean", "error", "count"))
            yield measure, Mean(of["mean"], of["error"], int(of["count"]))

    return ask


def longest(result: Result) -> int:
    """Tokens of a question that is asked, with its longest choice."""
    positions = getattr(result.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    return min(CONTEXT, positions or CONTEXT)


def refuse_none(samples: Sequence[Sample], name: str, result: Result) -> None:
    """Raises AtollError where no question is short enough."""
    if not len(samples):
        raise AtollError(
            "no question of this task fits the model", where="tasks", found=name, allowed=f"{longest(result)} tokens",
            remedy="leave it out",
        )  # fmt: skip


def batches(each: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """As many at a time as evaluation takes."""
    return (each[at : at + EVALUATION_BATCH] for at in range(0, len(each), EVALUATION_BATCH))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, but for case, punctuation, articles and white space; else 0.

    >>> exact_match("The Eiffel Tower.", ["eiffel tower"]), exact_match("In Paris", ["Paris"])
    (1.0, 0.0)
    """
    return float(bare(answer) in map(bare, references))


def bare(text: str) -> str:
    """Words without what does not count."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def rouge() -> Callable[[str, Sequence[str]], float]:
    """ROUGE-L (F, of stemmed words) of an answer with the nearest right one."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda answer, references: max(scorer.score(one, answer)["rougeL"].fmeasure for one in references)
