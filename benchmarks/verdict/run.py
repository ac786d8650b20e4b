"""Measure the evidence of right and of wrong answers: the rows that the verdict's model is fitted to.

    python benchmarks/verdict/run.py --data DATA --work WORK --out benchmarks/verdict/rows.csv

Each pair (`made`) is represented once: by the general model, by a method without a model (`--methods`), or by encoders
that were trained (`--specialist NAME=RUN`). Its right answer is where the method itself ends, from a start beside the
truth; if it does not come back, that is a wrong answer. It ends where `register` does, after the grids of the checks on
the finest level that is compared. More wrong answers are the best distinct ones of a search over all rotations, half
turns of the right one, and local optima beside it. Each is measured by the package (`register.checks`) as if it
had won: only worse wrong answers are its rivals, since a right one among them would give it away. Rows are added pair
by pair, so that a stopped run continues. One process and one thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "general"))

import numpy as np
import torch
from cases import FILES, SUCCESS
from made import ACROSS, SPOILED, WITHOUT, Maker, Pair, families
from rows import add_rows, done_in, options_of

from comir_hpc.config import RegisterSettings
from comir_hpc.errors import ComirError
from comir_hpc.ingest import ingest_array
from comir_hpc.register.alignment import Aligned, Alignment
from comir_hpc.register.checks.again import SearchAgain
from comir_hpc.register.checks.evidence import probe_of
from comir_hpc.register.checks.measured import Measured, lead_of, measure
from comir_hpc.register.checks.mirror import exchanged, mirrored
from comir_hpc.register.checks.motions import known_motions
from comir_hpc.register.coarse import coarsen
from comir_hpc.register.inputs import Inputs, open_inputs
from comir_hpc.register.pair import Pair as FeaturePair
from comir_hpc.register.ranking import COARSE, FINE
from comir_hpc.register.slices import SlicePlane
from comir_hpc.runs.model import read_model
from comir_hpc.transforms import Transform

KEYS = ("family", "seed", "pair", "representation")
COLUMNS = (
    *KEYS,
    "kind",
    "tre_mm",
    "tre_share",
    "side_mm",
    "voxel_mm",
    *(
        name for name in Measured.__dataclass_fields__ if name != "itself"
    ),  # it is the pair's, not the answer's
    "seconds",
    "start",  # what led to the answer
)
METHODS = ("comir", "mind", "gradient", "intensity")
GENERAL = "comir"
SAME = 0.05  # answers nearer to each other, as a share of the mean side, are one
ROTATIONS, VOXELS, IMPROVED = 180, 20, 16
NEAR_VOX = 2.0  # distance of the start that leads to the right answer from the truth


def settings_of(method: str, folder: Path, specialists: dict[str, Path]) -> RegisterSettings:
    """Say how the two volumes in a folder are compared: by a word of --representation, or by a specialist's name."""
    given: dict = {name: folder / f"{name}.zarr" for name in ("fixed", "moving")}
    if method in specialists:
        fixed, moving = read_model(specialists[method]).modalities
        given |= {"model": specialists[method], "fixed_modality": fixed, "moving_modality": moving}
    else:
        given["representation"] = method
    return RegisterSettings(**given, out=folder / "out", threads=1)


def opened(pair: Pair, settings: RegisterSettings) -> Inputs:
    """Write both volumes and open them as a registration does."""
    for path, (values, grid) in ((settings.fixed, pair.fixed), (settings.moving, pair.moving)):
        ingest_array(values, grid, path, overwrite=True)
    return open_inputs(settings)


Start = tuple[str, Transform]
"""What a start is, and where it is."""


