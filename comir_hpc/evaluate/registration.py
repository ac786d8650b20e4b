"""Measure a registration against a known transform: target registration error, success, methods side by side."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.geometry import FloatArray, Grid
from comir_hpc.padding import Unpadded
from comir_hpc.points import read_point_table
from comir_hpc.rotations import angle_deg
from comir_hpc.transforms import Transform, load_transform
from comir_hpc.volume import Volume

SUCCESS_SHARE = 0.02  # of the mean side: the success criterion of the CoMIR line of papers
_NUM_POINTS = 2000


@dataclass(frozen=True)
class Evaluation:
    """How far one registration is from the truth.

    Errors are distances between where the found and the true transform put the same fixed points; the rotation's is
    the angle from the true rotation to the found one, without scale and shear.
    """

    result: str
    representation: str
    initial: str
    verdict: str
    num_points: int
    tre_mm: float
    tre_median_mm: float
    tre_p95_mm: float
    tre_voxels: float
    rotation_error_deg: float
    success: bool
    seconds: float


@dataclass(frozen=True)
class Table:
    """Evaluations side by side."""

    rows: tuple[Evaluation, ...]

    @property
    def text(self) -> str:
        """Comma-separated, with a header."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([f.name for f in fields(Evaluation)])
        for row in self.rows:
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in asdict(row).values()])
        return out.getvalue().rstrip("\n")


def target_registration_error(found: Transform, true: Transform, points_mm: FloatArray) -> FloatArray:
    """Distances in mm, shape (N,), between the images of fixed points (N, 3) under two transforms."""
    distance: FloatArray = np.linalg.norm(found.apply(points_mm) - true.apply(points_mm), axis=-1)
    return distance


def specimen_points(volume: Volume, count: int = _NUM_POINTS) -> FloatArray:
    """Points spread over the specimen: world (x, y, z) in mm, shape (N, 3), the same at every call.

    They are centres of foreground voxels of the finest level that has at most 160 voxels a side.

    Raises
    ------
    VolumeError
        If no voxel is foreground.
    """
    level = next(
        (k for k in range(volume.num_levels) if max(volume.level_grid(k).shape_zyx) <= 160),
        volume.num_levels - 1,
    )
    mask = volume.intensity().foreground(Unpadded(volume).read(level=level)[0])
    index = np.argwhere(mask)
    if not len(index):
        raise VolumeError(f"{volume.path} has no foreground; give points with --points")
    chosen = np.random.default_rng(0).permutation(len(index))[:count]
    return volume.level_grid(level).world_mm(index[np.sort(chosen)])


def evaluate(
    results: Sequence[Path], truth: Path, *, points: Path | None = None, out: Path | None = None
) -> Table:
    """Measure folders that `register` wrote against one true transform.

    Each folder's result.json gets an entry ``truth`` with the errors, so that its report shows them.

    Parameters
    ----------
    truth : Path
        The true transform, fixed to moving points.
    points : Path, optional
        CSV of fixed points; otherwise points of the fixed volume's foreground.
    out : Path, optional
        CSV to write.

    Raises
    ------
    RegistrationError
        If a folder has no result.
    """
    true = load_transform(truth)
    rows = []
    for folder in results:
        record = read_result(folder)
        grid = Grid.from_dict(record["inputs"]["fixed"]["grid"])
        fixed = Path(record["inputs"]["fixed"]["path"])
        targets = read_point_table(points).points_mm if points else specimen_points(Volume.open(fixed))
        found = Transform(np.asarray(record["matrix_lps_mm"]))
        error = target_registration_error(found, true, targets)
        turned = float(angle_deg(found.rotation_xyz.T @ true.rotation_xyz))
        rows.append(_evaluation(folder, record, error, turned, grid))
        record["truth"] = {
            "matrix_lps_mm": true.matrix_mm.tolist(),
            **{
                k: v
                for k, v in asdict(rows[-1]).items()
                if k.startswith("tre") or k in ("num_points", "rotation_error_deg", "success")
            },
        }
        write_result(folder, record)
    table = Table(tuple(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table.text + "\n", encoding="utf-8")
    return table


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a folder that `register` wrote.

    Raises
    ------
    RegistrationError
        If there is none.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise RegistrationError(f"{path} does not exist; expected a folder that `comir-hpc register` wrote")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_result(folder: Path, record: dict[str, Any]) -> None:
    """Replace a folder's result.json as a whole."""
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "result.json")


def _evaluation(
    folder: Path, record: dict[str, Any], error_mm: FloatArray, rotation_error_deg: float, grid: Grid
) -> Evaluation:
    mean = float(error_mm.mean())
    return Evaluation(
        result=str(folder),
        representation=record["settings"]["representation"],
        initial=record["settings"]["initial"],
        verdict=record["verdict"],
        num_points=len(error_mm),
        tre_mm=mean,
        tre_median_mm=float(np.median(error_mm)),
        tre_p95_mm=float(np.percentile(error_mm, 95)),
        tre_voxels=mean / grid.finest_mm,
        rotation_error_deg=rotation_error_deg,
        success=bool(mean <= SUCCESS_SHARE * grid.mean_side_mm),
        seconds=float(sum(record["timings_s"].values())),
    )
