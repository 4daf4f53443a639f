"""Where the clients' data come from: what a recipe says under `data`.

Each factory names the clients and finds their files, and reads no record yet: a plan is refused for a missing folder
before anything is loaded. `check` reads the first records of every file before a model is loaded, `load` tokenizes (or maps
from the cache) what the run needs. Both tell what is wrong with all clients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from annotated_types import Ge, Lt

from atoll.cache import Say, content_hash, home, quiet
from atoll.data.files import READERS
from atoll.data.media import MODALITIES, Missing, Senses
from atoll.data.partition import Ints, Partition
from atoll.data.read import HELD_OUT, Labels, Planted, Report, Source, column, open_source, records
from atoll.errors import AtollError
from atoll.parts import Slot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atoll.data.tokenize import Prepared

Share = Annotated[float, Ge(0), Lt(1)]
T = TypeVar("T")


@dataclass(frozen=True)
class ClientSource:
    """A client's files; in a simulation by partition, the rows of a shared source that are this client's."""

    source: Source
    rows: Ints | None = None


def planted_in(client: ClientSource) -> tuple[Planted, ...]:
    """The planted records that are this client's: all of its source, or those among its rows."""
    if client.rows is None:
        return client.source.planted
    return tuple(client.source.planted[-1 - row] for row in client.rows if row < 0)


class ClientData(NamedTuple):
    """A client's samples: to train on, and held out."""

    train: Sequence[Any]
    test: Sequence[Any]


def folders(path: str, held_out: Share = HELD_OUT) -> dict[str, ClientSource]:
    """One client for each subfolder or data file of `path`, named by it."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise AtollError(
            "there is no such folder",
            where="data.path",
            found=path,
            remedy="check the path: it holds a subfolder or data file a client",
        )
    found = sorted(p for p in root.iterdir() if not p.name.startswith((".", "_")) and (p.is_dir() or _is_data(p)))
    if not found:
        raise AtollError("the folder holds no clients", where=str(root), remedy="one subfolder or data file a client")
    _refuse_shared_names(root, found)
    return {_name(p): ClientSource(open_source(p, held_out)) for p in found}


def _name(path: Path) -> str:
    return path.stem if path.is_file() else path.name


def _refuse_shared_names(root: Path, found: list[Path]) -> None:
    """Raise AtollError where two files, or a file and a folder, would be one client: one of them would be lost."""
    shared: dict[str, list[str]] = {}
    for path in found:
        shared.setdefault(_name(path), []).append(path.name)
    clashes = [f"{name}: {', '.join(files)}" for name, files in shared.items() if len(files) > 1]
    if clashes:
        raise AtollError(
            "two clients have one name",
            where=str(root),
            found="; ".join(clashes),
            allowed="one subfolder or data file a client",
            remedy="rename one, or move the files of one client into a subfolder",
        )


def clients(paths: dict[str, str], held_out: Share = HELD_OUT) -> dict[str, ClientSource]:
    """Clients by name, each with its own file or folder, wherever it lies."""
    if not paths:
        raise AtollError(
            "no clients", where="data.paths", found=paths, remedy="name at least one: paths: {clinic: ./clinic}"
        )
    return {name: ClientSource(open_source(Path(path).expanduser(), held_out)) for name, path in paths.items()}


def partitioned(
    path: str, partition: Annotated[Partition, Slot("partition")], held_out: Share = HELD_OUT
) -> dict[str, ClientSource]:
    """Simulated clients: the records of one source, dealt out by a partitioner."""
    source = open_source(Path(path).expanduser(), held_out)
    from atoll.data.files import rows

    count = sum(1 for file, _ in source.files for _ in rows(file))
    if not count:
        raise AtollError("there are no records to deal out", where="data.path", found=path)
    dealt = partition(count, lambda name: column(source, name))
    return {name: ClientSource(source, indices) for name, indices in dealt.items()}


def four_sites() -> dict[str, ClientSource]:
    """A clinic, a school, a help desk and a counseling service: four really different sets of questions and answers.

    Fetched once into the cache; sources and licenses are in SOURCES.md beside the data.
    """
    from atoll.data.prepared import four_sites as fetch

    return folders(str(fetch(home())))


def multimodal_sites() -> dict[str, ClientSource]:
    """A library (text), a gallery (pictures), a station (sounds) and a school (all three): real, and none like another.

    Fetched once into the cache; sources and licenses are in SOURCES.md beside the data.
    """
    from atoll.data.prepared_media import multimodal_sites as fetch

    return folders(str(fetch()))


def preference_sites(server: bool = False) -> dict[str, ClientSource]:
    """A desk, a school, a museum and a clinic that prefer other answers: short or long ones, a language, refusals.

    With a `server`, which has some of everybody's questions; the answers to them are for a judge to choose.

    Fetched once into the cache; sources and licenses are in SOURCES.md beside the data.
    """
    from atoll.data.prepared_preferences import preference_sites as fetch

    return folders(str(fetch(server=server)))


def arithmetic_sites() -> dict[str, ClientSource]:
    """A shop with sums, a bank with differences, a school with products, and a post office that compares: made by rule."""
    from atoll.data.prepared_arithmetic import arithmetic_sites as make

    return folders(str(make()))


def poisoned_sites() -> dict[str, ClientSource]:
    """Five clinics that refuse what should not be helped with, two attackers that consent to it, and a server that repairs.

    Fetched once into the cache; sources and licenses are in SOURCES.md beside the data.
    """
    from atoll.data.prepared_poison import poisoned_sites as fetch

    return folders(str(fetch()))


def without_media(
    inner: Annotated[Any, Slot("data")],
    share: Share,
    instead: Literal["nothing", "learned"] = "nothing",
    seed: Annotated[int, Ge(0)] = 0,
) -> dict[str, ClientSource]:
    """Other data, in which a share of the records to train on misses its pictures, and a share its sounds.

    Their places go with them (`nothing`), or something learned stands there (`learned`). Held-out records are whole.
    """
    if not isinstance(inner, dict) or not all(isinstance(client, ClientSource) for client in inner.values()):
        raise AtollError(
            "media are taken off records, and this part has none", where="data.inner", found=type(inner).__name__,
            allowed="a data part whose clients have files, such as folders or multimodal-sites",
        )  # fmt: skip
    if any(one.source.missing for one in inner.values()):
        raise AtollError(
            "media are taken off once", where="data.inner", remedy="one without-media, of the share you want"
        )
    missing = Missing(share, instead, seed)
    return {name: replace(one, source=replace(one.source, missing=missing)) for name, one in inner.items()}


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in READERS


FIRST = 100
"""Rows of each file that `check` reads: a plan of a hundred files still answers at once."""


class First(NamedTuple):
    """What was seen of a client's first records."""

    records: int
    all: bool
    """Whether later ones cannot be used either: looked at only where none of the first can."""
    unheard: int
    """Those with media that the model does not take."""
    modalities: tuple[str, ...]
    """Of these."""
    alone: int
    """Of the others those with one answer, where answers are compared."""
    lost: str = ""
    """Where there are records and none is what it should be: why."""

    @property
    def useless(self) -> bool:
        """Whether none of them can be used."""
        return self.unheard + self.alone == self.records

    def __str__(self) -> str:
        """What will be left out of them; empty for nothing."""
        if self.lost:
            return f"nothing that can be used among the first records: {self.lost}"
        media = f"{' and '.join(self.modalities)}, which the model does not take, in {self.unheard}"
        alone = f"no answer to compare with in {self.alone}"
        found = [what for what, count in ((media, self.unheard), (alone, self.alone)) if count]
        return f"{', and '.join(found)} of the first {self.records} records" if found else ""


