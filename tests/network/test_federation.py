"""The same recipe over a network, and who is let in."""

from __future__ import annotations

import datetime
import json
import shutil
import time

import pytest
from machines import Federation, free_port, wait_until

from atoll.fleet.flower import certs
from atoll.params import equal
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.record.story import read_story
from atoll.stream import UPDATE

pytestmark = pytest.mark.network


def result(federation, name):
    return RunFolder(federation.folder / "runs" / name)


def test_the_sites_give_what_one_process_gives(federation):
    done = federation.run("run", "mine.yaml", "--fleet", federation.address, "--set", "fleet.ordered=true")
    assert done.returncode == 0, done.stderr
    alone = federation.run("run", "mine.yaml", "--set", "name=alone")
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (load_state(result(federation, n).checkpoint).params[UPDATE] for n in ("net-1", "alone-1"))
    assert equal(ours, theirs)
    assert any(float(x.abs().max()) > 1e-3 for n, x in theirs.items() if "lora_B" in n), "something was learned"
    heard, simulated = (read_story(result(federation, n)) for n in ("net-1", "alone-1"))
    assert heard.final.mean == simulated.final.mean
    assert heard.started.samples == simulated.started.samples
    assert [r.bytes_up for r in heard.rounds] == [r.bytes_up for r in simulated.rounds]
    everything_that_left_is_in_the_audit_log(federation)


def everything_that_left_is_in_the_audit_log(federation):
    shown = federation.run("audit", "show", "state/north/audit.jsonl", "--json")
    lines = json.loads(shown.stdout)
    assert [line["task"].split(":")[0] for line in lines] == ["evaluate", *["train"] * 3, "evaluate"]
    assert sum(line["bytes"] for line in lines) > 3 * 30_000
    verified = federation.run("audit", "verify", "state/north/audit.jsonl", "--json")
    assert json.loads(verified.stdout)["lines"] == 5


def test_who_is_there(federation):
    listed = json.loads(federation.run("clients", federation.address, "--json").stdout)
    assert [(one["name"], one["status"], one["said"]["records"]) for one in listed] == [
        (name, "online", 40) for name in ("north", "south", "west")
    ]


def test_a_site_that_is_not_enrolled_is_not_let_in(federation):
    certs.site_key(federation.folder / "stranger" / "site.key")
    certs.write(federation.folder / "stranger" / "ca.pem", (federation.folder / "certs/ca/ca.pem").read_bytes())
    told = federation.run(
        "join", federation.address, "--data", "data/north.jsonl", "--certs", "stranger", "--state", "state/stranger"
    )
    assert told.returncode == 1
    assert "does not let this site in" in told.stderr
    assert "enrolled" in told.stderr


def test_a_second_process_with_the_same_key_is_not_let_in_and_the_first_goes_on(federation):
    own = ("--data", "data/north.jsonl", "--certs", "certs/sites/north")
    told = federation.run("join", federation.address, *own, "--state", "state/second")
    assert told.returncode == 1
    assert "only one process may use it" in told.stderr
    same = federation.run("join", federation.address, *own, "--state", "state/north")
    assert "joined already, in another process" in same.stderr
    listed = json.loads(federation.run("clients", federation.address, "--json").stdout)
    assert listed[0]["status"] == "online"


def test_a_site_without_data_does_not_join_and_leaves_nothing_behind(federation):
    told = federation.run(
        "join", federation.address, "--data", "nope", "--certs", "certs/sites/north", "--state", "never"
    )
    assert told.returncode == 1
    assert "no such file or folder" in told.stderr
    assert not (federation.folder / "never").exists()


def test_an_operator_with_another_token_starts_nothing(federation, tmp_path):
    certs.write_private(tmp_path / "operator.token", b"guessed")
    certs.write(tmp_path / "ca.pem", (federation.folder / "certs/ca/ca.pem").read_bytes())
    told = federation.run("run", "mine.yaml", "--fleet", federation.address, "--certs", str(tmp_path))
    assert told.returncode == 1
    assert "does not accept this operator's token" in told.stderr


def test_a_server_of_another_authority_is_not_trusted(federation, tmp_path):
    certs.init(tmp_path / "certs", ["localhost"])
    told = federation.run("clients", federation.address, "--certs", str(tmp_path / "certs" / "operator"))
    assert told.returncode == 1
    assert "certificate does not fit" in told.stderr


