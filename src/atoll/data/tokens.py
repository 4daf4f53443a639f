"""Token samples on disk: flat arrays, memory-mapped, written as they come.

A split of n samples and t tokens is five .npy files: `ids` int32 [t], `mask` uint8 [t / 8 rounded up] (one bit a token:
is there a loss?), `offsets` int64 [n + 1] (where each sample starts in `ids`), and per sample `rows` int64 [n] (the row
of the source it came from) and `labeled` int32 [n] (its tokens with a loss). Beside them, `media.jsonl` names the pictures
and sounds of each sample, which lie where the source has them, and `choices.jsonl` holds the answers that it allows. Reading
a sample touches its own pages only, so a data set larger than memory costs what is used of it, and processes share them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from atoll.data.collate import IGNORE, Choices, Sample
from atoll.data.media import Medium

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenDataset(Sequence[Sample]):
    """Samples, read as they are asked for.

    `chosen` holds the positions of these samples among those on disk, int64 [n].
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: Ints
    all_rows: Ints
    all_labeled: NDArray[np.int32]
    chosen: Ints
    all_media: Sequence[tuple[Medium, ...]] = ()
    """Of each sample on disk; empty where there are none at all."""
    all_choices: Sequence[Choices | None] = ()
    """The same."""

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        """One sample for an integer; the samples of a slice as a dataset."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        at = self.chosen[index]
        start, stop = int(self.offsets[at]), int(self.offsets[at + 1])
        ids = np.array(self.ids[start:stop])
        bits = np.unpackbits(self.mask[start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]
        labels = np.where(bits, ids, np.int32(IGNORE))
        media = self.all_media[at] if self.all_media else ()
        return Sample(ids, labels, media, self.all_choices[at] if self.all_choices else None)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int] | Ints) -> TokenDataset:
        """The samples at `indices`, without copying tokens: a simulated client's share."""
        return replace(self, chosen=self.chosen[np.asarray(indices, dtype=np.int64)])

    @property
    def rows(self) -> Ints:
        """The row of the source each sample came from, int64 [n]."""
        return self.all_rows[self.chosen]

    @property
    def lengths(self) -> Ints:
        """Tokens of each sample, int64 [n]."""
        return self.offsets[self.chosen + 1] - self.offsets[self.chosen]

    @property
    def labeled(self) -> NDArray[np.int32]:
        """Tokens with a loss of each sample, int32 [n]."""
        return self.all_labeled[self.chosen]

    @property
    def media(self) -> list[tuple[Medium, ...]]:
        """The pictures and sounds of each sample."""
        return [self.all_media[at] for at in self.chosen] if self.all_media else [()] * len(self)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return int(self.lengths.sum())

    @property
    def labeled_tokens(self) -> int:
        """All tokens with a loss."""
        return int(self.labeled.sum())


def load(folder: Path, root: Path = Path()) -> TokenDataset:
    """Memory-map what a `TokenWriter` has written; the paths of media are from `root`."""
    ids, mask, offsets, rows, labeled = (
        np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _DTYPES
    )
    chosen = np.arange(len(rows), dtype=np.int64)
    return TokenDataset(ids, mask, offsets, rows, labeled, chosen, _media(folder, root), _choices(folder))


def _media(folder: Path, root: Path) -> list[tuple[Medium, ...]]:
    lines = (folder / MEDIA).read_text(encoding="utf-8").splitlines()
    each = [tuple(Medium(name, path and root / path, key) for name, path, key in json.loads(line)) for line in lines]
    return each if any(each) else []


def _choices(folder: Path) -> list[Choices | None]:
    lines = (folder / CHOICES).read_text(encoding="utf-8").splitlines()
    each = [_read_choices(*found) if (found := json.loads(line)) else None for line in lines]
    return each if any(each) else []


def _read_choices(shared: int, rest: list[list[int]], labeled: list[list[int]], right: int) -> Choices:
    ids = tuple(np.array(one, np.int32) for one in rest)
    return Choices(shared, ids, tuple(np.array(one, bool) for one in labeled), right)


def _written_choices(one: Choices | None) -> str:
    found = one and [
        one.shared, [ids.tolist() for ids in one.rest], [which.astype(int).tolist() for which in one.labeled], one.right
    ]  # fmt: skip
    return json.dumps(found) + "\n"


class TokenWriter:
    """Writes samples one at a time into `folder`; complete when the `with` block ends.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "train"
        >>> with TokenWriter(folder) as writer:
        ...     writer.add(np.array([7, 8, 9]), np.array([False, True, True]), row=0)
        >>> sample = load(folder)[0]
        >>> sample.ids.tolist(), sample.labels.tolist()
        ([7, 8, 9], [-100, 8, 9])
    """

    def __init__(self, folder: Path, root: Path = Path()) -> None:
        folder.mkdir(parents=True)
        self._root = root
        self._stack = ExitStack()
        self._media, self._choices = (
            self._stack.enter_context((folder / name).open("w", encoding="utf-8")) for name in (MEDIA, CHOICES)
        )
        self._arrays = {
            name: self._stack.enter_context(_Growing(folder / f"{name}.npy", dtype)) for name, dtype in _DTYPES.items()
        }
        self._arrays["offsets"].extend(np.zeros(1))
        self._bits = np.zeros(0, bool)
        self._tokens = 0

    def add(
        self,
        ids: NDArray[Any],
        labeled: NDArray[np.bool_],
        row: int,
        media: Sequence[Medium] = (),
        choices: Choices | None = None,
    ) -> None:
        """Append one sample: ids and labeled [length], the row of the source it came from, what it has beside them."""
        self._choices.write(_written_choices(choices))
        named = [(one.modality, one.path and str(one.path.relative_to(self._root)), one.key) for one in media]
        self._media.write(json.dumps(named) + "\n")
        self._tokens += len(ids)
        self._arrays["ids"].extend(ids)
        self._arrays["offsets"].extend(np.array([self._tokens]))
        self._arrays["rows"].extend(np.array([row]))
        self._arrays["labeled"].extend(np.array([labeled.sum()]))
        bits = np.concatenate([self._bits, labeled])
        whole = len(bits) // 8 * 8
        self._arrays["mask"].extend(np.packbits(bits[:whole]))
        self._bits = bits[whole:]

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with self._stack:
            self._arrays["mask"].extend(np.packbits(self._bits))


MEDIA = "media.jsonl"
"""A line a sample: its media, [modality, path, key of its content] each; null for the path of one that is missing."""

CHOICES = "choices.jsonl"
"""A line a sample: [tokens shared, the rest of each choice, which of those are the answer's, the right one], or null."""

_DTYPES: dict[str, Any] = {
    "ids": np.int32,
    "mask": np.uint8,
    "offsets": np.int64,
    "rows": np.int64,
    "labeled": np.int32,
}


class _Growing:
    """A one-dimensional .npy file that grows; its header, in which numpy leaves room, gets the length at the end."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self.file: BinaryIO = path.open("wb")
        self._header()

    def extend(self, values: NDArray[Any]) -> None:
        self.file.write(values.astype(self.dtype).tobytes())
        self.length += len(values)

    def _header(self) -> None:
        descr = npy.dtype_to_descr(self.dtype)
        npy.write_array_header_1_0(self.file, {"descr": descr, "fortran_order": False, "shape": (self.length,)})

    def __enter__(self) -> _Growing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            self.file.seek(0)
            self._header()