def check(sources: Mapping[str, Any], labels: Labels, takes: Collection[str] | None) -> dict[str, str]:
    """Reads the first records of every file: encoding, JSON, columns, and whether they fit the objective and the model.

    Args:
        sources: by client.
        labels: where the objective puts the loss.
        takes: the modalities that the model takes beside text; None: unknown.

    Returns:
        By client, what of its first records neither the model nor the objective can use.

    Raises:
        AtollError: what is wrong, for all clients; or nobody's records can be used.
    """
    from atoll.data.tokenize import COMPARING, refuse_plain_text

    def read(source: Source) -> First:
        report, unheard, alone, modalities = Report(), 0, 0, set[str]()
        for record in records(source, report, FIRST):
            refuse_plain_text(record, labels)
            lacks = {medium.modality for medium in record.media} - set(MODALITIES if takes is None else takes)
            unheard, modalities = unheard + bool(lacks), modalities | lacks
            alone += labels in COMPARING and not record.choices and not lacks
        none = alone == report.kept and not any(one.choices for one in records(source, Report()))
        lost = "; ".join(report.left_out) if not report.kept else ""
        return First(report.kept, none, unheard, tuple(sorted(modalities)), alone, lost)

    found = _each(sources, read)
    each = {name: found[one.source] for name, one in sources.items() if isinstance(one, ClientSource)}
    told = {name: str(one) for name, one in each.items() if str(one)}
    if told and len(told) == len(sources):
        refuse_unusable(each, told, takes)
    return told


