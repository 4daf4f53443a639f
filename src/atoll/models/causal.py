"""Which folders hold a causal language model: told by their configuration, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import AtollError
from atoll.models.ready_made import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def causal_config(folder: Path) -> PretrainedConfig:
    """The configuration of a causal language model.

    Raises:
        AtollError: config.json cannot be read, needs code from the model's folder, or describes another kind of model.
    """
    from transformers import AutoConfig

    know_own_family()
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        found = str(error).strip().splitlines()[0]
        remedy = "a model that transformers knows without code of its own; such code is never run"
        where = str(folder / "config.json")
        raise AtollError("cannot read the model's configuration", where=where, found=found, remedy=remedy) from error
    _check_causal(config, str(folder / "config.json"))
    return config


def know_own_family() -> None:
    """Lets transformers read the one family that is ours."""
    import atoll.models.processor  # noqa: F401 - it and the model register themselves


def _check_causal(config: PretrainedConfig, where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type == "atoll_multimodal":
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = {known} if isinstance(known, str) else set(known or ())
    stated = set(getattr(config, "architectures", None) or names)
    if not names & stated:
        raise AtollError(
            "not a causal language model",
            where=where,
            found=f"model_type {config.model_type}, architectures {', '.join(sorted(stated)) or 'none'}",
            allowed=" or ".join(sorted(names)) or "a family that has a causal language-model head",
            remedy=f"of a ready-made model with an encoder, these families' parts are known: {', '.join(FAMILIES)}",
        )
