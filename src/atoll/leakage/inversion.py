"""Update inversion: what one client's update tells whoever sees it, if the client trained on a single sample.

The attacker is the server: it knows the model, the plan and the broadcast, and sees the update of one local step.

    matching    it has candidates, computes the update of each, and takes the one whose direction is nearest: the sample
                itself if all goes well, where Zhu et al. 2019 (arXiv 1906.08935) search for one by gradient descent
    tokens      where the token embedding trains, only rows of tokens that occur get a gradient from below: the rows that
                move spell out the words, in any order, before any search (Balunovic et al. 2022, arXiv 2202.08827, who
                search text, start from them)

An embedding that is also the head (tied) moves in all rows, and the second attack finds every token there is.

Both are made on the update in the clear and, where the run has masks or noise of clients, on what the server sees under
its plan (seen.py): the update as it is sent, and the sum that it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.cache import Counting
from atoll.data.sources import ClientData
from atoll.exchange import Broadcast, Task
from atoll.keys import key, rng
from atoll.leakage.membership import ordinary
from atoll.leakage.scores import Floats, first_of, mean_and_error
from atoll.leakage.seen import IN_THE_CLEAR, is_protected, of_one_sample, overheard
from atoll.leakage.subject import NotApplicable, Subject
from atoll.local.work import plain, train
from atoll.models.spaces import split
from atoll.params import Params, global_norm, nested, under
from atoll.record.folder import RunFolder
from atoll.record.leakage import Finding
from atoll.round import initial
from atoll.stage import sent_along
from atoll.stream import UPDATE

NAME = "inversion"
CANDIDATES = 16
"""Samples that the attacker holds for possible, at most: the true one and others of the same site."""

TRIALS = 4
"""Samples a site that are attacked, at most: as many updates are in memory at a time, of each view."""

Seen = Callable[[Params], Params]
"""An update -> the same under a protection of the user's own: names and shapes stay."""


def inversion(subject: Subject, samples: int, seen: Seen | None = None) -> list[Finding]:
    """Both attacks, on at most `samples` (and `TRIALS`) samples of each site, on everything that may be seen of an update.

    Raises:
        NotApplicable: no site has two samples to choose between.
    """
    pools = {name: pool for name, data in subject.trained.items() if len(pool := candidates(subject, name, data)) > 1}
    if not pools:
        raise NotApplicable("no site has two samples to choose between", where="data", remedy="run with more records")
    attacked = {name: pool[: min(samples, TRIALS)] for name, pool in pools.items()}
    with TemporaryDirectory(prefix="atoll-") as folder:
        listened = listen(subject, attacked, Path(folder))
        count = sum(len(pool) + len(attacked[name]) for name, pool in pools.items())
        progress = Counting(subject.say, "inversion: updates", count)
        hits: dict[str, list[float]] = {}
        tokens: dict[str, list[tuple[float, float]]] = {}
        for name, pool in pools.items():
            clear = list(updates(subject, name, attacked[name], progress))
            views = {IN_THE_CLEAR: clear, **gathered(listened[name])}
            if seen is not None:
                views[f"one update, {getattr(seen, '__name__', type(seen).__name__)}"] = list(map(seen, clear))
            for view, found in matched(views, updates(subject, name, pool, progress)).items():
                hits.setdefault(view, []).extend(found)
                tokens.setdefault(view, []).extend(found_tokens(subject, views[view], pool))
    sizes = [len(pool) for name, pool in pools.items() for _ in attacked[name]]
    return [row for view in hits for row in (*matching_rows(view, hits[view], sizes), *token_rows(view, tokens[view]))]


def listen(subject: Subject, attacked: Mapping[str, Sequence[Any]], folder: Path) -> dict[str, list[Path]]:
    """Site -> a file of what the server sees of each attacked sample; none without protection. Memory would not hold all."""
    files: dict[str, list[Path]] = {name: [] for name in attacked}
    if not is_protected(subject.plan):
        return files
    rounds = max(map(len, attacked.values()))
    progress = Counting(subject.say, "inversion: rounds as the server sees them", rounds)
    for trial in range(rounds):
        chosen = {name: nth(attacked.get(name) or data.train, trial) for name, data in subject.trained.items()}
        for number, (name, views) in enumerate(overheard(subject, chosen, RunFolder(folder))):
            if trial < len(attacked.get(name, ())):
                flat = {at: x.contiguous() for view, seen in views.items() for at, x in nested(view, seen).items()}
                files[name].append(folder / f"{trial}-{number}")
                save_file(flat, files[name][-1])
        progress.more()
    return files


def nth(samples: Sequence[Any], number: int) -> Any:
    """This sample, or the last one."""
    return samples[min(number, len(samples) - 1)]


