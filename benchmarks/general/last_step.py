"""Measure what the last refinement, on the intensities, makes of answers of the general model.

    OMP_NUM_THREADS=1 python benchmarks/general/last_step.py --data DATA --work WORK --out OUT

The answer is caught before the step, and both errors are in one row, with what the witnesses said. The seeds are those
for tuning, from 500 on. Rows are added one by one, so that a stopped run continues. `comir-hpc datasets fetch` writes
the families into DATA.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from rows import add_rows, done_in, options_of

from comir_hpc.config import IngestSettings, RegisterSettings
from comir_hpc.config.words import FAMILIES, LEVELS
from comir_hpc.data.families import Case, family
from comir_hpc.ingest import ingest
from comir_hpc.register import register
from comir_hpc.register.last_step import refined_on_intensities
from comir_hpc.register.pair import Pair
from comir_hpc.register.ranking import Ranking
from comir_hpc.runs.result_parts import LastStepRecord
from comir_hpc.transforms import Transform

COLUMNS = (
    "family", "level", "seed", "before_vox", "after_vox", "used", "moved_mm", "halves_mm", "halves_on_intensities_mm",
    "seconds", "sentence",
)  # fmt: skip


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = options_of(__doc__)
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
    done = done_in(options.out, COLUMNS[:3])
    seeds = range(options.seed, options.seed + options.seeds)
    for seed, name, level in itertools.product(seeds, options.only, options.levels):
        if (name, level, str(seed)) not in done:
            row = measured(name, level, seed, options.data, options.work)
            add_rows(options.out, [row], COLUMNS)
            print(row, flush=True)


def measured(name: str, level: str, seed: int, data: Path, work: Path) -> dict[str, object]:
    """Register one case, and measure its answer before and after the step."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    case = family(name, data).displaced(level, seed, work)
    stores = {role: work / f"{role}.zarr" for role in ("fixed", "moving")}
    for role, source in (("fixed", case.fixed), ("moving", case.moving)):
        ingest(IngestSettings(source=source, out=stores[role]))
    caught: list[Transform] = []

    def catching(pair: Pair, ranking: Ranking, *rest: object) -> tuple[Ranking, LastStepRecord | None]:
        caught.append(ranking.best.transform)
        return refined_on_intensities(pair, ranking, *rest)  # type: ignore[arg-type]

    with mock.patch("comir_hpc.register.refined_on_intensities", catching):
        result = register(RegisterSettings(**stores, out=work / "result", threads=1, checks="quick"))
    row: dict[str, object] = {"family": name, "level": level, "seed": seed}
    step = result.result.last_step
    if step is None or result.transform is None:
        return row | {"sentence": "nothing was found"}
    halves = step.halves_mm or ("", "")
    return row | {
        "before_vox": error_vox(case, caught[0]),
        "after_vox": error_vox(case, result.transform),
        "used": step.used,
        "moved_mm": step.moved_mm,
        "halves_mm": halves[0],
        "halves_on_intensities_mm": halves[1],
        "seconds": result.result.timings_s["last step"],
        "sentence": step.sentence,
    }


def error_vox(case: Case, found: Transform) -> float:
    """Mean error of an answer in voxels of the fixed volume."""
    return round(float(case.errors_mm(found).mean()) / case.voxel_mm, 4)


if __name__ == "__main__":
    main()
