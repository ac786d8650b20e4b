"""Refine bent pairs (`made`) block by block, and as one block, and compare the two fields.

    export OMP_NUM_THREADS=1
    python benchmarks/deform/blockwise.py --data DATA --work WORK --out benchmarks/deform/blockwise.csv

The coarse solution is the affine answer from where the headers put the volumes. Then `refine` runs twice: with one
block that holds the whole volume, and with blocks of ``--block`` voxels. Each run is a process of its own, so that the
peak of its memory is its own. Rows are added one by one, so that a stopped run continues.

Columns: ``difference_vox`` is the mean distance between the two fields over the points of the specimen, in voxels of
the fixed volume, ``difference_p95_vox`` its 95th percentile; ``affine_vox``, ``whole_vox`` and ``blocks_vox`` are the
mean residuals against the known answer. ``kept`` to ``no_content`` count the blocks by what became of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from made import LARGEST_VOX, BentCase, bent
from rows import add_rows, done_in, options_of

from comir_hpc.config import IngestSettings, RefineSettings, RegisterSettings
from comir_hpc.data.families import family
from comir_hpc.host.memory import peak_bytes
from comir_hpc.ingest import ingest
from comir_hpc.register import register
from comir_hpc.register.blockwise import refine
from comir_hpc.runs.result import read_result
from comir_hpc.transforms import read_transform

COLUMNS = (
    "family", "level", "seed", "compared", "smoothness_vox", "block", "affine_vox", "whole_vox", "blocks_vox",
    "difference_vox", "difference_p95_vox", "blocks", "kept", "fell_back", "refused", "no_content", "folds",
    "inverse_residual_mm", "whole_s", "blocks_s", "whole_peak_mib", "blocks_peak_mib",
)  # fmt: skip
WHOLE = 1 << 20


def main() -> None:
    """Run what is not in the table yet."""
    if sys.argv[1:2] == ["run"]:
        return alone(json.loads(sys.argv[2]))
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=["embedded"])
    parser.add_argument("--levels", nargs="+", default=["four"], choices=LARGEST_VOX)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--compared", nargs="+", default=["intensity", "comir"])
    parser.add_argument("--smoothness", type=float, default=4.0, help="voxels of the fixed volume")
    parser.add_argument("--block", type=int, default=32)
    asked = parser.parse_args()
    done = done_in(asked.out, COLUMNS[:6])
    for name in asked.families:
        for level in asked.levels:
            for seed in asked.seeds:
                for compared in asked.compared:
                    key = (name, level, str(seed), compared, str(asked.smoothness), str(asked.block))
                    if key not in done:
                        row = run_case(asked, name, level, seed, compared)
                        add_rows(asked.out, [dict(zip(COLUMNS[:6], key, strict=True)) | row], COLUMNS)
                        print(row, flush=True)


def alone(settings: dict) -> None:
    """Refine in this process, and print what came of it."""
    start = time.perf_counter()
    done = refine(RefineSettings(**settings))
    print(json.dumps({"figures": done.figures, "seconds": time.perf_counter() - start, "peak": peak_bytes()}))


def refined(case: BentCase, result: Path, name: str, **settings: object) -> tuple[dict, np.ndarray]:
    """Refine in a process of its own; what came of it, and where the points of the specimen are sent."""
    out = result / name
    given = {"result": str(result), "out": str(out), **settings}
    words = [sys.executable, __file__, "run", json.dumps(given)]
    ended = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr[-2000:])
    return json.loads(ended.stdout.splitlines()[-1]), read_transform(out).apply(case.points_mm)


def run_case(asked: object, name: str, level: str, seed: int, compared: str) -> dict:
    """Make one pair, register it, and refine the answer in both ways."""
    folder = asked.work / f"{name}-{level}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    case = bent(family(name, asked.data), level, seed, folder)
    for side, source in (("fixed", case.fixed), ("moving", case.moving)):
        if not (folder / f"{side}.zarr").exists():
            ingest(IngestSettings(source=source, out=folder / f"{side}.zarr"))
    result = folder / f"affine-{compared}"
    register(
        RegisterSettings(
            fixed=folder / "fixed.zarr", moving=folder / "moving.zarr", out=result, representation=compared,
            transform="affine", initial="identity", checks="quick", threads=1,
        )
    )  # fmt: skip

    def residual(moved: np.ndarray) -> float:
        return float(np.linalg.norm(moved - case.true_mm, axis=1).mean() / case.voxel_mm)

    affine = read_transform(result / read_result(result).transform_file).apply(case.points_mm)
    shared = {"smoothness_mm": asked.smoothness * case.voxel_mm, "spacing": case.voxel_mm}
    whole, at_once = refined(case, result, "whole.zarr", block=WHOLE, **shared)
    pieces, by_block = refined(case, result, f"blocks-{asked.block}.zarr", block=asked.block, **shared)
    apart = np.linalg.norm(at_once - by_block, axis=1) / case.voxel_mm
    states = pieces["figures"]["states"]
    return {
        "affine_vox": residual(affine), "whole_vox": residual(at_once), "blocks_vox": residual(by_block),
        "difference_vox": apart.mean(), "difference_p95_vox": np.percentile(apart, 95),
        "blocks": sum(states.values()), **{k.replace(" ", "_"): n for k, n in states.items()},
        "folds": pieces["figures"]["folded_points"],
        "inverse_residual_mm": pieces["figures"]["inverse_residual_mm"],
        "whole_s": whole["seconds"], "blocks_s": pieces["seconds"],
        "whole_peak_mib": whole["peak"] >> 20, "blocks_peak_mib": pieces["peak"] >> 20,
    }  # fmt: skip


if __name__ == "__main__":
    main()
