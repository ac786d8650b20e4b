"""Masks restrict what is compared; a start is read from a transform of any tool or fitted to landmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from registration_cases import OBLIQUE, seen, specimen, store, turn
from test_register import CENTRE, PLAIN, error, only_volumes, pair, settings

from comir_hpc.config.base import validate
from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import ComirError, ConfigError, RegistrationError, VolumeError
from comir_hpc.register import register
from comir_hpc.register.given_start import given_start
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine, GridPair, itk_image
from comir_hpc.transforms.conventions.exported import export_transform
from comir_hpc.volumes.region import Region

TRUTH = Affine.rigid(turn(137), (2.0, -1.5, 1.0), CENTRE)
NEAR = Affine.rigid(turn(139), (3.0, -2.5, 1.0), CENTRE)


@pytest.fixture(scope="module")
def displaced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pair(tmp_path_factory.mktemp("displaced"), TRUTH)


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A specimen whose halves along x moved by 2 mm in opposite directions, and masks of the halves on other grids."""
    folder = tmp_path_factory.mktemp("torn")
    values, _ = specimen(brightness=4.0)
    ways = [
        seen(values, PLAIN, PLAIN, Affine.rigid(np.eye(3), (0, shift, 0), CENTRE)) for shift in (2.0, -2.0)
    ]
    half = np.arange(PLAIN.shape_zyx[2]) < PLAIN.shape_zyx[2] // 2
    store(folder / "fixed.zarr", values, PLAIN)
    store(folder / "moving.zarr", np.where(half, ways[0], ways[1]), PLAIN)
    coarse = Grid((22, 24, 40), (2.0, 2.0, 1.0), (3.0, -9.0, 18.0))
    x = coarse.world_mm(np.stack(np.meshgrid(*map(np.arange, coarse.shape_zyx), indexing="ij"), -1))[..., 0]
    middle = PLAIN.world_mm((0, 0, PLAIN.shape_zyx[2] // 2 - 0.5))[0]
    store(folder / "left.zarr", (x < middle).astype(np.uint8), coarse, foreground_above=0)
    right = itk_image(np.where(x > middle, 7.0, np.nan).astype(np.float32), coarse)
    sitk.WriteImage(right, str(folder / "right.nii.gz"))
    store(folder / "empty.zarr", np.zeros(coarse.shape_zyx, np.uint8), coarse)
    far = Grid((8, 8, 8), (1.0, 1.0, 1.0), (500.0, 0.0, 0.0))
    store(folder / "far.zarr", np.ones(far.shape_zyx, np.uint8), far, foreground_above=0)
    corner = Grid((2, 2, 2), (1.0, 1.0, 1.0), PLAIN.origin_xyz)
    store(folder / "corner.zarr", np.ones((2, 2, 2), np.uint8), corner, foreground_above=0)
    store(folder / "two.zarr", np.ones((2, *far.shape_zyx), np.uint8), far, foreground_above=0)
    return folder


def mask_file(folder: Path, mask: str) -> Path:
    return folder / (f"{mask}.nii.gz" if mask == "right" else f"{mask}.zarr")


def of_halves(folder: Path, out: Path, **masks: str) -> RegisterSettings:
    paths = {name: folder / f"{name}.zarr" for name in ("fixed", "moving")}
    given = {name: mask_file(folder, mask) for name, mask in masks.items()}
    return settings(out, paths, representation="intensity", initial="identity", checks="quick", **given)


@pytest.mark.parametrize(("mask", "shift"), [("left", 2.0), ("right", -2.0)])
@pytest.mark.parametrize("role", ["fixed", "moving"])
def test_a_mask_decides_which_half_is_registered(
    torn: Path, tmp_path: Path, role: str, mask: str, shift: float
) -> None:
    result = register(of_halves(torn, tmp_path, **{f"{role}_mask": mask}))
    assert result.transform is not None
    found = result.transform.apply(CENTRE) - CENTRE
    np.testing.assert_allclose(found, (0, shift, 0), atol=0.6)
    assert result.record["inputs"][role]["mask"] == str(mask_file(torn, mask))
    other = of_halves(torn, tmp_path, **{f"{role}_mask": "right" if mask == "left" else "left"})
    with pytest.raises(RegistrationError, match="holds the result of other inputs"):
        register(other)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("empty", r"empty\.zarr is empty: all of its voxels are 0"),
        ("far", r"far\.zarr lies wholly outside of the volume"),
        ("corner", r"corner\.zarr covers no voxel of the specimen"),
        ("two", r"two\.zarr has 2 channels"),
    ],
)
def test_a_mask_that_masks_nothing_is_refused(torn: Path, tmp_path: Path, mask: str, message: str) -> None:
    with pytest.raises(ComirError, match=message):
        register(of_halves(torn, tmp_path, moving_mask=mask))


