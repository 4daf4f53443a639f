"""Atoll: adapt language models on data that cannot be pooled.

    import atoll

    plan = atoll.plan("quickstart", ["finetune.rounds=2"])
    folder = atoll.run("quickstart")
    folder = atoll.resume("quickstart-1")

The parts come by import from their modules. Nothing is loaded before it is used: `import atoll` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.errors import AtollError as AtollError
    from atoll.planning import plan as plan
    from atoll.run import resume as resume
    from atoll.run import run as run

__all__ = ["AtollError", "plan", "resume", "run"]

_HOMES = {"AtollError": "atoll.errors", "plan": "atoll.planning", "resume": "atoll.run"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "run":
        return import_module("atoll.run")  # the module, which can be called: see its end
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'atoll' has no attribute '{name}'")
