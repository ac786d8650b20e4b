"""Pairs with a known answer: displacements, degradations, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from comir_hpc.data.degradations import NOISE, spoiled
from comir_hpc.data.embedded import phantom_pair, write_nifti
from comir_hpc.data.families import family, specimen, with_labels, with_landmarks, with_transform
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform, array_and_grid, itk_image, itk_transform, save_transform

GRID = Grid((30, 34, 28), (2.0, 2.0, 2.0), (-30.0, 20.0, 10.0), ((-1, 0, 0), (0, -1, 0), (0, 0, 1)))
POINTS = "name,x,y,z\na,0,0,20\nb,-50,0,30\nc,-40,-20,40\nd,-40,-10,50\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    one, two = phantom_pair(GRID.shape_zyx, seed=1)
    write_nifti(folder / "fixed.nii.gz", one, GRID)
    write_nifti(folder / "moving.nii.gz", two, GRID)
    save_transform(Transform.identity(), folder, {})
    return folder


def pair(files: Path) -> Any:
    return with_transform("mine", files / "fixed.nii.gz", files / "moving.nii.gz", files / "transform.tfm")


def test_the_embedded_family_is_displaced_as_in_the_committed_rows(tmp_path: Path) -> None:
    """benchmarks/general/cases.csv, medium, seed 0: the protocol moved into the package, and its cases stayed."""
    case = family("embedded", None).displaced("medium", 0, tmp_path)
    assert case.truth is not None
    assert case.truth.rotation_deg == pytest.approx(28.46, rel=1e-3)
    assert case.displaced_mm == pytest.approx(29.47, rel=1e-3)


@pytest.mark.parametrize("level", ["small", "any"])
def test_the_truth_undoes_a_displacement(level: str, files: Path, tmp_path: Path) -> None:
    """SimpleITK, which shares no code with the displacement."""
    case = pair(files).displaced(level, 4, tmp_path)
    assert case.truth is not None
    assert case.errors_mm(case.truth).max() < 1e-9
    moving, fixed = sitk.ReadImage(str(case.moving)), sitk.ReadImage(str(files / "moving.nii.gz"))
    back = sitk.GetArrayFromImage(
        sitk.Resample(moving, fixed, itk_transform(case.truth), sitk.sitkLinear, 0.0)
    )
    values = sitk.GetArrayFromImage(fixed)
    inside = ndimage.binary_erosion(values > 20, iterations=2)
    assert np.corrcoef(back[inside], values[inside])[0, 1] > 0.9
    # A shift of 3 mm in the answer is an error of 3 mm at every point.
    wrong = Transform.rigid(np.eye(3), (0, 0, 3.0), np.zeros(3)).compose(case.truth)
    np.testing.assert_allclose(case.errors_mm(wrong), 3.0)


def test_without_displacement_the_files_are_taken_as_they_are(files: Path, tmp_path: Path) -> None:
    case = pair(files).displaced("none", 0, tmp_path)
    assert case.moving == files / "moving.nii.gz"
    assert case.displaced_mm == 0
    assert list(tmp_path.iterdir()) == []
    noisy = pair(files).displaced("none", 0, tmp_path, "noise")
    _, grid = array_and_grid(sitk.ReadImage(str(noisy.moving)))
    assert grid.agrees_with(GRID)


# ---------------------------------------------------------------------- degradations


@pytest.fixture(scope="module")
def spoil() -> Any:
    values = phantom_pair(GRID.shape_zyx, seed=1)[0]

    def run(kind: str) -> tuple[Any, Grid, Any]:
        return *spoiled(kind, values, GRID, specimen(values), np.random.default_rng(2)), values

    return run


def test_noise_and_bias_have_the_stated_size(spoil: Any) -> None:
    noisy, grid, values = spoil("noise")
    inside = values > 60
    assert grid == GRID
    assert np.std((noisy - values)[inside]) == pytest.approx(NOISE * np.percentile(values, 99.9), rel=0.1)
    biased, _, _ = spoil("bias")
    factor = np.log(biased[inside] / values[inside])
    assert 0.2 < np.abs(factor).max() <= 0.4 + 1e-5
    assert np.abs(np.diff(np.log(biased[15, 17, 8:20] / values[15, 17, 8:20]))).max() < 0.2  # smooth


def test_slices_are_means_of_four_where_those_were(spoil: Any) -> None:
    thick, grid, values = spoil("thick")
    assert thick.shape == (7, 34, 28)
    assert grid.spacing_mm == (8.0, 2.0, 2.0)
    np.testing.assert_allclose(thick[3], values[12:16].mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(grid.world_mm((3, 5, 6)), GRID.world_mm((13.5, 5, 6)))


def test_a_third_of_the_specimen_is_cut_off_and_the_rest_stays_in_place(spoil: Any) -> None:
    cropped, grid, values = spoil("cropped")
    (axis,) = [a for a in range(3) if cropped.shape[a] != values.shape[a]]
    start = np.rint(GRID.index_zyx(grid.origin_mm)).astype(int)
    kept = tuple(slice(s, s + n) for s, n in zip(start, cropped.shape, strict=True))
    np.testing.assert_array_equal(cropped, values[kept])

    def extent(mask: Any) -> int:
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        return int(np.ptp(inside)) + 1

    whole = specimen(values)
    assert extent(whole[kept]) / extent(whole) == pytest.approx(2 / 3, abs=0.03)


def test_padding_is_one_value_far_below_all_others(spoil: Any) -> None:
    padded, grid, values = spoil("padded")
    outside = padded < values.min()
    assert grid == GRID
    assert outside[:, 0, 0].all()
    assert not outside[:, 17, 14].any()
    assert len(np.unique(padded[outside])) == 1
    np.testing.assert_array_equal(padded[~outside], values[~outside])


# ---------------------------------------------------------------------- landmarks and labels


def landmarks(files: Path, folder: Path, moving: str) -> Any:
    (folder / "fixed.csv").write_text(POINTS, encoding="utf-8")
    (folder / "moving.csv").write_text(moving, encoding="utf-8")
    return with_landmarks(
        "mine",
        files / "fixed.nii.gz",
        files / "moving.nii.gz",
        (folder / "fixed.csv", folder / "moving.csv"),
    )


def test_landmarks_are_carried_with_the_displacement(files: Path, tmp_path: Path) -> None:
    mine = landmarks(files, tmp_path, POINTS.replace(",0,20", ",3,20"))
    still = mine.displaced("none", 0, tmp_path)
    np.testing.assert_allclose(still.errors_mm(Transform.identity()), [3, 0, 0, 0])
    known = pair(files).displaced("large", 1, tmp_path)
    moved = mine.displaced("large", 1, tmp_path)
    assert moved.truth is None
    assert known.truth is not None
    np.testing.assert_allclose(moved.errors_mm(known.truth), [3, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("moving", "said"),
    [
        ("name,x,y,z\na,0,0,20\n", "has 4 landmarks and .*moving.csv has 1"),
        (POINTS.replace("b,", "q,"), "landmark 2 is 'b' in .* and 'q' in"),
    ],
)
def test_landmarks_that_do_not_fit_are_refused(moving: str, said: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        landmarks(files, tmp_path, moving).displaced("none", 0, tmp_path)


def labels(shift: int = 0) -> Any:
    found = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    for number, place in enumerate([(5, 5, 5), (20, 8, 9), (9, 25, 14), (22, 24, 20)], 1):
        z, y, x = place
        found[z : z + 3, y : y + 3, x + shift : x + 3 + shift] = number
    return found


def labelled(files: Path, folder: Path, moving: Any, grid: Grid = GRID) -> Any:
    write_nifti(folder / "fixed_labels.nii.gz", labels(), GRID)
    write_nifti(folder / "moving_labels.nii.gz", moving, grid)
    return with_labels(
        "mine",
        files / "fixed.nii.gz",
        files / "moving.nii.gz",
        (folder / "fixed_labels.nii.gz", folder / "moving_labels.nii.gz"),
    )


def test_centres_of_labels_are_compared(files: Path, tmp_path: Path) -> None:
    case = labelled(files, tmp_path, labels(shift=2)).displaced("none", 0, tmp_path)
    np.testing.assert_allclose(case.errors_mm(Transform.identity()), 4.0, atol=1e-5)  # two voxels of 2 mm
    np.testing.assert_allclose(case.points_mm[0], GRID.world_mm((6, 6, 6)), atol=1e-5)


def test_labels_that_do_not_fit_are_refused(files: Path, tmp_path: Path) -> None:
    other = Grid(GRID.shape_zyx, (2.0, 2.0, 2.5), GRID.origin_xyz, GRID.direction)
    for moving, grid, said in (
        (np.where(labels() == 3, 0, labels()), GRID, "label 3 is in .*fixed_labels.nii.gz only"),
        (labels(), other, "expected the same grid"),
        (labels().astype(np.float32) / 2, GRID, "no whole numbers"),
        (np.zeros(GRID.shape_zyx, np.uint8), GRID, "label 1 is in .*fixed_labels.nii.gz only"),
    ):
        with pytest.raises(ConfigError, match=said):
            labelled(files, tmp_path, moving, grid).displaced("none", 0, tmp_path)


def test_files_that_cannot_be_compared_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "text.nii.gz").write_text("no image", encoding="utf-8")
    sitk.WriteImage(sitk.Image([4, 4], sitk.sitkUInt8), str(tmp_path / "flat.nii.gz"))
    sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkVectorFloat32, 2), str(tmp_path / "two.nii.gz"))
    truth = files / "transform.tfm"
    for name, said in (
        ("missing.nii.gz", "does not exist"),
        ("text.nii.gz", "cannot be read by SimpleITK"),
        ("flat.nii.gz", "expected a volume of one channel"),
        ("two.nii.gz", "2 channels"),
    ):
        with pytest.raises(VolumeError, match=said):
            with_transform("mine", tmp_path / name, files / "moving.nii.gz", truth).displaced(
                "none", 0, tmp_path
            )


def test_families_that_are_not_there_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `comir-hpc datasets fetch templates"):
        family("template_epi", tmp_path)
    with pytest.raises(ConfigError, match="did you mean embedded_1mm"):
        family("embeded_1mm", tmp_path)


def test_an_image_is_where_its_grid_says() -> None:
    """The reference for the tests above: SimpleITK and `Grid` agree on an oblique world."""
    image = itk_image(labels(), GRID)
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((6, 5, 3)), GRID.world_mm((3, 5, 6)))
