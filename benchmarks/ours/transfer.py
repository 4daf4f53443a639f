"""The two ends of one large update: a site that has it in memory, and an operator that adds it to a total.

    python -m benchmarks.ours.transfer site ADDRESS KEYS STATE TENSORS BYTES
    python -m benchmarks.ours.transfer operator ADDRESS KEYS TENSORS BYTES

Both use what `atoll join` and `atoll run` use; only the work is left out that would make the update. As a site does, this
one notes in its audit log what leaves.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atoll import messages
from atoll.aggregate.base import ALL
from atoll.aggregate.mean import mean
from atoll.audit import AuditLog
from atoll.cache import home
from atoll.exchange import Broadcast, Reply, Task
from atoll.fleet.flower import quiet
from atoll.params import Params
from atoll.stream import UPDATE
from atoll.talk import envelope, opened
from atoll.transforms.chain import Chain, Payload
from atoll.wire import Buffer
from benchmarks.worker import peak_rss_bytes, rss_bytes

SITE, PLAN, RUN = "site-0", "transfer", "0"


def random_update(tensors: int, size: int) -> Params:
    """`size` bytes of noise in float32: chunks that are equal would travel once."""
    return {f"layer-{i:02}": torch.randn(size // tensors // 4) for i in range(tensors)}


def site(address: str, keys: Path, state: Path, update: Params) -> None:
    """Answers each task with the update, until it is told to end."""
    from atoll.fleet.flower.node import SuperNode

    state.mkdir()
    node, audit = SuperNode(address, keys / "site.key", keys / "ca.pem", state, print), AuditLog(state / "audit.jsonl")

    def urgent(message: Sequence[Buffer]) -> list[list[Buffer]] | None:
        return [envelope("working")] if opened(message)["kind"] == "ask" else None

    def answer(message: Sequence[Buffer]) -> list[list[Buffer]]:
        task = messages.task_id(message[2])
        event = messages.pack_event(Reply(task, SITE, PLAN, 0, {UPDATE: Payload(update, ())}, {ALL: 1.0}))
        audit.wrote(RUN, PLAN, task, event)
        return [envelope("event"), event]

    signal.signal(signal.SIGTERM, lambda *_: node.over.set())
    node.join(patience=60.0)
    print("ready", flush=True)
    node.serve(urgent, answer)


def operator(address: str, keys: Path, update: Params, size: int) -> dict[str, float]:
    """Asks for the update and adds it to a total: MB/s from the question to the sum, and memory beyond both."""
    from atoll.fleet.flower.federation import Federation
    from atoll.fleet.flower.tasks import Flower

    federation, aggregate = Federation(address, keys), mean()
    fleet = Flower(federation, [SITE], RUN, PLAN)
    total = aggregate.init(update)
    for name in list(update):
        total[name].add_(update.pop(name))  # memory that was only promised does not count yet
    task = Task("train", SITE, PLAN, Broadcast(0, {}), key=0)
    try:
        assert SITE in fleet.clients()  # connects, for which Flower is imported
        before, started = rss_bytes(), time.perf_counter()
        fleet.submit([task])
        federation.limit(2 * size)  # an answer is held to the size of the broadcast, of which there is none here
        reply = fleet.receive([task.id])
        assert isinstance(reply, Reply), reply
        assert not reply.refusal, reply.refusal
        aggregate.add(total, Chain().decode_reply(reply.payloads[UPDATE]), reply.weights)
        seconds = time.perf_counter() - started
    finally:
        federation.close()
    extra = peak_rss_bytes() - before - reply.nbytes
    return {"mb_per_s": reply.nbytes / seconds / 1e6, "seconds": seconds, "operator_extra_mb": extra / 1e6}


def main(end: str, address: str, keys: str, *more: str) -> None:
    """One of the two ends."""
    quiet(home() / "flower")
    tensors, size = map(int, more[-2:])
    update = random_update(tensors, size)
    if end == "site":
        site(address, Path(keys), Path(more[0]), update)
    else:
        print(json.dumps(operator(address, Path(keys), update, size)))


if __name__ == "__main__":
    main(*sys.argv[1:])
