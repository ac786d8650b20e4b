"""The same bent pairs by elastix and by ANTs: an affine transform first, then B-splines or SyN, by mutual information.

Both are given what their own documentation gives: elastix its default parameter maps ``affine`` and ``bspline`` with
AdvancedMattesMutualInformation and the control points 16 mm apart, ANTs ``SyNRA``'s settings with Mattes information in
all stages. Only the number of threads is changed. Points go through each tool's own program for points.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from made import BentCase

from comir_hpc.space.grid import Grid
from comir_hpc.transforms.itk import array_and_grid
from comir_hpc.transforms.jacobian import folded, least_determinant

_CONTROL_MM = "16"


def by_peer(
    case: BentCase, folder: Path, method: str, residual_vox: Callable[[BentCase, np.ndarray], np.ndarray]
) -> dict:
    """Register by another tool, from where the headers put the volumes."""
    out = folder / method.replace(" ", "-")
    out.mkdir(exist_ok=True)
    affine, whole, folds = (_elastix if method.startswith("elastix") else _ants)(case, out)
    error = residual_vox(case, whole)
    return {
        "affine_vox": residual_vox(case, affine).mean(),
        "residual_vox": error.mean(),
        "p95_vox": np.percentile(error, 95),
        "folds": folds,
    }


def _elastix(case: BentCase, out: Path) -> tuple[np.ndarray, np.ndarray, int]:
    import itk

    fixed, moving = (itk.imread(str(p), itk.F) for p in (case.fixed, case.moving))
    parameters = itk.ParameterObject.New()
    parameters.AddParameterMap(itk.ParameterObject.GetDefaultParameterMap("affine", 4))
    parameters.AddParameterMap(itk.ParameterObject.GetDefaultParameterMap("bspline", 4, float(_CONTROL_MM)))
    for number in range(2):
        parameters.SetParameter(number, "AutomaticTransformInitialization", "false")
    _, found = itk.elastix_registration_method(
        fixed,
        moving,
        parameter_object=parameters,
        number_of_threads=1,
        output_directory=str(out),
        log_to_console=False,
    )
    affine = itk.ParameterObject.New()
    affine.AddParameterMap(found.GetParameterMap(0))
    moved = [_transformix(case.points_mm, moving, one, out) for one in (affine, found)]
    field = itk.transformix_deformation_field(moving, found, output_directory=str(out))
    grid = array_and_grid(_as_sitk(case.fixed))[1]
    return (
        moved[0],
        moved[1],
        _folds(np.asarray(itk.array_view_from_image(field), dtype=np.float64), grid, case),
    )


def _transformix(points_mm: np.ndarray, moving: object, parameters: object, out: Path) -> np.ndarray:
    import itk

    path = out / "points.txt"
    rows = "\n".join(" ".join(f"{v:.6f}" for v in point) for point in points_mm)
    path.write_text(f"point\n{len(points_mm)}\n{rows}\n", encoding="utf-8")
    itk.transformix_filter(
        moving,
        parameters,
        fixed_point_set_file_name=str(path),
        output_directory=str(out),
        log_to_console=False,
    )
    lines = (out / "outputpoints.txt").read_text(encoding="utf-8").splitlines()
    return np.asarray(
        [line.split("OutputPoint = [")[1].split("]")[0].split() for line in lines if line], dtype=float
    )


def _ants(case: BentCase, out: Path) -> tuple[np.ndarray, np.ndarray, int]:
    import ants
    import pandas

    fixed, moving = (ants.image_read(str(p)) for p in (case.fixed, case.moving))
    found = ants.registration(
        fixed,
        moving,
        type_of_transform="SyN",
        initial_transform="Identity",
        aff_metric="mattes",
        syn_metric="mattes",
        reg_iterations=(40, 20, 10),
        random_seed=1,
        outprefix=str(out / "ants"),
    )
    points = pandas.DataFrame(case.points_mm, columns=["x", "y", "z"])
    affine = [p for p in found["fwdtransforms"] if p.endswith(".mat")]
    moved = [ants.apply_transforms_to_points(3, points, files) for files in (affine, found["fwdtransforms"])]
    warp = next(p for p in found["fwdtransforms"] if p.endswith(".nii.gz"))
    field = np.moveaxis(ants.image_read(warp).numpy(), (0, 1, 2), (2, 1, 0))
    grid = array_and_grid(_as_sitk(case.fixed))[1]
    affine_points, whole_points = (np.asarray(m[["x", "y", "z"]], dtype=float) for m in moved)
    return affine_points, whole_points, _folds(field.astype(np.float64), grid, case)


def _folds(field_mm: np.ndarray, grid: Grid, case: BentCase) -> int:
    """Count the points of the specimen at which a field (z, y, x, 3) in mm folds."""
    places = grid.world_mm(np.moveaxis(np.indices(grid.shape_zyx), 0, -1))
    determinant = least_determinant(places + field_mm, grid)
    index = np.rint(grid.index_zyx(case.points_mm)).astype(int)
    return folded(determinant[tuple(index.T)])


def _as_sitk(path: Path) -> object:
    import SimpleITK as sitk

    return sitk.ReadImage(str(path))
