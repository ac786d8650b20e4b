"""Register the families of pairs with a known answer from many displacements, by several methods.

    python benchmarks/general/run.py --data DATA --work WORKDIR --out benchmarks/general/cases.csv

This is `comir-hpc benchmark` with the protocol of docs/general.md: the same cases, one after the other, with one
thread. Rows are added one by one, so that a stopped run continues. --only takes a part of the families. `comir-hpc
datasets fetch` writes the families into DATA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from comir_hpc.config.benchmark import BenchmarkRunSettings, BenchmarkSettings, all_methods
from comir_hpc.config.words import DEGRADATIONS, FAMILIES, LEVELS
from comir_hpc.recipes.benchmark.run import benchmark

METHODS = ("comir", "mind", "intensity")


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
    parser.add_argument(
        "--model", type=Path, help="run folder of a general model; the one in the package if left out"
    )
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["small", "medium", "large", "any"])
    parser.add_argument("--degradations", nargs="+", choices=DEGRADATIONS, default=["none"])
    parser.add_argument("--methods", nargs="+", choices=all_methods(), default=list(METHODS))
    parser.add_argument("--peers", type=Path, help="folder that other programs were installed into")
    parser.add_argument("--time-limit", type=float, default=7200, help="seconds a method and case")
    parser.add_argument(
        "--seed", type=int, default=500, help="first seed; from 500 on for tuning, from 0 for figures"
    )
    parser.add_argument("--seeds", type=int, default=5, help="displacements of each level")
    options = parser.parse_args()
    settings = BenchmarkSettings(
        pairs=tuple(options.only),
        data=options.data,
        levels=tuple(options.levels),
        degradations=tuple(options.degradations),
        methods=tuple(options.methods),
        first_seed=options.seed,
        seeds=options.seeds,
        model=options.model,
        peers=options.peers,
        time_limit_s=options.time_limit,
    )
    run = BenchmarkRunSettings(config=Path(__file__), out=options.out, work=options.work)
    done = benchmark(settings, run, tell=show)
    print(done.summary)


def show(row: dict[str, object]) -> None:
    """Print a row as it is added."""
    kept = {key: value for key, value in row.items() if key != "given" and value not in (None, "")}
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in kept.items()}, flush=True)


if __name__ == "__main__":
    main()
