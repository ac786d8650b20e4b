"""Time storage and ingest of this checkout beside an older one, in turns, each run a process of its own.

    export OMP_NUM_THREADS=1
    python benchmarks/volumes/before_after.py --before CHECKOUT --work WORK --pairs 15 --out OUT

The first of the two changes from pair to pair. What is compared is the processor time within each pair: a ratio is now
over before. `write` and `read` are those of `Volume`: 384^3 uint16 in shards of 128, written once and read four times.
`ingest` is `comir-hpc ingest v.npy OUT.zarr --spacing 1 1 1 --unit mm` of the same array, a whole process.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import options_of, write_rows

SIDE, SHARD = 384, 128
CASES = ("write", "read", "ingest")


def main() -> None:
    """Measure one case here (``--measure``), or both checkouts in turns."""
    parser = options_of(__doc__)
    parser.add_argument("--measure", type=Path, help="folder to write and read in; prints processor seconds")
    parser.add_argument("--before", type=Path, help="checkout of the older version")
    parser.add_argument("--work", type=Path, help="folder for volumes; emptied again")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.measure is not None:
        print(*measured(asked.measure))
        return
    now = Path(__file__).resolve().parents[2]
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    asked.work.mkdir(parents=True, exist_ok=True)
    np.save(asked.work / "v.npy", array())
    for pair in range(asked.pairs):
        found = {}
        for checkout in (now, asked.before)[:: 1 if pair % 2 else -1]:
            found[checkout] = (*in_process(checkout, asked.work), ingested(checkout, asked.work))
        for number, case in enumerate(CASES):
            seconds[case].append((found[now][number], found[asked.before][number]))
        print(pair + 1, found, flush=True)
    shutil.rmtree(asked.work)
    command = f"python benchmarks/volumes/before_after.py --before CHECKOUT --work WORK --pairs {asked.pairs} --out OUT"
    write_rows(asked.out, [summary(case, seconds[case]) for case in CASES], command)


def array() -> np.ndarray:
    """Make the voxels: noise about a mean, as cameras have it."""
    rng = np.random.default_rng(0)
    return (20 * rng.standard_normal((SIDE,) * 3, dtype=np.float32) + 1000).astype(np.uint16)


def measured(folder: Path) -> tuple[float, float]:
    """Write a volume and read it four times; return the processor seconds of both."""
    import time

    try:
        from comir_hpc.space.grid import Box, Grid
        from comir_hpc.volumes.volume import Volume
    except ModuleNotFoundError:  # where these were before there were rooms
        from comir_hpc.geometry import Box, Grid  # type: ignore[import-not-found, no-redef]
        from comir_hpc.volume import Volume  # type: ignore[import-not-found, no-redef]

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values, grid = array(), Grid((SIDE,) * 3, (1.0, 1.0, 1.0))
    corners = [
        (z, y, x) for z in range(0, SIDE, SHARD) for y in range(0, SIDE, SHARD) for x in range(0, SIDE, SHARD)
    ]
    boxes = [Box(c, (c[0] + SHARD, c[1] + SHARD, c[2] + SHARD)) for c in corners]
    start = time.process_time()
    volume = Volume.create(
        folder / "v.zarr", grid, values.dtype, channels=1, kind="image", chunk=64, shard=SHARD
    )
    for box in boxes:
        volume.write(box, values[None][(slice(None), *box.slices)])
    written = time.process_time()
    volume.finish()
    volume = Volume.open(folder / "v.zarr")
    opened = time.process_time()
    for _ in range(4):
        for box in boxes:
            volume.read(box)
    done = time.process_time()
    shutil.rmtree(folder)
    return written - start, done - opened


def in_process(checkout: Path, work: Path) -> tuple[float, float]:
    """Measure a checkout in a process of its own."""
    command = [sys.executable, __file__, "--measure", work / "volume"]
    done = subprocess.run(command, env=environment(checkout), check=True, capture_output=True, text=True)
    write, read = map(float, done.stdout.split())
    return write, read


def ingested(checkout: Path, work: Path) -> float:
    """Ingest the array by the command line of a checkout; return the processor seconds of the process."""
    out = work / "ingested.zarr"
    for path in work.glob("ingested.zarr*"):
        shutil.rmtree(path)
    before = os.times()
    command = [
        sys.executable,
        "-m",
        "comir_hpc",
        "ingest",
        work / "v.npy",
        out,
        "--spacing",
        "1",
        "1",
        "1",
        "--unit",
        "mm",
    ]
    subprocess.run(command, env=environment(checkout), check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def environment(checkout: Path) -> dict[str, str]:
    """Let Python find the package of a checkout."""
    return os.environ | {"PYTHONPATH": str(checkout.resolve())}


def summary(case: str, pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Make one row: medians, and the ratio within pairs with the middle half of it."""
    ratios = sorted(now / before for now, before in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": case,
        "pairs": len(pairs),
        "processor_s_now": round(statistics.median(now for now, _ in pairs), 4),
        "processor_s_before": round(statistics.median(before for _, before in pairs), 4),
        "median_ratio": round(middle, 3),
        "lower_quartile": round(low, 3),
        "upper_quartile": round(high, 3),
    }


if __name__ == "__main__":
    main()
