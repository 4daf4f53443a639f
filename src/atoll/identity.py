"""What decides the result of a stage, by content: a stage of the same identity need not run again."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import resources
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from atoll import parts
from atoll.assemble import Assembly
from atoll.build import Plan
from atoll.cache import content_hash
from atoll.data.sources import ClientData
from atoll.errors import AtollError
from atoll.fleet.inprocess import Elsewhere
from atoll.outcome import Progress, base_of, progress_of
from atoll.params import Params
from atoll.policy import model_code, own_code
from atoll.record.folder import CHECKPOINT, RunFolder, root
from atoll.wire import content


def base(ready: Plan) -> str:
    """What a plan's params are laid on, by content."""
    return base_of(identity(ready), ready.space, ready.recipe.seed)


def identity(ready: Plan) -> str:
    """The model's; empty for one of the user's own factory."""
    return ready.shapes.identity if ready.shapes else ""


def before_first(ready: Plan, things: Assembly, start: Params) -> Progress:
    """What decides the result of a stage, and nothing done."""
    return Progress(
        ready.hash,
        things.digests,
        start=content_hash(identity(ready), content(start)),
        base=base(ready),
        beside={
            "fleet": str(parts.spec(ready.recipe.fleet, "fleet")),
            "threads": str(torch.get_num_threads()),
            "code": code(),
            **versions(),
        },
    )


def versions() -> dict[str, str]:
    """Of Atoll, and of what it trains with."""
    return {name: version(name) for name in ("atoll", "torch", "transformers", "peft")}


@cache
def code() -> str:
    """This package's source by content: between releases, too, other code comes to something else."""
    folder = Path(str(resources.files("atoll")))
    return content_hash(*sorted(folder.rglob("*.py")))


def own_files(ready: Plan) -> list[Path]:
    """The modules of the user's own that a recipe names, and that can be found; what those import is not among them."""
    found = []
    for name in own_code(trains(ready)):
        with suppress(ImportError, ValueError):
            spec = find_spec(name.partition(":")[0])
            found += [Path(spec.origin)] if spec and spec.origin else []
    return sorted(found)


def done_before(ready: Plan, things: Assembly, start: Params) -> RunFolder | None:
    """A finished stage, of whatever run here, of the same plan on the same data that began with the same params.

    None is looked for where not all that decides the result is known by content: data at sites or of the user's own source,
    a model or a part of the user's own, a fleet that misbehaves.
    """
    own = any(isinstance(source, ClientData) for source in ready.sources.values()) or any(own_code(trains(ready)))
    if own or isinstance(ready.fleet, Elsewhere) or parts.spec(ready.recipe.fleet, "fleet").use == "faults":
        return None
    wanted = before_first(ready, things, start)
    for checkpoint in sorted((*root().glob(f"*/{CHECKPOINT}"), *root().glob(f"*/stages/*/{CHECKPOINT}"))):
        other = RunFolder(checkpoint.parent)
        if other.card.exists() and is_same(wanted, checkpoint):
            return other
    return None


def is_same(wanted: Progress, checkpoint: Path) -> bool:
    """Whether a checkpoint is the end of what begins as wanted."""
    try:
        _, found = progress_of(checkpoint)
    except AtollError:  # damaged, or of another version
        return False
    same = all(getattr(found, name) == getattr(wanted, name) for name in ("plan", "data", "start", "base", "beside"))
    return same and bool(found.ended)


def trains(ready: Plan) -> list[object]:
    """What of a recipe names the parts that a stage trains with."""
    written = ready.recipe
    return [model_code(written.model), *(part for part in (written.data, written.fleet)), written.finetune.model_dump()]
