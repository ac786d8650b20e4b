"""Patches a second with two processes against one, at equal batch a process and one thread each.

    python benchmarks/training/processes.py --work WORKDIR --out benchmarks/training/processes.csv

`comir-hpc train` on the embedded pair, in turns, for a few steps; the first half of the steps is left out. It needs a
machine on which nothing else runs: each process waits for the other in every step.
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
from comir_hpc.datasets import embedded_volume
from comir_hpc.ingest import ingest

PAIRS = 8  # a process


def patches_per_second(work: Path, engine: str, processes: int, steps: int) -> float:
    """Train for some steps; the mean rate of the second half."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    record = {
        "modalities": ["t1w", "t2w"],
        "pairs": [{name: str(work / f"{name}.zarr") for name in ("t1w", "t2w")}],
        "sampling": {"pairs_per_step": PAIRS * processes},
        "optimiser": {"steps": steps},
        "engine": {"name": engine},
        "tracking": {"mlflow": None, "log_every": 1, "picture_every": 10 * steps},
    }
    (work / "train.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    # Without the dashes torchrun takes --run for one of its own options.
    words = ["-m", "--", "comir_hpc"] if processes > 1 else ["-m", "comir_hpc"]
    command = [sys.executable, *launch, *words, "train", str(work / "train.yaml"), "--run", str(run)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [row["patches_per_s"] for row in map(json.loads, lines) if "patches_per_s" in row]
    return statistics.median(rates[len(rates) // 2 :])


def main() -> None:
    """Take turns, and write the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for name in ("t1w", "t2w"):
        ingest(IngestSettings(source=embedded_volume(name), out=given.work / f"{name}.zarr"))
    cases = [(engine, processes) for engine in ("torch", "deepspeed") for processes in (1, 2)]
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(given.rounds):
        for case in cases:
            rates[case].append(patches_per_second(given.work, *case, given.steps))
            print(case, rates[case], flush=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["engine", "processes", "patches_per_s", "against_one", "rounds", "cores"])
        for engine, processes in cases:
            rate = statistics.median(rates[engine, processes])
            one = statistics.median(rates[engine, 1])
            table.writerow(
                [engine, processes, f"{rate:.2f}", f"{rate / one:.3f}", given.rounds, os.cpu_count()]
            )


if __name__ == "__main__":
    main()