class Answers:
    """The answers of one pair: a probe to measure them on, and what refines them."""

    def __init__(self, pair: Pair, inputs: Inputs, settings: RegisterSettings) -> None:
        self.pair = pair
        planes = SlicePlane.from_grids(inputs.fixed.volume.grid, inputs.moving.volume.grid)
        self.probe = probe_of(inputs, planes)
        # As `register` does: maps that are searched at finer and finer scales need the finest level alone.
        self.carried = bool(inputs.searched_levels[0])
        self.own = own_pair(inputs, settings, by_steps=self.carried)

    def ended(self, start: Transform) -> Aligned:
        """Refine a start as a registration does, and measure where it ends on the finer grid of the checks."""
        probe, levels = self.probe, FINE[-1:] if self.carried else FINE
        if probe.optimised:
            start = probe.judged(start).transform
        else:  # the grid of the checks compares something else
            levels = COARSE + FINE
        return probe.judging.at(
            self.own.refiner.refine(start, levels).transform.about(probe.alignment.centre_mm)
        )

    def share(self, answer: Transform, truth: Transform) -> tuple[float, float]:
        """Measure the error in mm, and as a share of the mean side."""
        error = float(answer.distance_mm(truth, self.pair.points_mm).mean())
        return error, error / float(np.ptp(self.pair.points_mm, axis=0).mean())

    def searched(self) -> list[Start]:
        """Find the best answers of all rotations."""
        again = SearchAgain(ROTATIONS, VOXELS, IMPROVED, self.probe.points_mm)
        return [("search", one) for one in again.answers(*self.probe.sides)]

    def near(self, truth: Transform) -> Transform:
        """Make a start two voxels of the checks beside the truth."""
        return truth.compose(known_motions(self.probe, 1, NEAR_VOX * self.probe.spacing_mm, seed=11)[0])

    def beside(self, truth: Transform) -> list[Start]:
        """Make wrong starts from the truth: half turns about the main axes, and a wrong pre-alignment."""
        centre, axes = self.probe.alignment.centre_mm, self.probe.axes[0]
        turns = [2 * np.outer(axis, axis) - np.eye(3) for axis in axes.T]
        halves = [truth.compose(Transform.rigid(turn, np.zeros(3), centre)) for turn in turns]
        far = known_motions(self.probe, 2, 9 * self.probe.spacing_mm, seed=3)
        return [("half turn", one) for one in halves] + [("pre-alignment", truth.compose(one)) for one in far]

    def mirror(self, best: Transform) -> float:
        """Score the mirrored moving volume at its best answer that is found from the unmirrored one."""
        probe = self.probe
        coarse = Alignment(probe.fixed, coarsen(mirrored(probe.sides[1]), probe.spacing_mm, finer=2))
        finer = probe.judging_with(mirrored(probe.finer[1]))
        found = [coarse.improve(one.about(coarse.centre_mm), 8) for one in exchanged(best, probe)]
        return finer.improve(max(found, key=lambda one: one.evidence).transform, 8).evidence


def own_pair(inputs: Inputs, settings: RegisterSettings, *, by_steps: bool) -> FeaturePair:
    """Make what a registration refines with, at the level that it compares."""
    sides = inputs.fixed.features()[0], inputs.moving.features()[0]
    return FeaturePair(*sides, inputs.measure, settings, by_steps=by_steps)


def rows_of(answers: Answers, truth: Transform | None, starts: list[Start], wanted: int) -> list[dict]:
    """Refine and measure the answers of a pair: the right one, and the best wrong ones.

    As in a registration, the answer that is judged is refined to the end, and its rivals on the grids of the checks.
    """
    probe = answers.probe

    def differs(one: Transform, other: Transform) -> bool:
        return probe.apart_vox(one, other) * probe.spacing_mm >= SAME * probe.side_mm

    def error_of(answer: Transform) -> tuple[float, float]:
        return (np.inf, np.inf) if truth is None else answers.share(answer, truth)

    chosen = [] if truth is None else [("truth", answers.ended(answers.near(truth)))]
    others: list[tuple[str, Aligned]] = []
    for name, start in starts:
        judged = probe.judged(start)
        if error_of(judged.transform)[1] <= 2 * SUCCESS:
            continue
        if all(differs(judged.transform, one.transform) for _, one in chosen + others):
            others.append((name, judged))
    others.sort(key=lambda one: -one[1].evidence)
    ends = [(name, answers.ended(one.transform)) for name, one in others[:wanted]]
    chosen += [one for one in ends if error_of(one[1].transform)[1] > 2 * SUCCESS]
    if not chosen:
        return []
    mirror, rows = answers.mirror(chosen[0][1].transform), []
    for name, end in chosen:
        begun = time.process_time()
        error, share = error_of(end.transform)
        apart = [one.evidence for _, one in others if differs(one.transform, end.transform)]
        kind = "right" if share <= SUCCESS else "near" if share <= 2 * SUCCESS else "wrong"
        rivals = [one for one in apart if kind != "wrong" or one <= end.evidence]
        found = measure(probe, end.transform, rivals=rivals, mirror=lead_of(end.evidence, mirror))
        rows.append(
            {"kind": kind, "tre_mm": error, "tre_share": share, "side_mm": probe.side_mm,
             "voxel_mm": probe.spacing_mm, **asdict(found), "seconds": time.process_time() - begun, "start": name}
        )  # fmt: skip
    return rows


