r"""What a checksum after every chunk costs: the same box written and read with and without, in turns, in one process.

    export OMP_NUM_THREADS=1
    python benchmarks/volumes/checksums.py --work WORK --repeats 40 --out benchmarks/volumes/checksums.csv

The voxels are those of the other benchmarks here (brains with a camera's noise, uint16); chunks of 64, shards of 128
and of 256 a side, blosc zstd-3 with bitshuffle. A pair is one turn with and one without, the first of the two changing
from pair to pair; what is compared is the processor time of all threads within each pair. Files lie in the page cache
and are not flushed. `*_cost` is the median over the pairs of (with / without - 1), and `*_low`, `*_high` hold the
middle 95 % of that median (bootstrap): on a machine that is shared with others single pairs are off by several per
cent.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from brains import brains
from numpy.typing import NDArray
from rows import write_rows
from zarr.codecs import BloscCodec, Crc32cCodec

from comir_hpc.volumes.shards import Shards


def make(path: Path, shape: tuple[int, ...], shard: int, checked: bool) -> Shards:
    """Make an empty array of one level, with or without checksums, that is otherwise what `Volume` makes."""
    import zarr

    group = zarr.create_group(store=str(path), zarr_format=3, overwrite=True)
    codecs: list[Any] = [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")]
    group.create_array(
        "0",
        shape=shape,
        dtype=np.uint16,
        chunks=(1, 64, 64, 64),
        shards=(1, shard, shard, shard),
        compressors=[*codecs, Crc32cCodec()] if checked else codecs,
        fill_value=0,
    )
    return Shards(path / "0")


def seconds(act: Callable[[], object]) -> float:
    """Processor seconds of all threads."""
    begun = time.process_time()
    act()
    return time.process_time() - begun


def middle(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median, and the middle 95 % of medians of resampled values."""
    drawn = np.random.default_rng(0).choice(values, (4000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def compare(work: Path, shard: int, repeats: int) -> dict[str, Any]:
    """Write and read a volume of 2 x 2 shards of this side, in turns."""
    values = brains((shard, 2 * shard, 2 * shard))[None]
    stores = {
        checked: make(work / f"{checked}.zarr", values.shape, shard, checked) for checked in (False, True)
    }
    place = tuple(slice(0, n) for n in values.shape)
    spent: dict[tuple[str, bool], list[float]] = {(what, c): [] for what in ("write", "read") for c in stores}
    for turn in range(repeats + 1):
        for checked in (False, True) if turn % 2 else (True, False):
            spent["write", checked].append(seconds(lambda store=stores[checked]: store.write(place, values)))
        for checked in (False, True) if turn % 2 else (True, False):
            spent["read", checked].append(seconds(lambda store=stores[checked]: store.read(place)))
    same = all(np.array_equal(store.read(place), values) for store in stores.values())
    sizes = {c: sum(f.stat().st_size for f in (work / f"{c}.zarr").rglob("*") if f.is_file()) for c in stores}
    row: dict[str, Any] = {"shard": shard, "chunk": 64, "mib": values.nbytes >> 20, "pairs": repeats}
    for what in ("write", "read"):
        plain, checked = (np.array(spent[what, c][1:]) for c in (False, True))  # the first turn warms up
        cost, low, high = middle(checked / plain - 1)
        row |= {
            f"{what}_cpu_s_without": round(float(np.median(plain)), 4),
            f"{what}_cpu_s_with": round(float(np.median(checked)), 4),
        }
        row |= {f"{what}_cost": round(cost, 4), f"{what}_low": round(low, 4), f"{what}_high": round(high, 4)}
    return {**row, "size_cost": round(sizes[True] / sizes[False] - 1, 6), "equal": same}


def main() -> None:
    """Parse, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--shards", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for shard in given.shards:
        rows.append(compare(given.work, shard, given.repeats))
        print(rows[-1], flush=True)
        for store in given.work.glob("*.zarr"):
            shutil.rmtree(store)
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
