"""Features of pictures and sounds, made once: frozen encoders give the same for the same medium, so a folder keeps them.

A feature is named by the content of its medium and by the encoder with its preprocessing, so that it is never another's. The
folder is bounded; what was read longest ago goes first, and is made again when it is asked for.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.lib import format as npy
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


def places(features: Features | None) -> list[int]:
    """The tokens in whose places pictures and sounds stand: nothing that a model may write."""
    return [sense.token_id for sense in features.senses.values()] if features else []


def features_of(model: Any) -> Features | None:
    """Those of a loaded model, wrapped by PEFT or not; None for one that takes text alone."""
    from atoll.models.multimodal import MultimodalModel

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, MultimodalModel):
        return None
    prepared = preparations(model.config)
    identities = {
        name: content_hash(str(VERSION), one.identity, *_taken(model.config.of(name)), content_of(model.encoder(name)))
        for name, one in prepared.items()
    }
    return Features(model, prepared, identities, home() / "features")


def preparations(config: Any) -> dict[str, Preparation]:
    """What makes an encoder's inputs of media, by modality; they lie beside the model whose configuration it is."""
    folder = Path(config._name_or_path)
    return {name: load_preparation(name, folder / name, config.of(name)["seconds"]) for name in config.modalities}


def senses_of(config: Any, prepared: Mapping[str, Preparation]) -> Senses:
    """How a model of this configuration takes media."""
    said = {name: config.of(name) for name in prepared}
    return {
        name: Sense(said[name]["token_id"], said[name]["tokens"], one.rate, one.seconds or 0.0)
        for name, one in prepared.items()
    }


def _taken(said: Mapping[str, Any]) -> list[str]:
    """Which of an encoder's outputs are taken, where it is not all of the last ones."""
    return [] if said["layer"] is None else [f"layer {said['layer']} from {said['skip']}"]


CONTENTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Of encoders, by the encoder: they are frozen, and read through once."""


def content_of(encoder: Any) -> str:
    """Names what an encoder is made of."""
    if encoder not in CONTENTS:
        CONTENTS[encoder] = content_hash(*_bytes(encoder))
    return CONTENTS[encoder]


def _bytes(encoder: Any) -> Iterator[bytes]:
    """What an encoder is made of."""
    said = encoder.config.to_dict()
    by_whom = ("transformers_version", "dtype", "architectures")
    kept = {key: value for key, value in said.items() if key not in by_whom and not key.startswith("_")}
    yield json.dumps(kept, sort_keys=True, default=str).encode()
    for name, x in encoder.state_dict().items():
        yield name.encode()
        yield x.detach().float().cpu().numpy().tobytes()


@dataclass
class Features:
    """The features that a model's encoders make, kept in `folder`."""

    model: Any
    preparations: dict[str, Preparation]
    identities: dict[str, str]
    """Of each modality's encoder and preprocessing."""
    folder: Path
    most_bytes: int = MOST_BYTES
    written: int = 0
    """Bytes since the folder was last bounded."""

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
            return torch.full(self._shape(medium.modality), math.nan)
        if (kept := read(self._path(medium), self._shape(medium.modality))) is None:
            (kept,) = self._make([medium])
        return torch.from_numpy(kept.astype(np.float32))

    def _path(self, medium: Medium) -> Path:
        return self.folder / self.identities[medium.modality] / f"{medium.key}.npy"

    def fill(self, media: Iterable[Medium], tell: Callable[[int, int], None] = lambda done, of: None) -> int:
        """Makes all that are missing and find room; returns how many do not, which are made whenever they are asked for."""
        named = {self._path(medium): medium for medium in media if medium.path}
        missing = [medium for path, medium in named.items() if not touched(path)]
        kept = Counter(medium.modality for medium in named.values()) - Counter(medium.modality for medium in missing)
        room = self.most_bytes - sum(count * self._size(name) for name, count in kept.items())
        sizes = accumulate(self._size(medium.modality) for medium in missing)
        fitting = missing[: sum(size <= room for size in sizes)]
        done = 0
        for name in self.preparations:
            some = [medium for medium in fitting if medium.modality == name]
            for at in range(0, len(some), AT_ONCE):
                self._make(some[at : at + AT_ONCE])
                done += len(some[at : at + AT_ONCE])
                tell(done, len(fitting))
        self._bound()
        return len(missing) - len(fitting)

    def _shape(self, modality: str) -> tuple[int, int]:
        """Of a feature: T and F."""
        said = self.model.config.of(modality)
        return said["positions"], said["features"]

    def _size(self, modality: str) -> int:
        """Bytes of a feature's file."""
        shape = self._shape(modality)
        return len(header(shape)) + 2 * math.prod(shape)

    def inputs(self, medium: Medium) -> Tensor:
        """What the medium's encoder takes, without the batch's dimension."""
        return self.preparations[medium.modality](self.senses[medium.modality].read(medium))

    def _make(self, media: Sequence[Medium]) -> list[NDArray[np.float16]]:
        """Encodes media of one modality, and writes each as float16 [T, F]. Raises Unusable."""
        for medium in media:
            medium.check()
        name = media[0].modality
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # pictures, nearly: nobody else reads a client's
        raw = torch.stack([self.inputs(medium) for medium in media])
        made: list[NDArray[np.float16]] = [
            features.clamp(-LARGEST, LARGEST).half().cpu().numpy() for features in self.model.encode(name, raw)
        ]
        for medium, features in zip(media, made, strict=True):
            content = header(features.shape) + features.tobytes()
            write_file(self._path(medium), content)
            self.written += len(content)
        if self.written > self.most_bytes / 16:
            self._bound()
        return made

    def _bound(self) -> None:
        """Takes off what was read longest ago, as far as there is too much. Other processes may do the same."""
        files = []
        for path in self.folder.glob("*/*.npy"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = 0
        for _, size, path in sorted(files, reverse=True):
            total += size
            if total > self.most_bytes:
                path.unlink(missing_ok=True)
        self.written = 0


def touched(path: Path) -> bool:
    """Whether a feature is there; it then counts as read just now, for what was read longest ago goes first."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def read(path: Path, shape: tuple[int, int]) -> NDArray[np.float16] | None:
    """A kept feature of this shape; None if it is not there, or not whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    head = header(shape)
    if not content.startswith(head) or len(content) != len(head) + 2 * math.prod(shape):
        return None
    touched(path)
    return np.frombuffer(content, np.float16, offset=len(head)).reshape(shape)


@lru_cache
def header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of float16 of this shape begins with: every file of an encoder's features with the same bytes."""
    file = io.BytesIO()
    npy.write_array_header_1_0(
        file, {"descr": npy.dtype_to_descr(np.dtype("<f2")), "fortran_order": False, "shape": shape}
    )
    return file.getvalue()