def run_pair(maker: Maker, named: dict, options: argparse.Namespace) -> None:
    """Measure one pair, unless its rows are there."""
    if tuple(named.values()) in options.known:
        return
    pair, begun = maker.pair(named["pair"]), time.process_time()
    try:
        settings = settings_of(named["representation"], options.work, options.specialists)
        answers = Answers(pair, opened(pair, settings), settings)
        if pair.truth is None:
            starts = answers.searched()[:4]
        else:
            known = maker.searched.setdefault(named["representation"], [])
            if not known:
                known += answers.searched()[:3]
            starts = known + (answers.beside(pair.truth) if options.wrong else [])
        rows = rows_of(answers, pair.truth, starts, options.wrong)
    except ComirError as error:
        print(*named.values(), error, flush=True)
        return
    add_rows(options.out, [named | row for row in rows], COLUMNS)
    shown = [(row["kind"], round(row["agreement"], 2), round(row["chance"] or 0)) for row in rows]
    print(*named.values(), shown, f"{time.process_time() - begun:.1f} s", flush=True)


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the families' files")
    parser.add_argument("--work", type=Path, required=True, help="folder for volumes; emptied again")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(FILES), default=[n for n in FILES if n != "embedded_1mm"]
    )
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[GENERAL])
    parser.add_argument(
        "--specialist",
        nargs="+",
        default=[],
        metavar="NAME=RUN",
        help="encoders of a run, under a name in the rows",
    )
    parser.add_argument("--across", type=int, default=ACROSS, help="voxels along the mean side of a specimen")
    parser.add_argument("--pairs", nargs="+", choices=(*SPOILED, *WITHOUT), default=[*SPOILED, *WITHOUT])
    parser.add_argument("--seed", type=int, default=500, help="first seed; from 500 on for tuning")
    parser.add_argument("--seeds", type=int, default=6, help="displacements of each family")
    parser.add_argument(
        "--wrong", type=int, default=2, help="wrong answers of each pair beside the end near the truth"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    options.known = done_in(options.out, KEYS)
    options.specialists = {
        name: Path(run) for name, _, run in (one.partition("=") for one in options.specialist)
    }
    every = families(options.data, options.only)
    for seed in range(options.seed, options.seed + options.seeds):
        makers = {}
        for name, family in every.items():
            others = [other for other in every.values() if unrelated(name, other.name)]
            other = (others or [family])[seed % max(1, len(others))]
            makers[name] = Maker(family, seed, other, options.across)
        for pair in options.pairs:
            if pair in WITHOUT and (WITHOUT.index(pair) + seed) % 2:
                continue  # half of these in every seed
            for method in [*options.methods, *options.specialists]:
                for name, maker in makers.items():
                    values = (name, str(seed), pair, method)
                    run_pair(maker, dict(zip(KEYS, values, strict=True)), options)
    shutil.rmtree(options.work)


def unrelated(one: str, other: str) -> bool:
    """Say whether two families show different things: a head and a piece of concrete."""
    return (one == "concrete") != (other == "concrete")


if __name__ == "__main__":
    main()
