"""Time the search: 4000 rotations and all shifts, answers told apart at 64 voxels a side.

    python benchmarks/general/search_time.py --out benchmarks/general/search_time.csv

A made specimen of 96^3 voxels is turned by 137 degrees. What is timed is all that `register` does from the features to
the starts. The row also says how many starts lie within two voxels of the truth, and how far the first is from it. CPU
seconds stand beside the time by the clock, which other programs on the machine lengthen.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rows import add_rows, options_of
from scipy import ndimage
from scipy.spatial.transform import Rotation

from comir_hpc.register.starts import Scale, StartFinder
from comir_hpc.representations import CORRELATION, Features
from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import reverse_axes, so3_grid
from comir_hpc.transforms import Transform

COLUMNS = (
    "voxels",
    "rotations",
    "threads",
    "seconds",
    "cpu_seconds",
    "first_error_vox",
    "near_starts",
    "starts",
)


def made_pair(side: int, truth: Transform) -> tuple[Features, Features]:
    """Make structures of two sizes in an ellipsoid, and the same turned."""
    rng = np.random.default_rng(0)
    grid = Grid((side, side, side), (1.0, 1.0, 1.0))
    centred = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij"))
    mask = ((centred / np.array([0.75, 0.85, 0.7])[:, None, None, None]) ** 2).sum(axis=0) < 1
    values = sum(ndimage.gaussian_filter(rng.normal(size=mask.shape), s) * s**1.5 for s in (1.5, 4.0))
    values = np.where(mask, values, 0).astype(np.float32)
    back = np.linalg.inv(grid.matrix_mm) @ truth.inverse().matrix_mm @ grid.matrix_mm
    moved, there = (
        ndimage.affine_transform(one.astype(np.float32), back[:3, :3], back[:3, 3], order=1)
        for one in (values, mask)
    )
    return Features(values[None], mask, grid), Features(moved[None], there > 0.5, grid)


def main() -> None:
    """Time one search and write its row."""
    parser = options_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--voxels", type=int, default=64)
    parser.add_argument("--rotations", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    centre = np.full(3, 47.5)
    turn = Rotation.from_rotvec(np.radians(137) * np.array([1, 2, -0.5]) / np.linalg.norm([1, 2, -0.5]))
    truth = Transform.rigid(turn.as_matrix(), (3.0, -2.0, 1.0), centre)
    fixed, moving = made_pair(96, truth)
    points = fixed.grid.world_mm(np.argwhere(fixed.mask)[::200])
    finder = StartFinder(CORRELATION, points, 8, options.voxels, options.threads)
    start, cpu = time.perf_counter(), time.process_time()
    starts, _ = finder.at_one_scale(Scale(fixed, moving), reverse_axes(so3_grid(options.rotations)), None)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    errors = [float(one.distance_mm(truth, points).mean()) for one, _ in starts]
    near = sum(e < 2 for e in errors)
    figures = (options.voxels, options.rotations, options.threads, seconds, cpu, errors[0], near, len(starts))
    row = dict(zip(COLUMNS, figures, strict=True))
    add_rows(options.out, [row], COLUMNS, digits=3)
    print(row)


if __name__ == "__main__":
    main()
