"""Where the time of `comir-hpc register FIXED MOVING` goes: two heads of 1 mm, files in, report out, the general model.

    python benchmarks/general/register_time.py --volume T1.nii.gz --work WORK --out benchmarks/general/register_time.csv

The second volume is the first, turned anywhere, shifted, with a bias field and noise, in a cube of 256 voxels.
Processor seconds are those of all threads together. On a machine that other work shares they are what can be compared;
the wall clock is only right on quiet cores.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.config import RegisterPairSettings
from comir_hpc.data.embedded import Displacement, degrade, displace, write_nifti
from comir_hpc.evaluate import evaluate
from comir_hpc.host.progress import Clock
from comir_hpc.recipes.pair import register_pair, require_usable
from comir_hpc.recipes.stores import with_stores
from comir_hpc.transforms.files import save_transform
from comir_hpc.volumes.readers import open_source

SIDE, SEED, THREADS = 256, 0, 2


def displaced(source: Path, work: Path) -> tuple[Path, Path]:
    """Write the second volume and the true transform."""
    opened, rng = open_source(source), np.random.default_rng(SEED)
    grid = opened.grid()
    drawn = Displacement.draw(rng, grid.shape_zyx)
    values, scanner, truth = displace(opened.read()[0], grid, drawn, SIDE)
    write_nifti(work / "moving.nii.gz", degrade(values, rng).astype(np.int16), scanner)
    save_transform(truth, work / "truth", {"made_by": "benchmarks/general/register_time.py"})
    return work / "moving.nii.gz", work / "truth" / "transform.tfm"


class Stages:
    """Seconds of each stage, by its name."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Measure what the block takes; a stage that runs again adds to its row."""
        processor, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            row = {"stage": stage, "processor_s": time.process_time() - processor}
            self.rows.append(row | {"wall_s": time.perf_counter() - wall})


def main() -> None:
    """Register, and write a row a stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    moving, truth = displaced(options.volume, options.work)

    stages = Stages()
    Clock.time = lambda self, part: stages.time(part)  # type: ignore[method-assign, assignment]
    with stages.time("all"):
        asked = RegisterPairSettings(
            fixed=options.volume, moving=moving, out=options.work / "result", threads=THREADS, overwrite=True
        )
        require_usable(asked)
        with stages.time("ingest"):
            settings = with_stores(asked, asked.out)
        with stages.time("register and report"):
            done = register_pair(settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (row,) = evaluate([done.result.folder], truth).rows
    print(f"{row.verdict}: {row.tre_mm:.2f} mm; {peak:.0f} MiB; load {os.getloadavg()[0]:.1f}")
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage", "processor_s", "wall_s", "threads", "peak_mib", "verdict", "tre_mm"])
        for one in stages.rows:
            numbers = (f"{one[key]:.1f}" for key in ("processor_s", "wall_s"))
            writer.writerow(
                [one["stage"], *numbers, THREADS, f"{peak:.0f}", row.verdict, f"{row.tre_mm:.3f}"]
            )


if __name__ == "__main__":
    main()
