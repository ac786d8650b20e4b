r"""`ingest` of files of 2 GiB beside writing the same array from memory, pyramid included on both sides.

    python benchmarks/volumes/ingest.py compare --work WORK --out benchmarks/volumes/ingest.csv

Every measurement is a process of its own, and they take turns. `write` has the array in memory and calls `Volume.write`
shard by shard, then `Volume.build_pyramid`. `ingest` reads the file, checks it, counts its values, writes, flushes each
shard to the disk, checksums it, and builds the pyramid. The files are in the page cache. `cpu_seconds` are of all
threads: on a machine shared with others they are steadier than those of the wall clock. `allowed_mib` is two shards for
each worker and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import Kept, measured_apart, verbs_of, write_rows

SHARD = 256


def _write(data: Path, store: Path) -> tuple[float, float]:
    from comir_hpc.space.grid import Grid
    from comir_hpc.space.plan import plan_blocks
    from comir_hpc.volumes.volume import Volume

    values = np.load(data)
    wall, cpu = time.perf_counter(), time.process_time()
    volume = Volume.create(store, Grid(values.shape, (1.0, 1.0, 1.0)), values.dtype, chunk=64, shard=SHARD)
    for block in plan_blocks(values.shape, volume.shard_zyx):
        volume.write(block.write, values[None][(slice(None), *block.write.slices)])
    volume.build_pyramid()
    volume.finish()
    return time.perf_counter() - wall, time.process_time() - cpu


def _ingest(source: Path, store: Path) -> tuple[float, float]:
    from comir_hpc.config import IngestSettings
    from comir_hpc.ingest import ingest

    settings = IngestSettings(source=source, out=store, spacing=(1.0, 1.0, 1.0), unit="um", shard=SHARD)
    wall, cpu = time.perf_counter(), time.process_time()
    print(ingest(settings).summary)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, work: Path) -> dict[str, Any]:
    """Carry out one of them in this process."""
    from comir_hpc.host.memory import peak_bytes

    act = _write if name == "write" else _ingest
    wall, cpu = act(files_of(work)[name], work / "store.zarr")
    return {"name": name, "seconds": wall, "cpu_seconds": cpu, "peak_mib": peak_bytes() / 2**20}


def files_of(work: Path) -> dict[str, Path]:
    """What each measurement reads."""
    return {
        "write": work / "values.npy",
        "TIFF": work / "values.tif",
        "HDF5": work / "values.h5",
        "TIFF, deflate": work / "deflate.tif",
    }


def prepare(work: Path, shape: tuple[int, int, int], names: list[str]) -> None:
    """Write the array in every format."""
    import h5py
    import tifffile
    from brains import brains

    work.mkdir(parents=True, exist_ok=True)
    files = files_of(work)
    if not files["write"].exists():
        np.save(files["write"], brains(shape))
    values = np.load(files["write"], mmap_mode="r")
    if "TIFF" in names and not files["TIFF"].exists():
        with tifffile.TiffWriter(files["TIFF"], bigtiff=True) as tiff:
            for plane in values:
                tiff.write(plane, contiguous=True)
    if "TIFF, deflate" in names and not files["TIFF, deflate"].exists():
        with tifffile.TiffWriter(files["TIFF, deflate"], bigtiff=True) as tiff:
            for plane in values:
                tiff.write(plane, compression="zlib", predictor=True, rowsperstrip=64)
    if "HDF5" in names and not files["HDF5"].exists():
        with h5py.File(files["HDF5"], "w") as file:
            dataset = file.create_dataset("volume", values.shape, values.dtype, chunks=(64, 64, 64))
            for z in range(0, len(values), 64):
                dataset[z : z + 64] = values[z : z + 64]


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Take turns; medians, and ratios to the write of the same turn."""
    prepare(given.work, tuple(given.shape), given.names)
    store, kept = given.work / "store.zarr", Kept(given.work / "rows.jsonl")
    before = {(row["repeat"], row["name"]) for row in kept.rows}
    for repeat in range(given.repeats):
        for name in given.names:
            if (repeat, name) in before:
                continue
            shutil.rmtree(store, ignore_errors=True)
            shutil.rmtree(f"{store}.ledger", ignore_errors=True)
            command = [sys.executable, __file__, "one", name, str(given.work)]
            kept.add({"repeat": repeat, **measured_apart(command)})
    shutil.rmtree(store, ignore_errors=True)
    table, rows, shard_mib = [], kept.rows, SHARD**3 * 2 / 2**20
    for name in given.names:
        own = [row for row in rows if row["name"] == name]
        line: dict[str, Any] = {
            "name": name,
            "mib": round(2 * np.prod(given.shape) / 2**20),
            "repeats": len(own),
        }
        for key in ("seconds", "cpu_seconds"):
            first = {row["repeat"]: row[key] for row in rows if row["name"] == "write"}
            line[key] = round(statistics.median(row[key] for row in own), 2)
            line[f"{key}_over_write"] = round(
                statistics.median(row[key] / first[row["repeat"]] for row in own), 3
            )
        line["peak_mib"] = round(max(row["peak_mib"] for row in own))
        line["allowed_mib"] = "" if name == "write" else round(2 * shard_mib + 500e6 / 2**20)
        table.append(line)
    return table


def main() -> None:
    """Parse, measure, write the table."""
    parser, verbs = verbs_of(__doc__)
    one = verbs.add_parser("one")
    one.add_argument("name")
    one.add_argument("work", type=Path)
    many = verbs.add_parser("compare")
    many.add_argument("--work", type=Path, required=True)
    many.add_argument("--shape", type=int, nargs=3, default=[1024, 1024, 1024])
    many.add_argument("--repeats", type=int, default=3)
    many.add_argument("--names", nargs="+", default=["write", "TIFF", "HDF5", "TIFF, deflate"])
    many.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.verb == "one":
        print(json.dumps(measure(given.name, given.work)))
        return
    table = compare(given)
    write_rows(given.out, table)


if __name__ == "__main__":
    main()
