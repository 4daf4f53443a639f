"""Learning from rewards that can be verified, on what the model itself says: GRPO.

Each local step draws several completions of each prompt from the model as it is, rewards them, and makes the better ones of
a prompt likelier than the others (Shao et al. 2024, arXiv 2402.03300, eq. 3, with one step on each batch, as TRL does):

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                                over the completions of one prompt
    loss = mean over tokens of  p / stop(p) (beta (q / p - log(q / p) - 1) - A_i)

p is the model's probability of a token at the temperature of the draw, q the reference's. With one step on a batch the ratio
p / stop(p) is 1 and nothing is clipped. It stands before the divergence, too, whose gradient is biased without it
(DeepSeek-AI 2025, arXiv 2512.02556). The reference is asked only where `beta` is not 0.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.data.answers import ends_of
from atoll.data.collate import IGNORE, Batch, Sample, evaluating, language_model, pack, packable, pad
from atoll.errors import AtollError
from atoll.local.choices import Media, shares
from atoll.local.language import MeanOver, reader, refuse_without_text
from atoll.local.objectives import token_losses
from atoll.local.reference import Reference
from atoll.local.rewards import DEADLINE, OwnReward, Reward, reward_of
from atoll.local.rollouts import Sampling, rollouts
from atoll.local.work import Measured, Needs, Objective
from atoll.models.features import features_of, places

SMALL = 1e-4
"""Added to the spread of rewards, as TRL does."""

WHOLE = 1.0
"""The reward of a completion that is right."""


@dataclass(frozen=True)
class Drawn:
    """Completions with what they are worth, as a batch."""

    batch: Batch
    advantages: Tensor
    """Of each completion, fp32 [completions]."""
    reference: Tensor | None
    """Log-probabilities of the completions' tokens under the reference, fp32 [L]; None where it is not asked."""


@dataclass
class Told:
    """What is to tell of the draws since it was last taken: means, and seconds in all."""

    sums: Counter[str] = field(default_factory=Counter)

    def add(self, **values: float) -> None:
        """Of a batch."""
        self.sums.update(values)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """The seconds of the block."""
        started = time.perf_counter()
        yield
        self.add(**{f"seconds_{what}": time.perf_counter() - started})

    def take(self) -> dict[str, float]:
        """By name; it begins anew."""
        count, found = self.sums.pop("completions", 0.0), dict(self.sums)
        self.sums.clear()
        return {name: value if name.startswith("seconds") else value / count for name, value in found.items()}


@dataclass(frozen=True)
class Drawing:
    """Samples -> completions that the model draws, with what they are worth."""

    model: nn.Module
    tokenizer: Any
    media: Media
    sampling: Sampling
    reward: Reward
    reference: Reference | None
    """None where it is not asked."""
    told: Told = field(default_factory=Told)

    def __call__(self, samples: Sequence[Sample]) -> Drawn:
        """Of each sample's prompt the completions, as a batch."""
        with self.told.timed("drawing"):
            found = self.completions(samples)
        with self.told.timed("rewarding"):
            worth = self.rewarded(samples, found)
        asked = (prompt_of(sample) for sample in samples)
        batch = self.batch([written(prompt, one) for prompt, each in zip(asked, found, strict=True) for one in each])
        tokens = sum(len(one) for each in found for one in each)
        self.told.add(completions=worth.numel(), reward=float(worth.sum()), tokens=tokens)
        return Drawn(batch, advantages(worth).flatten().to(batch.input_ids.device), self.of_reference(batch))

    def completions(self, samples: Sequence[Sample]) -> list[list[NDArray[np.int32]]]:
        """Of each sample's prompt."""
        return rollouts(self.model, [prompt_of(sample) for sample in samples], self.media, self.sampling)

    def rewarded(self, samples: Sequence[Sample], found: Sequence[Sequence[NDArray[np.int32]]]) -> Tensor:
        """What completions are worth, [prompts, completions]."""
        said = [self.tokenizer.decode(one, skip_special_tokens=True) for each in found for one in each]
        answers = [answer_of(sample, self.tokenizer) for sample in samples for _ in range(self.sampling.each)]
        return torch.tensor(self.reward(said, answers)).view(len(samples), -1)

    def batch(self, rows: Sequence[Sample]) -> Batch:
        """Completions after their prompts."""
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        batch = pack(rows) if packable(self.model) else pad(rows, pad_id)
        return replace(batch, media=self.media(rows)).to(next(self.model.parameters()).device)

    def of_reference(self, batch: Batch) -> Tensor | None:
        """Log-probabilities of the completions' tokens."""
        if self.reference is None:
            return None
        timed = self.told.timed("of_the_reference")
        with timed, self.reference.in_place(self.model), evaluating(self.model), torch.no_grad():
            return -token_losses(self.model, batch, self.sampling.temperature)[0]


