"""A site's policy: what the owner of the data allows. A plan that breaks it is refused at the site, whoever sent it.

models: [smollm2-135m, HuggingFaceTB/*]     # names, with * and ?; all by default
objectives: [sft]
spaces: [lora]
exchanges: [secure-aggregation]             # all by default; this one: the operator sees no update of this site alone
privacy: {epsilon: 8, delta: 1e-5}          # what all runs together may spend of this site's data; none: not limited
metrics: [loss, standard_error]             # that may leave, beside what a round needs
minimum_cohort: 3                           # fewest clients whose updates are put together
code: []                                    # module:factory parts that may run here; none by default
require: [{use: clip, norm: 1.0}]           # transforms that must be in the up chain; numbers are the most they may be
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll import parts
from atoll.data.media import MODALITIES
from atoll.errors import AtollError, closest
from atoll.privacy.mechanisms import LEAST_DELTA
from atoll.recipe import load
from atoll.schema import Recipe

NEEDED = frozenset({"seconds_in_steps", "samples"})
"""Metrics by which rounds are counted: none of what the data are like."""


SEEN_BY_THE_OPERATOR = frozenset({"none", "central"})
"""Mechanisms under which an update leaves its site as it is."""


class Budget(BaseModel):
    """Of differential privacy, over everything that is ever done with a site's data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epsilon: float = Field(gt=0)
    delta: float = Field(ge=LEAST_DELTA, lt=1)


class Policy(BaseModel):
    """See the module's text. Everything that ships is allowed by default, and no code of anybody's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] = ["*"]
    objectives: list[str] = ["*"]
    spaces: list[str] = ["*"]
    exchanges: list[str] = ["*"]
    privacy: Budget | None = None
    metrics: list[str] = ["*"]
    minimum_cohort: int = Field(default=1, ge=1)
    code: list[str] = []
    require: list[str | dict[str, Any]] = []

    def broken_by(self, recipe: Recipe) -> list[str]:
        """Why a plan is refused; nothing if it is allowed. Reads names alone: nothing that they name is imported."""
        stage = recipe.finetune
        asked = {
            "models": [name for name in model_names(recipe.model) if not allows(self.models, name.partition("@")[0])],
            "objectives": [parts.spec(stage.objective, "finetune.objective").use],
            "spaces": [parts.spec(stage.space, "finetune.space").use],
            "exchanges": [parts.spec(stage.exchange, "finetune.exchange").use],
        }
        broken = [
            f"{key} {name}; this site allows {', '.join(getattr(self, key)) or 'none'}"
            for key, names in asked.items()
            for name in names
            if not allows(getattr(self, key), name)
        ]
        broken += [
            f"code {name}; this site runs {', '.join(self.code) or 'no code but what ships with Atoll'}"
            for name in own_code(
                [model_code(recipe.model), stage.model_dump()]
            )  # a site makes nothing else of a recipe
            if not allows(self.code, name)
        ]
        private = parts.spec(stage.privacy, "finetune.privacy").use
        if self.privacy and private in SEEN_BY_THE_OPERATOR:
            broken.append(f"privacy {private}; this site gives the operator no update without differential privacy")
        correction = parts.spec(stage.correction, "finetune.correction").use
        if self.require and correction != "none":
            broken.append(f"correction {correction}, whose own stream leaves without what this site requires")
        chain = [parts.spec(one, "finetune.up") for one in stage.up]
        wanted = [parts.spec(one, "require") for one in self.require]
        return broken + [
            f"no {told(one)} in finetune.up, which this site requires"
            for one in wanted
            if not any(within(given, one) for given in chain)
        ]

    def too_few(self, cohort: float) -> list[str]:
        """Why `cohort` clients a round, on average, are not enough."""
        if cohort >= self.minimum_cohort:
            return []
        return [f"{cohort:g} clients a round; this site asks for at least {self.minimum_cohort}"]

    def may_leave(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics that the owner lets out; those that rounds are counted by are among them in any case."""
        return {name: value for name, value in metrics.items() if name in NEEDED or allows(self.metrics, name)}


