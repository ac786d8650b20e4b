from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from comir_hpc.data.embedded import (
    EMBEDDED,
    Displacement,
    degrade,
    displace,
    embedded_landmarks,
    embedded_volume,
    phantom_pair,
    write_nifti,
)
from comir_hpc.errors import ConfigError
from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import rotation_by
from comir_hpc.transforms import Transform, array_and_grid, itk_image, itk_transform


def test_embedded_pair_is_one_grid_of_two_millimetres() -> None:
    headers = [nibabel.load(embedded_volume(m)) for m in EMBEDDED]
    assert headers[0].shape == headers[1].shape == (96, 114, 96)
    np.testing.assert_array_equal(headers[0].affine, headers[1].affine)
    np.testing.assert_allclose(headers[0].header.get_zooms(), 2)
    assert all(h.get_data_dtype() == np.uint8 for h in headers)
    assert sum(embedded_volume(m).stat().st_size for m in EMBEDDED) < 2.5e6
    notice = embedded_volume("t1w").parent / "LICENSE-ICBM.txt"
    assert "Permission to use, copy, modify, and distribute" in notice.read_text(encoding="utf-8")


def test_landmarks_lie_in_the_head() -> None:
    landmarks = embedded_landmarks()
    assert len(landmarks) == 32
    image = sitk.ReadImage(str(embedded_volume("t1w")))
    for name, point in landmarks.items():
        assert image.TransformPhysicalPointToIndex(point.tolist()) is not None
        assert np.abs(point).max() < 110, name
    # The anterior commissure is the origin of the space; in RAS the posterior one lies behind it: +y in LPS.
    assert np.linalg.norm(landmarks["AC"]) < 6
    assert landmarks["PC"][1] > landmarks["AC"][1] + 20


def test_unknown_modality() -> None:
    with pytest.raises(ConfigError, match="t1w, t2w"):
        embedded_volume("pd")


def test_phantoms_share_structure_and_not_intensity() -> None:
    one, two = phantom_pair((24, 26, 28), seed=1)
    assert one.shape == two.shape == (24, 26, 28)
    assert ((one > 20) != (two > 20)).mean() < 0.02  # the soft edge of the specimen
    again, _ = phantom_pair((24, 26, 28), seed=1)
    np.testing.assert_array_equal(one, again)
    inside = one > 20
    assert abs(np.corrcoef(one[inside], two[inside])[0, 1]) < 0.9


GRID = Grid((20, 24, 22), (2, 2, 2), (5, -3, 8), ((-1, 0, 0), (0, -1, 0), (0, 0, 1)))


def test_displacing_by_nothing_copies_voxel_for_voxel() -> None:
    values, _ = phantom_pair(GRID.shape_zyx)
    moved, cube, truth = displace(values, GRID, Displacement.none(), side=24)
    np.testing.assert_allclose(truth.matrix_mm, np.eye(4), atol=1e-12)
    inner = moved[2:22, :, 1:23]
    np.testing.assert_allclose(inner, values, atol=1e-3)
    np.testing.assert_allclose(cube.world_mm((2, 0, 1)), GRID.world_mm((0, 0, 0)))


def test_truth_brings_the_displaced_volume_back() -> None:
    """SimpleITK, which shares no code with the displacement, undoes it with the true transform."""
    values, _ = phantom_pair(GRID.shape_zyx, seed=3)
    drawn = Displacement(rotation_by((1, 2, 3), 137.0), np.array([1.5, -2.0, 0.5]))
    moved, cube, truth = displace(values, GRID, drawn, side=44)
    fixed = itk_image(values, GRID)
    back, _ = array_and_grid(
        sitk.Resample(itk_image(moved, cube), fixed, itk_transform(truth), sitk.sitkLinear, 0.0)
    )
    inside = values > 20
    correlation = np.corrcoef(back[inside], values[inside])[0, 1]
    mirrored = Transform(np.linalg.inv(truth.matrix_mm))
    wrong, _ = array_and_grid(
        sitk.Resample(itk_image(moved, cube), fixed, itk_transform(mirrored), sitk.sitkLinear, 0.0)
    )
    assert correlation > 0.97
    assert np.corrcoef(wrong[inside], values[inside])[0, 1] < 0.8


def test_drawn_displacements_stay_within_their_limits() -> None:
    rng = np.random.default_rng(0)
    drawn = [Displacement.draw(rng, (100, 100, 100)) for _ in range(50)]
    assert max(np.linalg.norm(d.shift_vox) for d in drawn) <= 13
    angles = [np.degrees(np.arccos((np.trace(d.rotation_zyx) - 1) / 2)) for d in drawn]
    assert max(angles) > 150
    for d in drawn:
        np.testing.assert_allclose(np.linalg.det(d.rotation_zyx), 1)


def test_degradation_is_seeded_and_positive() -> None:
    values, _ = phantom_pair((16, 16, 16))
    once, twice = (degrade(values, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(once, twice)
    assert once.min() >= 0
    assert 0.01 < np.std((once - values)[values > 20]) / 255 < 0.3


def test_written_nifti_has_the_grid(tmp_path: Path) -> None:
    values, _ = phantom_pair(GRID.shape_zyx)
    write_nifti(tmp_path / "a.nii.gz", values, GRID)
    array, grid = array_and_grid(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    assert grid.agrees_with(GRID)
    np.testing.assert_array_equal(array, values)
