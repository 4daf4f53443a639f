"""The processes fleet gives what the in-process fleet gives, and outlives its workers."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll import messages, run
from atoll.exchange import Broadcast, Dropped, Reply, Task
from atoll.fleet.processes import Worker, receive, send
from atoll.params import equal
from atoll.record.checkpoint import load_state
from atoll.record.story import read_story
from atoll.transforms.chain import Payload
from atoll.wire import Buffer

RECIPE = """
recipe: 1
name: several
model: tiny:llama
data: {{use: folders, path: {data}}}
finetune:
  rounds: 3
  local_steps: 2
  schedule: {schedule}
  up: [{{use: error-feedback, chain: [{{use: topk, fraction: 0.2}}]}}]
evaluate: {{samples: 4, final_samples: 4}}
fleet: {{use: {fleet}, seconds: {{north: 1, south: 2.5, west: 4}}}}
"""


def result(tmp_path: Path, sites: Path, fleet: str, schedule: str):
    recipe = tmp_path / f"{fleet}.yaml"
    recipe.write_text(RECIPE.format(data=sites, fleet=fleet, schedule=schedule))
    return run.run(str(recipe), ["fleet.workers=2"] if fleet == "processes" else [])


@pytest.mark.parametrize(
    "schedule", ["synchronous", "{use: buffered, concurrency: 3, buffer: 2}"], ids=["sync", "async"]
)
def test_gives_what_one_process_gives(tmp_path, monkeypatch, sites, schedule):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    one, several = (
        load_state(result(tmp_path, sites, fleet, schedule).checkpoint) for fleet in ("inprocess", "processes")
    )
    assert several.clock == one.clock
    assert several.acknowledged == one.acknowledged
    for name, x in one.params["update"].items():
        assert torch.allclose(several.params["update"][name], x, atol=1e-4)


def explode(samples=8):
    """A data factory whose clients end their process when the worker `north` asks for samples."""
    from atoll.data.sources import ClientData

    good = [(torch.zeros(4, dtype=torch.int32).numpy(), torch.zeros(4, dtype=torch.int32).numpy())] * samples
    return {"north": ClientData(Fatal(good), ()), "south": ClientData(good, ()), "west": ClientData(good, ())}


class Fatal(list):
    def __getitem__(self, index):
        import multiprocessing
        import os

        if multiprocessing.parent_process() is not None:
            os._exit(9)
        return super().__getitem__(index)


def test_a_worker_that_dies_drops_its_client_and_the_round_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    recipe = tmp_path / "fatal.yaml"
    recipe.write_text(
        "recipe: 1\nname: fatal\nmodel: tiny:llama\ndata: test_processes:explode\n"
        "finetune: {rounds: 1, local_steps: 1}\nevaluate: {every: 0}\nfleet: {use: processes, workers: 2}\n"
    )
    story = read_story(run.run(str(recipe)))
    assert [(m.client, m.refused) for m in story.missing] == [("north", False)]
    assert "status 9" in story.missing[0].reason
    assert sorted(r.client for r in story.replies) == ["south", "west"]


def test_little_room_for_files_in_memory_is_no_reason_to_stop(monkeypatch):
    ours, theirs = multiprocessing.Pipe()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    made = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir=None: made(dir=dir) if dir is None else pytest.fail(dir))
    message = messages.pack_broadcast(example())
    send(ours, message)
    assert bytes(receive(theirs)) == b"".join(message)


def test_a_worker_that_cannot_take_a_task_is_an_error_and_not_a_wait(monkeypatch):
    ours, _ = multiprocessing.Pipe()

    def full(dir=None):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="no space"):
        Worker(None, ours).give(Task("train", "north", "plan", example(), key=7))


@pytest.mark.parametrize(
    "changes",
    [{"task": ["train:4:north"]}, {"round": "4"}, {"weights": [1.0]}, {"metrics": {"loss": "low"}}, {"seconds": None}],
    ids=str,
)
def test_a_field_of_another_type_is_a_value_error(changes):
    reply = Reply("train:4:north", "north", "plan", 4)
    with pytest.raises(ValueError, match="valid"):
        messages.unpack_event(joined(messages.pack_event(replace(reply, **changes))))


def joined(message: list[Buffer]) -> bytearray:
    return bytearray(b"".join(message))


def example() -> Broadcast:
    payload = Payload({"w": torch.randn(3, 2)}, ({"w#at": torch.arange(3)}, {}))
    return Broadcast(
        4, {"update": payload, "control": Payload({"c": torch.ones(1)}, ())}, {"before": {"w": torch.ones(2)}}
    )


def test_messages_carry_everything_both_ways():
    sent = example()
    fixed = messages.unpack_fixed(joined(messages.pack_fixed(sent.fixed)))
    again = messages.unpack_broadcast(joined(messages.pack_broadcast(sent)), fixed)
    assert again.round == 4
    assert again.fixed.keys() == {"before"}
    assert equal(again.fixed["before"], sent.fixed["before"])
    assert all(equal(again.payloads[s].main, sent.payloads[s].main) for s in sent.payloads)
    assert [len(again.payloads[s].sides) for s in ("update", "control")] == [2, 0]
    task = Task("train", "north", "plan", sent, key=7, sent=1.5, acknowledged="train:3:north", data={"samples": 4})
    assert messages.unpack_task(joined(messages.pack_task(task)), sent) == task
    reply = Reply(
        task.id, "north", "plan", 4, sent.payloads, {"all": 3.0}, {"loss": 0.5}, keeps_state=True, seconds=0.1
    )
    back = messages.unpack_event(joined(messages.pack_event(reply)))
    assert isinstance(back, Reply)
    assert {f: getattr(back, f) for f in ("task", "weights", "metrics", "keeps_state")} == {
        f: getattr(reply, f) for f in ("task", "weights", "metrics", "keeps_state")
    }
    assert equal(back.payloads["update"].main, reply.payloads["update"].main)
    gone = Dropped("north", task.id, "why")
    assert messages.unpack_event(joined(messages.pack_event(gone))) == gone


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"no message at all"])
def test_bytes_that_are_no_message_are_a_value_error(data):
    with pytest.raises(ValueError, match="not a message"):
        messages.unpack_event(data)


def test_a_task_goes_with_its_own_broadcast():
    task = Task("train", "north", "plan", example(), key=7)
    with pytest.raises(ValueError, match="round 4"):
        messages.unpack_task(joined(messages.pack_task(task)), Broadcast(5, {}))
