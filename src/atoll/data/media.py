"""Pictures and sounds that records name: found, checked and read, within bounds.

A record names files in columns `images` and `audio`, one or a list, by paths from the folder of its data file. In its text a
medium stands where it says `<image>` or `<audio>`; those that no place is given for stand at the beginning of the first
question. What is broken, too large or of another kind leaves its record out, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.cache import content_hash, file_hash
from atoll.errors import AtollError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000
"""Of a picture: what unpacks to more is left out before it is unpacked."""

MOST_UNEQUAL = 50
"""How many times one side of a picture is the other: preprocessing may make the shorter 224 pixels, and both grow."""

MOST_BYTES = 64 * 1024**2
"""Of a file."""

LONGEST_SOUND = 3600.0
"""Seconds that are read at all, whatever an encoder takes."""


class Modality(NamedTuple):
    """What a client may hold beside text."""

    name: str
    placeholder: str
    """In a text, where a medium stands."""
    columns: tuple[str, ...]
    """Of a record, that name its files."""
    encoder: str
    """Of an assembled model, the module that makes its features."""
    config: str
    """Of that model's configuration, the encoder's."""


IMAGE = Modality("image", "<image>", ("images", "image"), "vision_encoder", "vision_config")
AUDIO = Modality("audio", "<audio>", ("audio", "audios"), "audio_encoder", "audio_config")
MODALITIES = {one.name: one for one in (IMAGE, AUDIO)}
COLUMNS = {column: one for one in MODALITIES.values() for column in one.columns}


@dataclass(frozen=True)
class Medium:
    """A picture or a sound that a record names."""

    modality: str
    path: Path | None
    """None: it is missing, and what the model sees or hears in its place is learned."""
    known: str = field(default="", compare=False)
    """Its key when the data were read; empty for one that was read just now."""

    @property
    def key(self) -> str:
        """Names its content."""
        return "missing" if self.path is None else self.known or file_hash(self.path)

    def check(self) -> None:
        """Raises Unusable if its file is gone, or holds something else than when the data were read."""
        if self.path is None or not self.known:
            return
        if not self.path.is_file():
            raise Unusable(f"{self.modality} that is gone since the data were read")
        if file_hash(self.path) != self.known:
            raise Unusable(f"{self.modality} that has changed since the data were read")


class Unusable(ValueError):
    """Why a record or one of its media cannot be used: in words that name no path."""


@dataclass(frozen=True)
class Sense:
    """How a model takes media of a modality."""

    token_id: int
    """Of the placeholder, in the model's tokenizer."""
    tokens: int
    """Places of one medium among the tokens."""
    rate: int = 0
    """Samples a second of sound; 0 for pictures."""
    seconds: float = 0.0
    """The longest sound."""

    def read(self, medium: Medium) -> Any:
        """A picture, or a sound at the model's rate. Raises Unusable."""
        if medium.path is None:
            raise Unusable(f"{medium.modality} that is missing")
        return read_sound(medium.path, self.rate, self.seconds) if self.rate else read_image(medium.path)


Senses = Mapping[str, Sense]
"""By modality, of a model; empty for one that takes text alone."""


MEDIA_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".wav", ".flac", ".ogg", ".opus",
    ".mp3", ".m4a", ".mp4", ".mov", ".avi", ".mkv", ".webm",
)  # fmt: skip
"""Of what somebody may take for a medium, readable or not."""


