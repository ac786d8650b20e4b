"""Seconds until `comir-hpc --help` has printed its page.

    python benchmarks/help.py --out benchmarks/help.csv

Every verb's help too: nobody waits for torch to learn what an option means. Each is a process that starts anew. The
fastest start is what the program needs; the median also has what else the machine did meanwhile. `processor` is the
least processor time of a start.
"""

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

VERBS = ("", "ingest", "train", "infer", "register", "warp", "evaluate", "report", "demo", "doctor", "sync")


def seconds(verb: str) -> tuple[float, float]:
    """Wall and processor time of one start."""
    begun, used = time.perf_counter(), _processor_seconds()
    words = [verb] if verb else []
    subprocess.run([sys.executable, "-m", "comir_hpc", *words, "--help"], check=True, capture_output=True)
    return time.perf_counter() - begun, _processor_seconds() - used


def _processor_seconds() -> float:
    """Processor time of all children that ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def main() -> None:
    """All verbs, in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    found = [[seconds(verb) for verb in VERBS] for _ in range(given.rounds)]
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["command", "fastest", "median", "slowest", "processor", "rounds"])
        for verb, starts in zip(VERBS, zip(*found, strict=True), strict=True):
            name = f"comir-hpc {verb} --help".replace("  ", " ")
            times, used = zip(*starts, strict=True)
            figures = (min(times), statistics.median(times), max(times), min(used))
            table.writerow([name, *(f"{number:.3f}" for number in figures), given.rounds])


if __name__ == "__main__":
    main()
