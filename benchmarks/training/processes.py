"""Patches a second with two processes against one, at equal batch a process and one thread each.

    out=benchmarks/training/processes.csv
    python benchmarks/training/processes.py --work WORKDIR --out $out --rounds 5

`comir-hpc train` on the embedded pair, in turns, for a few steps, of which the first are left out. It needs a machine
on which nothing else runs: each process waits for the other thirty times a step, at every norm. "two that share
nothing" are two trainings of their own, started together: what the machine allows. Rows are added to the table.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from comir_hpc.config import IngestSettings
from comir_hpc.data.embedded import embedded_volume
from comir_hpc.ingest import ingest


def start(
    work: Path, run: Path, engine: str, processes: int, pairs: int, norm: str, steps: int
) -> subprocess.Popen[bytes]:
    """Start a training of some steps."""
    shutil.rmtree(run, ignore_errors=True)
    record = {
        "modalities": ["t1w", "t2w"],
        "pairs": [{name: str(work / f"{name}.zarr") for name in ("t1w", "t2w")}],
        "sampling": {"pairs_per_step": pairs * processes},
        "network": {"norm": norm},
        "optimiser": {"steps": steps},
        "engine": {"name": engine},
        "tracking": {"mlflow": None, "log_every": 2, "picture_every": 10 * steps},
    }
    file = work / f"train-{processes}.yaml"
    file.write_text(yaml.safe_dump(record), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    # Without the dashes torchrun takes --run for one of its own options.
    words = ["-m", "--", "comir_hpc"] if processes > 1 else ["-m", "comir_hpc"]
    command = [sys.executable, *launch, *words, "train", str(file), "--run", str(run)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def patches_per_second(
    work: Path, engine: str, processes: int, trainings: int, pairs: int, norm: str, steps: int
) -> float:
    """Train for some steps; the rate of all trainings together after the first steps."""
    runs = [work / f"run{number}" for number in range(trainings)]
    started = [start(work, run, engine, processes, pairs, norm, steps) for run in runs]
    if any([one.wait() for one in started]):
        raise SystemExit(f"training failed; see {runs}")
    total = 0.0
    for run in runs:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [row["patches_per_s"] for row in map(json.loads, lines) if "patches_per_s" in row]
        total += statistics.median(rates[1:])
    return total


CASES = {
    "one process": ("torch", 1, 1),
    "two that share nothing": ("torch", 1, 2),
    "two processes": ("torch", 2, 1),
    "one process, DeepSpeed": ("deepspeed", 1, 1),
    "two processes, DeepSpeed": ("deepspeed", 2, 1),
}


def main() -> None:
    """Take turns, and write the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[16], help="a process")
    parser.add_argument("--norm", default="batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    given.work = given.work.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    for name in ("t1w", "t2w"):
        ingest(IngestSettings(source=embedded_volume(name), out=given.work / f"{name}.zarr"))
    rates: dict[tuple[str, int], list[float]] = {(case, pairs): [] for pairs in given.pairs for case in CASES}
    for _ in range(given.rounds):
        for (case, pairs), found in rates.items():
            found.append(patches_per_second(given.work, *CASES[case], pairs, given.norm, given.steps))
            print(case, pairs, found, flush=True)
    new = not given.out.is_file()
    with given.out.open("a", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        if new:
            table.writerow(
                ["case", "norm", "pairs_a_process", "patches_per_s", "against_one", "rounds", "cores"]
            )
        for (case, pairs), found in rates.items():
            one = rates["one process, DeepSpeed" if "DeepSpeed" in case else "one process", pairs]
            ratio = statistics.median(a / b for a, b in zip(found, one, strict=True))
            rate = statistics.median(found)
            table.writerow(
                [case, given.norm, pairs, f"{rate:.2f}", f"{ratio:.3f}", given.rounds, os.cpu_count()]
            )


if __name__ == "__main__":
    main()