def test_a_plan_that_a_policy_forbids_is_refused_at_both_ends(federation):
    (federation.folder / "policy.yaml").write_text("spaces: [full]\nminimum_cohort: 5\nmodels: [smollm2-*]\n")
    federation.stop("west")
    federation.join("west", "--policy", "policy.yaml")
    done = federation.run("run", "mine.yaml", "--fleet", federation.address, "--set", "name=refused")
    assert done.returncode == 0, done.stderr
    for said in (federation.said("west"), done.stderr):
        assert "the site's policy does not allow" in said
        assert "models tiny:llama; this site allows smollm2-*" in said
        assert "spaces lora; this site allows full" in said
    story = read_story(result(federation, "refused-1"))
    assert sorted({reply.client for reply in story.replies}) == ["north", "south"]


def test_a_site_that_is_revoked_is_turned_away_at_once(federation):
    (federation.folder / "certs/server/clients/south.pub").unlink()
    wait_until(lambda: "south is no longer let in" in federation.said("server"), "the revocation")
    wait_until(lambda: "is away" in federation.said("south"), "south to notice")
    listed = json.loads(federation.run("clients", federation.address, "--json").stdout)
    assert [one["name"] for one in listed if one["status"] == "online"] == ["north", "west"]


def test_nothing_of_the_keys_is_in_logs_records_or_what_left(federation):
    token = (federation.folder / "certs/operator/operator.token").read_text()
    files = [p for p in federation.folder.rglob("*") if p.is_file() and "certs" not in p.parts]
    assert len(files) > 10
    assert not [p for p in files if token.encode() in p.read_bytes()]
    assert not [p for p in files if b"PRIVATE KEY" in p.read_bytes() and p.name != "site.key"]


def test_nothing_is_written_but_in_the_folders_that_were_named(federation):
    assert not list((federation.folder / "home").rglob("*"))
    left = {path.name for path in federation.folder.iterdir() if path.suffix not in (".log", ".yaml")}
    # which of them are there is decided by what was run before
    assert left <= {"cache", "certs", "data", "home", "runs", "state", "stranger"}
    assert {"certs", "data", "state"} <= left


def test_without_tls_it_stays_on_this_machine(bare, tmp_path):
    shutil.copytree(bare.folder / "certs", tmp_path / "certs")
    shutil.copytree(bare.folder / "data", tmp_path / "data")
    (tmp_path / "mine.yaml").write_text((bare.folder / "mine.yaml").read_text())
    open_one = Federation(tmp_path, free_port())
    try:
        told = open_one.run("server", "--listen", "0.0.0.0:8000", "--insecure", "--certs", "certs/server")
        assert told.returncode == 1
        assert "without TLS others could read" in told.stderr
        told = open_one.run("run", "mine.yaml", "--fleet", "server.example:8000", "--insecure")
        assert "without TLS others could read" in told.stderr
        open_one.serve("--insecure")
        open_one.join("north", "--insecure")
        stranger = open_one.run("clients", open_one.address, "--insecure", "--certs", "nowhere")
        assert "operator's token" in stranger.stderr, "keys and tokens are asked for all the same"
        done = open_one.run("run", "mine.yaml", "--fleet", open_one.address, "--insecure")
        assert done.returncode == 0, done.stderr
    finally:
        open_one.close()


def test_leaving_is_clean(federation):
    assert federation.stop("north") == 0
    assert federation.stop("server") == 0


def test_a_server_of_another_name_than_its_machines_own_enrolls_its_sites(tmp_path):
    certs.init(tmp_path / "certs", ["server.example"])
    certs.site(tmp_path / "certs", "north")
    named = Federation(tmp_path, free_port())
    try:
        named.serve()
        told = named.run("clients", named.address)
    finally:
        named.close()
    assert told.returncode == 1
    assert "certificate does not fit" in told.stderr


def test_an_expired_certificate_is_named(bare, tmp_path):
    shutil.copytree(bare.folder / "certs", tmp_path / "certs")
    certs.server(tmp_path / "certs", ["localhost", "127.0.0.1"], valid=-datetime.timedelta(days=1))
    expired = Federation(tmp_path, free_port())
    try:
        expired.start("server", "server", "--listen", expired.address, "--certs", "certs/server")
        time.sleep(4)
        told = expired.run("clients", expired.address)
    finally:
        expired.close()
    assert told.returncode == 1
    assert "expired" in told.stderr
