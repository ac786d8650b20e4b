"""Print the table of docs/general.md from the rows of `run.py`: success, error, verdicts, family by family.

python benchmarks/general/table.py benchmarks/general/cases.csv
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from pathlib import Path

from comir_hpc.recipes.benchmark.scores import wilson

KNOWN = {"embedded", "embedded_1mm", "avg152_t2", "avg152_pd"}
"""Families whose anatomy, or a close kin of it, lent its shape to the training."""


def main(path: Path) -> None:
    """Print one line a family and method."""
    rows = list(csv.DictReader(line for line in path.open(encoding="utf-8") if not line.startswith("#")))
    print("| family | method | right | 95 % | mean TRE of these | PASS, WARN, FAIL of right | of wrong |")
    print("|---|---|---|---|---|---|---|")
    for family in dict.fromkeys(row["family"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows if row["family"] == family):
            some = [row for row in rows if (row["family"], row["method"]) == (family, method)]
            right = [row for row in some if row["success"] == "True"]
            wrong = [row for row in some if row["success"] != "True"]
            low, high = wilson(len(right), len(some))
            error = statistics.mean(float(row["tre_mm"]) for row in right) if right else math.nan
            counts = [
                ", ".join(str(sum(row["verdict"] == v for row in group)) for v in ("PASS", "WARN", "FAIL"))
                for group in (right, wrong)
            ]
            mark = " (seen)" if family in KNOWN and method == "comir" else ""
            print(
                f"| {family}{mark} | {method} | {len(right)} of {len(some)} | {low:.0%} to {high:.0%} | "
                f"{error:.2f} mm | {counts[0]} | {counts[1]} |"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
