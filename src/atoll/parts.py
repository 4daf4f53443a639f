"""Parts by name: what a recipe may say at each slot, and how a factory is called with what it says.

A part is written as a name (`adamw`), as a mapping with its arguments (`{use: adamw, lr: 1e-3}`), or by the place of the
user's own factory (`{use: "my_module:my_factory", ...}`). The factory's signature is the schema: its types and bounds are
what the arguments are checked against, and its docstring is what `atoll parts` prints.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import ModuleType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from atoll.errors import AtollError, closest, in_words, mend, wanted

SLOTS: dict[str, dict[str, str]] = {
    "model": {"assembled": "atoll.models.assembled:assembled"},
    "data": {
        "folders": "atoll.data.sources:folders",
        "clients": "atoll.data.sources:clients",
        "partitioned": "atoll.data.sources:partitioned",
        "four-sites": "atoll.data.sources:four_sites",
        "multimodal-sites": "atoll.data.sources:multimodal_sites",
        "preference-sites": "atoll.data.sources:preference_sites",
        "arithmetic-sites": "atoll.data.sources:arithmetic_sites",
        "poisoned-sites": "atoll.data.sources:poisoned_sites",
        "with-canaries": "atoll.data.canaries:with_canaries",
        "without-media": "atoll.data.sources:without_media",
    },
    "partition": {
        "natural": "atoll.data.partition:natural",
        "iid": "atoll.data.partition:iid",
        "dirichlet": "atoll.data.partition:dirichlet",
    },
    "objective": {
        "sft": "atoll.local.language:sft",
        "causal-lm": "atoll.local.language:causal_lm",
        "dpo": "atoll.local.preferences:dpo",
        "grpo": "atoll.local.grpo:grpo",
        "reward-model": "atoll.local.judges:reward_model",
        "selector": "atoll.local.judges:selector",
    },
    "space": {
        "lora": "atoll.models.spaces:lora",
        "ffa-lora": "atoll.models.spaces:ffa_lora",
        "full": "atoll.models.spaces:full",
    },
    "connector": {
        "mlp": "atoll.models.connectors:mlp",
        "llava": "atoll.models.connectors:llava",
        "resampler": "atoll.models.connectors:resampler",
        "alignment": "atoll.models.connectors:alignment",
    },
    "optimizer": {"adamw": "atoll.local.optimizers:adamw", "sgd": "atoll.local.optimizers:sgd"},
    "rate": {
        "constant": "atoll.local.optimizers:constant",
        "linear": "atoll.local.optimizers:linear",
        "cosine": "atoll.local.optimizers:cosine",
    },
    "correction": {
        "none": "atoll.local.corrections:none",
        "proximal": "atoll.local.corrections:proximal",
        "l1": "atoll.local.corrections:l1",
        "scaffold": "atoll.local.corrections:scaffold",
    },
    "transform": {
        "clip": "atoll.transforms.clip:clip",
        "gaussian-noise": "atoll.transforms.noise:gaussian_noise",
        "int8": "atoll.transforms.quantize:int8",
        "int4": "atoll.transforms.quantize:int4",
        "topk": "atoll.transforms.sparsify:topk",
        "error-feedback": "atoll.transforms.residual:error_feedback",
    },
    "aggregate": {
        "mean": "atoll.aggregate.mean:mean",
        "median": "atoll.aggregate.robust:median",
        "trimmed-mean": "atoll.aggregate.robust:trimmed_mean",
        "krum": "atoll.aggregate.robust:krum",
        "multi-krum": "atoll.aggregate.robust:multi_krum",
    },
    "fuse": {"ties": "atoll.aggregate.fuse:ties", "average": "atoll.aggregate.fuse:average"},
    "outer": {
        "sgd": "atoll.outer:sgd",
        "momentum": "atoll.outer:momentum",
        "nesterov": "atoll.outer:nesterov",
        "adam": "atoll.outer:adam",
        "yogi": "atoll.outer:yogi",
        "adagrad": "atoll.outer:adagrad",
    },
    "schedule": {
        "synchronous": "atoll.schedule:synchronous",
        "poisson": "atoll.schedule:poisson",
        "buffered": "atoll.schedule:buffered",
    },
    "exchange": {
        "plain": "atoll.privacy.masks:in_the_clear",
        "secure-aggregation": "atoll.privacy.masks:secure_aggregation",
    },
    "privacy": {
        "none": "atoll.privacy.mechanisms:none",
        "central": "atoll.privacy.mechanisms:central",
        "local": "atoll.privacy.mechanisms:local",
        "distributed": "atoll.privacy.mechanisms:distributed",
        "examples": "atoll.privacy.examples:examples",
    },
    "fleet": {
        "inprocess": "atoll.fleet.inprocess:inprocess",
        "processes": "atoll.fleet.processes:processes",
        "faults": "atoll.fleet.faults:faults",
        "flower": "atoll.fleet.flower.fleet:flower",
    },
    "sink": {"tensorboard": "atoll.record.sinks:tensorboard"},
}


@dataclass(frozen=True)
class Slot:
    """Marks an argument that is a part itself: `Annotated[Sequence[Transform], Slot("transform")]`."""

    name: str


@dataclass(frozen=True)
class Spec:
    """A part as a recipe says it: the factory's name and its arguments."""

    use: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.use}({said})" if said else self.use


