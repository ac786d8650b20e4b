"""Measure what the last refinement, on the intensities, makes of answers of the general model.

    OMP_NUM_THREADS=1 python benchmarks/general/last_step.py --data DATA --work WORK --out benchmarks/general/last_step.csv

Each case is registered without the step. From that answer it is registered again, with the step. Both errors are in one
row, with what the witnesses said. The seeds are those for tuning, from 500 on. Rows are added one by one, so that a stopped
run continues. `comir-hpc datasets fetch` writes the families into DATA.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

from comir_hpc.config import IngestSettings, RegisterSettings
from comir_hpc.config.words import FAMILIES, LEVELS
from comir_hpc.data.families import Case, family
from comir_hpc.ingest import ingest
from comir_hpc.register import RegisterResult, register

COLUMNS = (
    "family", "level", "seed", "before_vox", "after_vox", "used", "moved_mm", "halves_mm", "halves_on_intensities_mm",
    "seconds", "sentence",
)  # fmt: skip


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
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["small", "any"])
    parser.add_argument("--seed", type=int, default=500, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="displacements of each level")
    options = parser.parse_args()
    done = set()
    if options.out.exists():
        with options.out.open(newline="") as file:
            done = {
                (r["family"], r["level"], int(r["seed"]))
                for r in csv.DictReader(line for line in file if line[0] != "#")
            }
    else:
        options.out.write_text(f"# {__doc__.splitlines()[2].strip()}\n" + ",".join(COLUMNS) + "\n")
    for seed in range(options.seed, options.seed + options.seeds):
        for name in options.only:
            for level in options.levels:
                if (name, level, seed) in done:
                    continue
                row = measured(name, level, seed, options.data, options.work)
                with options.out.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(row)
                print(row, flush=True)


def measured(name: str, level: str, seed: int, data: Path, work: Path) -> dict[str, object]:
    """Register one case without the step and from there with it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    case = family(name, data).displaced(level, seed, work)
    stores = {role: work / f"{role}.zarr" for role in ("fixed", "moving")}
    for role, source in (("fixed", case.fixed), ("moving", case.moving)):
        ingest(IngestSettings(source=source, out=stores[role]))
    given = {**stores, "threads": 1, "checks": "quick"}
    before = register(RegisterSettings(**given, out=work / "before", last_step="none"))
    row: dict[str, object] = {
        "family": name,
        "level": level,
        "seed": seed,
        "before_vox": error_vox(case, before),
    }
    if before.transform is None:
        return row | {"sentence": "nothing was found"}
    after = register(RegisterSettings(**given, out=work / "after", initial=before.folder / "transform.tfm"))
    step = after.result.last_step
    assert step is not None
    halves = step.halves_mm or ("", "")
    return row | {
        "after_vox": error_vox(case, after) if step.used else row["before_vox"],
        "used": step.used,
        "moved_mm": step.moved_mm,
        "halves_mm": halves[0],
        "halves_on_intensities_mm": halves[1],
        "seconds": after.result.timings_s["last step"],
        "sentence": step.sentence,
    }


def error_vox(case: Case, result: RegisterResult) -> float | str:
    """Mean error of a result in voxels of the fixed volume; empty without an answer."""
    if result.transform is None:
        return ""
    return round(float(case.errors_mm(result.transform).mean()) / case.voxel_mm, 4)


if __name__ == "__main__":
    main()
