"""Client state: two versions, and what happens to those that are damaged, rolled back or forgotten."""

from __future__ import annotations

import errno

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from atoll.cache import replace_tensors
from atoll.client import FileStore, MemoryStore, StateLost
from atoll.params import Params, equal

ONE, TWO = {"e": torch.ones(2)}, {"e": torch.full((2,), 2.0)}


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "client.safetensors")


def kept(store, acknowledged: str | None) -> Params:
    return dict(store.settle(acknowledged))


def test_the_acknowledged_version_counts_and_no_other(store):
    assert kept(store, None) == {}
    store.pend("t1", ONE)
    assert equal(kept(store, "t1"), ONE)
    store.pend("t2", TWO)
    assert equal(kept(store, "t1"), ONE)


def test_a_server_that_counts_on_nothing_gets_a_client_that_starts_anew(store):
    store.settle(None)
    store.pend("t1", ONE)
    store.settle("t1")
    store.pend("t2", TWO)
    assert kept(store, None) == {}


def test_a_version_that_is_not_here_is_lost_and_the_next_task_starts_anew(store):
    store.settle(None)
    store.pend("t1", ONE)
    with pytest.raises(StateLost, match="t7"):
        store.settle("t7")
    assert kept(store, None) == {}


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_a_damaged_file_is_set_aside_and_the_next_task_starts_anew(tmp_path, damage):
    store = FileStore(tmp_path / "client.safetensors")
    store.settle(None)
    store.pend("t1", ONE)
    store.path.write_bytes(damage(store.path.read_bytes()))
    with pytest.raises(StateLost, match="damaged"):
        store.settle("t1")
    assert (tmp_path / "client.damaged").exists()
    assert kept(store, None) == {}


def test_a_disk_that_is_full_is_an_error_of_the_system_whoever_noticed(tmp_path, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space") as caught:
        replace_tensors(tmp_path / "x.safetensors", ONE, {})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