def spec(written: object, where: str) -> Spec:
    """Reads a part as written: a name, or a mapping with `use`."""
    if isinstance(written, str):
        return Spec(written, {})
    if isinstance(written, Mapping) and isinstance(written.get("use"), str):
        return Spec(written["use"], {str(name): value for name, value in written.items() if name != "use"})
    raise AtollError(
        "not a part",
        where=where,
        found=in_words(written),
        allowed="a name, or a mapping like {use: NAME, argument: value}",
    )


def make(slot: str, written: object, where: str) -> Any:
    """The part that a recipe says at `where`: its factory, called with checked arguments.

    >>> make("transform", {"use": "clip", "norm": 2.0}, "up")
    Clip(norm=2.0)
    """
    part = spec(written, where)
    factory = find(slot, part.use, where)
    arguments = check(factory, part, where)
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise AtollError(f"'{part.use}' does not take its arguments", where=where, found=error) from error


def find(slot: str, name: str, where: str) -> Callable[..., Any]:
    """The factory by its name in the slot, or by `module:factory`."""
    if ":" in name:
        return _own(name, where)
    known = SLOTS[slot]
    target = known.get(name) or known.get(name.replace("_", "-"))
    if target is None:
        raise AtollError(f"unknown {slot}", where=where, found=name, remedy=closest(name, known))
    module, _, attribute = target.partition(":")
    factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return factory


def _own(name: str, where: str) -> Callable[..., Any]:
    """A factory of the user's, from the current folder or anything installed."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    home = _import(module, name, where)
    if not hasattr(home, attribute):
        names = [n for n in dir(home) if not n.startswith("_")]
        raise AtollError("the module has no such factory", where=where, found=name, remedy=closest(attribute, names))
    found = getattr(home, attribute)
    if not callable(found):
        raise AtollError("not a factory", where=where, found=name, allowed="a function or class")
    factory: Callable[..., Any] = found
    return factory


def _import(module: str, name: str, where: str) -> ModuleType:
    if module.partition(".")[0] != "atoll":
        _OWN[module] = name
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "name a module in the current folder or an installed package"
        raise AtollError("cannot import the module", where=where, found=f"{name}: {error}", remedy=remedy) from error
    except SyntaxError as error:
        at = f"{where}: {error.filename} line {error.lineno}"
        raise AtollError(f"your part {name} failed", where=at, found=f"SyntaxError: {error.msg}") from error
    except Exception as error:
        if (told := own_failure(error)) is None:
            raise
        raise told from error


_OWN: dict[str, str] = {}
"""The user's own modules that recipes named in this process -> the part, as named."""


