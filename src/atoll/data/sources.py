"""Where the clients' data come from: what a recipe says under `data`.

Each factory names the clients and finds their files, and reads no record yet: a plan is refused for a missing folder
before anything is loaded. `load` then tokenizes (or maps from the cache) what the run needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Lt

from atoll.cache import home
from atoll.data.partition import Ints, Partition
from atoll.data.read import Report, Source, column, open_source
from atoll.errors import AtollError
from atoll.parts import Slot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labels = Literal["sft", "causal_lm"]
Share = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class ClientSource:
    """A client's files; in a simulation by partition, the rows of a shared source that are this client's."""

    source: Source
    rows: Ints | None = None


class ClientData(NamedTuple):
    """A client's samples: to train on, and held out."""

    train: Sequence[Any]
    test: Sequence[Any]


def folders(path: str, held_out: Share = 0.1) -> dict[str, ClientSource]:
    """One client for each subfolder or data file of `path`, named by it."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise AtollError("there is no such folder", where="data.path", found=path, remedy="one subfolder a client")
    found = sorted(p for p in root.iterdir() if not p.name.startswith((".", "_")) and (p.is_dir() or _is_data(p)))
    if not found:
        raise AtollError("the folder holds no clients", where=str(root), remedy="one subfolder or data file a client")
    return {p.stem if p.is_file() else p.name: ClientSource(open_source(p, held_out)) for p in found}


def clients(paths: dict[str, str], held_out: Share = 0.1) -> dict[str, ClientSource]:
    """Clients by name, each with its own file or folder, wherever it lies."""
    if not paths:
        raise AtollError(
            "no clients", where="data.paths", found=paths, remedy="name at least one: paths: {clinic: ./clinic}"
        )
    return {name: ClientSource(open_source(Path(path).expanduser(), held_out)) for name, path in paths.items()}


def partitioned(
    path: str, partition: Annotated[Partition, Slot("partition")], held_out: Share = 0.1
) -> dict[str, ClientSource]:
    """Simulated clients: the records of one source, dealt out by a partitioner."""
    source = open_source(Path(path).expanduser(), held_out)
    from atoll.data.files import rows

    count = sum(1 for file, _ in source.files for _ in rows(file))
    dealt = partition(count, lambda name: column(source, name))
    return {name: ClientSource(source, indices) for name, indices in dealt.items()}


def four_sites() -> dict[str, ClientSource]:
    """A clinic, a school, a help desk and a counseling service: four really different sets of questions and answers.

    Fetched once into the cache; sources and licenses are in SOURCES.md beside the data.
    """
    from atoll.data.prepared import four_sites as fetch

    return folders(str(fetch(home())))


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".parquet", ".csv")


def load(
    sources: Mapping[str, ClientSource],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    labels: Labels,
) -> dict[str, tuple[ClientData, Report]]:
    """Every client's samples, and what became of its records. Both splits of a client may be empty: see the report."""
    from atoll.data.tokenize import prepare

    loaded = {}
    prepared = {}
    for name, client in sources.items():
        if client.source not in prepared:
            prepared[client.source] = prepare(client.source, tokenizer, context, labels, cache_root=home())
        tokens = prepared[client.source]
        train, test = tokens.train, tokens.test
        if client.rows is not None:
            train = train.select(np.flatnonzero(np.isin(train.rows, client.rows)))
            test = test.select(np.flatnonzero(np.isin(test.rows, client.rows)))
        loaded[name] = (ClientData(train, test), tokens.report)
    return loaded
