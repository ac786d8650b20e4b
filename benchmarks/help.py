"""Seconds until `comir-hpc --help` has printed its page.

    python benchmarks/help.py --out benchmarks/help.csv

Every verb's help too: nobody waits for torch to learn what an option means. Medians of processes that start anew.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

VERBS = ("", "ingest", "train", "infer", "register", "warp", "evaluate", "report", "demo", "doctor", "sync")


def seconds(verb: str) -> float:
    """One start."""
    begun = time.perf_counter()
    words = [verb] if verb else []
    subprocess.run([sys.executable, "-m", "comir_hpc", *words, "--help"], check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    """All verbs, in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    found = [[seconds(verb) for verb in VERBS] for _ in range(given.rounds)]
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["command", "seconds", "slowest", "rounds"])
        for verb, times in zip(VERBS, zip(*found, strict=True), strict=True):
            name = f"comir-hpc {verb} --help".replace("  ", " ")
            table.writerow([name, f"{statistics.median(times):.3f}", f"{max(times):.3f}", given.rounds])


if __name__ == "__main__":
    main()
