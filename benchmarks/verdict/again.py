"""Measure whether a repeated search finds an answer again: the short one, and the one with all rotations.

    python benchmarks/verdict/again.py --data DATA --work WORK --out benchmarks/verdict/again.csv

A right answer should be found again from another position, a wrong one need not. The right answer is where the method
ends from a start beside the truth, as in `run.py`; the wrong one is the best that a search leads to. Columns:
``short_vox`` is how far from the answer the short search ends, ``short_lead`` by how much the answer agrees better than
that end, and ``again_vox`` how far from it both searches end together. Up to 3 voxels count as found. ``all_cpu_s`` is
empty where the search with all rotations was not needed. ``probability`` is the calibration's, before any rule, and
``pass_from`` its cut of PASS: the rule on repeated searches decides only above it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "general"))  # after this folder: both have a run.py

import torch
from cases import FILES, SUCCESS
from made import ACROSS, SPOILED, WITHOUT, Maker, families
from rows import add_rows, done_in, options_of
from run import KEYS, METHODS, Answers, opened, settings_of

from comir_hpc.errors import ComirError
from comir_hpc.register.alignment import Aligned
from comir_hpc.register.checks.again import SearchAgain
from comir_hpc.register.checks.calibration import own_calibration
from comir_hpc.register.checks.evidence import repeats, search_again
from comir_hpc.register.checks.measured import lead_of, measure
from comir_hpc.register.checks.probe import Probe
from comir_hpc.representations.features import Features
from comir_hpc.transforms import Transform

COLUMNS = (
    *KEYS, "kind", "tre_share", "evidence", "probability", "pass_from", "short_vox", "short_lead", "again_vox",
    "short_cpu_s", "all_cpu_s",
)  # fmt: skip


@dataclass
class Once:
    """A repeated search that is done once for all answers of a pair, and only if it is asked for."""

    search: SearchAgain
    seconds: float | None = None
    found: list[Transform] = field(default_factory=list)

    def answers_turned(self, fixed: Features, moving: Features) -> list[Transform]:
        """Search, or give what was found before."""
        if self.seconds is None:
            begun = time.process_time()
            self.found = self.search.answers_turned(fixed, moving)
            self.seconds = time.process_time() - begun
        return list(self.found)


class Nothing:
    """A search that finds nothing: what is left is the short one."""

    def answers_turned(self, fixed: Features, moving: Features) -> list[Transform]:
        """Find nothing."""
        return []


def row_of(probe: Probe, answer: Aligned, rivals: list[float], short: Once, thorough: Once) -> dict:
    """Measure one answer."""
    where = answer.transform
    short_end, _ = search_again(probe, where, short, Nothing())  # type: ignore[arg-type]
    end, found = search_again(probe, where, short, thorough)  # type: ignore[arg-type]
    measured = measure(probe, where, rivals=rivals or [0.0])
    model = own_calibration()
    return {
        "evidence": answer.evidence,
        "probability": model.probability(measured),
        "pass_from": model.pass_from,
        "short_vox": probe.apart_vox(short_end, where),
        "short_lead": lead_of(answer.evidence, probe.judged(short_end).evidence),
        "again_vox": probe.apart_vox(end, where),
        "short_cpu_s": short.seconds,
        "all_cpu_s": thorough.seconds if len(found) > len(short.found) else None,
    }


def run_pair(maker: Maker, named: dict, options: argparse.Namespace) -> None:
    """Measure the right answer of a pair and a wrong one."""
    pair = maker.pair(named["pair"])
    settings = settings_of(named["representation"], options.work, options.specialists)
    try:
        answers = Answers(pair, opened(pair, settings), settings)
        probe = answers.probe
        short, thorough = map(Once, repeats(probe, settings, 1))
        searched = [probe.judged(start) for _, start in answers.searched()[:4]]
        chosen = [] if pair.truth is None else [answers.ended(answers.near(pair.truth))]
        far = [one for one in searched if is_far(answers, one, pair.truth)]
        chosen += sorted(far, key=lambda one: -one.evidence)[:1]
        rows = []
        for answer in chosen:
            rivals = [one.evidence for one in searched if one.evidence < answer.evidence]
            share = None if pair.truth is None else answers.share(answer.transform, pair.truth)[1]
            kind = "right" if share is not None and share <= SUCCESS else "wrong"
            row = row_of(probe, answer, rivals, short, thorough)
            rows.append(named | {"kind": kind, "tre_share": share} | row)
    except ComirError as error:
        print(*named.values(), error, flush=True)
        return
    add_rows(options.out, rows, COLUMNS)
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def is_far(answers: Answers, one: Aligned, truth: Transform | None) -> bool:
    """Say whether an answer is certainly wrong."""
    return truth is None or answers.share(one.transform, truth)[1] > 2 * SUCCESS


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the families' files")
    parser.add_argument("--work", type=Path, required=True, help="folder for volumes; emptied again")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(FILES), default=["concrete", "t1_epi"])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["comir", "mind"])
    parser.add_argument("--specialist", nargs="+", default=[], metavar="NAME=RUN", help="encoders of a run")
    parser.add_argument("--across", type=int, default=ACROSS, help="voxels along the mean side of a specimen")
    parser.add_argument("--pairs", nargs="+", choices=(*SPOILED, *WITHOUT), default=["plain", "other"])
    parser.add_argument("--seed", type=int, default=500, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="displacements of each family")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    options.specialists = {
        name: Path(run) for name, _, run in (one.partition("=") for one in options.specialist)
    }
    known = done_in(options.out, KEYS)
    every = families(options.data, tuple(FILES))
    for seed in range(options.seed, options.seed + options.seeds):
        for name in options.only:
            other = every["embedded" if name == "concrete" else "concrete"]
            maker = Maker(every[name], seed, other, options.across)
            for pair in options.pairs:
                for method in [*options.methods, *options.specialists]:
                    values = (name, str(seed), pair, method)
                    if values not in known:
                        run_pair(maker, dict(zip(KEYS, values, strict=True)), options)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
