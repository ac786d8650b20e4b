"""Measure registrations side by side: against a known transform, corresponding points, or labels of both volumes.

What a transform does to space is measured in any case: folds, and what is left after a point is carried there and back.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from pathlib import Path

import numpy as np

from comir_hpc.config.words import TransformForm
from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.evaluate.labels import Overlap, label_overlaps, means
from comir_hpc.host.files import write_text
from comir_hpc.runs.record import brief
from comir_hpc.runs.result import INVERSE_FILE, RESULT_FILE, Errors, Result, read_result, write_result
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.space.rotations import angle_deg
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.transforms.files import read_transform
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.volumes.padding import Unpadded
from comir_hpc.volumes.points import PointTable, read_point_table
from comir_hpc.volumes.volume import Volume

SUCCESS_SHARE = 0.02  # of the mean side: the success criterion of the CoMIR line of papers
_NUM_POINTS = 2000


@dataclass(frozen=True)
class Evaluation:
    """How far one registration is from the truth.

    An error is the distance between the place to which a fixed point is put and the place where it belongs. The true
    transform says where that is, or the corresponding point of the moving volume. The rotation error is the angle
    between the true rotation and the found one, without scale and shear. Errors are NaN if a registration failed
    without an answer, or where nothing says what is true.

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
        Rotation error in degrees; of a transform that bends, that of its affine part. NaN where the truth bends.
    success : bool
        Whether the mean error is at most 2 % of the fixed grid's mean side; False where nothing says what is true.
    seconds : float
        Time that the registration took, in seconds.
    dice : float
        Mean overlap of the structures of both volumes, 0 to 1; NaN without labels.
    hd95_mm : float
        Mean 95th percentile of the distance between their surfaces, in mm; NaN without labels.
    determinant_least : float
        Least determinant of the transform's Jacobian over the specimen; zero or less where space is folded.
    folded_share : float
        Share of the specimen's points where it is zero or less.
    inverse_mm : float
        Mean distance of a point from where it was after it was carried there and back, in mm: by the inverse that the
        registration wrote, or by the registration in the opposite direction if that is given.
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
    dice: float = math.nan
    hd95_mm: float = math.nan
    determinant_least: float = math.nan
    folded_share: float = math.nan
    inverse_mm: float = math.nan


@dataclass(frozen=True)
class Table:
    """Evaluations side by side.

    Attributes
    ----------
    rows : tuple of Evaluation
        Errors of each registration, in the order given.
    overlaps : tuple of tuple of Overlap
        Every structure's overlap, for each registration; empty without labels.
    notes : tuple of str
        Assumptions about the files, for the user to see.
    """

    rows: tuple[Evaluation, ...]
    notes: tuple[str, ...] = ()
    overlaps: tuple[tuple[Overlap, ...], ...] = ()

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


def target_registration_error(found: PointMap, true: PointMap, points_mm: FloatArray) -> FloatArray:
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
    truth: Path | None = None,
    *,
    points: Path | None = None,
    moving_points: Path | None = None,
    labels: tuple[Path, Path] | None = None,
    back: Path | None = None,
    out: Path | None = None,
    form: TransformForm | None = None,
) -> Table:
    """Measure folders that `register` wrote.

    Where a truth is given, each folder's result.json gets an entry ``truth`` with the errors, so that its report shows
    them.

    Parameters
    ----------
    results : sequence of Path
        Folders that `register` wrote.
    truth : Path, optional
        File of the true transform, which maps fixed to moving points; it may bend.
    points : Path, optional
        Table of fixed points (`read_point_table`). Without it, points of the fixed volume's foreground are used.
    moving_points : Path, optional
        Table of the moving points that `points` correspond to, row by row: the truth, where no transform is known.
    labels : two of Path, optional
        Stores of the fixed and the moving volume's labels.
    back : Path, optional
        Folder of a registration of the same pair in the opposite direction.
    out : Path, optional
        CSV file to write.
    form : str, optional
        Form of `truth`, where the file does not say it itself.

    Raises
    ------
    RegistrationError
        If a folder has no result, the result names no fixed volume, the two tables of points do not correspond, or a
        file cannot be written.
    VolumeError
        If the labels cannot be compared.
    """
    given = read_point_table(points) if points else None
    belong = _corresponding(given, points, moving_points)
    rows, overlaps = [], []
    for folder in results:
        result = read_result(folder)
        grid, fixed = _fixed_volume(folder, result)
        moving = result.inputs.get("moving")
        grids = GridPair(grid, None if moving is None else moving.space)
        true = None if truth is None else read_transform(truth, form, grids)
        targets = given.points_mm if given else specimen_points(Volume.open(fixed))
        places = true.apply(targets) if true is not None else belong
        row = _evaluation(folder, result, places, targets, grid, as_affine(true) if true else None)
        found = whole_transform(folder, result)
        if found is not None:
            least, folds, inverse = _of_space(folder, result, found, targets, back)
            row = replace(row, determinant_least=least, folded_share=folds, inverse_mm=inverse)
        if labels is not None and found is not None:
            overlaps.append(label_overlaps(*labels, found))
            dice, distance = means(overlaps[-1])
            row = replace(row, dice=dice, hd95_mm=distance)
        rows.append(row)
        if true is not None:
            _record_errors(folder, result, row, true)
    table = Table(tuple(rows), given.notes if given else (), tuple(overlaps))
    if out is not None:
        _write_table(out, table)
    return table


