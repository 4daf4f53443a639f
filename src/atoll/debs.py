"""Debian packages as carriers: pictures and sounds that a distribution has, without installing anything.

The package is fetched by apt where there is one, or lies as a file in the cache's `downloads`; it is held to a pinned hash,
and what is wanted of it is unpacked. A .deb is an `ar` archive whose `data.tar` holds the files; no script of it runs.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from atoll.cache import Say, home, once, quiet, require_space
from atoll.errors import AtollError

MOST_UNPACKED = 2 * 1024**3


@dataclass(frozen=True)
class Deb:
    """A package and what is wanted of it.

    Args:
        name, version: as apt knows them.
        sha256: of the file, 64 hex digits.
        bytes: its size.
        folders: what paths of wanted members begin with.
        license: in a few words, as the package states it.
    """

    name: str
    version: str
    sha256: str
    bytes: int
    folders: tuple[str, ...]
    license: str

    @property
    def file(self) -> str:
        """Its usual file name."""
        return f"{self.name}_{self.version}_all.deb"


TUXPAINT_STAMPS = Deb(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    160_880_444,
    ("./usr/share/tuxpaint/stamps/", "./usr/share/doc/tuxpaint-stamps-default/copyright"),
    "GPL-2",
)

NOTO_EMOJI = Deb(
    "fonts-noto-color-emoji",
    "2.042-0+deb12u1",
    "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    9_893_872,
    ("./usr/share/fonts/truetype/noto/", "./usr/share/doc/fonts-noto-color-emoji/copyright"),
    "OFL-1.1 (the font), Apache-2.0 (its pictures)",
)

_ASTERISK = {
    "en": (
        (18_272_864, "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"),
        (22_844, "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"),
        "CC-BY-SA-3.0",
    ),
    "fr": (
        (18_516_060, "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e"),
        (23_152, "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056"),
        "CC-BY-SA-3.0",
    ),
    "es": (
        (23_767_256, "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903"),
        (22_012, "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74"),
        "CC-BY-SA-3.0",
    ),
    "it": (
        (18_262_124, "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb"),
        (23_972, "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b"),
        "CC-BY-3.0",
    ),
}


def asterisk_prompts(language: str) -> tuple[Deb, Deb]:
    """The sounds of a language, and their transcripts."""
    (sound_bytes, sound_hash), (text_bytes, text_hash), license = _ASTERISK[language]
    name, version = f"asterisk-core-sounds-{language}", "1.6.1-1"
    return (
        Deb(f"{name}-wav", version, sound_hash, sound_bytes, ("./usr/share/asterisk/sounds/",), license),
        Deb(name, version, text_hash, text_bytes, (f"./usr/share/doc/{name}/",), license),
    )


LANGUAGES = tuple(_ASTERISK)


def fetch_deb(deb: Deb, say: Say = quiet) -> Path:
    """The folder in the cache with the wanted members at their paths; fetched the first time.

    Raises:
        AtollError: the package is not to be had, is not the pinned one, or cannot be unpacked.
    """

    def build(folder: Path) -> None:
        require_space(folder, 3 * deb.bytes, deb.name)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            path = _at_hand(deb) or _download(deb, Path(temporary), say)
            _check(deb, path)
            _unpack(deb, path, folder)

    return once(home() / "carriers" / f"{deb.name}-{deb.sha256[:12]}", build)


def _at_hand(deb: Deb) -> Path | None:
    found = home() / "downloads" / deb.file
    return found if found.is_file() else None


def _download(deb: Deb, folder: Path, say: Say) -> Path:
    """By apt, in its own sandbox's eyes a plain download: nothing is installed."""
    say(f"fetching the Debian package {deb.name} {deb.version} ({deb.bytes / 1e6:.0f} MB)")
    by_hand = f"put {deb.file} into {home() / 'downloads'}: it is in Debian 12 (bookworm)"
    if shutil.which("apt-get") is None:
        raise AtollError("cannot fetch a Debian package without apt", found=deb.name, remedy=by_hand)
    command = ["apt-get", "download", f"{deb.name}={deb.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.deb"))
    if done.returncode != 0 or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise AtollError(
            f"cannot fetch the Debian package {deb.name}", where=" ".join(command),
            found=lines[0] if lines else f"status {done.returncode}", remedy=f"apt-get update, then again; or {by_hand}",
        )  # fmt: skip
    return found[0]


def _check(deb: Deb, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != deb.sha256:
        raise AtollError(
            f"the Debian package {deb.name} is not the one that is pinned", where=str(path),
            found=f"sha256 {found}", allowed=f"sha256 {deb.sha256}, version {deb.version}",
            remedy=f"put that version's file as {home() / 'downloads' / deb.file}",
        )  # fmt: skip


def _unpack(deb: Deb, path: Path, folder: Path) -> None:
    """The wanted members, as plain files."""
    total = 0
    with path.open("rb") as file:
        name, data = next((name, data) for name, data in _members(file) if name.startswith("data.tar"))
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
            for member in archive:
                if member.isfile() and member.name.startswith(deb.folders):
                    total += member.size
                    if total > MOST_UNPACKED:
                        raise AtollError(
                            "the package unpacks to too much", where=f"{path}: {name}", found=f"{total} bytes"
                        )
                    archive.extract(member, folder, filter="data")


def _members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Of an `ar` archive: a line of 60 bytes before each, which is padded to an even length."""
    if file.read(8) != b"!<arch>\n":
        raise AtollError("not a Debian package", where=getattr(file, "name", ""))
    while header := file.read(60):
        size = int(header[48:58])
        yield header[:16].decode().strip().rstrip("/"), file.read(size)
        file.read(size % 2)