def without_parts(content: Any, place: str) -> Any:
    """A message's content as text: parts, as other libraries have them, with a placeholder for each picture and sound.

    >>> without_parts([{"type": "image"}, {"type": "text", "text": "What is it?"}], "a.jsonl:1")
    '<image>\\nWhat is it?'

    Raises:
        AtollError: a part of another kind, or one that holds its medium itself.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        beside = {name for name, value in part.items() if value is not None} - {"type"} if kind else set()
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in MODALITIES and not beside:
            texts.append(MODALITIES[kind].placeholder)
        else:
            columns = ", ".join(one.columns[0] for one in MODALITIES.values())
            raise AtollError(
                "a part of a message cannot be read", where=place, found=str(part)[:60],
                allowed='{"type": "text", "text": ...}, ' + ", ".join(f'{{"type": "{name}"}}' for name in MODALITIES),
                remedy=f"name the files in the record's columns ({columns}), in the order of their places",
            )  # fmt: skip
    return "\n".join(texts)  # as the exported processor writes them


def need(module: str) -> None:
    """Raises AtollError where a library that pictures and sounds need is not installed."""
    try:
        import_module(module)
    except ImportError as error:
        raise AtollError(
            "pictures and sounds need libraries that are not installed", found=error,
            remedy="pip install 'atoll[multimodal]'",
        ) from error  # fmt: skip


def named_media(row: Mapping[str, Any], folder: Path, place: str) -> list[Medium]:
    """The media of a record, those of a column in its order.

    Raises:
        AtollError: a column holds something else than paths.
        Unusable: a file that is not there, or lies outside the folder.
    """
    found = []
    for column, modality in COLUMNS.items():
        value = row.get(column)
        if isinstance(value, str) and value.strip()[:1] == "[":  # a CSV cell
            with suppress(ValueError):
                value = json.loads(value)
        paths = [] if value is None or value == "" else [value] if isinstance(value, str) else value
        if not isinstance(paths, Sequence) or not all(isinstance(one, str | None) for one in paths):
            raise AtollError(
                f"'{column}' has the wrong type", where=place, found=f"{type(value).__name__}: {str(value)[:60]}",
                allowed="a path, or a list of paths (null: one that is missing), from the folder of this file",
            )  # fmt: skip
        found += [Medium(modality.name, None if one is None else _inside(folder, one, modality.name)) for one in paths]
    return found


def _inside(folder: Path, name: str, modality: str) -> Path:
    path = folder / name
    if Path(name).is_absolute():
        raise Unusable(f"{modality} that is not named from the folder of its record")
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Unusable(f"{modality} outside the folder of its record")
        if not path.is_file():
            raise Unusable(f"{modality} that is not there")
        size = path.stat().st_size
    except Unusable:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # what no file can be called; a link to itself
        raise Unusable(f"{modality} that is not there") from error
    if size > MOST_BYTES:
        raise Unusable(f"{modality} of more than {MOST_BYTES // 1024**2} MiB")
    return path


@dataclass(frozen=True)
class Missing:
    """A share of the records that miss their media of a modality, drawn by their content."""

    share: float
    instead: Literal["nothing", "learned"]
    """Their places go, or something learned stands there."""
    seed: int

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], media: Sequence[Medium], content: int
    ) -> tuple[list[dict[str, Any]], tuple[Medium, ...]]:
        """The record without what it misses; `content` is the hash of what it held."""
        gone = {
            name for name in MODALITIES
            if int(content_hash(str(self.seed), str(content), name)[:8], 16) < self.share * 2**32
        }  # fmt: skip
        if self.instead == "learned":
            return list(map(dict, messages)), tuple(
                replace(one, path=None) if one.modality in gone else one for one in media
            )
        kept = tuple(one for one in media if one.modality not in gone)
        lost = {MODALITIES[one.modality].placeholder for one in media if one.modality in gone}
        return [{**message, "content": _without(str(message["content"]), lost)} for message in messages], kept


def _without(text: str, words: Collection[str]) -> str:
    for word in words:
        text = text.replace(word, "")
    return text


def placed_media(
    messages: Sequence[Mapping[str, Any]], media: Sequence[Medium], known: Collection[str] = MODALITIES
) -> list[dict[str, Any]]:
    """Messages with a placeholder for every medium; those of one modality are for its media in their order.

    Media that no place is given for stand at the beginning of the first question. What would be the place of a modality that
    is not `known` to the model is a word like any other.

    Raises:
        Unusable: more places than media.
    """
    placed = [dict(message) for message in messages]
    for one in map(MODALITIES.__getitem__, known):
        places = sum(str(message["content"]).count(one.placeholder) for message in placed)
        missing = sum(medium.modality == one.name for medium in media) - places
        if missing < 0:
            raise Unusable(f"a place for {one.name} that it does not name")
        if missing:
            asked = next((m for m in placed if m.get("role", "user") == "user"), placed[0])
            asked["content"] = f"{one.placeholder * missing}\n{asked['content']}"
    return placed


def read_image(path: Path) -> Image:
    """A picture in RGB, on white where it is transparent. Raises Unusable."""
    need("PIL")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise Unusable(f"image of more than {MOST_PIXELS // 10**6} million pixels")
            if max(opened.size) > MOST_UNEQUAL * min(opened.size):
                raise Unusable(f"image more than {MOST_UNEQUAL} times as long as it is wide, or as wide as it is long")
            upright = ImageOps.exif_transpose(of_8_bits(opened)).convert("RGBA")
    except Unusable:
        raise
    except UnidentifiedImageError as error:
        raise Unusable(f"image that is not of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise what they like
        raise Unusable("image that is broken") from error
    ground = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(ground, upright).convert("RGB")


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""That are read at all."""


