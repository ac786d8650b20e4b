"""Train encoders for one family as `comir-hpc adapt` does once it has found the alignment: the known one is taken here.

    python benchmarks/verdict/specialists.py --data DATA --work RUNS --only t1_epi
    python benchmarks/verdict/run.py ... --specialist adapted=RUNS/t1_epi/run --only t1_epi template_epi --across 96

They are rows of what a trained model sees, on the specimen that it was trained on and on others. A specialist of the
embedded pair is what `comir-hpc demo` leaves in demo/run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from comir_hpc.config.adapt import AdaptSettings
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.config.words import FAMILIES
from comir_hpc.data.families import family
from comir_hpc.ingest import ingest
from comir_hpc.recipes.adaptation import Adaptation, Alignment


def main() -> None:
    """Train one specialist after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the families' files")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and runs")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=["t1_epi"])
    parser.add_argument("--steps", type=int, default=100, help="training steps, as for a candidate of adapt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        pair, folder = family(name, options.data), options.work / name
        stores = {role: folder / f"{role}.zarr" for role in ("fixed", "moving")}
        for path, store in zip(pair.files, stores.values(), strict=True):
            ingest(IngestSettings(source=path, out=store))
        assert pair.answer.transform is not None
        work = Adaptation(AdaptSettings(**stores, run=folder, steps=options.steps, threads=1), None)
        found = work.train_on(
            Alignment(pair.answer.transform, "known"), "run", work.start, options.steps, (1, 4)
        )
        print(f"{name}: {found.held_out:.0%} of the held-out cells find their place", flush=True)


if __name__ == "__main__":
    main()
