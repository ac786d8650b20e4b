"""The promise of the first page: two files of different modality and spacing in, the right transform out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from coarse_heads import write_heads
from registration_cases import seen, turn

from comir_hpc.config import IngestSettings, RegisterSettings
from comir_hpc.data.embedded import embedded_volume, write_nifti
from comir_hpc.ingest import ingest
from comir_hpc.register import register
from comir_hpc.runs.result import read_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine
from comir_hpc.transforms.files import save_itk
from comir_hpc.transforms.itk import array_and_grid

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a minute on two quiet cores

SPACING_ZYX, SHAPE_ZYX = (4.5, 3.5, 3.0), (54, 69, 79)


def read(path: Path) -> tuple[np.ndarray, Grid]:  # type: ignore[type-arg]
    """Voxels and grid of a file by ITK, which is not how the pipeline reads it."""
    import SimpleITK as sitk

    values, grid = array_and_grid(sitk.ReadImage(str(path)))
    return values, grid


def test_a_start_that_is_given_comes_back_from_60_degrees(tmp_path: Path) -> None:
    """Two aligned heads of 4 mm, and a start 60 degrees off. Steps on one grid alone end 59 mm off."""
    heads = write_heads(tmp_path)
    values, grid = read(heads["t1w"])
    for name, path in heads.items():
        ingest(IngestSettings(source=path, out=tmp_path / f"{name}.zarr"))
    start = Affine.rigid(turn(60, axis=(1, 2, -0.5)), (0.0, 0.0, 0.0), grid.centre_mm)
    save_itk(start, tmp_path / "start.tfm")
    found = register(
        RegisterSettings(
            fixed=tmp_path / "t1w.zarr", moving=tmp_path / "t2w.zarr", out=tmp_path / "out",
            initial=tmp_path / "start.tfm", checks="quick", last_step="none", threads=1,
        )
    ).result  # fmt: skip
    assert found.transform is not None
    points = grid.world_mm(np.argwhere(values > 30)[::50])
    assert start.distance_mm(Affine.identity(), points).mean() > 50
    assert found.transform.distance_mm(Affine.identity(), points).mean() < 1.5
    assert any("started at one place" in reason for reason in found.reasons)


def test_two_files_of_different_spacing_are_registered_by_the_general_model(tmp_path: Path) -> None:
    """T1w at 4 mm, and T2w at 4.5 x 3.5 x 3 mm, turned by 75 degrees and shifted by 24 mm: no model, no options."""
    (tmp_path / "coarse").mkdir()
    heads = write_heads(tmp_path / "coarse")
    heads["t1w"].rename(tmp_path / "t1w.nii.gz")
    values, grid = read(embedded_volume("t2w"))
    truth = Affine.rigid(turn(75, axis=(1, 2, -0.5)), (12.0, -18.0, 9.0), grid.centre_mm)
    half = (np.asarray(SHAPE_ZYX) - 1)[::-1] * SPACING_ZYX[::-1] / 2
    onto = Grid(SHAPE_ZYX, SPACING_ZYX, tuple((truth.apply(grid.centre_mm) - half).tolist()))
    write_nifti(tmp_path / "t2w.nii.gz", seen(values, grid, onto, truth).astype(np.float32), onto)

    done = subprocess.run(
        [sys.executable, "-m", "comir_hpc", "register", "t1w.nii.gz", "t2w.nii.gz", "--warped", "w.nii.gz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(
        r"(PASS: probably within \d.* mm \(90 %\); |WARN: )turned by 7\d\.\d\d degrees", done.stdout
    ), done.stdout
    assert "the general model is used" in done.stderr
    result = read_result(tmp_path / "t1w-t2w")
    assert result.transform is not None
    points = grid.world_mm(np.argwhere(values > 30)[::200])
    error_mm = result.transform.distance_mm(truth, points)
    assert error_mm.mean() < 2.0, f"{error_mm.mean():.2f} mm"  # less than the least side of a voxel
    assert error_mm.max() < 4.0

    warped = nibabel.load(tmp_path / "w.nii.gz")
    np.testing.assert_allclose(warped.affine, nibabel.load(tmp_path / "t1w.nii.gz").affine)
    aligned, _ = read(heads["t2w"])
    inside = aligned > 30
    assert np.corrcoef(np.asanyarray(warped.dataobj).T[inside], aligned[inside])[0, 1] > 0.9