def of_8_bits(picture: Any) -> Any:
    """A picture of 16 bits of gray as one of 8: Pillow would cut off what is brighter. Raises Unusable for other depths."""
    from PIL import Image

    of_16_bits = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")
    if picture.mode in ("I", "F") and not of_16_bits:
        raise Unusable("image of more than 16 bits a channel")
    if not of_16_bits:
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


LOUDEST = 1000.0
"""Of samples, whose full scale is 1: files of floating-point numbers may hold any, and powers of large ones overflow."""

LEAST_RATE, MOST_RATE = 1000, 768_000
"""Samples a second: a filter to another rate is as long as what both share is short."""

MOST_CHANNELS = 16

UNKNOWN_LENGTH = 1 << 62
"""Frames, from which on libsndfile means that it does not know."""

BLOCK = 1 << 16
"""Frames that are unpacked at a time: a small file may hold much silence in many channels."""


def read_sound(path: Path, rate: int, seconds: float) -> NDArray[np.float32]:
    """One channel, float32 [samples] at `rate`. Raises Unusable for one of more than `seconds`."""
    need("soundfile")
    import soundfile
    from scipy.signal import resample_poly

    longest = min(seconds, LONGEST_SOUND)
    try:
        with soundfile.SoundFile(path) as file:
            own: int = file.samplerate
            if not LEAST_RATE <= own <= MOST_RATE:
                raise Unusable(f"audio of {own} samples a second")
            if file.channels > MOST_CHANNELS:
                raise Unusable(f"audio of more than {MOST_CHANNELS} channels")
            most = math.floor(longest * own)
            if file.frames >= UNKNOWN_LENGTH:  # as a pipe writes it; libsndfile cannot read it in blocks
                raise Unusable("audio that does not say how long it is")
            blocks = file.blocks(BLOCK, frames=most + 1, dtype="float32", always_2d=True)
            mono: NDArray[np.float32] = np.concatenate([np.zeros(0, np.float32), *(block.mean(1) for block in blocks)])
            if len(mono) > most:
                raise Unusable(f"audio of more than {longest:g} s")
    except Unusable:
        raise
    except Exception as error:
        raise Unusable("audio that is broken, or not of a known format (WAV, FLAC, OGG, MP3, ...)") from error
    if not len(mono) or not np.isfinite(mono).all():
        raise Unusable("audio without sound")
    if float(np.abs(mono).max()) > LOUDEST:
        raise Unusable(f"audio more than {LOUDEST:g} times louder than full scale")
    if own == rate:
        return mono
    shared = math.gcd(own, rate)
    resampled: NDArray[np.float32] = resample_poly(mono, rate // shared, own // shared).astype(np.float32)
    return resampled
