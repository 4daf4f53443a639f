"""Load any Hugging Face causal language model, with a dtype and a device that suit where it runs.

No pickled weights and no code from a model's folder: safetensors only, `trust_remote_code` never.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.cache import Say, quiet
from atoll.data.media import Senses
from atoll.errors import AtollError
from atoll.models.assembled import Assembled
from atoll.models.causal import know_own_family
from atoll.models.presets import no_progress_bars
from atoll.models.ref import ModelRef as ModelRef
from atoll.models.ref import folder_of
from atoll.models.ref import resolve as resolve
from atoll.models.shapes import Shapes as Shapes
from atoll.models.shapes import shapes as shapes
from atoll.models.shapes import shapes_of
from atoll.models.tiny import byte_tokenizer
from atoll.models.tiny import tiny as tiny

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str | Assembled,
    dtype: str = "auto",
    device: str = "auto",
    gradient_checkpointing: bool = False,
    quantize: str | None = None,
    say: Say = quiet,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: a preset, `tiny:FAMILY`, a folder, or a hub id `org/name` (`org/name@revision`); or the parts of a model.
        dtype: of the params; "auto" is bfloat16 where the device computes fast in it, float32 elsewhere and for
            `tiny:` models.
        device: "cpu", "cuda", "cuda:1"; "auto" is the first GPU, or the CPU where there is none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        quantize: "4bit" holds the base in NF4 by bitsandbytes, on a GPU.
        say: told before each slow step.

    Raises:
        AtollError: the model is not there, is not a causal language model, does not fit into memory, or the choices of
            dtype, device and quantize cannot be had here.

    Example:
        >>> model, tokenizer = load_model("tiny:gpt2")
        >>> model.dtype, len(tokenizer)
        (torch.float32, 260)
    """
    place = choose_device(device)
    ref = resolve(name)
    kind = choose_dtype("float32" if ref.tiny and dtype == "auto" else dtype, place)
    quantization = choose_quantization(quantize, kind, place)
    if ref.kind == "tiny":
        if quantization:
            raise AtollError("tiny models are not quantized", where=ref.name, found=f"quantize: {quantize}")
        model, tokenizer = tiny(ref.location)
        model = model.to(place, kind)  # type: ignore[arg-type]
    else:
        model, tokenizer = _load_folder(ref, kind, place, quantization, say)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    return model, tokenizer


def load_tokenizer(name: str | Assembled, say: Say = quiet) -> PreTrainedTokenizerBase:
    """The tokenizer alone of the model `name`: what a preview of data needs.

    Raises:
        AtollError: the model is not there, or has no tokenizer.
    """
    ref = resolve(name)
    if ref.kind == "tiny":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    folder = folder_of(ref, say)
    know_own_family()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AtollError("cannot load the tokenizer", where=f"{name} in {folder}", found=_first_line(error)) from error
    return tokenizer


def load_senses(name: str | Assembled, say: Say = quiet) -> Senses:
    """How the model `name` takes media, without loading it; empty for one that takes text alone."""
    from transformers import AutoConfig

    ref = resolve(name)
    if ref.kind == "tiny":
        return {}
    from atoll.models.features import preparations, senses_of
    from atoll.models.multimodal import MultimodalConfig

    know_own_family()
    config = AutoConfig.from_pretrained(folder_of(ref, say))
    return senses_of(config, preparations(config)) if isinstance(config, MultimodalConfig) else {}


def choose_device(device: str) -> torch.device:
    """The torch device named by `device`; "auto" is the first GPU, or the CPU where there is none."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise AtollError("unknown device", found=device, allowed="auto, cpu, cuda, cuda:N") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        found = f"{device}, with {torch.cuda.device_count()} GPUs visible to torch {torch.__version__}"
        raise AtollError("no such GPU here", found=found, remedy="use device: auto or device: cpu")
    return place


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype named by `dtype`; "auto" is bfloat16 where `device` multiplies fast in it, else float32."""
    import torch

    if dtype not in DTYPES:
        raise AtollError("unknown dtype", found=dtype, allowed=", ".join(DTYPES))
    if dtype == "auto":
        dtype = "bfloat16" if fast_bfloat16(device) else "float32"
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies in bfloat16: AMX or AVX512_BF16 on a CPU, Ampere and later among GPUs."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def _load_folder(
    ref: ModelRef, dtype: torch.dtype, device: torch.device, quantization: Any, say: Say
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of(ref, say)
    know_own_family()
    known = shapes_of(ref, folder)
    check_memory(known.count * (0.6 if quantization else dtype.itemsize), device, ref.name, known.count)
    say(f"loading {ref.name} ({known.count / 1e6:.0f} M params, {str(dtype).removeprefix('torch.')} on {device})")
    options: dict[str, Any] = {"dtype": dtype, "quantization_config": quantization, "output_loading_info": True}
    if device.type != "cpu":
        options["device_map"] = {"": str(device)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AtollError("cannot load the model", where=f"{ref.name} in {folder}", found=_first_line(error)) from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would fill them with random values
        missing = ", ".join(sorted(report["missing_keys"])[:4])
        raise AtollError("the model's files lack params", where=f"{ref.name} in {folder}", found=f"no {missing}")
    for name, sense in ref.parts.senses.items() if ref.parts else ():  # it changes no parameter: the folder is for any
        model.config.of(name)["dropout"] = model.connector(name).dropout = sense.dropout
    return model.eval(), tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def choose_quantization(quantize: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    """The configuration of a 4-bit base, None without one, or the reason why it cannot be."""
    if quantize is None:
        return None
    if quantize != "4bit":
        raise AtollError("unknown quantization of the base", found=quantize, allowed="4bit, or nothing")
    if device.type != "cuda":
        raise AtollError("a 4-bit base needs a GPU", found=f"device {device}", remedy="leave out quantize")
    try:
        import bitsandbytes  # type: ignore[import-not-found, unused-ignore] # noqa: F401
    except ImportError as error:
        raise AtollError("a 4-bit base needs bitsandbytes", remedy="pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **options)  # type: ignore[no-untyped-call]


def check_memory(needed: float, device: torch.device, name: str, count: int) -> None:
    """Raise `AtollError` unless `device` has `needed` bytes free, saying how many params would fit."""
    free = free_memory(device)
    if needed <= free:
        return
    fits = free / 2 / 1e9
    raise AtollError(
        "the model does not fit into memory",
        where=f"{name} on {device}",
        found=f"{count / 1e6:.0f} M params, {needed / 1e9:.2f} GB, of which {free / 1e9:.2f} GB are free",
        allowed=f"about {fits:.2g} billion params in bfloat16, without room for training",
        remedy="a smaller model, dtype: bfloat16, or quantize: 4bit on a GPU",
    )


def free_memory(device: torch.device) -> int:
    """Bytes free on `device`; on a CPU the least of the system's and the control group's."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_system_free(), _group_free())


def _system_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _group_free(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container may still take; unbounded (2^63 - 1) where no limit is set."""
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return 2**63 - 1
    return 2**63 - 1 if limit == "max" else int(limit) - int(used)
