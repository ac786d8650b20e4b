"""Register whole files by the command line, and write down the verdict, the error and what the checks cost.

    python benchmarks/verdict/native.py --data DATA --work WORK --out benchmarks/verdict/native.csv

Unlike the rows of `run.py` these are volumes as they come, and registrations as a user runs them: FIXED and MOVING are
files. `mirrored` is the embedded pair whose moving array was reversed along x under the same header. Cases that are
there are not done again. Seconds are those that the registration measured itself; only their ratio within one
registration means something on a machine that others use, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "general"))

import numpy as np
from cases import Case
from rows import add_rows, done_in, options_of

from comir_hpc.data.embedded import write_nifti
from comir_hpc.data.families import family
from comir_hpc.transforms import Transform

COLUMNS = (
    "case", "representation", "checks", "verdict", "exit_code", "probability", "bound_mm", "tre_mm", "tre_share",
    "itself_mm", "search_s", "refine_s", "check_s", "checks_over_search_and_refine", "threads", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One registration: a family as its files have it (none) or displaced, and the options."""

    family: str
    level: str = "none"
    representation: str = "comir"
    checks: str = "full"
    mirrored: bool = False
    seed: int = 500

    @property
    def name(self) -> str:
        """Name in the table."""
        seed = "" if self.level == "none" else f" {self.seed}"
        return f"{self.family} {'mirrored' if self.mirrored else self.level}{seed}"


ASKED = (
    Asked("embedded", "any"),
    Asked("embedded", "any", checks="quick"),
    Asked("t1_epi"),
    Asked("embedded", mirrored=True),
    Asked("t1_epi", "medium", seed=0),
    Asked("embedded", "any", "mind"),
    Asked("embedded", "any", "intensity"),
    Asked("t1_epi", "large", seed=1),
    Asked("template_pet", representation="mind"),
    Asked("t1_epi", "any", seed=1),
    Asked("concrete"),
    Asked("template_epi"),
    Asked("t1_epi", "medium", seed=1),
    Asked("t1_epi", "large", seed=2),
    Asked("embedded_1mm", "any"),
    Asked("embedded_1mm", "any", checks="quick"),
)
"""The displaced ones of t1_epi are those that an earlier calibration gave WARN (benchmarks/general/default.csv)."""


def files_of(asked: Asked, data: Path, folder: Path) -> Case:
    """Write the moving file, unless the family's own is meant."""
    pair = family(asked.family, data)
    if not asked.mirrored:
        return pair.displaced(asked.level, asked.seed, folder)
    values, grid = pair.moving
    write_nifti(folder / "moving.nii.gz", np.ascontiguousarray(values[..., ::-1]), grid)
    return Case(
        pair.files[0],
        folder / "moving.nii.gz",
        pair.inside_mm,
        pair.inside_mm,
        float(np.ptp(pair.inside_mm, axis=0).mean()),
        pair.fixed[1].finest_mm,
        None,
    )


def run(asked: Asked, data: Path, folder: Path, threads: int) -> dict[str, object]:
    """Register one pair of files."""
    folder.mkdir(parents=True, exist_ok=True)
    case = files_of(asked, data, folder)
    out = folder / "result"
    command = [
        sys.executable, "-m", "comir_hpc", "register", case.fixed, case.moving, "--out", out,
        "--representation", asked.representation, "--checks", asked.checks, "--threads", threads, "--quiet",
        "--fallback", "none",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([str(word) for word in command], env=environment, check=False)
    found = json.loads((out / "result.json").read_text(encoding="utf-8"))
    seconds = found["timings_s"]
    error = None
    if found["matrix_lps_mm"] is not None and not asked.mirrored:
        error = float(case.errors_mm(Transform(np.asarray(found["matrix_lps_mm"]))).mean())
    pieces = {piece["name"]: piece["value"] for piece in found["evidence"]}
    return {
        "case": asked.name, "representation": asked.representation, "checks": asked.checks,
        "verdict": found["verdict"], "exit_code": done.returncode, "probability": found["probability"],
        "bound_mm": found["bound_mm"], "tre_mm": error,
        "tre_share": None if error is None else error / case.mean_side_mm, "itself_mm": pieces.get("itself"),
        "search_s": seconds.get("search"), "refine_s": seconds.get("refine"), "check_s": seconds.get("check"),
        "checks_over_search_and_refine": seconds["check"] / (seconds["search"] + seconds["refine"]),
        "threads": threads, "reason": found["reasons"][0],
    }  # fmt: skip


def main() -> None:
    """Fill the missing rows."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the families' files")
    parser.add_argument("--work", type=Path, required=True, help="folder for volumes and results")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    done = done_in(options.out, ("case", "representation", "checks"))
    for number, asked in enumerate(ASKED):
        if (asked.name, asked.representation, asked.checks) in done:
            continue
        row = run(asked, options.data, options.work / f"{number}", options.threads)
        add_rows(options.out, [row], COLUMNS)
        print(row, flush=True)


if __name__ == "__main__":
    main()
