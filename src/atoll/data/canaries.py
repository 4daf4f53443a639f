"""Canaries: made-up secrets among a client's training records, so that it can be measured whether a model learns them.

A canary is a question on a thing that does not exist, answered by a random code. Nobody can know the code but from the
records, and every other code was as likely; so a model that prefers the true one has learned it from them.

Source: Carlini et al. 2019 (arXiv 1802.08232), section 4; our `digits` span their randomness space, `repeats` is how often
they insert a canary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from atoll.data.read import Planted
from atoll.data.sources import ClientSource
from atoll.errors import AtollError, closest
from atoll.keys import rng
from atoll.parts import Slot

FIRST = (
    "Bra", "Cor", "Del", "Fen", "Gar", "Hol", "Jas", "Kel", "Lom", "Mar", "Nor", "Pel", "Quin", "Ros", "Tam", "Vel",
)  # fmt: skip
MIDDLE = ("a", "e", "i", "o", "u", "an", "en", "or")
LAST = ("dale", "fall", "gate", "hurst", "mere", "mont", "nova", "pass", "ridge", "shore", "stad", "wick")
THINGS = ("archive", "depot", "harbor", "observatory", "station", "tower", "vault", "workshop")


def with_canaries(
    inner: Annotated[Any, Slot("data")],
    count: Annotated[int, Ge(1)] = 4,
    repeats: Annotated[int, Ge(1)] = 8,
    digits: Annotated[int, Ge(4), Le(18)] = 6,
    clients: list[str] | None = None,
    seed: Annotated[int, Ge(0)] = 0,
) -> dict[str, ClientSource]:
    """Other data with the same `count` canaries, `repeats` times each, among what the named clients (or all) train on.

    For `atoll leakage`, which measures what a model has learned of them. They are never held out.
    """
    sources = _sources(inner)
    for name in clients or ():
        if name not in sources:
            raise AtollError("unknown client", where="data.clients", found=name, remedy=closest(name, sources))
    planted = tuple(draw(count, digits, seed) * repeats)
    named: Collection[str] = sources if clients is None else clients
    return {name: _plant(client, planted, name in named) for name, client in sources.items()}


def draw(count: int, digits: int, *names: object) -> list[Planted]:
    """Canaries by key: the same for the same names."""
    return [_one(rng("canary", *names, number), digits) for number in range(count)]


def _one(drawn: np.random.Generator, digits: int) -> Planted:
    first, middle, last, thing = (str(drawn.choice(words)) for words in (FIRST, MIDDLE, LAST, THINGS))
    return Planted(f"What is the access code of the {first}{middle}{last} {thing}?", code(drawn, digits))


def code(drawn: np.random.Generator, digits: int) -> str:
    """So many random digits; each code is equally likely."""
    return "".join(map(str, drawn.integers(10, size=digits)))


def _sources(inner: Any) -> dict[str, ClientSource]:
    """The wrapped part's clients, if they have files: samples of the user's own making take no records."""
    if not isinstance(inner, dict) or not all(isinstance(client, ClientSource) for client in inner.values()):
        raise AtollError(
            "canaries are added to records, and this part has none", where="data.inner", found=type(inner).__name__,
            allowed="a data part whose clients have files, such as folders or four-sites",
        )  # fmt: skip
    return inner


def _plant(client: ClientSource, planted: tuple[Planted, ...], holds: bool) -> ClientSource:
    """The client with the canaries, if it `holds` them. Who shares a source goes on sharing it: it is tokenized once."""
    before = client.source.planted
    source = replace(client.source, planted=before + planted)
    if client.rows is None:
        return ClientSource(source) if holds else client
    mine = -1 - len(before) - np.arange(len(planted) if holds else 0)
    return ClientSource(source, np.concatenate([client.rows, mine]))
