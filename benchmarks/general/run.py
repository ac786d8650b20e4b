"""Register the families of pairs with a known answer from many displacements, by several methods.

    python benchmarks/general/run.py --data DATA --work WORKDIR --out benchmarks/general/cases.csv

Each case is the moving volume resampled onto a displaced grid (`cases`), ingested and registered by the package, with
the general model, with MIND-SSC and with mutual information, all by the same global search. Rows are added one by one,
so that a stopped run continues. One process and one thread; --only takes a part of the families.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shutil
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cases import FILES, LEVELS, SUCCESS, Case, Family

from comir_hpc.config import IngestSettings, RegisterSettings
from comir_hpc.errors import ComirError
from comir_hpc.ingest import ingest
from comir_hpc.register import RegisterResult, register
from comir_hpc.runs.model import general_model

COLUMNS = (
    "family", "level", "seed", "method", "verdict", "success", "tre_mm", "tre_median_mm", "tre_p95_mm", "tre_share",
    "displaced_mm", "rotation_deg", "agreement", "margin", "overlap", "consensus", "seconds", "search_seconds",
    "peak_memory_mib", "error",
)  # fmt: skip
METHODS = ("comir", "mind", "intensity")


def settings_of(method: str, case: Case, folder: Path, model: Path) -> RegisterSettings:
    """Make the settings that a user of the command line would give."""
    return RegisterSettings(
        fixed=folder / "fixed.zarr",
        moving=folder / "moving.zarr",
        out=folder / method,
        representation=method,
        **({"model": model, "fixed_modality": "any", "moving_modality": "any"} if method == "comir" else {}),
        threads=1,
        overwrite=True,
    )


def row_of(result: RegisterResult, case: Case, seconds: float) -> dict:
    """Measure one answer."""
    record = result.record
    row = {
        "verdict": result.verdict,
        "success": False,
        "displaced_mm": float(
            np.linalg.norm(case.truth.apply(case.points_mm) - case.points_mm, axis=1).mean()
        ),
        "rotation_deg": case.truth.rotation_deg,
        "agreement": result.agreement,
        "margin": result.margin,
        "overlap": record.get("overlap"),
        "consensus": record.get("consensus"),
        "seconds": seconds,
        "search_seconds": record["timings_s"].get("search"),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if result.transform is not None:
        errors = case.errors_mm(result.transform)
        share = float(errors.mean()) / case.mean_side_mm
        row |= {
            "success": share <= SUCCESS,
            "tre_mm": float(errors.mean()),
            "tre_median_mm": float(np.median(errors)),
            "tre_p95_mm": float(np.percentile(errors, 95)),
            "tre_share": share,
        }
    return row


def run_case(
    family: Family, level: str, seed: int, methods: list[str], work: Path, model: Path
) -> list[dict]:
    """Register one displaced pair by each method."""
    folder = work / f"{family.name}-{level}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    case = family.displaced(level, seed, folder)
    for name, source in (("fixed", case.fixed), ("moving", case.moving)):
        ingest(IngestSettings(source=source, out=folder / f"{name}.zarr", overwrite=True))
    rows = []
    for method in methods:
        start = time.perf_counter()
        row = {"family": family.name, "level": level, "seed": seed, "method": method}
        try:
            result = register(settings_of(method, case, folder, model))
        except ComirError as error:
            row |= {"success": False, "error": str(error)}
        else:
            row |= row_of(result, case, time.perf_counter() - start)
        rows.append(row)
    shutil.rmtree(folder)
    return rows


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to the CSV."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for row in rows:
            values = [row.get(column, "") for column in COLUMNS]
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else "" if v is None else v for v in values])


def done_in(path: Path) -> set[tuple[str, str, int, str]]:
    """List the cases that the CSV holds."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(r["family"], r["level"], int(r["seed"]), r["method"]) for r in rows}


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the families' files")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for volumes and results; emptied again"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model", type=Path, help="run folder of a general model; the one in the package if left out"
    )
    parser.add_argument("--only", nargs="+", choices=tuple(FILES), default=list(FILES))
    parser.add_argument("--levels", nargs="+", choices=tuple(LEVELS), default=list(LEVELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--seed", type=int, default=500, help="first seed; from 500 on for tuning, from 0 for figures"
    )
    parser.add_argument("--seeds", type=int, default=5, help="displacements of each level")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = options.model or general_model()
    # One displacement of every family and level first, so that a stopped run still shows all of them.
    cases = [
        (name, level, seed)
        for seed in range(options.seed, options.seed + options.seeds)
        for name in options.only
        for level in options.levels
    ]
    families = {name: Family(name, options.data) for name in options.only}
    for name, level, seed in cases:
        known = done_in(options.out)
        methods = [m for m in options.methods if (name, level, seed, m) not in known]
        if methods:
            rows = run_case(families[name], level, seed, methods, options.work, model)
            append(options.out, rows)
            for row in rows:
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
