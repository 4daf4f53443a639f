"""Spaces: the coordinates of what trains and travels.

    prepare(model, key) -> model      once: adapters in, everything else frozen
    trainable(model)                  name -> parameter, the coordinates
    read(model), write(model, params) params out of the model and into it
    plan(shapes)                      the same names and shapes without a model

A LoRA space carries PEFT's own names, so that what travels is also what `save_pretrained` writes and plain `peft` loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn

from atoll.data.media import MODALITIES
from atoll.errors import AtollError, closest
from atoll.params import Params

if TYPE_CHECKING:
    from atoll.models.shapes import Shapes

PlannedShapes = dict[str, tuple[int, ...]]
T = TypeVar("T")


class Space(Protocol):
    """What trains and travels."""

    @property
    def draws(self) -> bool:
        """Whether `prepare` draws by its seed what then stays as it is: params mean something beside that alone."""
        ...

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """Makes the model train in this space and nowhere else; called once per process."""
        ...

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The coordinates by name."""
        ...

    def plan(self, shapes: Shapes) -> PlannedShapes:
        """Names and shapes of the coordinates, from the model's shapes alone."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes what trained in the ecosystem's own format."""
        ...


def draws(space: Space) -> bool:
    """Whether a space draws what stays as it is; one of the user's own that does not say does not."""
    return getattr(space, "draws", False)


def read(space: Space, model: nn.Module) -> Params:
    """The values of the coordinates. They are the model's own tensors: clone what must outlive the next `write`."""
    return {name: parameter.detach() for name, parameter in space.trainable(model).items()}


@torch.no_grad()
def write(space: Space, model: nn.Module, params: Mapping[str, torch.Tensor]) -> None:
    """Sets every coordinate."""
    for name, parameter in space.trainable(model).items():
        parameter.copy_(params[name])


def split(params: Mapping[str, T], personal: Sequence[str]) -> tuple[dict[str, T], dict[str, T]]:
    """What travels, and what stays at its client: the parameters whose names hold one of the `personal` words.

    >>> split({"x.lora_A.weight": 1, "x.lora_B.weight": 2}, ["lora_A"])
    ({'x.lora_B.weight': 2}, {'x.lora_A.weight': 1})
    """
    stays = {name for name in params if any(word in name for word in personal)}
    return (
        {name: x for name, x in params.items() if name not in stays},
        {name: x for name, x in params.items() if name in stays},
    )


def frozen(name: str) -> bool:
    """Whether a parameter is of an assembled model's encoder: what features are made by once stays as it is."""
    return name.startswith(tuple(f"{one.encoder}." for one in MODALITIES.values()))


@dataclass(frozen=True)
class Full:
    """See `full`."""

    draws = False

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """Every parameter trains, in float32: bfloat16 has too few digits to hold small steps."""
        for name, parameter in model.float().named_parameters():
            parameter.requires_grad_(not frozen(name))
        return model

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Every parameter but encoders'; tied ones once."""
        return {name: parameter for name, parameter in model.named_parameters() if not frozen(name)}

    def plan(self, shapes: Shapes) -> PlannedShapes:
        """The model's own."""
        return {name: shape for name, (shape, _) in shapes.params.items() if not frozen(name)}

    def save(self, model: nn.Module, folder: Path) -> None:
        """A model folder for `transformers`."""
        save: Any = model.save_pretrained
        save(folder)


