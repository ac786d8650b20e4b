"""What `export` writes, applied by ANTs and by transformix: the same voxels and points as SimpleITK's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from registration_cases import OBLIQUE, turn
from test_conventions import bspline, field

from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine, Composite, GridPair, PointMap, itk_form, itk_image
from comir_hpc.transforms.conventions.exported import default_ending, export_transform

pytestmark = pytest.mark.peers
FIXED = Grid((30, 34, 28), (1.4, 1.0, 1.2), (5.0, -8.0, 20.0), OBLIQUE)
MOVING = Grid((36, 36, 36), (1.1, 1.5, 1.1), (30.0, 10.0, 60.0))
LINEAR = Affine.rigid(turn(20), MOVING.centre_mm - FIXED.centre_mm + 2.0, FIXED.centre_mm)
KINDS = {
    "affine": LINEAR,
    "spline": Composite((bspline(FIXED), LINEAR)),
    "field": Composite((field(FIXED), LINEAR)),
}
POINTS = FIXED.world_mm(np.random.default_rng(3).uniform(9, 20, (30, 3)))
INNER = (slice(8, -8),) * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers")
    noise = np.random.default_rng(0).normal(size=MOVING.shape_zyx)
    values = sitk.Cast(sitk.SmoothingRecursiveGaussian(itk_image(noise, MOVING), 2.0), sitk.sitkFloat32)
    sitk.WriteImage(values, str(path / "moving.nii.gz"))
    sitk.WriteImage(itk_image(np.zeros(FIXED.shape_zyx, np.float32), FIXED), str(path / "fixed.nii.gz"))
    return path


def expected_of(transform: PointMap, folder: Path) -> np.ndarray:
    fixed, moving = (sitk.ReadImage(str(folder / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    values = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, itk_form(transform)))[INNER]
    assert values.std() > 0.01
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_ants_applies_what_is_exported(folder: Path, kind: str) -> None:
    ants, pandas = pytest.importorskip("ants"), pytest.importorskip("pandas")
    transform = KINDS[kind]
    path = folder / f"{kind}{default_ending(transform, 'ants')}"
    export_transform(transform, "ants", path, GridPair(FIXED, MOVING))
    fixed, moving = (ants.image_read(str(folder / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    warped = ants.apply_transforms(fixed, moving, [str(path)], interpolator="linear").numpy().T[INNER]
    assert np.abs(warped - expected_of(transform, folder)).max() < 1e-4
    moved = ants.apply_transforms_to_points(3, pandas.DataFrame(POINTS, columns=list("xyz")), [str(path)])
    assert np.abs(moved[["x", "y", "z"]].to_numpy() - transform.apply(POINTS)).max() < 1e-3


def test_ants_applies_a_field_alone(folder: Path) -> None:
    ants, pandas = pytest.importorskip("ants"), pytest.importorskip("pandas")
    transform = field(FIXED)
    path = folder / f"alone{default_ending(transform, 'ants')}"
    assert path.name.endswith(".nii.gz")
    export_transform(transform, "ants", path, GridPair(FIXED, MOVING))
    moved = ants.apply_transforms_to_points(3, pandas.DataFrame(POINTS, columns=list("xyz")), [str(path)])
    assert np.abs(moved[["x", "y", "z"]].to_numpy() - transform.apply(POINTS)).max() < 1e-3


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_transformix_applies_what_is_exported(folder: Path, kind: str) -> None:
    itk = pytest.importorskip("itk")
    pytest.importorskip("itk.itkElastixRegistrationMethodPython")
    transform = KINDS[kind]
    path = folder / f"{kind}.txt"
    export_transform(transform, "elastix", path, GridPair(FIXED, MOVING))
    described = itk.ParameterObject.New()
    described.ReadParameterFiles(
        [str(path)] if kind == "affine" else [str(folder / "spline.0.txt"), str(path)]
    )
    moving = itk.imread(str(folder / "moving.nii.gz"), itk.F)
    warped = itk.array_from_image(itk.transformix_filter(moving, described, log_to_console=False))[INNER]
    assert np.abs(warped - expected_of(transform, folder)).max() < 1e-4


def test_a_result_of_elastix_is_read(folder: Path) -> None:
    """Elastix registers, writes its parameter files, and the points go where its own transformix sends the voxels."""
    itk = pytest.importorskip("itk")
    pytest.importorskip("itk.itkElastixRegistrationMethodPython")
    from comir_hpc.transforms import read_transform

    small = Affine.rigid(turn(3), (1.0, -0.5, 0.8), MOVING.centre_mm)
    moving = sitk.ReadImage(str(folder / "moving.nii.gz"))
    sitk.WriteImage(sitk.Resample(moving, moving, itk_form(small)), str(folder / "seen.nii.gz"))
    fixed, given = (itk.imread(str(folder / name), itk.F) for name in ("seen.nii.gz", "moving.nii.gz"))
    wanted = itk.ParameterObject.New()
    for kind in ("rigid", "bspline"):
        settings = wanted.GetDefaultParameterMap(kind, 1, 12.0)
        settings["MaximumNumberOfIterations"] = ["8"]
        wanted.AddParameterMap(settings)
    result, found = itk.elastix_registration_method(
        fixed, given, parameter_object=wanted, log_to_console=False, output_directory=str(folder)
    )
    assert found.GetNumberOfParameterMaps() == 2
    read = read_transform(folder / "TransformParameters.1.txt")
    again = sitk.Resample(
        moving, sitk.ReadImage(str(folder / "seen.nii.gz")), itk_form(read), sitk.sitkBSpline
    )  # fmt: skip
    difference = sitk.GetArrayFromImage(again)[INNER] - itk.array_from_image(result)[INNER]
    assert np.abs(difference).max() < 1e-2 * np.abs(itk.array_from_image(result)).max()