@dataclass(frozen=True)
class GRPO:
    """See the module's text."""

    reward: Reward
    completions: int
    most_tokens: int
    temperature: float
    beta: float
    mean_over: MeanOver

    @property
    def needs(self) -> Needs:
        """Room for what is drawn; a reference where leaving it costs something; a reward that can be made."""
        own = {"refuse_unmade": self.reward.refuse_unmade} if isinstance(self.reward, OwnReward) else {}
        return Needs("sft", self.beta > 0, self.most_tokens, self.completions, **own)

    def bind(self, model: nn.Module, tokenizer: Any) -> Objective:
        """The objective on this model; as it is now, it is the reference."""
        refuse_without_text(tokenizer, "grpo")
        refuse_recurrent(model)
        features = features_of(model)
        sampling = Sampling(self.completions, self.most_tokens, self.temperature, ends_of(tokenizer), places(features))
        reference = Reference(model, reader(features)) if self.needs.reference else None
        drawing = Drawing(model, tokenizer, reader(features), sampling, self.reward, reference)
        judged = replace(drawing, sampling=replace(sampling, each=1, temperature=0.0))

        def loss(model: nn.Module, drawn: Drawn) -> tuple[Tensor, int]:
            losses, owners = token_losses(model, drawn.batch, self.temperature)
            each = self.token_losses(-losses, drawn.advantages[owners], drawn.reference)
            if self.mean_over == "tokens":
                return each.sum(), each.numel()
            counts = torch.bincount(owners, minlength=len(drawn.advantages)).clamp_min(1)
            return (each / counts[owners]).sum(), len(drawn.advantages)

        def terms(drawn: Drawn) -> int:
            by_tokens = self.mean_over == "tokens"
            return int((drawn.batch.targets != IGNORE).sum()) if by_tokens else len(drawn.advantages)

        def measure(model: nn.Module, samples: Sequence[Sample]) -> Measured:
            worth = judged.rewarded(samples, judged.completions(samples))[:, 0]
            return Measured(WHOLE - worth, [float(one >= WHOLE) for one in worth], chance=0.0)

        refer = reference.take if reference else None
        return Objective(drawing, loss, terms, measure, refer, features is not None, drawing.told.take)

    def token_losses(self, log_p: Tensor, advantages: Tensor, reference: Tensor | None) -> Tensor:
        """The loss at each token, [L], of log-probabilities, advantages and the reference's log-probabilities [L]."""
        ratio = torch.exp(log_p - log_p.detach())
        if reference is None:
            return -advantages * ratio
        further = reference - log_p
        return ratio * (self.beta * (torch.exp(further) - further - 1) - advantages)


def advantages(rewards: Tensor) -> Tensor:
    """How much better completions are than others of their prompt, [prompts, completions].

    >>> advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.8659, -0.8659,  0.8659, -0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    away = rewards - rewards.mean(dim=1, keepdim=True)
    return away / (rewards.std(dim=1, keepdim=True) + SMALL)


def last_answer(sample: Sample) -> int:
    """Where the last answer of a sample begins."""
    labeled = np.flatnonzero(sample.labels != IGNORE)
    breaks = np.flatnonzero(np.diff(labeled) > 1)
    return int(labeled[breaks[-1] + 1] if len(breaks) else labeled[0])


def prompt_of(sample: Sample) -> Sample:
    """What comes before the last answer."""
    ids = sample.ids[: last_answer(sample)]
    return sample._replace(ids=ids, labels=np.full_like(ids, IGNORE))


def answer_of(sample: Sample, tokenizer: Any) -> str:
    """The text of the last answer."""
    rest = slice(last_answer(sample), None)
    ids = sample.ids[rest][sample.labels[rest] != IGNORE]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def written(prompt: Sample, completion: NDArray[np.int32]) -> Sample:
    """A prompt with a completion, which has the loss."""
    ids = np.concatenate([prompt.ids, completion])
    return Sample(ids, np.concatenate([prompt.labels, completion]), prompt.media)


def refuse_recurrent(model: nn.Module) -> None:
    """Raises AtollError for families whose state cannot be repeated for several completions."""
    with evaluating(model):
        able = shares(model)
    if not able:
        raise AtollError(
            "rollouts need a cache of keys and values", where="finetune.objective",
            found=language_model(model).config.model_type,
            allowed="a family of attention alone", remedy="`objective: dpo` takes every family",
        )  # fmt: skip


def grpo(
    reward: str = "exact",
    completions: Annotated[int, Ge(2)] = 8,
    most_tokens: Annotated[int, Gt(0)] = 64,
    temperature: Annotated[float, Gt(0)] = 1.0,
    beta: Annotated[float, Ge(0)] = 0.0,
    mean_over: MeanOver = "tokens",
    seconds: Annotated[float, Gt(0)] = DEADLINE,
) -> GRPO:
    """Group relative policy optimization: of several completions of a prompt the better ones gain on the others.

    The held-out loss is one less the reward of the likeliest answer, and the accuracy the share that is right.

    Args:
        reward: `exact` (the data's answer), `number` (the last number of it), or `module:factory` of your own, which gives a
            function (completions, answers) -> numbers, 1 for what is right; it runs in a process of its own.
        completions: of each prompt.
        most_tokens: of a completion.
        temperature: of the draw.
        beta: how much it costs to leave the reference; 0 asks it nothing.
        mean_over: all `tokens` of a step (TRL's `dapo`), or `samples` of each one's mean (the paper's, TRL's `grpo`).
        seconds: that a reward of your own has for a batch.
    """
    return GRPO(reward_of(reward, seconds), completions, most_tokens, temperature, beta, mean_over)