def within(given: parts.Spec, wanted: parts.Spec) -> bool:
    """Whether a transform is the wanted one, with numbers no larger than wanted and anything else the same."""
    if given.use.replace("_", "-") != wanted.use.replace("_", "-"):
        return False
    for name, most in wanted.arguments.items():
        value = given.arguments.get(name)
        number = isinstance(value, int | float) and isinstance(most, int | float)
        if not (value <= most if number else value == most):
            return False
    return True


def told(wanted: parts.Spec) -> str:
    """A required transform in words."""
    return " ".join([wanted.use, *(f"{name} of at most {most}" for name, most in wanted.arguments.items())])


def allows(patterns: Sequence[str], name: str) -> bool:
    """Whether one of the patterns fits."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def model_names(written: Any) -> list[str]:
    """A model's name; of an assembled one those of its parts."""
    part = parts.spec(written, "model")
    if part.use != "assembled":
        return [part.use]
    senses = [part.arguments.get(name) for name in MODALITIES]
    found = [part.arguments.get("language")]
    for one in senses:
        if isinstance(one, dict):
            connector = one.get("connector")
            found += [one.get("encoder"), connector.get("of") if isinstance(connector, dict) else None]
    return [str(name) for name in found if name is not None]


def model_code(written: Any) -> Any:
    """What of a model as written could be code: not the names of tiny ones."""
    names = model_names(written)
    rest = [part for part in own_code(written) if part not in names]
    return [*rest, *(name for name in names if not name.startswith("tiny:"))]


def own_code(tree: Any) -> Iterator[str]:
    """Every text with a colon, at whatever depth: what ships is named without one."""
    if isinstance(tree, str):
        if ":" in tree:
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from own_code(value)
    elif isinstance(tree, Sequence):
        for value in tree:
            yield from own_code(value)


def read(path: Path | None) -> Policy:
    """A policy from its file; without one, the default. Raises AtollError."""
    if path is None:
        return Policy()
    try:
        policy = Policy.model_validate(load(path))
    except OSError as error:
        raise AtollError("there is no such policy", where=str(path), found=error.strerror) from error
    except ValidationError as error:
        first = error.errors()[0]
        *section, key = map(str, first["loc"] or ("",))
        if first["type"] == "extra_forbidden":
            known = list(Budget.model_fields if section else Policy.model_fields)
            raise AtollError(
                "unknown key", where=": ".join([str(path), *section]), found=key, allowed=", ".join(known),
                remedy=closest(key, known),
            ) from error  # fmt: skip
        raise AtollError(
            "the policy cannot be read", where=f"{path}: {'.'.join(map(str, first['loc']))}", found=first.get("input"),
            allowed=", ".join(Policy.model_fields), remedy=first["msg"],
        ) from error  # fmt: skip
    refuse_unknown_names(policy, path)
    for i, one in enumerate(policy.require):
        at = f"{path}: require[{i}]"
        part = parts.spec(one, at)
        parts.check(parts.find("transform", part.use, at), part, at)
    return policy


NAMES_OF = {"objectives": "objective", "spaces": "space", "exchanges": "exchange"}
"""Keys whose entries name parts, and of which slot."""


def refuse_unknown_names(policy: Policy, path: Path) -> None:
    """A name that is none allows nothing, and its owner would wonder at every plan that is refused. Raises AtollError."""
    for key, slot in NAMES_OF.items():
        for name in getattr(policy, key):
            known = sorted(parts.SLOTS[slot])
            if ":" not in name and not any(fnmatchcase(one, name) for one in known):
                raise AtollError(
                    f"no {slot} of this name", where=f"{path}: {key}", found=name,
                    allowed=f"{', '.join(known)}, with * and ?; module:factory", remedy=closest(name, known),
                )  # fmt: skip
