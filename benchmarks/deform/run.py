"""Register bent pairs (`made`) with the field and the B-spline of the package, and with elastix and ANTs beside them.

    python benchmarks/deform/run.py --data DATA --work WORKDIR --out benchmarks/deform/bent.csv [--peers FOLDER]

Every method starts from where the headers put the volumes. Rows are added one by one, so that a stopped run continues.
One process and one thread. ``--peers`` names a folder into which itk-elastix and antspyx were installed
(``pip install --target FOLDER itk-elastix antspyx``); without it the peers are left out.

Columns: ``affine_vox`` is the mean residual of the method's own affine part, in voxels of the fixed volume, and
``residual_vox`` that of the whole; ``best_affine_vox`` is what the best affine map of the known answer would leave.
``folds`` counts points of the specimen, on the fixed grid, at which the determinant is zero or less.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from made import LARGEST_VOX, BentCase, bent
from rows import add_rows, done_in, options_of

from comir_hpc.config import IngestSettings, RegisterSettings
from comir_hpc.data.families import Pair, family
from comir_hpc.errors import ComirError
from comir_hpc.ingest import ingest
from comir_hpc.register import register
from comir_hpc.transforms import read_transform

COLUMNS = (
    "family", "level", "seed", "method", "largest_vox", "before_vox", "best_affine_vox", "affine_vox", "residual_vox",
    "p95_vox", "folds", "kept", "verdict", "held_before", "held_after", "seconds", "processor_s", "error",
)  # fmt: skip
OURS = {
    "field": ("comir", "field"),
    "bspline": ("comir", "bspline"),
    "field on intensities": ("intensity", "field"),
    "bspline on intensities": ("intensity", "bspline"),
    "field on mind": ("mind", "field"),
}
PEERS = ("elastix B-spline MI", "ANTs SyN MI")


def residual_vox(case: BentCase, moved_mm: np.ndarray) -> np.ndarray:
    """Measure how far points are from where they belong, in voxels of the fixed volume."""
    return np.linalg.norm(moved_mm - case.true_mm, axis=1) / case.voxel_mm


def known_of(case: BentCase, level: str) -> dict:
    """Describe the bend itself."""
    points = np.c_[case.points_mm, np.ones(len(case.points_mm))]
    best = points @ np.linalg.lstsq(points, case.true_mm, rcond=None)[0]
    return {
        "largest_vox": LARGEST_VOX[level],
        "before_vox": float(residual_vox(case, case.points_mm).mean()),
        "best_affine_vox": float(residual_vox(case, best).mean()),
    }


def by_package(case: BentCase, folder: Path, method: str) -> dict:
    """Register by a method of the package."""
    representation, kind = OURS[method]
    out = folder / method.replace(" ", "-")
    result = register(
        RegisterSettings(
            fixed=folder / "fixed.zarr",
            moving=folder / "moving.zarr",
            out=out,
            representation=representation,
            transform=kind,
            initial="identity",
            fallback="none",  # a row is of the representation that it names
            threads=1,
            overwrite=True,
        )
    ).result
    row = {"verdict": result.verdict, "kept": result.bends}
    if result.transform is None:
        return row | {"error": result.reasons[0]}
    affine = residual_vox(case, result.transform.apply(case.points_mm))
    whole = residual_vox(case, read_transform(out / result.transform_file).apply(case.points_mm))
    deformation = result.deformation
    row |= {"affine_vox": affine.mean(), "residual_vox": whole.mean(), "p95_vox": np.percentile(whole, 95)}
    if deformation is not None and deformation.held_out is not None:
        row |= {
            "folds": deformation.folded_points,
            "held_before": deformation.held_out.before,
            "held_after": deformation.held_out.after,
        }
    return row


def main() -> None:
    """Run what is not in the table yet."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--families", nargs="+", default=["embedded", "avg152_t2", "t1_epi"])
    parser.add_argument("--levels", nargs="+", default=list(LARGEST_VOX)[::-1], choices=LARGEST_VOX)
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked = parser.parse_args()
    done = done_in(asked.out, COLUMNS[:4])
    methods = [m for m in asked.methods if m in OURS or asked.peers is not None]
    if asked.peers is not None:
        sys.path.append(str(asked.peers))
    for name in asked.families:
        for level in asked.levels:
            for seed in asked.seeds:
                todo = [m for m in methods if (name, level, str(seed), m) not in done]
                if todo:
                    run_case(family(name, asked.data), level, seed, todo, asked.work, asked.out)


def run_case(pair: Pair, level: str, seed: int, methods: list[str], work: Path, out: Path) -> None:
    """Make one pair and register it by several methods."""
    folder = work / f"{pair.name}-{level}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    case = bent(pair, level, seed, folder)
    known = known_of(case, level)
    if any(method in OURS for method in methods):
        for name, source in (("fixed", case.fixed), ("moving", case.moving)):
            ingest(IngestSettings(source=source, out=folder / f"{name}.zarr", overwrite=True))
    for method in methods:
        row = {"family": pair.name, "level": level, "seed": seed, "method": method, **known}
        start, processor = time.perf_counter(), time.process_time()
        try:
            if method in OURS:
                row |= by_package(case, folder, method)
            else:
                from peers import by_peer

                row |= by_peer(case, folder, method, residual_vox)
        except (ComirError, RuntimeError) as error:
            row |= {"error": str(error).splitlines()[0][:200]}
        row |= {"seconds": time.perf_counter() - start, "processor_s": time.process_time() - processor}
        add_rows(out, [row], COLUMNS)
        print(row, flush=True)


if __name__ == "__main__":
    main()
