"""Features of pictures and sounds, made once: frozen encoders give the same for the same medium, so a folder keeps them.

A feature is named by the content of its medium and by the encoder with its preprocessing, so that it is never another's. The
folder is bounded; what was read longest ago goes first, and is made again when it is asked for.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.cache import content_hash, home, write_file
from atoll.data.media import Medium, Sense, Senses
from atoll.models.encoders import Preparation, load_preparation

MOST_BYTES = 8 * 1024**3
"""Of all features."""

VERSION = 1
"""Raise it when a medium is read to something else."""

LARGEST = 60000.0
"""That float16 holds, nearly."""

AT_ONCE = 8
"""Media that an encoder is given at a time."""


def features_of(model: Any) -> Features | None:
    """Those of a loaded model, wrapped by PEFT or not; None for one that takes text alone."""
    from atoll.models.multimodal import ENCODERS, MultimodalModel

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, MultimodalModel):
        return None
    prepared = preparations(model.config)
    identities = {
        name: content_hash(
            str(VERSION),
            prepared[name].identity,
            *_taken(getattr(model.config, name)),
            *_bytes(getattr(model, ENCODERS[name])),
        )
        for name in prepared
    }
    return Features(model, prepared, identities, home() / "features")


def preparations(config: Any) -> dict[str, Preparation]:
    """What makes an encoder's inputs of media, by modality; they lie beside the model whose configuration it is."""
    folder = Path(config._name_or_path)
    return {name: load_preparation(name, folder / name, getattr(config, name)["seconds"]) for name in config.modalities}


def senses_of(config: Any, prepared: Mapping[str, Preparation]) -> Senses:
    """How a model of this configuration takes media."""
    said = {name: getattr(config, name) for name in prepared}
    return {
        name: Sense(said[name]["token_id"], said[name]["tokens"], one.rate, one.seconds or 0.0)
        for name, one in prepared.items()
    }


def _taken(said: Mapping[str, Any]) -> list[str]:
    """Which of an encoder's outputs are taken, where it is not all of the last ones."""
    return [] if said.get("layer") is None else [f"layer {said['layer']} from {said['skip']}"]


def _bytes(encoder: Any) -> Iterator[bytes]:
    """What an encoder is made of."""
    said = encoder.config.to_dict()
    by_whom = ("transformers_version", "dtype", "architectures")
    kept = {key: value for key, value in said.items() if key not in by_whom and not key.startswith("_")}
    yield json.dumps(kept, sort_keys=True, default=str).encode()
    for name, x in encoder.state_dict().items():
        yield name.encode()
        yield x.detach().float().cpu().numpy().tobytes()


@dataclass(frozen=True)
class Features:
    """The features that a model's encoders make, kept in `folder`."""

    model: Any
    preparations: dict[str, Preparation]
    identities: dict[str, str]
    """Of each modality's encoder and preprocessing."""
    folder: Path
    most_bytes: int = MOST_BYTES

    @property
    def senses(self) -> Senses:
        """How the model takes media."""
        return senses_of(self.model.config, self.preparations)

    def of(self, media: Sequence[Medium]) -> dict[str, Tensor]:
        """By modality, [media, T, F] in float32: read, or made and kept; not numbers for a medium that is missing."""
        each = {name: [medium for medium in media if medium.modality == name] for name in self.preparations}
        return {name: torch.stack([self._one(medium) for medium in some]) for name, some in each.items() if some}

    def _one(self, medium: Medium) -> Tensor:
        if medium.path is None:
            said = getattr(self.model.config, medium.modality)
            return torch.full((said["positions"], said["features"]), math.nan)
        path = self._path(medium)
        if (kept := read(path)) is None:
            self._make([medium])
            kept = np.load(path, allow_pickle=False)
        return torch.from_numpy(kept.astype(np.float32))

    def _path(self, medium: Medium) -> Path:
        return self.folder / self.identities[medium.modality] / f"{medium.key}.npy"

    def fill(self, media: Iterable[Medium], tell: Callable[[int, int], None] = lambda done, of: None) -> int:
        """Makes all that are missing; how many they were."""
        named = {self._path(medium): medium for medium in media if medium.path}
        missing = [medium for path, medium in named.items() if not path.is_file()]
        done = 0
        for name in self.preparations:
            some = [medium for medium in missing if medium.modality == name]
            for at in range(0, len(some), AT_ONCE):
                self._make(some[at : at + AT_ONCE])
                done += len(some[at : at + AT_ONCE])
                tell(done, len(missing))
        self._bound()
        return len(missing)

    def inputs(self, medium: Medium) -> Tensor:
        """What the medium's encoder takes, without the batch's dimension."""
        return self.preparations[medium.modality](self.senses[medium.modality].read(medium))

    def _make(self, media: Sequence[Medium]) -> None:
        """Encodes media of one modality, and writes each as float16. Raises Unusable."""
        for medium in media:
            medium.check()
        name = media[0].modality
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # pictures, nearly: nobody else reads a client's
        raw = torch.stack([self.inputs(medium) for medium in media])
        for medium, features in zip(media, self.model.encode(name, raw), strict=True):
            array = io.BytesIO()
            np.save(array, features.clamp(-LARGEST, LARGEST).half().cpu().numpy(), allow_pickle=False)
            write_file(self._path(medium), array.getvalue())

    def _bound(self) -> None:
        """Takes off what was read longest ago, as far as there is too much."""
        files = sorted(self.folder.glob("*/*.npy"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self.most_bytes:
                path.unlink(missing_ok=True)


def read(path: Path) -> NDArray[np.float16] | None:
    """A kept feature; None if it is not there, or not whole. What was read last goes last."""
    try:
        found: NDArray[np.float16] = np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    os.utime(path)
    return found
