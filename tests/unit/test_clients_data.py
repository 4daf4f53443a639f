"""What is wrong with the clients' data is told of all of them, before a model is loaded; what has changed, at a resume."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import atoll as package
from atoll.data.formats import EMPTY_TEXT, NO_ANSWER
from atoll.data.read import open_source
from atoll.data.sources import ClientData, ClientSource, check, digest
from atoll.data.tokenize import prepare
from atoll.errors import AtollError
from atoll.models.tiny import byte_tokenizer
from atoll.record.events import EVERYBODY, RecordsLeftOut, RoundEnded, RunStarted, read_events
from atoll.record.folder import RunFolder
from support import Atoll


def record(number: int, **more: Any) -> bytes:
    return json.dumps({"prompt": f"Why {number}?", "completion": f"Since {number}.", **more}).encode() + b"\n"


GOOD = b"".join(map(record, range(20)))
LATIN = record(1) + '{"prompt": "Größe?", "completion": "x"}\n'.encode("latin-1")
COLUMNS = json.dumps({"question": "x", "answer": "y"}).encode() + b"\n"


def folder_of(root: Path, **clients: bytes) -> Path:
    root.mkdir()
    for name, content in clients.items():
        (root / f"{name}.jsonl").write_bytes(content)
    return root


@pytest.fixture
def mine(tmp_path: Path, sites: Path) -> Path:
    """A copy of the three sites that a test may change."""
    return Path(shutil.copytree(sites, tmp_path / "mine"))


# Before the model is loaded.


@pytest.mark.parametrize("command", ["plan", "run"])
def test_bad_clients_are_named_all_at_once_before_a_model_is_loaded(
    atoll: Atoll, tiny: str, tmp_path: Path, command: str
) -> None:
    data = folder_of(tmp_path / "data", good=GOOD, latin=LATIN, columns=COLUMNS, broken=record(1) + b'{"prompt": \n')
    said = atoll(command, tiny, "--set", f"data.path={data}")
    assert said.status == 1
    assert "the data of 3 clients cannot be read" in said.err
    for told in ("broken.jsonl:2", "columns.jsonl:1", "latin.jsonl:2, byte offset", "iconv"):
        assert told in said.err
    assert "good.jsonl" not in said.err
    assert "loading" not in said.err
    assert not list((tmp_path / "runs").glob("*"))


def test_one_bad_client_keeps_its_own_message(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    said = atoll("plan", tiny, "--set", f"data.path={folder_of(tmp_path / 'data', good=GOOD, latin=LATIN)}")
    assert "the file is not UTF-8" in said.err
    assert "latin.jsonl:2" in said.err


def test_plain_text_for_an_objective_of_answers_is_found_early(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", notes=json.dumps({"text": "x"}).encode())
    assert "plain text has no answers" in atoll("plan", tiny, "--set", f"data.path={data}").err
    said = atoll("plan", tiny, "--set", f"data.path={data}", "--set", "finetune.objective=causal-lm")
    assert said.status == 0


def test_what_is_broken_late_in_files_is_told_of_all_clients_too(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    late = b"".join(map(record, range(150))) + b"no json\n"
    said = atoll("run", tiny, "--set", f"data.path={folder_of(tmp_path / 'data', good=GOOD, one=late, two=late)}")
    assert "the data of 2 clients cannot be read" in said.err
    assert "one.jsonl:151" in said.err
    assert "two.jsonl:151" in said.err


def test_a_shared_source_is_checked_once(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "data", one=LATIN, two=LATIN))
    with pytest.raises(AtollError, match="the file is not UTF-8"):
        check({name: ClientSource(source, np.arange(2)) for name in "abc"}, "sft", ())


def test_empty_files_and_folders_are_left_out(atoll: Atoll, tiny: str, mine: Path) -> None:
    (mine / "blank.jsonl").touch()
    (mine / "hollow").mkdir()
    said = atoll("run", tiny, "--set", f"data.path={mine}", "--set", "finetune.rounds=1", "--json")
    assert said.status == 0, said.err
    assert json.loads(said.out)["left_out"] == {"blank": "no records", "hollow": "no records"}
    assert "hollow is left out, it has no usable data: no records" in said.err


def test_no_records_to_deal_out(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", blank=b"")
    said = atoll("plan", tiny, "--set", f"data={{use: partitioned, path: {data}, partition: {{use: iid, clients: 2}}}}")
    assert "there are no records to deal out" in said.err


# Who has nothing to train on.


def test_all_clients_without_usable_data_are_named(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", one=record(1, completion=""), two=b"", three=record(1, completion=" "))
    said = atoll("run", tiny, "--set", f"data.path={data}")
    lines = said.err[said.err.index("no client has usable data") :].splitlines()
    assert [line.split() for line in lines[1:4]] == [["where:", "one"], ["three"], ["two"]]
    assert "one.jsonl:1" in lines[4]
    assert "three.jsonl:1" in lines[5]
    assert lines[6].strip() == "no records"
    assert {len(line) - len(line.lstrip()) for line in (*lines[2:4], *lines[5:7])} == {11}


def test_nothing_but_held_out_samples_is_blamed_on_the_share(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", one=GOOD)
    said = atoll("run", tiny, "--set", f"data={{use: folders, path: {data}, held_out: 0.999}}")
    assert "all its samples, 20, are held out: lower data.held_out" in said.err
    assert "records kept" not in said.err


# What became of records.


def test_records_left_out_are_in_the_record_the_card_and_what_is_shown(atoll: Atoll, tiny: str, mine: Path) -> None:
    with (mine / "north.jsonl").open("ab") as file:
        file.write(record(1, completion="") + record(2, prompt=" ") + record(3, completion=" "))
    said = atoll("run", tiny, "--set", f"data.path={mine}", "--set", "finetune.rounds=1", "--set", "baselines=[pooled]")
    assert said.err.count("of 43 records used") == 1
    assert "north: 40 of 43 records used: 2 no answer, first at north.jsonl:41; 1 no prompt" in said.err
    (event,) = (e for e in read_events(RunFolder(Path("runs/tiny-1")).record) if isinstance(e, RecordsLeftOut))
    assert (event.client, event.read, event.kept) == ("north", 43, 40)
    assert event.reasons == {NO_ANSWER: [2, "north.jsonl:41"], "no prompt": [1, "north.jsonl:42"]}
    for command in ("show", "card"):
        assert "north: 40 of 43 records used: 2 no answer, first at north.jsonl:41" in atoll(command).out
    assert json.loads(atoll("show", "--json").out)["records_left_out"]["north"]["read"] == 43


def test_a_shared_source_tells_once_what_it_left_out(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    texts = b"".join(json.dumps({"text": f"Note number {i} is here."}).encode() + b"\n" for i in range(40))
    data = folder_of(tmp_path / "data", notes=texts + b'{"text": ""}\n')
    partition = f"data={{use: partitioned, path: {data}, partition: {{use: iid, clients: 3}}, held_out: 0.25}}"
    said = atoll("run", tiny, "--set", partition, "--set", "finetune.rounds=1", "--set", "finetune.objective=causal-lm")
    assert said.status == 0, said.err
    events = read_events(RunFolder(Path("runs/tiny-1")).record)
    assert [(e.client, list(e.reasons)) for e in events if isinstance(e, RecordsLeftOut)] == [(EVERYBODY, [EMPTY_TEXT])]


# What has changed since the run began.


@pytest.fixture
def stopped(atoll: Atoll, tiny: str, mine: Path) -> RunFolder:
    """A run of the copied sites that was interrupted after its first of two rounds."""

    def impatient(event: object) -> None:
        if isinstance(event, RoundEnded) and event.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package.run(tiny, [f"data.path={mine}", "baselines=[local]"], sinks=[impatient])
    return RunFolder(Path("runs/tiny-1"))


def more(mine: Path) -> None:
    with (mine / "south.jsonl").open("ab") as file:
        file.write(record(1))


CHANGES = {
    "south: holds other records": more,
    "south: is no longer there": lambda mine: (mine / "south.jsonl").unlink(),
    "east: was not there": lambda mine: (mine / "east.jsonl").write_bytes(GOOD),
}


@pytest.mark.parametrize("told", CHANGES)
def test_resume_refuses_changed_data_and_names_the_client(
    atoll: Atoll, stopped: RunFolder, mine: Path, told: str
) -> None:
    before = stopped.checkpoint.read_bytes(), stopped.record.read_bytes()
    CHANGES[told](mine)
    said = atoll("resume", "tiny-1")
    assert said.status == 1
    assert "the clients' data have changed since the run began" in said.err
    assert told in said.err
    assert "north" not in said.err.partition("found:")[2]
    assert (stopped.checkpoint.read_bytes(), stopped.record.read_bytes()) == before


def test_resume_goes_on_with_the_same_bytes_under_another_date(atoll: Atoll, stopped: RunFolder, mine: Path) -> None:
    for file in mine.iterdir():
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    assert atoll("resume", "tiny-1").status == 0


def test_what_a_client_holds_by_content(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "data", one=GOOD))
    shares = [ClientSource(source, np.arange(3)), ClientSource(source, np.arange(4)), ClientSource(source)]
    assert len({digest(share) for share in shares}) == 3
    assert digest(ClientData([1, 2], [3])) == "2 + 1"


# A damaged record.


def test_a_damaged_line_is_named_before_anything_goes_on(atoll: Atoll, stopped: RunFolder) -> None:
    lines = stopped.record.read_bytes().splitlines(keepends=True)
    stopped.record.write_bytes(b"".join([lines[0], b"\0" * 9 + b"\n", *lines[2:]]))
    with pytest.raises(AtollError, match="a line of the record is damaged") as told:
        list(read_events(stopped.record))
    assert told.value.details["where"] == f"{stopped.record}:2"
    for command in ("resume", "show"):
        said = atoll(command, "tiny-1")
        assert said.status == 1
        assert "runs/tiny-1/record.jsonl:2" in said.err
    assert [run["state"] for run in json.loads(atoll("runs", "--json").out)] == ["damaged"]


def test_a_record_that_lost_its_end_is_not_gone_on_with(atoll: Atoll, stopped: RunFolder) -> None:
    lines = stopped.record.read_bytes().splitlines(keepends=True)
    stopped.record.write_bytes(b"".join(lines[:2]))
    assert "the record is shorter than when the run left it" in atoll("resume", "tiny-1").err


def test_an_event_of_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text('{"event": "Unheard", "time": 1}\n{"event": "RunEnded", "time": 1}\n')
    with pytest.raises(AtollError, match="a line of the record is damaged"):
        list(read_events(path))


def test_the_record_says_what_the_run_was_made_from(finished: Path) -> None:
    started = next(iter(read_events(RunFolder(finished).record)))
    assert isinstance(started, RunStarted)
    assert started.recipe["model"] == "tiny:llama"
    assert started.recipe["finetune"]["rounds"] == 2
    assert {n: started.samples[n] + started.held_out[n] for n in started.samples} == dict.fromkeys(started.samples, 40)


# Privacy.


def test_nobody_else_reads_cached_tokens(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", one=GOOD)
    prepare(data, byte_tokenizer(), 256, cache_root=tmp_path / "cache")
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert modes == {0o700, 0o600}