def test_a_mask_on_another_grid_is_looked_up_at_its_nearest_voxel(tmp_path: Path) -> None:
    grid = Grid((6, 7, 8), (2.0, 1.0, 1.5), (4.0, 5.0, 6.0), OBLIQUE)
    values = np.random.default_rng(0).integers(0, 2, grid.shape_zyx).astype(np.uint8)
    region = Region.open(store(tmp_path / "m.zarr", values, grid, foreground_above=0).path)
    np.testing.assert_array_equal(region.on(grid), values != 0)
    finer = Grid((12, 7, 8), (1.0, 1.0, 1.5), tuple(grid.world_mm((-0.25, 0, 0))), OBLIQUE)
    np.testing.assert_array_equal(region.on(finer), np.repeat(values != 0, 2, axis=0))
    beyond = grid.crop(grid.box.grown((1, 1, 1)))
    np.testing.assert_array_equal(region.on(beyond), np.pad(values != 0, 1))


@pytest.mark.parametrize("form", ["itk", "ants", "lta", "fsl", "matrix-ras"])
def test_a_start_is_a_transform_of_any_tool(displaced: dict[str, Path], tmp_path: Path, form: str) -> None:
    path = tmp_path / {"itk": "s.tfm", "ants": "s.mat", "lta": "s.lta", "fsl": "f.mat"}.get(form, "m.txt")
    export_transform(NEAR, form, path, GridPair(PLAIN, PLAIN))
    said = {"form": form} if form == "fsl" else {}
    chosen = settings(tmp_path, displaced, initial=path, **said)
    if form in ("itk", "fsl"):
        assert error(register(chosen), TRUTH) < 0.2
    start = given_start(chosen, PLAIN, PLAIN)
    assert start is not None
    np.testing.assert_allclose(start.transform.matrix_mm, NEAR.matrix_mm, atol=1e-9)


def landmarks(path: Path, fixed: np.ndarray, moving: np.ndarray, columns: str, head: str = "") -> Path:
    rows = "\n".join(",".join(f"{v:.6f}" for v in row) for row in np.hstack([fixed, moving]))
    path.write_text(f"{head}{columns}\n{rows}\n", encoding="utf-8")
    return path