def own_failure(error: BaseException) -> AtollError | None:
    """An error inside a part of the user's own, told with the part's line that led to it; None for any other."""
    passed = [(frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
              for frame, line in walk_tb(error.__traceback__)]  # fmt: skip
    mine = [one for one in passed if one[0] in _OWN]
    if not mine:
        return None
    module, file, line = mine[-1]
    found = f"{type(error).__name__}: {error}"
    return AtollError(f"your part {_OWN[module]} failed", where=f"{file} line {line}", found=found)


def check(factory: Callable[..., Any], part: Spec, where: str, named: bool = True) -> dict[str, Any]:
    """The arguments as the factory's signature has them: nested parts made, numbers converted, bounds held.

    A part that is not `named` is a mapping without `use`: its place says which it is.
    """
    parameters = inspect.signature(factory).parameters
    hints = types_of(factory)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    checked = {}
    for name, value in part.arguments.items():
        at = f"{where}.{name}"
        if name not in parameters and not open_ended:
            raise no_such_argument(part.use, name, at, parameters)
        checked[name] = _value(hints.get(name, Any), value, at)
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and n not in checked and p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    if missing:
        raise AtollError(
            f"'{part.use}' lacks '{missing[0]}'", where=where, allowed=signature(factory),
            remedy=f"write {{{f'use: {part.use}, ' if named else ''}{missing[0]}: ...}}",
        )  # fmt: skip
    return checked


def no_such_argument(use: str, name: str, where: str, known: Collection[str]) -> AtollError:
    """Of a part that takes `known` ones.

    >>> no_such_argument("dpo", "use:grpo", "align.objective", ["beta"]).details["remedy"]
    "'use: grpo', with a space after the colon"
    """
    remedy = closest(name, known) if known else "leave it out"
    if ":" in name:
        remedy = f"'{name.replace(':', ': ', 1)}', with a space after the colon"
    return AtollError(f"'{use}' has no such argument", where=where, found=name, remedy=remedy)


def types_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """The types of a factory's arguments. Its return type is passed over: it may name what is not imported."""
    function: Any = getattr(factory, "__init__") if isinstance(factory, type) else factory  # noqa: B009 - mypy
    named = {name: hint for name, hint in getattr(function, "__annotations__", {}).items() if name != "return"}
    return get_type_hints(
        SimpleNamespace(__annotations__=named), getattr(function, "__globals__", {}), include_extras=True
    )


def _value(hint: Any, value: object, where: str) -> Any:
    slot = next((mark.name for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Slot)), None)
    if slot and isinstance(value, Sequence) and not isinstance(value, str):
        return [make(slot, one, f"{where}[{i}]") for i, one in enumerate(value)]
    return make(slot, value, where) if slot else validate(hint, value, where)


def validate(hint: Any, value: object, where: str) -> Any:
    """A plain value against its type and bounds, with a message that says what would do."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        mistakes: list[Any] = error.errors()
        raise AtollError(
            "wrong value", where=where, found=in_words(value), allowed=wanted(mistakes), remedy=mend(mistakes)
        ) from error


def signature(factory: Callable[..., Any]) -> str:
    """The arguments with their types, bounds and defaults, as one line."""
    return ", ".join(
        f"{one['name']}: {one['type']}{one['bounds'] and ' ' + one['bounds']}"
        + ("" if one["required"] else f" = {one['default']}")
        for one in arguments(factory)
    )


def arguments(factory: Callable[..., Any]) -> list[dict[str, Any]]:
    """What a factory takes: name, type, bounds, default, required.

    >>> from atoll.transforms.clip import clip
    >>> arguments(clip)
    [{'name': 'norm', 'type': 'float', 'bounds': '> 0', 'required': True, 'default': None}]
    """
    hints = types_of(factory)
    return [_argument(p, hints.get(name, Any)) for name, p in inspect.signature(factory).parameters.items()]


def _argument(parameter: inspect.Parameter, hint: Any) -> dict[str, Any]:
    kind, bounds = _plain_type(hint)
    required = parameter.default is parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    default = None if parameter.default is parameter.empty else parameter.default
    return {"name": parameter.name, "type": kind, "bounds": bounds, "required": required, "default": default}


def _plain_type(hint: Any) -> tuple[str, str]:
    """A type in words, and its bounds: Annotated[int, Ge(1)] | None -> ('int or None', '>= 1')."""
    if get_origin(hint) is Annotated:
        marks = hint.__metadata__
        slot = next((mark.name for mark in marks if isinstance(mark, Slot)), None)
        name, inner = _plain_type(hint.__origin__)
        return f"a {slot} part" if slot else name, ", ".join(filter(None, [inner, *map(_bound, marks)]))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint))), ""
    if get_origin(hint) in (Union, UnionType):
        each = [_plain_type(one) for one in get_args(hint)]
        return " or ".join(name for name, _ in each), ", ".join(filter(None, (bounds for _, bounds in each)))
    if get_args(hint):
        inside = ", ".join(_plain_type(one)[0] for one in get_args(hint))
        return f"{get_origin(hint).__name__}[{inside}]", ""
    return ("None" if hint is type(None) else getattr(hint, "__name__", str(hint))), ""


def _bound(mark: object) -> str:
    return ", ".join(f"{sign} {getattr(mark, name)}" for name, sign in _SIGNS.items() if hasattr(mark, name))


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
