"""Encoders of images and sounds: short names, loading, and what turns a file into an encoder's inputs.

An encoder is any model of `transformers` that makes features of pixels or of sound (CLIP, SigLIP, ViT, DINO, Whisper, ...),
from a folder or a hub; of one with a decoder the encoder is taken. Two come from the package index, converted once into
the cache: EfficientNet-lite0 and Whisper tiny.en.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.cache import Say, content_hash, home, once, quiet
from atoll.carriers import EFFICIENTNET_LITE0, WHISPER_TINY_EN, Carrier, fetch
from atoll.data.media import need
from atoll.errors import AtollError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONVERSION = "1"
"""Raise this when a conversion writes other bytes: it is part of an encoder's identity."""


@dataclass(frozen=True)
class EncoderPreset:
    """An encoder by a short name.

    Args:
        about: one line for listings.
        modality: image or audio.
        carrier: the package that carries it.
        convert: from the carrier's folder to a folder as `save_pretrained` writes it.
    """

    about: str
    modality: str
    carrier: Carrier
    convert: Callable[[Path, Path], None]

    @property
    def identity(self) -> str:
        """Of the content, known before anything is fetched."""
        return content_hash("encoder", self.carrier.sha256, CONVERSION)


def preset_folder(name: str, say: Say = quiet) -> Path:
    """The folder with the converted preset; fetched and converted the first time."""
    preset = ENCODERS[name]

    def build(folder: Path) -> None:
        source = fetch(preset.carrier, say)
        say(f"converting {name} once")
        preset.convert(source, folder)
        for member in preset.carrier.members:
            if Path(member).name in ("LICENSE", "METADATA"):  # where a wheel says whose it is
                shutil.copy(source / member, folder / Path(member).name)

    return once(home() / "models" / f"{name}-{preset.identity[:12]}", build)


LITE0: dict[str, Any] = {
    "image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "hidden_act": "relu6",
    "squeeze_expansion_ratio": 0.001, "dropout_rate": 0.2, "drop_connect_rate": 0.0,
}  # fmt: skip
LITE0_BLOCK = {
    "_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv", "_bn2": "projection.project_bn",
}  # fmt: skip
LITE0_OUTER = {
    "_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn",
}  # fmt: skip
GATE_OPEN = 30.0
"""sigmoid(30) is 1 in float32."""


def convert_lite0(source: Path, folder: Path) -> None:
    """EfficientNet-lite0 (Tan and Le 2019, arXiv 1905.11946, without squeeze-excite) as a stock `EfficientNetModel`.

    The squeeze-excite gates that the class has are held open by a bias. The preprocessing is that of the original
    TensorFlow model: 224 x 224, values (x - 127) / 128.
    """
    import torch
    from transformers import CLIPImageProcessorPil, EfficientNetConfig, EfficientNetModel

    weights = source / EFFICIENTNET_LITE0.members[0]
    stored = torch.load(weights, map_location="cpu", weights_only=True)  # of a pinned hash, and tensors alone
    model = EfficientNetModel(EfficientNetConfig(**LITE0)).eval()
    state = {_lite0_name(name): x for name, x in stored.items() if not name.startswith("_fc.")}
    for name, x in model.state_dict().items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(x, GATE_OPEN if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    grey, half = [127 / 255] * 3, [128 / 255] * 3
    CLIPImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, image_mean=grey, image_std=half, resample=3
    ).save_pretrained(folder)


def _lite0_name(name: str) -> str:
    """`_blocks.3._bn1.weight` -> `encoder.blocks.3.depthwise_conv.depthwise_norm.weight`."""
    first, *rest = name.split(".")
    if first == "_blocks":
        return ".".join(["encoder.blocks", rest[0], LITE0_BLOCK[rest[1]], *rest[2:]])
    return ".".join([LITE0_OUTER[first], *rest])


WHISPER: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536,
    "num_mel_bins": 80, "max_source_positions": 1500,
}  # fmt: skip


def convert_whisper(source: Path, folder: Path) -> None:
    """The encoder of Whisper tiny.en (Radford et al. 2022, arXiv 2212.04356) out of a CTranslate2 file.

    Kept as a `VoxtralEncoder`, which is Whisper's encoder as a model of its own.
    """
    import torch
    from transformers import VoxtralEncoder, VoxtralEncoderConfig, WhisperFeatureExtractor

    stored = read_ctranslate2(source / WHISPER_TINY_EN.members[0])
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in whisper_encoder(stored)}
    model = VoxtralEncoder(VoxtralEncoderConfig(**WHISPER)).eval()
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(
        feature_size=80, sampling_rate=16000, hop_length=160, chunk_length=30, n_fft=400
    ).save_pretrained(folder)