@dataclass(frozen=True)
class LoRA:
    """See `lora` and `ffa_lora`."""

    rank: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]
    freeze_a: bool = False
    modules: tuple[str, ...] = ()
    """That train in full."""

    @property
    def draws(self) -> bool:
        """Whether A is drawn and then frozen."""
        return self.freeze_a

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """Wraps the model by PEFT. A is drawn by `seed`, B is zero: the first update starts from the base model.

        A frozen A is the same wherever the plan is built: it never travels.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT annotates an int and divides by the rank
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            exclude_modules=beside_text(model) or refused_by_peft(family_of(model)),
            modules_to_save=[name for name, _ in self._whole(model)] or None,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        try:
            wrapped: nn.Module = get_peft_model(model, config)
        except ValueError as error:
            raise AtollError(
                "LoRA found no module to adapt", where="finetune.space.targets", found=self.targets,
                allowed=f"{ALL_LINEAR}, or names of linear modules", remedy=str(error).splitlines()[0],
            ) from error  # fmt: skip
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameter.requires_grad = not self.freezes(name)
        return wrapped

    def freezes(self, name: str) -> bool:
        """Whether this parameter of an adapter stays as it was drawn."""
        return self.freeze_a and ".lora_A." in name

    def _whole(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules that train in full; the children of a list or mapping of them, which are what PEFT takes."""
        found = []
        for name in self.modules:
            module = dict(model.named_modules()).get(name)
            if module is None:
                raise no_such_module(name, [child for child, _ in model.named_children()])
            inside = isinstance(module, nn.ModuleDict | nn.ModuleList)
            found += [(f"{name}.{n}", m) for n, m in module.named_children()] if inside else [(name, module)]
        return found

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The adapters' factors and whole modules, under the names of PEFT's adapter files."""
        return {
            n.replace(".modules_to_save.default", "").replace(".default", ""): p
            for n, p in model.named_parameters()
            if p.requires_grad
        }

    def plan(self, shapes: Shapes) -> PlannedShapes:
        """A [rank, in], unless it is frozen, and B [out, rank] for every adapted linear module."""
        refused = refused_by_peft(shapes.family)
        text = {name: sizes for name, sizes in shapes.linears.items() if name.startswith(shapes.text)}
        open_to_us = {name: sizes for name, sizes in text.items() if name.rsplit(".", 1)[-1] not in refused}
        adapted = {name: sizes for name, sizes in open_to_us.items() if self._adapts(name)}
        if not adapted:
            ends = sorted({name.rsplit(".", 1)[-1] for name in shapes.linears})
            wanted = self.targets if isinstance(self.targets, str) else self.targets[0]
            raise AtollError(
                "LoRA finds no module to adapt", where="finetune.space.targets", found=self.targets,
                allowed=f"{ALL_LINEAR}, or some of: {', '.join(ends)}", remedy=closest(wanted, ends),
            )  # fmt: skip
        planned: PlannedShapes = {}
        for name, (into, out) in adapted.items():
            if not self.freeze_a:
                planned[f"base_model.model.{name}.lora_A.weight"] = (self.rank, into)
            planned[f"base_model.model.{name}.lora_B.weight"] = (out, self.rank)
        for name in self.modules:
            whole = {n: shape for n, (shape, _) in shapes.params.items() if n.startswith(f"{name}.")}
            if not whole or any(map(frozen, whole)):
                raise no_such_module(name, sorted({n.partition(".")[0] for n in shapes.params if not frozen(n)}))
            planned |= {f"base_model.model.{n}": shape for n, shape in whole.items()}
        return planned

    def _adapts(self, name: str) -> bool:
        if self.targets == ALL_LINEAR:
            return True
        wanted = (self.targets,) if isinstance(self.targets, str) else self.targets
        return any(name == target or name.endswith("." + target) for target in wanted)

    def save(self, model: nn.Module, folder: Path) -> None:
        """A PEFT adapter: adapter_config.json and adapter_model.safetensors."""
        save: Any = model.save_pretrained
        save(folder)
        (folder / "README.md").unlink(
            missing_ok=True
        )  # PEFT's own, in which nothing is filled in: an export writes one


def no_such_module(name: str, known: Sequence[str]) -> AtollError:
    """What `modules` names and the model has not."""
    return AtollError(
        "the model has no such module", where="finetune.space.modules", found=name, allowed=", ".join(known),
        remedy=closest(name, known),
    )  # fmt: skip


def family_of(model: nn.Module) -> str:
    """The model type in transformers; empty for other models."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def beside_text(model: nn.Module) -> str:
    """A pattern of the modules beside the language model, of a model that has others: adapters are for text."""
    return r"(?!language_model\.).*" if hasattr(model, "language_model") else ""


ALL_LINEAR = "all-linear"

STATE_SPACE_FAMILIES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def refused_by_peft(family: str) -> list[str]:
    """Modules that PEFT will not adapt: Mamba's fused kernels read the plain parameters of these past their module."""
    return ["out_proj", "conv1d"] if family in STATE_SPACE_FAMILIES else []


def full() -> Full:
    """All parameters train and travel."""
    return Full()


def lora(
    rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[float, Gt(0)] = 16.0,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    targets: Literal["all-linear"] | Sequence[str] = ALL_LINEAR,
    modules: Sequence[str] = (),
) -> LoRA:
    """Low-rank adapters W + alpha / rank B A on the named linear modules, through PEFT; `modules` train in full beside them.

    Source: Hu et al. 2021 (arXiv 2106.09685); our `rank` is their r. Averaging A and B separately, as FedAvg does, is
    biased: mean(B) mean(A) is not mean(B A).
    """
    return LoRA(rank, alpha, dropout, _targets(targets), modules=tuple(modules))


def _targets(written: str | Sequence[str]) -> str | tuple[str, ...]:
    return written if isinstance(written, str) else tuple(written)


def ffa_lora(
    rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[float, Gt(0)] = 16.0,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    targets: Literal["all-linear"] | Sequence[str] = ALL_LINEAR,
    modules: Sequence[str] = (),
) -> LoRA:
    """Low-rank adapters whose A stays as it was drawn: B alone trains and travels.

    Source: Sun et al. 2024, FFA-LoRA (arXiv 2403.12313). The mean of B A is mean(B) A then: averaging is exact, noise on B
    is noise on the product and no more, and half of the bytes travel.
    """
    return LoRA(rank, alpha, dropout, _targets(targets), freeze_a=True, modules=tuple(modules))
