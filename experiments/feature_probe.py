"""What frozen encoders' features tell by themselves: a linear classifier over the multimodal recipe's own media.

    python experiments/feature_probe.py

For each site and closed question with a few answers: accuracy on the held-out media of logistic regression over the means
and standard deviations of a medium's features, and the share of the commonest answer. What a connector could learn at least.

Owner: the maintainers of src/atoll/models. Expires with the first release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

import atoll
from atoll.assemble import Assembly, assemble
from atoll.data.collate import IGNORE, media_in
from atoll.models.features import features_of

QUESTIONS = {"gallery": "What kind of thing", "school": "Which language", "station": "Which language"}
STEPS, RATE, DECAY = 300, 1e-2, 0.1


def answers(things: Assembly, site: str, split: str) -> Iterator[tuple[Tensor, str]]:
    """The summary of each medium that the site's question is about, and the answer."""
    features = features_of(things.model)
    assert features is not None
    for sample in getattr(things.data[site], split):
        if QUESTIONS[site] in things.tokenizer.decode(sample[0]):
            [seen] = next(iter(features.of(list(media_in(sample))).values()))
            answer = things.tokenizer.decode(sample[1][sample[1] != IGNORE])
            yield torch.cat([seen.mean(0), seen.std(0)]), answer


def accuracy(train: list[tuple[Tensor, str]], test: list[tuple[Tensor, str]]) -> float:
    """Of logistic regression on standardized summaries."""
    known = sorted({answer for _, answer in train})
    x, y = torch.stack([one for one, _ in train]), torch.tensor([known.index(answer) for _, answer in train])
    mean, std = x.mean(0), x.std(0) + 1e-6
    layer = torch.nn.Linear(x.shape[1], len(known))
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer((x - mean) / std), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    said: list[int] = layer((torch.stack([one for one, _ in test]) - mean) / std).argmax(1).tolist()
    right = sum(known[i] == answer for i, (_, answer) in zip(said, test, strict=True))
    return right / len(test)


def main() -> None:
    """Prints a line for each site."""
    things = assemble(atoll.plan("multimodal", ["baselines=[]"]))
    for site, question in QUESTIONS.items():
        train, test = (list(answers(things, site, split)) for split in ("train", "test"))
        commonest = Counter(answer for _, answer in test).most_common(1)[0][1] / len(test)
        found = accuracy(train, test)
        error = (found * (1 - found) / len(test)) ** 0.5
        print(f"{site}, {question}: {found:.3f} ± {error:.3f} of {len(test)}; the commonest answer {commonest:.3f}")


if __name__ == "__main__":
    main()