def gathered(files: Sequence[Path]) -> dict[str, list[Params]]:
    """What `listen` has kept of a site, by view."""
    found: dict[str, list[Params]] = {}
    for file in files:
        flat = load_file(file)
        for view in dict.fromkeys(name.partition("/")[0] for name in flat):
            found.setdefault(view, []).append(under(view, flat))
    return found


def candidates(subject: Subject, name: str, data: ClientData) -> list[Any]:
    """What a site's update may be from: half of it training samples, the rest held out, as far as there are any."""
    order = rng(subject.plan.recipe.seed, NAME, name)
    mine = ordinary(data.train, range(len(data.train)))
    known = [data.train[int(i)] for i in order.permutation(mine)[:CANDIDATES]]
    other = [data.test[int(i)] for i in order.permutation(len(data.test))[: CANDIDATES // 2]]
    return [*known[: CANDIDATES - len(other)], *other]


def updates(subject: Subject, name: str, samples: Sequence[Any], progress: Counting) -> Iterator[Params]:
    """The update that the run's own local work makes of each sample alone, in the first round; the server gives its key."""
    local = replace(of_one_sample(subject), gradients=plain)  # the attacker's guesses, and the clear, have no noise
    travels, _ = split(subject.base, subject.plan.recipe.finetune.personal)
    params = {**initial(subject.plan.rounds, travels).params, **sent_along(subject.plan, subject.base)}
    task = Task("train", name, subject.plan.hash, Broadcast(0, {}), key(subject.plan.recipe.seed, 0, name))
    for sample in samples:
        yield train(local, params, ClientData([sample], ()), {}, task).updates[UPDATE]
        progress.more()


def matched(views: Mapping[str, Sequence[Params]], made: Iterator[Params]) -> dict[str, list[float]]:
    """For each update in each view, of the candidate with the same number: is it the most similar? (1, 0, a tie's share)"""
    similar: dict[str, list[list[float]]] = {view: [] for view in views}
    for candidate in made:
        for view, observed in views.items():
            similar[view].append([cosine(one, candidate) for one in observed])
    return {
        view: [first_of(column, number) for number, column in enumerate(np.array(rows).T)]
        for view, rows in similar.items()
    }


def cosine(one: Params, other: Params) -> float:
    """Of the angle between two updates, rounded where equal sums in another order would differ; 0 if one is zero."""
    dot = sum(float((x.double() * other[name].double()).sum()) for name, x in one.items())
    norms = global_norm(one) * global_norm(other)
    return round(dot / norms, 9) if norms else 0.0


def matching_rows(view: str, hits: Sequence[float], sizes: Sequence[int]) -> list[Finding]:
    """The share of samples that were told from the others."""
    chance = float(np.mean([1 / size for size in sizes]))
    of = f"{len(hits)} updates of one sample, {max(sizes)} candidates each"
    return [Finding(NAME, "matching: true sample first", *mean_and_error(np.array(hits)), chance, of, view)]


def found_tokens(subject: Subject, observed: Sequence[Params], pool: Sequence[Any]) -> list[tuple[float, float]]:
    """(precision, recall) of the tokens whose rows moved, for each observed update; none if the embedding is frozen."""
    name = embedding(subject)
    if name is None:
        return []
    before = subject.base[name]
    return [
        precision_and_recall(moved_rows(update[name], before), {int(token) for token in ids})
        for update, (ids, *_) in zip(observed, pool, strict=False)
    ]


def embedding(subject: Subject) -> str | None:
    """The name under which the token embedding travels; None if it does not."""
    local = subject.things.local
    module: Any = local.model.get_input_embeddings()  # type: ignore[operator]
    named = local.space.trainable(local.model).items()
    return next((name for name, parameter in named if parameter is module.weight), None)


def moved_rows(update: Tensor, before: Tensor) -> set[int]:
    """Rows of [V, D] that moved otherwise than along themselves, which weight decay does to every row."""
    update, before = update.double(), before.double()
    along = (update * before).sum(1) / before.square().sum(1).clamp_min(1e-30)
    rest = (update - along[:, None] * before).norm(dim=1)
    moved = rest > 1e-3 * rest.max()
    return {int(row) for row in torch.nonzero(moved).flatten()}


def precision_and_recall(found: set[int], true: set[int]) -> tuple[float, float]:
    """The share of what was found that is true, and the share of what is true that was found.

    >>> precision_and_recall({1, 2, 3, 4}, {1, 2, 5})
    (0.5, 0.6666666666666666)
    """
    right = len(found & true)
    return right / max(1, len(found)), right / len(true)


def token_rows(view: str, tokens: Sequence[tuple[float, float]]) -> list[Finding]:
    """Means over samples; nothing where no embedding trains."""
    if not tokens:
        return []
    columns: Floats = np.array(tokens)
    of = f"{len(tokens)} updates of one sample"
    names = ("tokens: precision", "tokens: recall")
    return [
        Finding(NAME, name, *mean_and_error(column), None, of, view)
        for name, column in zip(names, columns.T, strict=True)
    ]