def _record_errors(folder: Path, result: Result, row: Evaluation, true: PointMap) -> None:
    """Write the errors, and the truth where it is linear, into a result: its report shows them."""
    linear = as_affine(true)
    errors = {key: value for key, value in asdict(row).items() if key in Errors.model_fields}
    matrix = {} if linear is None else {"matrix_lps_mm": linear.matrix_mm.tolist()}
    _write(folder, result.with_entries(truth={**matrix, **errors}))


def _write_table(path: Path, table: Table) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, table.text + "\n")
    except OSError as error:
        raise RegistrationError(f"{path} cannot be written ({brief(error)}); give another --out") from error


def whole_transform(folder: Path, result: Result) -> PointMap | None:
    """Read the transform of a result, bent or not; None where no answer was found.

    Raises
    ------
    RegistrationError
        If it bends, and its file is missing or damaged.
    """
    return read_transform(folder / result.transform_file) if result.bends else result.transform


def _corresponding(
    given: PointTable | None, points: Path | None, moving_points: Path | None
) -> FloatArray | None:
    """Read the moving points that the fixed ones belong to."""
    if moving_points is None:
        return None
    assert given is not None
    table = read_point_table(moving_points)
    if len(table.points_mm) != len(given.points_mm):
        raise RegistrationError(
            f"{points} has {len(given.points_mm)} points, {moving_points} has {len(table.points_mm)}; expected the "
            "same landmarks in the same order in both"
        )
    return table.points_mm


def _of_space(
    folder: Path, result: Result, found: PointMap, targets_mm: FloatArray, back: Path | None
) -> tuple[float, float, float]:
    """Measure what a transform does to space: its least determinant, the share of folds, and the way back in mm."""
    linear = 1.0 if result.transform is None else result.transform.determinant
    bent = result.deformation if result.bends else None
    least = linear if bent is None else linear * bent.determinant.get("least", math.nan)
    folds = 0.0 if bent is None else bent.folded_share
    inverse: PointMap | None
    if back is not None:
        inverse = whole_transform(back, read_result(back))
    else:
        inverse = read_transform(folder / INVERSE_FILE) if bent is not None else found.inverse()
    if inverse is None:
        return least, folds, math.nan
    returned = inverse.apply(found.apply(targets_mm))
    return least, folds, float(np.linalg.norm(returned - targets_mm, axis=1).mean())


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
    folder: Path,
    result: Result,
    places_mm: FloatArray | None,
    targets_mm: FloatArray,
    grid: Grid,
    true: Affine | None,
) -> Evaluation:
    """Measure the distances to `places_mm`, where the targets belong; `true` is the truth where it is affine."""
    found, affine = whole_transform(folder, result), result.transform
    error_mm, turned = np.full(len(targets_mm), np.nan), math.nan
    if found is not None and places_mm is not None:
        error_mm = np.linalg.norm(found.apply(targets_mm) - places_mm, axis=-1)
    if affine is not None and true is not None:
        turned = float(angle_deg(affine.rotation_xyz.T @ true.rotation_xyz))
    mean = float(error_mm.mean())
    return Evaluation(
        result=str(folder),
        representation=result.representation or str(result.settings.get("representation", "")),
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
