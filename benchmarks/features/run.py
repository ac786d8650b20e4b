"""Find the starts of displaced pairs by keypoints and by the global search, on the same maps, and compare them.

    python benchmarks/features/run.py --data DATA --work WORKDIR --out benchmarks/features/starts.csv

The pairs are those of benchmarks/general/cases.py. What is measured is `find_starts`: all that `comir-hpc register`
does before its last refinement, which is the same for both. The maps of the general model are made once for a pair and
used by both methods, and their time is counted once, in a column of its own. Seconds are those of the processor, of one
thread, since the wall clock of a busy machine says nothing. The error is that of the best start; "hits" counts how
many of the starts are right. Rows are added one by one, so that a stopped run continues.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "general"))

import numpy as np
import torch
from cases import FILES, LEVELS, SUCCESS, Case, Family
from rows import add_rows, done_in, options_of

from comir_hpc.config import IngestSettings, RegisterSettings
from comir_hpc.ingest import ingest
from comir_hpc.register.initial import find_starts
from comir_hpc.register.inputs import Input, Inputs, open_inputs
from comir_hpc.register.pair import Pair
from comir_hpc.register.slices import SlicePlane

COLUMNS = (
    "family", "level", "seed", "initial", "success", "tre_mm", "tre_share", "hits", "starts", "rotation_deg",
    "displaced_mm", "keypoints_fixed", "keypoints_moving", "matches", "agree", "start_seconds", "maps_seconds",
    "failure",
)  # fmt: skip
INITIALS = ("features", "global")


class Kept:
    """A representation whose maps are made once."""

    def __init__(self, representation: Any) -> None:
        self._representation = representation
        self._made: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._representation, name)

    def features(self, level: int) -> Any:
        """Make the features of a level, or give those that were made before."""
        if level not in self._made:
            self._made[level] = self._representation.features(level)
        return self._made[level]


def opened(settings: RegisterSettings) -> Inputs:
    """Open a pair, and keep its maps of all scales."""
    inputs = open_inputs(settings)
    sides = [Input(s.role, Kept(s.representation), s.level) for s in (inputs.fixed, inputs.moving)]
    kept = Inputs(sides[0], sides[1], inputs.predicted_bytes, inputs.fingerprint)
    for side in sides:
        for level in {side.level, *(n for levels in kept.searched_levels for n in levels)}:
            side.representation.features(level)
    return kept


def rows_of(
    case: Case, folder: Path, initials: list[str], representation: str, memory_gib: float
) -> list[dict]:
    """Find the starts of one pair by each method."""
    stores = {"fixed": folder / "fixed.zarr", "moving": folder / "moving.zarr", "out": folder / "out"}
    rows, inputs = [], None
    for initial in initials:
        settings = RegisterSettings(
            **stores, representation=representation, initial=initial, threads=1, max_memory_gib=memory_gib
        )
        begin = time.process_time()
        inputs = inputs or opened(settings)
        maps_seconds = time.process_time() - begin
        fixed, moving = (side.features()[0] for side in (inputs.fixed, inputs.moving))
        frame = SlicePlane.from_grids(fixed.grid, moving.grid)
        by_steps = bool(inputs.searched_levels[0])
        pair = Pair(*frame.flattened(fixed, moving), inputs.measure, settings, by_steps=by_steps)
        begin = time.process_time()
        begun = find_starts(pair, settings, inputs, frame, None)
        seconds = time.process_time() - begin
        errors = [float(case.errors_mm(start).mean()) for start, _ in begun.starts]
        row = {
            "initial": initial, "success": False, "starts": len(errors), "start_seconds": seconds,
            "maps_seconds": maps_seconds if initial == initials[0] else "", "failure": begun.failure,
        }  # fmt: skip
        if errors:
            side_mm = case.mean_side_mm
            row |= {
                "success": errors[0] <= SUCCESS * side_mm, "tre_mm": errors[0], "tre_share": errors[0] / side_mm,
                "hits": sum(error <= SUCCESS * side_mm for error in errors),
            }  # fmt: skip
        if initial == "features":
            counts = [int(word) for word in (*begun.notes, begun.failure or "")[0].split() if word.isdigit()]
            row |= dict(zip(("keypoints_fixed", "keypoints_moving"), counts[:2], strict=True))
            if begun.failure is None:
                row |= {"matches": counts[-2], "agree": counts[-1]}
        rows.append(row)
    return rows


def run_case(family: Family, level: str, seed: int, initials: list[str], work: Path, *how: Any) -> list[dict]:
    """Displace one pair, and find its starts."""
    folder = work / f"{family.name}-{level}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    case = family.displaced(level, seed, folder)
    for name, source in (("fixed", case.fixed), ("moving", case.moving)):
        ingest(IngestSettings(source=source, out=folder / f"{name}.zarr", overwrite=True))
    displaced = np.linalg.norm(case.truth.apply(case.points_mm) - case.points_mm, axis=1).mean()
    known = {
        "family": family.name, "level": level, "seed": seed, "rotation_deg": case.truth.rotation_deg,
        "displaced_mm": float(displaced),
    }  # fmt: skip
    rows = [known | row for row in rows_of(case, folder, initials, *how)]
    shutil.rmtree(folder)
    return rows


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the families' files")
    parser.add_argument("--work", type=Path, required=True, help="folder for volumes; emptied again")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(FILES), default=["t1_epi", "embedded", "avg152_t2"]
    )
    parser.add_argument("--levels", nargs="+", choices=tuple(LEVELS), default=list(LEVELS))
    parser.add_argument("--initials", nargs="+", choices=INITIALS, default=list(INITIALS))
    parser.add_argument("--representation", default="comir")
    parser.add_argument(
        "--max-memory-gib", type=float, default=4.0, help="less of it compares coarser maps, which is quicker"
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed; from 500 on for tuning")
    parser.add_argument("--seeds", type=int, default=1, help="displacements of each level")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = done_in(options.out, ("family", "level", "seed", "initial"))
    how = options.representation, options.max_memory_gib
    families = {name: Family(name, options.data) for name in options.only}
    for seed in range(options.seed, options.seed + options.seeds):
        for level in options.levels:
            for name, family in families.items():
                wanted = [i for i in options.initials if (name, level, str(seed), i) not in done]
                if not wanted:
                    continue
                rows = run_case(family, level, seed, wanted, options.work, *how)
                add_rows(options.out, rows, COLUMNS)
                shown = ("initial", "success", "tre_mm", "hits", "start_seconds")
                print(name, level, seed, [{k: row.get(k) for k in shown} for row in rows], flush=True)


if __name__ == "__main__":
    main()