def test_a_start_is_fitted_to_landmarks(displaced: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fixed = CENTRE + rng.uniform(-15, 15, (9, 3))
    moving = TRUTH.apply(fixed) + rng.normal(0, 0.8, (9, 3))
    path = landmarks(tmp_path / "l.csv", fixed, moving, "x,y,z,moving_x,moving_y,moving_z")
    result = register(settings(tmp_path, displaced, initial=path))
    assert error(result, TRUTH) < 0.2
    note = next(note for note in result.result.notes if "landmarks" in note)
    assert "fitted to 9 pairs of landmarks (rigid); residual" in note
    # The residual of the note is that of the best rigid map: noise of 0.8 mm in three directions.
    assert 0.8 < float(note.split("residual ")[1].split()[0]) < 1.6
    assert len(result.record["candidates"]) == 1


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_landmarks_give_the_transform_they_were_made_with(
    displaced: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    matrix = TRUTH.matrix_mm.copy()
    if kind == "affine":
        matrix[:3, :3] = matrix[:3, :3] @ np.array([[1.1, 0.05, 0], [0, 0.9, 0], [0.1, 0, 1.2]])
    truth = Affine(matrix)
    fixed = CENTRE + np.random.default_rng(1).uniform(-20, 20, (6, 3))
    forms = {
        "a.csv": ("x,y,z,moving_x,moving_y,moving_z", fixed, truth.apply(fixed), ""),
        # As `warp --points` writes them: x, y, z are the points that were carried.
        "b.csv": ("x,y,z,fixed_x,fixed_y,fixed_z", truth.apply(fixed), fixed, ""),
        "c.csv": (
            "x,y,z,moving_x,moving_y,moving_z", fixed * (-1, -1, 1), truth.apply(fixed) * (-1, -1, 1),
            "# CoordinateSystem = RAS\n",
        ),
    }  # fmt: skip
    for name, (columns, one, two, head) in forms.items():
        path = landmarks(tmp_path / name, one, two, columns, head)
        start = given_start(settings(tmp_path, displaced, initial=path, transform=kind), PLAIN, PLAIN)
        assert start is not None
        np.testing.assert_allclose(start.transform.apply(fixed), truth.apply(fixed), atol=1e-4)


@pytest.mark.parametrize(
    ("points", "kind", "message"),
    [
        ([(0, 0, 0), (9, 0, 0)], "rigid", "holds 2 pairs; a turn and a shift need at least 3"),
        ([(0, 0, 0), (9, 0, 0), (18, 0, 0), (27, 0, 0)], "rigid", "4 pairs, all on one line"),
        ([(4, 4, 4)] * 5, "affine", "5 pairs, all on one point"),
    ],
)
def test_landmarks_that_fix_nothing_are_refused(
    displaced: dict[str, Path], tmp_path: Path, points: list[tuple[float, ...]], kind: str, message: str
) -> None:
    fixed = np.asarray(points, float)
    path = landmarks(tmp_path / "l.csv", fixed, fixed + 1, "x,y,z,moving_x,moving_y,moving_z")
    with pytest.raises(RegistrationError, match=message):
        register(settings(tmp_path, displaced, initial=path, transform=kind))


def test_what_is_no_start_is_refused(displaced: dict[str, Path], tmp_path: Path) -> None:
    flat = np.array([(0, 0, 0), (20, 0, 0), (0, 20, 0), (20, 20, 0), (10, 5, 0)], float)
    path = landmarks(tmp_path / "l.csv", flat, TRUTH.apply(flat), "x,y,z,moving_x,moving_y,moving_z")
    start = given_start(settings(tmp_path, displaced, initial=path, transform="affine"), PLAIN, PLAIN)
    assert start is not None
    assert "do not fix scale and shear: the start is a turn and a shift" in start.notes[0]
    np.testing.assert_allclose(start.transform.matrix_mm, TRUTH.matrix_mm, atol=1e-6)
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    with pytest.raises(RegistrationError, match=r"has the columns x, y, z; expected .* moving_x"):
        register(settings(tmp_path, displaced, initial=tmp_path / "p.csv"))
    far = Affine.rigid(np.eye(3), (500.0, 0, 0), CENTRE)
    export_transform(far, "itk", tmp_path / "far.tfm", GridPair())
    with pytest.raises(RegistrationError, match="puts the two specimens beside each other"):
        register(settings(tmp_path, displaced, initial=tmp_path / "far.tfm"))
    with pytest.raises(RegistrationError, match=r"none\.tfm does not exist"):
        register(settings(tmp_path, displaced, initial=tmp_path / "none.tfm"))
    record = {**displaced, "out": tmp_path / "o"}
    with pytest.raises(
        ConfigError,
        match="initial is 'globl': Input should be 'identity', 'moments', 'global', 'features' or a file",
    ):
        validate(RegisterSettings, record | {"initial": "globl"})
    with pytest.raises(ConfigError, match="give it with --initial FILE"):
        validate(RegisterSettings, record | {"form": "fsl"})
    assert only_volumes(displaced).keys() == {"fixed", "moving"}
    with pytest.raises(VolumeError, match="does not exist"):
        register(settings(tmp_path, displaced, fixed_mask=tmp_path / "none.zarr"))
