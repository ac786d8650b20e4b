"""Run the demo over many displacements and trainings: does it register, and does it know when it did not.

    python benchmarks/demo_seeds.py --work WORKDIR --out benchmarks/demo_seeds.csv

Row by row, so that a stopped run continues: 20 displacement seeds with one trained model, training seeds 0, 1, 2 (each
trained afresh, displacement seed 0 and more), and the aligned pair. Every row is `comir-hpc demo` as a user runs it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rows import add_rows, done_in, options_of

COLUMNS = (
    "train_seed", "seed", "displacement", "rotation_deg", "verdict", "tre_voxels", "tre_mm", "tre_p95_mm",
    "mi_verdict", "mi_tre_voxels", "agreement", "margin", "trained_here", "seconds", "peak_memory_mib",
)  # fmt: skip


def run_demo(work: Path, train_seed: int, seed: int, displacement: str) -> dict:
    """One demo, in a process of its own; its numbers."""
    out = work / f"train{train_seed}" / f"{displacement}{seed}"
    model = work / f"train{train_seed}" / "so30" / "run"
    trained_here = out == model.parent
    command = [sys.executable, "-m", "comir_hpc", "demo", "--out", str(out), "--seed", str(seed)]
    command += ["--train-seed", str(train_seed), "--displacement", displacement]
    command += [] if trained_here else ["--model", str(model)]
    start = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) not in (0, 1):  # 1: the verdict is FAIL, which is a result
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    summary = json.loads((out / "result.json").read_text(encoding="utf-8"))
    comir = json.loads((out / "registration" / "result.json").read_text(encoding="utf-8"))
    information = json.loads((out / "mutual_information" / "result.json").read_text(encoding="utf-8"))
    truth = json.loads((out / "truth" / "transform.json").read_text(encoding="utf-8"))
    return {
        "train_seed": train_seed,
        "seed": seed,
        "displacement": displacement,
        "rotation_deg": truth.get("rotation_deg", comir["rotation_deg"]),
        "verdict": summary["verdict"],
        "tre_voxels": summary["tre_voxels"],
        "tre_mm": summary["tre_mm"],
        "tre_p95_mm": comir["truth"]["tre_p95_mm"],
        "mi_verdict": information["verdict"],
        "mi_tre_voxels": summary["mi_tre_voxels"],
        "agreement": comir["agreement"],
        "margin": comir["margin"],
        "trained_here": trained_here,
        "seconds": seconds,
        "peak_memory_mib": usage.ru_maxrss / 1024,
    }


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = options_of(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20, help="displacement seeds with training seed 0")
    parser.add_argument(
        "--seeds-more", type=int, default=1, help="displacement seeds with training seeds 1 and 2"
    )
    options = parser.parse_args()
    cases = [(0, seed, "so3") for seed in range(options.seeds)] + [(0, 0, "none")]
    cases += [(train, seed, "so3") for train in (1, 2) for seed in range(options.seeds_more)]
    done = done_in(options.out, COLUMNS[:3])
    for case in cases:
        if tuple(map(str, case)) in done:
            continue
        row = run_demo(options.work, *case)
        add_rows(options.out, [row], COLUMNS)
        print(row, flush=True)


if __name__ == "__main__":
    main()
