"""Which shard files a finished store has, and how large each is.

An all-zero shard has no file, so the file system cannot say whether a file is missing. A finished volume therefore
carries a list of the sizes of all its shard files, of every level, in the attribute ``comir_files`` of its metadata. It
is written in the same moment as the word that the volume is complete. Both are in one file, which is renamed into its
place. So the two cannot contradict each other, whenever the writer is killed. 100,000 files take about 400 kB there.

Looking at a file's size costs about 5 microseconds on a local disk, and up to a millisecond on a parallel file system.
`Volume.open` looks at all files of a store that has up to 20,000 of them. In a larger store each file is looked at when
it is first read from.
"""

from __future__ import annotations

import base64
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from comir_hpc.space.grid import Box, Triple


LOOKED_AT_ONCE = 20_000  # files of a store that are looked at when it is opened
Sizes = NDArray[np.int64]


def shard_path(store: Path, level: int, place: Sequence[int]) -> Path:
    """Return the file of one shard, given its place (c, z, y, x) on the grid of shards."""
    return store / str(level) / "c" / "/".join(str(int(p)) for p in place)


def shards_of(box: Box, shard_zyx: Triple) -> tuple[range, range, range]:
    """Return the places (z, y, x) of the shards that a box touches."""
    z, y, x = (range(a // s, -(-b // s)) for a, b, s in zip(box.start, box.stop, shard_zyx, strict=True))
    return z, y, x


class Inventory:
    """Sizes of the shard files of every level, as they were when the store was finished.

    Parameters
    ----------
    store : Path
        Folder of the store.
    levels : sequence of int64 arrays
        For each level an array over the grid of its shards (c, z, y, x), in bytes; 0 where a shard has no file.
    """

    def __init__(self, store: Path, levels: Sequence[Sizes]) -> None:
        self.store = store
        self.levels = tuple(levels)
        self._seen = [np.zeros(sizes.shape, dtype=np.bool_) for sizes in self.levels]

    @classmethod
    def on_disk(cls, store: Path, counts: Sequence[Sequence[int]]) -> Inventory:
        """List what is there now.

        Parameters
        ----------
        counts : sequence of four int
            For each level the number of shards along c, z, y, x.
        """
        return cls(store, [_sizes(store / str(n) / "c", shape) for n, shape in enumerate(counts)])

    @classmethod
    def from_record(cls, store: Path, record: Any, counts: Sequence[Sequence[int]]) -> Inventory:
        """Read what `record` made.

        Raises
        ------
        ValueError
            If it is damaged, or belongs to other levels than the store has.
        """
        try:
            packed = [(tuple(level["shards"]), level["sizes"]) for level in record]
            # A list of another store, copied along with its metadata, would vouch for files that it does not know.
            if [shape for shape, _ in packed] != [tuple(shape) for shape in counts]:
                raise ValueError("it lists other levels or shards than the store has")
            return cls(store, [_unpacked(text, shape) for shape, text in packed])
        except (KeyError, TypeError, AttributeError, zlib.error) as error:
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error

    def record(self) -> list[dict[str, Any]]:
        """Return a JSON-ready form, one item a level: the number of shards, of files and of bytes, and the sizes."""
        return [
            {
                "shards": list(sizes.shape),
                "files": int(np.count_nonzero(sizes)),
                "bytes": int(sizes.sum()),
                "sizes": _packed(sizes),
            }
            for sizes in self.levels
        ]

    @property
    def num_files(self) -> int:
        """Number of files in all levels."""
        return sum(int(np.count_nonzero(sizes)) for sizes in self.levels)

    def damage(self) -> list[str]:
        """Look at every file; say of each that is missing, of another size or too many what is wrong with it."""
        found = Inventory.on_disk(self.store, [sizes.shape for sizes in self.levels])
        return list(
            itertools.chain.from_iterable(
                self._differences(level, np.argwhere(now != before), now[now != before])
                for level, (before, now) in enumerate(zip(self.levels, found.levels, strict=True))
            )
        )

    def damage_in(self, level: int, channels: int, places: tuple[range, range, range]) -> list[str]:
        """Look at the files of some shards of a level, each once only; say what is wrong as `damage` does."""
        # Each file is looked at once in the life of this object. A volume that changes while it is read is refused
        # elsewhere, by its fingerprint.
        where = np.ix_(range(channels), *places)
        unseen = ~self._seen[level][where]
        if not unseen.any():
            return []
        looked = np.argwhere(unseen) + np.array([0, *(r.start for r in places)])
        now = np.array([_size(shard_path(self.store, level, place)) for place in looked])
        self._seen[level][where] = True
        wrong = now != self.levels[level][tuple(looked.T)]
        return list(self._differences(level, looked[wrong], now[wrong]))

    def _differences(self, level: int, places: NDArray[Any], now: Sizes) -> Iterator[str]:
        for place, found in zip(places, now.tolist(), strict=True):
            name = shard_path(self.store, level, place).relative_to(self.store).as_posix()
            was = int(self.levels[level][tuple(place)])
            if not found:
                yield f"{name} is missing"
            elif not was:
                yield f"{name} holds {found} bytes where nothing was stored"
            else:
                yield f"{name} has {found} bytes, {was} were written"


def _sizes(folder: Path, counts: Sequence[int]) -> Sizes:
    sizes = np.zeros(tuple(counts), dtype=np.int64)
    for c, z, y in np.ndindex(*sizes.shape[:3]):
        try:
            with os.scandir(f"{folder}/{c}/{z}/{y}") as entries:
                for entry in entries:
                    # Beside the shards may lie what a killed writer left under a temporary name.
                    if entry.name.isdigit() and int(entry.name) < sizes.shape[3]:
                        sizes[c, z, y, int(entry.name)] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
    return sizes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _packed(sizes: Sizes) -> str:
    """Return sizes as packed text.

    All first bytes stand together, then all second ones, and so on: most are zero, so this order compresses best.
    """
    planes = sizes.astype("<u8").reshape(-1, 1).view(np.uint8).T
    return base64.b64encode(zlib.compress(np.ascontiguousarray(planes).tobytes(), 6)).decode("ascii")


def _unpacked(text: str, shape: tuple[int, ...]) -> Sizes:
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype=np.uint8)
    if raw.size != 8 * int(np.prod(shape, dtype=np.int64)):
        raise ValueError("its length does not fit the number of shards")
    planes = np.ascontiguousarray(raw.reshape(8, -1).T)
    sizes: Sizes = planes.view("<u8").reshape(shape).astype(np.int64)
    return sizes
