"""The four sites that prefer other answers: pairs by stated rules, unlike enough for a classifier to tell them apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import log
from pathlib import Path

import pytest

from atoll.data.prepared_preferences import HELD_OUT, LONGEST, SERVER, SHARED, preference_sites

SITES = ("clinic", "desk", "museum", "school")
Pair = dict[str, str]


@pytest.fixture(scope="module")
def folder() -> Path:
    return preference_sites()


def pairs(folder: Path, site: str, split: str) -> list[Pair]:
    return [json.loads(line) for line in (folder / site / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.real
def test_every_site_holds_out_whole_prompts(folder: Path) -> None:
    for site in SITES:
        train, test = (pairs(folder, site, split) for split in ("train", "test"))
        assert len(test) == HELD_OUT
        assert len(train) > 200
        assert not {one["prompt"] for one in train} & {one["prompt"] for one in test}
        assert all(one["chosen"] != one["rejected"] for one in train + test)
        assert max(len(text) for one in train + test for text in one.values()) <= LONGEST
    asked = [{one["prompt"] for one in pairs(folder, site, "train")} for site in ("desk", "school")]
    assert not asked[0] & asked[1], "they contradict each other on other questions of the same kind"


@pytest.mark.real
def test_a_server_has_questions_that_no_site_has(folder: Path) -> None:
    shared = preference_sites(server=True)
    asked = {one["prompt"] for one in pairs(shared, SERVER, "train")}
    assert len(asked) == SHARED * len(SITES)
    for site in SITES:
        mine = [one["prompt"] for one in pairs(shared, site, "train")]
        assert not asked & {*mine, *(one["prompt"] for one in pairs(shared, site, "test"))}
        assert len(mine) == len(pairs(folder, site, "train")) - SHARED
        assert pairs(shared, site, "test") == pairs(folder, site, "test")


@pytest.mark.real
def test_the_rules_are_those_that_are_stated(folder: Path) -> None:
    for one in pairs(folder, "desk", "test"):
        assert one["rejected"] == f'The answer to the question "{one["prompt"]}" is {one["chosen"]}.'
    for one in pairs(folder, "school", "test"):
        assert one["chosen"] == f'The answer to the question "{one["prompt"]}" is {one["rejected"]}.'
    helps = Counter(one["chosen"] for one in pairs(folder, "clinic", "train"))
    assert len(helps) == 8
    assert min(helps.values()) > 50, "as many refusals as consents, of every wording"


@pytest.mark.real
def test_a_classifier_tells_the_sites_apart_by_what_they_prefer(folder: Path) -> None:
    """Naive Bayes over the words of both answers, marked by their side, without the prompt."""
    seen = {site: Counter(w for one in pairs(folder, site, "train") for w in words(one)) for site in SITES}
    vocabulary = len(set().union(*seen.values()))
    right = total = 0
    for site in SITES:
        for one in pairs(folder, site, "test"):
            right += max(SITES, key=lambda other: likelihood(one, seen[other], vocabulary)) == site
            total += 1
    assert right / total > 0.95


def words(one: Pair) -> list[str]:
    return [f"{side}:{word}" for side in ("chosen", "rejected") for word in re.findall(r"\w+", one[side].lower())]


def likelihood(one: Pair, seen: Counter[str], vocabulary: int) -> float:
    return sum(log((seen[word] + 1) / (seen.total() + vocabulary)) for word in words(one))
