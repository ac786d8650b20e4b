"""Adapt encoders to displaced pairs with a known answer, without an aligned pair, and measure where that ends.

    python benchmarks/general/adapt.py --data DATA --work WORKDIR --out benchmarks/general/adapt.csv

Each case is files in to model out, as `comir-hpc adapt FIXED MOVING` does it. A row has the error of every candidate
and round: it shows what held-out retrieval chose from. Rows are added one by one, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from cases import FILES, LEVELS, SUCCESS, Case, Family
from rows import add_rows, done_in, options_of

from comir_hpc.config import IngestSettings
from comir_hpc.config.adapt import AdaptSettings
from comir_hpc.ingest import ingest
from comir_hpc.recipes.adapt import AdaptResult, adapt
from comir_hpc.transforms import Transform

COLUMNS = (
    "family", "level", "seed", "verdict", "success", "tre_mm", "tre_p95_mm", "tre_share", "tre_voxels", "displaced_mm",
    "rotation_deg", "agreement", "margin", "seconds", "threads", "peak_memory_mib", "tried", "reasons",
)  # fmt: skip


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the families' files")
    parser.add_argument("--work", type=Path, required=True, help="folder for volumes and results")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(FILES), default=["t1_epi", "concrete"])
    parser.add_argument("--levels", nargs="+", choices=tuple(LEVELS), default=list(LEVELS))
    parser.add_argument(
        "--seed", type=int, default=500, help="first seed; from 500 on for tuning, from 0 for figures"
    )
    parser.add_argument("--seeds", type=int, default=5, help="displacements of each level")
    parser.add_argument("--threads", type=int, default=0, help="0 takes as many as the machine gives")
    parser.add_argument("--keep", action="store_true", help="keep the folder of every case")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.seeds):
        for name in options.only:
            for level in options.levels:
                if (name, level, str(seed)) not in done_in(options.out, ("family", "level", "seed")):
                    row = run_case(Family(name, options.data), level, seed, options)
                    add_rows(options.out, [row], COLUMNS)
                    print(row, flush=True)


def run_case(family: Family, level: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Adapt to one displaced pair."""
    folder = options.work / f"{family.name}-{level}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    case = family.displaced(level, seed, folder)
    start = time.perf_counter()
    for name, source in (("fixed", case.fixed), ("moving", case.moving)):
        ingest(IngestSettings(source=source, out=folder / f"{name}.zarr", overwrite=True))
    result = adapt(
        AdaptSettings(
            fixed=folder / "fixed.zarr",
            moving=folder / "moving.zarr",
            run=folder / "run",
            threads=options.threads,
        )
    )
    seconds = time.perf_counter() - start
    row = {
        "family": family.name,
        "level": level,
        "seed": seed,
        "verdict": result.verdict,
        "success": False,
        "displaced_mm": float(
            np.linalg.norm(case.truth.apply(case.points_mm) - case.points_mm, axis=1).mean()
        ),
        "rotation_deg": case.truth.rotation_deg,
        "seconds": seconds,
        "threads": options.threads,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tried": _tried(result, case),
        "reasons": "; ".join(result.reasons),
    }
    if result.registration is not None:
        record = json.loads((result.registration / "result.json").read_text(encoding="utf-8"))
        errors = case.errors_mm(Transform(np.asarray(record["matrix_lps_mm"])))
        share = float(errors.mean()) / case.mean_side_mm
        row |= {
            "success": share <= SUCCESS,
            "tre_mm": float(errors.mean()),
            "tre_p95_mm": float(np.percentile(errors, 95)),
            "tre_share": share,
            "tre_voxels": float(errors.mean()) / min(family.fixed[1].spacing_mm),
            "agreement": record["agreement"],
            "margin": record["margin"],
        }
    if not options.keep:
        shutil.rmtree(folder)
    return row


def _tried(result: AdaptResult, case: Case) -> str:
    """Say of every candidate and round what judged it, and how wrong it was."""
    return "; ".join(
        f"{one.origin}: retrieval {one.held_out:.2f}, error {case.errors_mm(one.transform).mean():.3g} mm"
        for one in (*result.candidates, *result.rounds)
    )


if __name__ == "__main__":
    main()
