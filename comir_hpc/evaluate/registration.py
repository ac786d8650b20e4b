"""Measure a registration against a known transform: target registration error, success, methods side by side."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path

import numpy as np

from comir_hpc.config.words import TransformForm
from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.host.files import write_text
from comir_hpc.runs.record import brief
from comir_hpc.runs.result import RESULT_FILE, Errors, Result, read_result, write_result
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.space.rotations import angle_deg
from comir_hpc.transforms import Transform
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.transforms.files import load_transform
from comir_hpc.volumes.padding import Unpadded
from comir_hpc.volumes.points import read_point_table
from comir_hpc.volumes.volume import Volume

SUCCESS_SHARE = 0.02  # of the mean side: the success criterion of the CoMIR line of papers
_NUM_POINTS = 2000


@dataclass(frozen=True)
class Evaluation:
    """How far one registration is from the truth.

    Errors are distances between the places to which the found and the true transform put the same fixed points. The
    rotation error is the angle between the true rotation and the found one, without scale and shear. All errors are NaN
    if a registration failed without an answer.

    Attributes
    ----------
    result : str
        Folder of the registration.
    representation : str
        What was compared, as in the settings of `register`.
    initial : str
        Where the registration started from, as in the settings of `register`.
    verdict : str
        Verdict of the registration: PASS, WARN or FAIL.
    num_points : int
        Number of points that were measured.
    tre_mm, tre_median_mm, tre_p95_mm : float
        Mean, median and 95th percentile of the target registration error, in mm.
    tre_voxels : float
        Mean error in voxels of the fixed grid's finest spacing.
    rotation_error_deg : float
        Rotation error in degrees.
    success : bool
        Whether the mean error is at most 2 % of the fixed grid's mean side.
    seconds : float
        Time that the registration took, in seconds.
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
    """Evaluations side by side.

    Attributes
    ----------
    rows : tuple of Evaluation
        Errors of each registration, in the order given.
    notes : tuple of str
        Assumptions about the files, for the user to see.
    """

    rows: tuple[Evaluation, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The rows as comma-separated text, with a header."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([f.name for f in fields(Evaluation)])
        for row in self.rows:
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in asdict(row).values()])
        return out.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        """Show one row for each result in a notebook."""
        header, *lines = csv.reader(io.StringIO(self.text))
        cells = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
        cells += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines]
        return f"<table>{''.join(cells)}</table>"


def target_registration_error(found: Transform, true: Transform, points_mm: FloatArray) -> FloatArray:
    """Measure the distances in mm, (N,), between the places to which two transforms put fixed points (N, 3)."""
    distance: FloatArray = np.linalg.norm(found.apply(points_mm) - true.apply(points_mm), axis=-1)
    return distance


def specimen_points(volume: Volume, count: int = _NUM_POINTS) -> FloatArray:
    """Spread points over the specimen: world (x, y, z) in mm, shape (N, 3), the same at every call.

    They are centres of foreground voxels of the finest level that has at most 160 voxels along each side.

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
    # Voxels at even steps through the list would follow its rows and planes: a random choice does not.
    index = np.argwhere(mask)
    if not len(index):
        raise VolumeError(f"{volume.path} has no foreground; give points with --points")
    chosen = np.random.default_rng(0).permutation(len(index))[:count]
    return volume.level_grid(level).world_mm(index[np.sort(chosen)])


def evaluate(
    results: Sequence[Path],
    truth: Path,
    *,
    points: Path | None = None,
    out: Path | None = None,
    form: TransformForm | None = None,
) -> Table:
    """Measure folders that `register` wrote against one true transform.

    Each folder's result.json gets an entry ``truth`` with the errors, so that its report shows them.

    Parameters
    ----------
    results : sequence of Path
        Folders that `register` wrote.
    truth : Path
        File of the true transform, which maps fixed to moving points.
    points : Path, optional
        Table of fixed points (`read_point_table`). Without it, points of the fixed volume's foreground are used.
    out : Path, optional
        CSV file to write.
    form : str, optional
        Form of `truth`, where the file does not say it itself.

    Raises
    ------
    RegistrationError
        If a folder has no result, the result names no fixed volume, or a file cannot be written.
    """
    given = read_point_table(points) if points else None
    rows = []
    for folder in results:
        result = read_result(folder)
        grid, fixed = _fixed_volume(folder, result)
        moving = result.inputs.get("moving")
        true = load_transform(truth, form, GridPair(grid, None if moving is None else moving.space))
        targets = given.points_mm if given else specimen_points(Volume.open(fixed))
        row = _evaluation(folder, result, true, targets, grid)
        rows.append(row)
        errors = {key: value for key, value in asdict(row).items() if key in Errors.model_fields}
        changed = result.with_entries(truth={"matrix_lps_mm": true.matrix_mm.tolist(), **errors})
        _write(folder, changed)
    table = Table(tuple(rows), given.notes if given else ())
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, table.text + "\n")
        except OSError as error:
            raise RegistrationError(
                f"{out} cannot be written ({brief(error)}); give another --out"
            ) from error
    return table


def _write(folder: Path, result: Result) -> None:
    try:
        write_result(folder, result)
    except OSError as error:
        raise RegistrationError(
            f"{folder / RESULT_FILE} cannot be written ({brief(error)}), which is where the errors go; copy the folder "
            "to a place that can be written to, and evaluate the copy"
        ) from error


def _fixed_volume(folder: Path, result: Result) -> tuple[Grid, Path]:
    fixed = result.inputs.get("fixed")
    grid = None if fixed is None else fixed.space
    if fixed is None or grid is None:
        raise RegistrationError(
            f"{folder / RESULT_FILE} names no fixed volume with its grid; run the registration again"
        )
    return grid, Path(fixed.path)


def _evaluation(
    folder: Path, result: Result, true: Transform, targets_mm: FloatArray, grid: Grid
) -> Evaluation:
    found = result.transform
    if found is None:
        error_mm, turned = np.full(len(targets_mm), np.nan), math.nan
    else:
        error_mm = target_registration_error(found, true, targets_mm)
        turned = float(angle_deg(found.rotation_xyz.T @ true.rotation_xyz))
    mean = float(error_mm.mean())
    return Evaluation(
        result=str(folder),
        representation=str(result.settings.get("representation", "")),
        initial=str(result.settings.get("initial", "")),
        verdict=result.verdict or "",
        num_points=len(error_mm),
        tre_mm=mean,
        tre_median_mm=float(np.median(error_mm)),
        tre_p95_mm=float(np.percentile(error_mm, 95)),
        tre_voxels=mean / grid.finest_mm,
        rotation_error_deg=turned,
        success=bool(mean <= SUCCESS_SHARE * grid.mean_side_mm),
        seconds=float(sum(result.timings_s.values())),
    )