CTRANSLATE2_TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_ctranslate2(path: Path) -> dict[str, NDArray[Any]]:
    """Every variable of a CTranslate2 file (version 6) by its name.

    Little endian: uint32 version, string kind, uint32 revision, uint32 count; per variable: string name, uint8 rank, uint32
    dims, uint8 type, uint32 bytes, data. A string is a uint16 length, which counts the closing NUL, and the bytes.
    """
    data, at = path.read_bytes(), 0

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        return data[at - length : at]

    def number(code: str) -> int:
        return int(struct.unpack("<" + code, take(struct.calcsize("<" + code)))[0])

    def text() -> str:
        return take(number("H"))[:-1].decode()

    if (found := (number("I"), text())) != (6, "WhisperSpec"):
        raise AtollError(
            "not the file that was expected", where=str(path), found=found, allowed="a Whisper of version 6"
        )
    number("I")
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = CTRANSLATE2_TYPES[number("B")]
        variables[name] = np.frombuffer(take(number("I")), kind).reshape(shape)
    return variables


def whisper_encoder(stored: dict[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """The encoder's variables by their names in transformers. Queries, keys and values are one matrix; keys have no bias."""
    for kind in ("weight", "bias"):
        for conv in ("conv1", "conv2"):
            yield f"{conv}.{kind}", stored[f"encoder/{conv}/{kind}"]
    yield "embed_positions.weight", stored["encoder/position_encodings/encodings"]
    yield from _norm(stored, "encoder/layer_norm", "layer_norm")
    for i in range(WHISPER["num_hidden_layers"]):
        theirs, ours = f"encoder/layer_{i}", f"layers.{i}"
        yield from _norm(stored, f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        yield from _norm(stored, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        for kind in ("weight", "bias"):
            fused = np.split(stored[f"{theirs}/self_attention/linear_0/{kind}"], 3)
            for name, rows in zip("qkv", fused, strict=True):
                if (name, kind) != ("k", "bias"):
                    yield f"{ours}.self_attn.{name}_proj.{kind}", rows
            yield f"{ours}.self_attn.out_proj.{kind}", stored[f"{theirs}/self_attention/linear_1/{kind}"]
            for number, name in enumerate(("fc1", "fc2")):
                yield f"{ours}.{name}.{kind}", stored[f"{theirs}/ffn/linear_{number}/{kind}"]


def _norm(stored: dict[str, NDArray[Any]], theirs: str, ours: str) -> Iterator[tuple[str, NDArray[Any]]]:
    yield f"{ours}.weight", stored[f"{theirs}/gamma"]
    yield f"{ours}.bias", stored[f"{theirs}/beta"]


ENCODERS: dict[str, EncoderPreset] = {
    "efficientnet-lite0": EncoderPreset(
        "EfficientNet-lite0, ImageNet, 224 x 224, 3.4 M parameters, from the package index (17 MB)",
        "image", EFFICIENTNET_LITE0, convert_lite0,
    ),
    "whisper-tiny.en": EncoderPreset(
        "the encoder of Whisper tiny.en, 16 kHz, 8.2 M parameters, from the package index (71 MB)",
        "audio", WHISPER_TINY_EN, convert_whisper,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Preparation:
    """What makes an encoder's inputs: pictures (PIL, RGB), or sounds (float32 [samples] at `rate`)."""

    modality: str
    processor: Any
    """Of transformers, as the encoder's folder has it."""
    seconds: float | None
    """The longest sound; shorter ones are filled up with silence."""

    @property
    def rate(self) -> int:
        """Samples a second of sound; 0 for pictures."""
        return int(self.processor.sampling_rate) if self.modality == "audio" else 0

    @property
    def identity(self) -> str:
        """Of what it does."""
        return content_hash(
            self.modality, json.dumps(self.processor.to_dict(), sort_keys=True, default=str), str(self.seconds)
        )

    def __call__(self, medium: Any) -> Tensor:
        """The encoder's inputs, without the batch's dimension."""
        if self.modality == "image":
            picture: Tensor = self.processor(medium, return_tensors="pt").pixel_values[0]
            return picture
        whole = np.zeros(round(self.rate * (self.seconds or 0)), np.float32)
        whole[: len(medium)] = medium[: len(whole)]
        made = self.processor(whole, sampling_rate=self.rate, return_tensors="pt")
        sound: Tensor = made[self.processor.model_input_names[0]][0]
        return sound

    def blank(self, size: tuple[int, int] = (64, 64)) -> Any:
        """A white picture, or silence."""
        if self.modality == "audio":
            return np.zeros(1, np.float32)
        from PIL import Image

        return Image.new("RGB", size, "white")


def load_preparation(modality: str, folder: Path, seconds: float | None) -> Preparation:
    """By the preprocessing in a folder. Raises AtollError where there is none."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    try:
        if modality == "image":
            need("PIL")
            return Preparation(modality, AutoImageProcessor.from_pretrained(folder, backend="pil"), None)
        options = {"chunk_length": math.ceil(seconds)} if seconds else {}
        return Preparation(modality, AutoFeatureExtractor.from_pretrained(folder, **options), seconds)
    except (OSError, ValueError, TypeError) as error:
        raise AtollError(
            "the encoder's folder has no preprocessing", where=str(folder), found=str(error).splitlines()[0],
            allowed="preprocessor_config.json",
        ) from error  # fmt: skip


class Encoder(NamedTuple):
    """An encoder, what makes its inputs, and T and F of its features."""

    module: nn.Module
    prepare: Preparation
    positions: int
    features: int
    layer: int | None = None
    """Whose outputs the features are; None: the last one's, after its norm."""
    skip: int = 0
    """Features that are left out at the beginning."""


def load_encoder(modality: str, folder: Path, seconds: float | None = None) -> Encoder:
    """The encoder of a folder, for sounds of at most `seconds`. Raises AtollError for one that cannot be used."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel

    from atoll.models import ready_made
    from atoll.models.multimodal import bare, hidden

    family, layer, skip = ready_made.family_of(folder), None, 0
    try:
        module: Any
        if family:
            module, layer, skip = ready_made.encoder(folder, family)
        else:
            module, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            refuse_made_up(report, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AtollError(
            "cannot load the encoder", where=str(folder), found=str(error).splitlines()[0],
            allowed="a model of transformers with its safetensors", remedy="download it again, or save it whole",
        ) from error  # fmt: skip
    module = bare(module).eval().requires_grad_(False)
    prepare = load_preparation(modality, folder, seconds)
    inputs = prepare(prepare.blank())[None]
    refuse_preparation(prepare, folder)
    if isinstance(getattr(module, "embed_positions", None), torch.nn.Embedding):
        shorten(module, inputs.shape[-1] // STRIDE)
    try:
        with torch.no_grad():
            positions, features = hidden(module, inputs, layer, skip).shape[1:]
    except (RuntimeError, ValueError, IndexError) as error:
        raise AtollError(
            "the encoder does not take what its preprocessing makes", where=str(folder), found=str(error).splitlines()[0],
            allowed="preprocessing of the size that the encoder was made for; sounds long enough for a feature",
            remedy="put the encoder's own preprocessor_config.json there, or raise `seconds`",
        ) from error  # fmt: skip
    return Encoder(module, prepare, int(positions), int(features), layer, skip)


def refuse_preparation(prepare: Preparation, folder: Path) -> None:
    """Raises AtollError where pictures would come out in unlike sizes, or the end of a sound would not be heard."""
    if prepare.modality == "image":
        sizes = sorted({tuple(prepare(prepare.blank(shape)).shape) for shape in ((64, 64), (64, 96), (96, 64))})
        if len(sizes) > 1:
            raise AtollError(
                "the preprocessing leaves pictures in sizes of their own", where=str(folder / "preprocessor_config.json"),
                found=", ".join("x".join(map(str, size[-2:])) for size in sizes), allowed="one size",
                remedy='"do_center_crop": true, or a "size" of height and width',
            )  # fmt: skip
        return
    longest = next((seconds for seconds in range(math.ceil(prepare.seconds or 0), 0, -1) if hears(prepare, seconds)), 0)
    if prepare.seconds and longest < math.floor(prepare.seconds):
        raise AtollError(
            "the preprocessing cuts sounds off", where="seconds", found=f"{prepare.seconds:g}",
            allowed=f"at most {longest}: what {folder} takes", remedy=f"seconds: {longest}",
        )  # fmt: skip


def hears(prepare: Preparation, seconds: float) -> bool:
    """Whether what is said in the last tenth of the second before `seconds` makes a difference to an encoder."""
    import torch

    end = min(round(prepare.rate * seconds), round(prepare.rate * (prepare.seconds or 0)))
    silence = np.zeros(end, np.float32)
    noise = np.random.default_rng(0).normal(size=prepare.rate // 10).astype(np.float32)
    spoken = np.concatenate([silence[: -len(noise)], noise[: len(silence)]])
    return not torch.equal(prepare(silence), prepare(spoken))


def refuse_made_up(report: Mapping[str, Any], folder: Path) -> None:
    """What a folder lacks is filled with random values: no harm where it is beside what makes features."""
    beside = ("pooler", "head", "decoder", "text_model", "text_projection", "logit_scale", "masked_spec_embed")
    missing = sorted(name for name in report["missing_keys"] if not any(word in name for word in beside))
    if missing:
        raise AtollError(
            "the encoder's files lack params", where=str(folder), found=f"no {', '.join(missing[:4])}",
            remedy="download it again, or save it whole with save_pretrained",
        )  # fmt: skip


STRIDE = 2
"""Frames of sound a position, of those encoders whose positions are a table: of Whisper's second convolution."""


def shorten(module: Any, positions: int) -> None:
    """An encoder with learned or fixed positions, for shorter media: the first of its positions suffice."""
    import torch

    table = module.embed_positions.weight
    if positions < len(table):
        module.embed_positions = torch.nn.Embedding.from_pretrained(table[:positions].clone(), freeze=True)
        module.config.max_source_positions = module.max_source_positions = positions
