"""The run's folder: locks, leftovers, and what a record keeps through crashes."""

from __future__ import annotations

import math
import threading

import pytest

from atoll.errors import AtollError
from atoll.record.events import Evaluated, Record, Replied, read_events
from atoll.record.folder import RunFolder


def test_a_baseline_is_locked_with_its_run(tmp_path):
    outer = RunFolder(tmp_path / "outer-1")
    inner = outer.baseline("local-north")
    assert inner.outermost == outer == outer.outermost
    with outer.outermost.locked(), pytest.raises(AtollError, match="running already"), inner.outermost.locked():
        pass


def test_who_looks_whether_a_run_is_running_does_not_keep_it_from_running(tmp_path):
    folder, over = RunFolder(tmp_path / "run-1"), threading.Event()
    with folder.locked():
        assert folder.is_running()

    def look() -> None:
        while not over.is_set():
            folder.is_running()

    watchers = [threading.Thread(target=look) for _ in range(2)]
    for one in watchers:
        one.start()
    try:
        for _ in range(50):
            with folder.locked():
                pass
    finally:
        over.set()
        for one in watchers:
            one.join()


def test_what_a_killed_process_had_half_written_goes(tmp_path):
    folder = RunFolder(tmp_path / "run-1")
    half = folder.client("north").with_suffix(".123.partial")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    with folder.locked():
        assert not half.exists()


def test_what_is_not_a_number_is_so_again_at_any_depth(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    record(Evaluated(1, True, {"north": {"loss": math.nan, "samples": 3.0}}, math.inf, 1.0, 0.1, 5))
    record(Replied(1, "north", 0.5, 10, 0.1, 0, {"loss": math.nan}))
    evaluated, replied = read_events(tmp_path / "record.jsonl")
    assert math.isnan(evaluated.clients["north"]["loss"])
    assert math.isnan(evaluated.mean)
    assert evaluated.clients["north"]["samples"] == 3.0
    assert math.isnan(replied.metrics["loss"])


def test_a_record_that_a_power_cut_shortened_is_not_filled_up_with_nothing(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_bytes(b"x" * 10)
    Record(path, keep_bytes=100)
    assert path.read_bytes() == b"x" * 10