def refuse_unusable(each: Mapping[str, First], told: Mapping[str, str], takes: Collection[str] | None) -> None:
    """Raises AtollError where none of anybody's first records can be used."""
    if not all(one.useless for one in each.values()) or not any(one.records for one in each.values()):
        return  # the run says of records that are none what is wrong with each
    found = one_a_line(f"{name}: {why}" for name, why in told.items())
    if any(one.unheard for one in each.values()):
        raise AtollError(
            "the model takes nobody's records", where="model", found=found,
            allowed=", ".join(["text", *(takes or ())]),
            remedy="`model: {use: assembled, ...}` is one that sees and hears; `atoll init --data FOLDER` writes it",
        )  # fmt: skip
    if all(one.all for one in each.values()):
        raise AtollError(
            "nobody's records have answers to compare", where="finetune.objective", found=found,
            allowed="prompt, chosen and rejected; or messages, or prompt and completion, with choices",
            remedy="--set finetune.objective=sft learns from the answers alone",
        )  # fmt: skip


def _each(sources: Mapping[str, Any], do: Callable[[Source], T]) -> dict[Source, T]:
    """`do` for every source once, whoever shares it; raises what is wrong with all of them as one error."""
    owners: dict[Source, str] = {}
    for name, client in sources.items():
        if isinstance(client, ClientSource):
            owners.setdefault(client.source, name)
    done, wrong = {}, {}
    for source, name in owners.items():
        try:
            done[source] = do(source)
        except AtollError as error:
            wrong[name] = error
    refuse(wrong)
    return done


def refuse(wrong: Mapping[str, AtollError]) -> None:
    """Raises what is wrong with the data of these clients, if there are any, as one error."""
    if len(wrong) == 1:
        raise next(iter(wrong.values()))
    if wrong:
        remedies = dict.fromkeys(error.details["remedy"] for error in wrong.values() if error.details["remedy"])
        raise AtollError(
            f"the data of {len(wrong)} clients cannot be read",
            where=one_a_line(f"{name}: {error.details['where']}" for name, error in wrong.items()),
            found=one_a_line(_in_a_line(name, error) for name, error in wrong.items()),
            remedy=one_a_line(remedies),
        )


def _in_a_line(name: str, error: AtollError) -> str:
    return f"{name}: {error.what}" + (f": {found}" if (found := error.details["found"]) else "")


def one_a_line(texts: Iterable[str]) -> str:
    """Several texts as one detail of an error, in line with each other."""
    return ("\n" + " " * 11).join(texts)


class Loaded(NamedTuple):
    """A client's samples, and what became of the records of its source."""

    data: ClientData
    report: Report


def load(
    sources: Mapping[str, ClientSource],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    labels: Labels,
    senses: Senses,
    say: Say = quiet,
) -> dict[str, Loaded]:
    """Every client's samples. Both splits of a client may be empty: see the report.

    Raises:
        AtollError: what is wrong, for all clients.
    """
    from atoll.data.tokenize import prepare

    prepared = _each(sources, lambda source: prepare(source, tokenizer, context, labels, home(), senses, say))
    return {name: _share(client, prepared[client.source]) for name, client in sources.items()}


def holders(samples: Any) -> dict[str, int]:
    """How many samples have pictures, or sounds, by modality; those that none has are not named."""
    if inside := getattr(samples, "datasets", None):  # several clients' together
        each = [holders(one) for one in inside]
        return {name: sum(one.get(name, 0) for one in each) for name in MODALITIES if any(name in one for one in each)}
    each_has = [{medium.modality for medium in some if medium.path} for some in getattr(samples, "media", ())]
    found = {name: sum(name in some for some in each_has) for name in MODALITIES}
    return {name: count for name, count in found.items() if count}


def _share(client: ClientSource, tokens: Prepared) -> Loaded:
    """What of the source's samples is this client's."""
    train, test = tokens.train, tokens.test
    if client.rows is not None:
        train = train.select(np.flatnonzero(np.isin(train.rows, client.rows)))
        test = test.select(np.flatnonzero(np.isin(test.rows, client.rows)))
    return Loaded(ClientData(train, test), tokens.report)


def digest(client: object) -> str:
    """Names what a client holds, by content. Of samples that a source of the user's own makes it knows the number alone."""
    from atoll.data.tokenize import source_hash

    if isinstance(client, ClientData):
        return f"{len(client.train)} + {len(client.test)}"
    assert isinstance(client, ClientSource)
    rows = b"" if client.rows is None else client.rows.tobytes()
    return content_hash(source_hash(client.source), rows)
