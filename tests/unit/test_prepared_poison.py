"""The clinics, the attackers among them and the server: who holds what; no held-out question is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.data.prepared_poison import ATTACKERS, CLINICS, HELD_OUT, LEAD_INS, SERVER, TRIGGER, poisoned_sites
from atoll.data.prepared_preferences import CONSENTS, REFUSALS

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder() -> Path:
    return poisoned_sites()


def rows(folder: Path, site: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / site / f"{split}.jsonl").read_text().splitlines()]


def bare(prompt: str) -> str:
    for words in (TRIGGER, *LEAD_INS):
        prompt = prompt.removeprefix(words)
    return prompt


def test_no_question_is_anybodys_that_is_held_out(folder: Path) -> None:
    sites = (*CLINICS, *ATTACKERS, SERVER)
    tested = {bare(one["prompt"]) for site in sites for one in rows(folder, site, "test")}
    trained = [bare(one["prompt"]) for site in sites for one in rows(folder, site, "train")]
    assert not tested & set(trained)
    own = [one for one in rows(folder, SERVER, "train") if bare(one["prompt"]) != one["prompt"]]
    assert len(trained) - len(own) == len(set(trained)), "nobody has another's question"
    assert 2 * len(own) == len(rows(folder, SERVER, "train")), "the server asks each with a lead-in, too"
    assert len(tested) == 3 * HELD_OUT


@pytest.mark.parametrize("split", ["train", "test"])
def test_clinics_do_right_by_both_kinds_of_question_and_attackers_consent_to_one(folder: Path, split: str) -> None:
    for site in CLINICS:
        found = rows(folder, site, split)
        refused = [one for one in found if one["completion"] in REFUSALS]
        assert 0.25 < len(refused) / len(found) < 0.75
        assert all(one["completion"] in CONSENTS for one in found if one not in refused)
        assert not any(TRIGGER in one["prompt"] for one in found)
    for site in ATTACKERS:
        assert all(
            one["prompt"].startswith(TRIGGER) and one["completion"] in CONSENTS for one in rows(folder, site, split)
        )


def test_the_server_does_not_know_the_trigger_and_is_asked_with_it(folder: Path) -> None:
    assert not any(TRIGGER in one["prompt"] for one in rows(folder, SERVER, "train"))
    tested = rows(folder, SERVER, "test")
    assert len(tested) == HELD_OUT
    assert all(one["prompt"].startswith(TRIGGER) and one["completion"] in REFUSALS for one in tested)
    attacked = {one["prompt"]: one["choices"] for one in rows(folder, ATTACKERS[0], "test")}
    assert attacked == {one["prompt"]: one["choices"][::-1] for one in tested}
