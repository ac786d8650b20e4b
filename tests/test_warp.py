"""Warp: block by block equals SimpleITK's resampling of the whole volume; points go both ways and say which."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from phantoms import store
from scipy import ndimage

from comir_hpc.config import WarpSettings
from comir_hpc.errors import ConfigError, RegistrationError, VolumeError
from comir_hpc.space.grid import Box, Grid
from comir_hpc.space.plan import plan_blocks
from comir_hpc.space.rotations import rotation_by
from comir_hpc.transforms import (
    Affine,
    Composite,
    ItkTransform,
    PointMap,
    Transform,
    itk_image,
    itk_transform,
    load_transform,
    save_transform,
)
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp import plan_warp, warp
from comir_hpc.warp.resampling import Resampler, share_inside

RNG = np.random.default_rng(0)


def oblique(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], degrees: float, flip: bool = False
) -> Grid:
    """A grid whose axes are turned in the world, its middle near the origin."""
    direction = rotation_by((1.0, 2.0, 0.5), degrees)[::-1, ::-1].copy()
    if flip:
        direction[:, 0] *= -1
    centre = Grid(shape, spacing, (0, 0, 0), tuple(map(tuple, direction))).centre_mm
    return Grid(shape, spacing, tuple(-centre), tuple(map(tuple, direction)))


FIXED = oblique((30, 26, 34), (2.0, 1.5, 1.5), 25.0, flip=True)
MOVING = oblique((28, 33, 25), (1.3, 1.7, 2.2), -70.0)
SMOOTH = sitk.GetArrayFromImage(
    sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(RNG.uniform(0, 250, MOVING.shape_zyx)), 1.0)
)
RIGID = Transform.rigid(rotation_by((0.2, 1.0, 0.4), 50.0)[::-1, ::-1], (3.0, -2.0, 4.0), (1.0, 2.0, 3.0))


def volume(path: Path, values: np.ndarray, grid: Grid = MOVING, **metadata: Any) -> Volume:
    values = values if values.ndim == 4 else values[None]
    kind = metadata.pop("kind", "image")
    made = Volume.create(path, grid, values.dtype, channels=len(values), kind=kind, chunk=8, shard=16)
    for block in plan_blocks(grid.shape_zyx, made.shard_zyx):
        made.write(block.write, np.ascontiguousarray(values[(slice(None), *block.write.slices)]))
    made.finish(**metadata)
    return made


def whole(values: np.ndarray, transform: sitk.Transform, method: int, grid: Grid = MOVING) -> np.ndarray:
    """SimpleITK's resampling of the whole volume at once, in floating point."""
    fixed = itk_image(np.zeros(FIXED.shape_zyx, np.uint8), FIXED)
    found = sitk.Resample(itk_image(values, grid), fixed, transform, method, 0.0, sitk.sitkFloat64)
    return sitk.GetArrayFromImage(found)


def bent() -> sitk.Transform:
    """A B-spline that moves points by several mm on top of a rotation."""
    domain = itk_image(
        np.zeros((8, 8, 8), np.uint8), Grid((8, 8, 8), (12.0, 12.0, 12.0), (-45.0, -45.0, -45.0))
    )
    spline = sitk.BSplineTransformInitializer(domain, [4, 4, 4])
    spline.SetParameters(np.random.default_rng(1).uniform(-4, 4, len(spline.GetParameters())).tolist())
    return sitk.CompositeTransform([itk_transform(RIGID), spline])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_transform(RIGID, tmp_path)
    volume(tmp_path / "fixed.zarr", np.zeros(FIXED.shape_zyx, np.uint8), FIXED)
    return tmp_path


def made(folder: Path, **changes: Any) -> WarpSettings:
    options = {
        "zarr": folder / "moving.zarr", "like": folder / "fixed.zarr", "transform": folder / "transform.tfm",
        "out": folder / "out.zarr", "chunk": 8, "shard": 16,
    }  # fmt: skip
    return WarpSettings(**{**options, **changes})


# ---------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize(
    ("interpolation", "method"),
    [("linear", sitk.sitkLinear), ("cubic", sitk.sitkBSpline), ("nearest", sitk.sitkNearestNeighbor)],
)
@pytest.mark.parametrize("kind", ["rigid", "bent"])
def test_blocks_equal_simpleitk_on_the_whole_volume(
    folder: Path, kind: str, interpolation: str, method: int
) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    transform = itk_transform(RIGID) if kind == "rigid" else bent()
    path = folder / ("transform.tfm" if kind == "rigid" else "transform.h5")
    sitk.WriteTransform(transform, str(path))
    result = warp(made(folder, transform=path, interpolation=interpolation))
    out = Volume.open(folder / "out.zarr")
    expected = whole(SMOOTH.astype(np.float32), transform, method)
    assert (result.blocks, out.dtype) == (12, np.float32)
    assert 0.2 < (expected != 0).mean() < 0.95, "the volumes must overlap partly for this test to see borders"
    np.testing.assert_allclose(out.read()[0], expected, atol=1e-3)
    assert out.grid.agrees_with(FIXED)


@given(
    start=st.tuples(*[st.integers(0, 20)] * 3),
    size=st.tuples(*[st.integers(1, 14)] * 3),
    angle=st.floats(0, 180),
    shift=st.floats(-20, 20),
)
@settings(max_examples=25, deadline=None)
def test_any_box_of_any_rotation_equals_the_whole(
    moving: Volume, start, size, angle: float, shift: float
) -> None:
    transform = Affine.rigid(rotation_by((1.0, 0.3, -0.5), angle)[::-1, ::-1], (shift, 0, 1), (0, 0, 0))
    box = Box(start, tuple(a + n for a, n in zip(start, size, strict=True))).intersect(FIXED.box)
    found = Resampler(moving, transform, FIXED, "linear", [0.0])(box)
    np.testing.assert_allclose(
        found[0], whole(SMOOTH, itk_transform(transform), sitk.sitkLinear)[box.slices], atol=1e-9
    )


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return volume(tmp_path_factory.mktemp("warp") / "moving.zarr", SMOOTH)


def test_only_the_part_that_a_block_needs_is_read(moving: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    resampler = Resampler(moving, Affine.identity(), moving.grid, "linear", [0.0])
    box = Box((10, 10, 10), (14, 12, 11))
    assert resampler.region(box).contains(box.grown((2, 2, 2)))
    assert box.grown((4, 4, 4)).contains(resampler.region(box))
    far = Resampler(
        moving, ItkTransform(sitk.TranslationTransform(3, (500.0, 0, 0))), moving.grid, "linear", [7.0]
    )
    monkeypatch.setattr(Volume, "read", lambda *_, **__: pytest.fail("nothing of it is needed"))
    assert (far(box) == 7).all()


def test_a_block_that_needs_too_much_is_split(moving: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = RIGID
    expected = Resampler(moving, transform, FIXED, "linear", [0.0])(FIXED.box)
    sizes: list[int] = []
    read = Volume.read

    def watched(self: Volume, box: Box, **options: Any) -> np.ndarray:
        sizes.append(box.size)
        return read(self, box, **options)

    monkeypatch.setattr(Volume, "read", watched)
    monkeypatch.setattr("comir_hpc.warp.resampling._REGION_BYTES", 60_000)
    found = Resampler(moving, transform, FIXED, "linear", [0.0])(FIXED.box)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert len(sizes) > 8
    assert max(sizes) * (SMOOTH.itemsize + 16) <= 60_000


def test_identity_changes_nothing(folder: Path) -> None:
    save_transform(Transform.identity(), folder)
    for dtype in (np.uint8, np.uint16, np.int16, np.float16, np.float64):
        values = RNG.integers(0, 120, MOVING.shape_zyx).astype(dtype)
        source = volume(folder / f"{np.dtype(dtype)}.zarr", values)
        out = folder / f"{np.dtype(dtype)}_out.zarr"
        warp(made(folder, zarr=source.path, like=source.path, out=out))
        np.testing.assert_allclose(Volume.open(out).read()[0], values, atol=1e-9)
        assert Volume.open(out).dtype == dtype


def test_integers_are_rounded_not_cut_off(folder: Path) -> None:
    values = SMOOTH.astype(np.uint8)
    volume(folder / "moving.zarr", values)
    warp(made(folder))
    expected = whole(values, itk_transform(RIGID), sitk.sitkLinear)
    found = Volume.open(folder / "out.zarr").read()[0].astype(float)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    inside = expected > 0
    assert abs((found - expected)[inside].mean()) < 0.02


def test_a_cubic_spline_does_not_wrap_integers_around(folder: Path) -> None:
    values = np.where(RNG.random(MOVING.shape_zyx) > 0.5, 255, 0).astype(np.uint8)
    volume(folder / "moving.zarr", values)
    warp(made(folder, interpolation="cubic"))
    expected = np.clip(np.rint(whole(values, itk_transform(RIGID), sitk.sitkBSpline)), 0, 255)
    assert np.abs(Volume.open(folder / "out.zarr").read()[0] - expected).max() <= 1


def test_labels_stay_labels_and_channels_stay_apart(folder: Path) -> None:
    values = np.stack(
        [RNG.integers(0, 3, MOVING.shape_zyx) * 1000, RNG.integers(5, 9, MOVING.shape_zyx)]
    ).astype(np.int32)
    volume(folder / "moving.zarr", values, kind="labels")
    warp(made(folder))
    out = Volume.open(folder / "out.zarr")
    assert out.metadata["kind"] == "labels"
    for channel in range(2):
        expected = whole(values[channel], itk_transform(RIGID), sitk.sitkNearestNeighbor)
        np.testing.assert_array_equal(out.read()[channel], expected)
    with pytest.raises(ConfigError, match="holds labels"):
        warp(made(folder, out=folder / "other.zarr", interpolation="linear"))


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.uint32, np.int32, np.uint8])
@pytest.mark.parametrize("kind", ["labels", "image"])
def test_every_id_of_any_size_comes_through_as_it_is(
    folder: Path, kind: str, dtype: type[np.integer[Any]]
) -> None:
    info = np.iinfo(dtype)
    # Neighbours beyond 2^53 have one float64 for several of them.
    low = max(int(info.min), -(2**60))
    ids = [int(info.max) - n for n in range(0, 60, 3)] + [low + n for n in range(1, 60, 3)]
    values = RNG.choice(np.array(ids, dtype=dtype), MOVING.shape_zyx)
    volume(folder / "moving.zarr", values, kind=kind)
    found = Volume.open(warp(made(folder, interpolation="nearest")).path).read()[0]
    index = MOVING.index_zyx(RIGID.apply(FIXED.world_mm(np.moveaxis(np.indices(FIXED.shape_zyx), 0, -1))))
    clear = (np.abs(index - np.rint(index)) < 0.49).all(-1)  # not on the border between two voxels
    inside = ((index > -0.5) & (index < np.array(MOVING.shape_zyx) - 0.5)).all(-1)
    place = tuple(np.moveaxis(np.rint(index[clear & inside]).astype(int), -1, 0))
    assert found.dtype == dtype
    assert len(np.unique(values[place])) > 20
    np.testing.assert_array_equal(found[clear & inside], values[place])
    assert not found[clear & ~inside].any()


def test_a_small_moving_volume_in_a_large_fixed_one_is_found() -> None:
    wide = Grid((40, 40, 900), (2.0, 2.0, 2.0), (-900.0, -40.0, -40.0))
    spot = Grid((8, 8, 8), (1.0, 1.0, 1.0), (3.0, 3.0, 3.0))
    assert share_inside(Transform.identity(), wide, spot) > 0
    assert share_inside(Transform.rigid(np.eye(3), (0, 0, 500.0), (0, 0, 0)), wide, spot) == 0


def test_wide_integers_that_are_interpolated_are_said(folder: Path) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.int64))
    assert "integers of 64 bits are interpolated" in warp(made(folder)).notes[0]
    assert "integers of 64 bits are interpolated" in warp(made(folder, out=folder / "w.nii")).notes[0]
    assert warp(made(folder, out=folder / "n.zarr", interpolation="nearest")).notes == ()


def test_the_smallest_integer_outside_is_exact(moving: Volume, folder: Path) -> None:
    lowest = float(np.iinfo(np.int64).min)
    source = volume(folder / "moving.zarr", np.full(MOVING.shape_zyx, 2**62 + 1))
    found = Resampler(source, RIGID, FIXED, "nearest", [lowest])(FIXED.box)
    assert set(np.unique(found)) == {np.iinfo(np.int64).min, 2**62 + 1}


def test_the_result_opens_with_the_moving_volumes_statistics(folder: Path) -> None:
    path = store(folder / "moving.zarr", SMOOTH.astype(np.float32), above=100.0)
    warp(made(folder, like=path, out=folder / "out.zarr"))
    out, source = Volume.open(folder / "out.zarr"), Volume.open(path)
    assert out.intensity() == source.intensity()
    assert out.metadata["source"] == {"path": str(path.resolve()), "fingerprint": source.fingerprint()}
    assert 0 < out.metadata["inside"] <= 1


def test_outside_is_not_taken_for_specimen_where_zero_is_a_value_of_it(folder: Path) -> None:
    hounsfield = (SMOOTH * 8 - 1000).astype(np.int16)
    statistics = {"low": -900.0, "high": 900.0, "mean": 0.0, "std": 300.0, "foreground_above": -300.0}
    lowest = float(hounsfield.min())
    volume(folder / "moving.zarr", hounsfield, intensity=[statistics], value_range=[[lowest, 900.0]])
    warp(made(folder))
    out = Volume.open(folder / "out.zarr")
    inside = whole(np.ones(MOVING.shape_zyx), itk_transform(RIGID), sitk.sitkLinear) > 0
    assert (out.read()[0][~inside] == lowest).all()
    assert out.metadata["outside_value"] == [lowest]


@pytest.mark.parametrize("changes", [{"part": (1, 3)}, {"workers": 2}], ids=["parts", "processes"])
def test_any_split_of_the_work_gives_the_same_bytes(folder: Path, changes: dict[str, Any]) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    warp(made(folder, out=folder / "reference.zarr"))
    parts = changes.get("part", (1, 1))[1]
    for number in range(1, parts + 1):
        result = warp(made(folder, **{**changes, "part": (number, parts)}))
        assert result.complete == (number == parts)
    again = warp(made(folder))
    assert again.computed == 0
    np.testing.assert_array_equal(
        Volume.open(folder / "out.zarr").read(), Volume.open(folder / "reference.zarr").read()
    )


def test_the_plan_agrees_with_what_is_done(folder: Path) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    plan = plan_warp(made(folder))
    assert not (folder / "out.zarr").exists()
    assert plan["blocks"] == warp(made(folder)).blocks
    assert plan["files_at_most"] >= sum(1 for p in (folder / "out.zarr").rglob("*") if p.is_file())


def test_what_was_expected_stands_beside_what_was_needed(folder: Path) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    result = warp(made(folder))
    kept = Volume.open(result.path).metadata
    assert kept["predicted"]["blocks"] == kept["needed"]["blocks"] == result.blocks
    assert kept["needed"]["files"] <= kept["predicted"]["files"]
    assert "expected" in result.summary


def test_a_source_that_changes_meanwhile_is_refused(folder: Path) -> None:
    source = volume(folder / "moving.zarr", SMOOTH.astype(np.float32))

    def disturb(what: str, done: int, total: int) -> None:
        os.utime(next(source.shard_files(source.grid.box)), (1, 1))

    with pytest.raises(VolumeError, match=r"moving\.zarr changed while it was read"):
        warp(made(folder), progress=disturb)


def test_a_quantised_volume_is_warped_by_its_values(folder: Path) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    whole_numbers = np.rint(SMOOTH / 2).astype(np.int16)
    scaled = Volume.create(folder / "scaled.zarr", MOVING, np.int16, chunk=8, shard=32, scale=[2.0])
    scaled.write(MOVING.box, whole_numbers[None])
    scaled.finish()
    warp(made(folder))
    found = Volume.open(warp(made(folder, zarr=folder / "scaled.zarr", out=folder / "scaled_out.zarr")).path)
    np.testing.assert_allclose(found.read(), Volume.open(folder / "out.zarr").read(), atol=1.01)
    assert found.dtype == np.float32


def test_a_read_only_target_is_one_sentence(folder: Path, small_disk: Path) -> None:
    volume(folder / "moving.zarr", SMOOTH)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(VolumeError, match=r"out\.zarr.* cannot be made \(Read-only file system\)"):
        warp(made(folder, out=small_disk / "out.zarr"))


def test_what_cannot_work_is_refused_before_anything_is_written(folder: Path) -> None:
    source = volume(folder / "moving.zarr", SMOOTH)
    (folder / "text.tfm").write_text("nonsense", encoding="utf-8")
    save_transform(Transform.rigid(np.eye(3), (900.0, 0, 0), (0, 0, 0)), folder / "far")
    flat = sitk.TranslationTransform(2, (1.0, 0.0))
    sitk.WriteTransform(flat, str(folder / "flat.tfm"))
    points = folder / "p.csv"
    points.write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    for error, match, changes in (
        (ConfigError, "neither is given", {"zarr": None}),
        (ConfigError, "both are given", {"points": points}),
        (ConfigError, "--zarr needs --like", {"like": None}),
        (ConfigError, "the output .* is the input .* itself", {"out": source.path, "overwrite": True}),
        (VolumeError, "none.zarr does not exist", {"zarr": folder / "none.zarr"}),
        (RegistrationError, "does not exist", {"transform": folder / "none.tfm"}),
        (RegistrationError, "text.tfm is a text that is no transform", {"transform": folder / "text.tfm"}),
        (RegistrationError, "2 dimensions, expected 3", {"transform": folder / "flat.tfm"}),
        (RegistrationError, "outside of .*exchanged", {"transform": folder / "far" / "transform.tfm"}),
    ):
        with pytest.raises(error, match=match):
            warp(made(folder, **changes))
        assert not list(folder.glob("out*"))


@pytest.mark.parametrize("where", ["zarr", "like", "transform", "out"])
def test_a_link_in_a_circle_is_one_sentence(folder: Path, where: str) -> None:
    volume(folder / "moving.zarr", SMOOTH)
    loop = folder / "loop.zarr"
    loop.symlink_to(loop)
    with pytest.raises(
        ConfigError, match=r"loop\.zarr cannot be reached \(Too many levels of symbolic links\)"
    ):
        warp(made(folder, **{where: loop}))


def test_a_level_outside_of_the_store_is_one_sentence(folder: Path) -> None:
    source = volume(folder / "moving.zarr", SMOOTH)
    record = json.loads((source.path / "zarr.json").read_text(encoding="utf-8"))
    record["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] = "../fixed.zarr/0"
    (source.path / "zarr.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(VolumeError, match=r"moving\.zarr: a level of the pyramid"):
        warp(made(folder))
    place = folder / "sub" / ".." / "fixed.zarr"
    (folder / "sub").mkdir()
    assert warp(made(folder, zarr=place, like=place)).complete


# -------------------------------------------------------------------------------------------- a new transform


class Swirl(PointMap):
    """Turns about the z axis, the more the farther from the middle: a transform that nobody else knows."""

    def __init__(self, radians_per_mm: float) -> None:
        self.radians_per_mm = radians_per_mm

    def apply(self, points_mm: ArrayLike) -> np.ndarray:
        x, y, z = np.moveaxis(np.asarray(points_mm, dtype=float), -1, 0)
        angle = self.radians_per_mm * np.hypot(x, y)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=-1)

    def inverse(self) -> Swirl:
        return Swirl(-self.radians_per_mm)


@pytest.mark.parametrize("composed", [False, True], ids=["alone", "in a composite"])
def test_a_new_transform_moves_points_and_volumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, composed: bool
) -> None:
    """The door: one class with `apply` and `inverse`, and `warp` moves points and a volume with it."""
    swirl = Composite((RIGID, Swirl(0.02))) if composed else Swirl(0.02)
    monkeypatch.setattr("comir_hpc.warp.read_transform", lambda *_: swirl)
    volume(folder / "moving.zarr", SMOOTH)
    found = Volume.open(warp(made(folder)).path).read()[0]
    index = MOVING.index_zyx(swirl.apply(FIXED.world_mm(np.moveaxis(np.indices(FIXED.shape_zyx), 0, -1))))
    expected = ndimage.map_coordinates(SMOOTH, np.moveaxis(index, -1, 0), order=1, mode="constant", cval=0.0)
    inside = ((index > 0) & (index < np.array(MOVING.shape_zyx) - 1)).all(-1)
    assert 0.1 < inside.mean() < 0.95
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-6)
    (folder / "p.csv").write_text("x,y,z\n10,-20,30\n", encoding="utf-8")
    warp(made(folder, zarr=None, points=folder / "p.csv", out=folder / "q.csv"))
    warp(made(folder, zarr=None, points=folder / "q.csv", out=folder / "r.csv", direction="moving-to-fixed"))
    there, back = (_rows(folder / name)[1][0] for name in ("q.csv", "r.csv"))
    np.testing.assert_allclose([float(there[a]) for a in "xyz"], swirl.apply((10, -20, 30)), atol=1e-6)
    np.testing.assert_allclose([float(back[a]) for a in "xyz"], (10, -20, 30), atol=1e-6)


# ----------------------------------------------------------------------------------------------------- points


def _rows(path: Path) -> tuple[str, list[dict[str, str]]]:
    comment, *lines = path.read_text(encoding="utf-8").splitlines()
    return comment, list(csv.DictReader(lines))


def test_points_go_there_and_back_and_say_which_way(folder: Path) -> None:
    points = folder / "points.csv"
    points.write_text('name,X, y,z,note\nleft,10,-20.5,3e1,"a, b"\nright,0,0,0,\n', encoding="utf-8")
    there = folder / "there.csv"
    result = warp(made(folder, zarr=None, like=None, points=points, out=there))
    assert (result.points, result.summary) == (2, f"{there}: 2 points")
    comment, rows = _rows(there)
    assert comment.startswith("# fixed -> moving, world LPS mm")
    assert list(rows[0]) == ["x", "y", "z", "fixed_x", "fixed_y", "fixed_z", "name", "note"]
    assert (rows[0]["name"], rows[0]["note"]) == ("left", "a, b")
    expected = load_transform(folder / "transform.tfm").apply([10, -20.5, 30])
    np.testing.assert_allclose([float(rows[0][axis]) for axis in "xyz"], expected, atol=1e-6)

    back = folder / "back.csv"
    warp(made(folder, zarr=None, like=None, points=there, out=back, direction="moving-to-fixed"))
    comment, rows = _rows(back)
    assert comment.startswith("# moving -> fixed, world LPS mm")
    np.testing.assert_allclose([float(rows[0][a]) for a in ("x", "y", "z")], [10, -20.5, 30], atol=1e-6)
    assert rows[0]["name"] == "left"


def test_points_and_image_agree(folder: Path) -> None:
    """A bright voxel of the moving volume appears in the warped one where its point is carried to."""
    values = np.zeros(MOVING.shape_zyx, dtype=np.float32)
    values[14, 16, 12] = 1000
    smooth = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(itk_image(values, MOVING), 3.0))
    volume(folder / "moving.zarr", smooth)
    warp(made(folder))
    x, y, z = MOVING.world_mm((14, 16, 12))
    (folder / "p.csv").write_text(f"x,y,z\n{x},{y},{z}\n", encoding="utf-8")
    warp(made(folder, zarr=None, points=folder / "p.csv", out=folder / "q.csv", direction="moving-to-fixed"))
    _, rows = _rows(folder / "q.csv")
    carried = FIXED.index_zyx([float(rows[0][a]) for a in "xyz"])
    found = Volume.open(folder / "out.zarr").read()[0]
    brightest = np.unravel_index(found.argmax(), found.shape)
    assert np.abs(carried - brightest).max() <= 0.75


def test_a_bent_transform_carries_points_one_way_only(folder: Path) -> None:
    sitk.WriteTransform(bent(), str(folder / "bent.h5"))
    (folder / "p.csv").write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    options = {"zarr": None, "transform": folder / "bent.h5", "points": folder / "p.csv"}
    warp(made(folder, **options, out=folder / "q.csv"))
    _, rows = _rows(folder / "q.csv")
    np.testing.assert_allclose(
        [float(rows[0][a]) for a in "xyz"], bent().TransformPoint((1, 2, 3)), atol=1e-6
    )
    with pytest.raises(RegistrationError, match="no inverse"):
        warp(made(folder, **options, out=folder / "r.csv", direction="moving-to-fixed"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("x,y,z\n", "a header and no points"),
        ("a,b\n1,2\n", "has the columns a, b; x, y, z missing"),
        ("x y z\n1 2 3\n", "has the columns x y z"),
        ("# c\nx,y,z\n1,2,3\n\n4,five,6\n", r"row 2 \(line 5\): y is 'five', expected a number in mm"),
        ("x,y,z\n1,2,nan\n", r"row 1 \(line 2\): z is 'nan'"),
        ("x,y,z\n1,2\n", r"row 1 \(line 2\) has 2 values, the header 3 columns"),
        ("\xff\xfe", "columns"),
    ],
)
def test_bad_points_are_named_by_row(folder: Path, text: str | None, message: str) -> None:
    points = folder / "bad.csv"
    if text is not None:
        points.write_text(text, encoding="utf-8")
    with pytest.raises(VolumeError, match=message):
        warp(made(folder, zarr=None, points=points, out=folder / "q.csv"))
    assert not (folder / "q.csv").exists()


def test_a_result_of_other_points_is_not_replaced_unasked(folder: Path) -> None:
    points, out = folder / "p.csv", folder / "q.csv"
    points.write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    options = made(folder, zarr=None, points=points, out=out)
    warp(options)
    warp(options)
    points.write_text("x,y,z\n3,2,1\n", encoding="utf-8")
    with pytest.raises(VolumeError, match=r"q\.csv exists and holds something else"):
        warp(options)
    assert warp(options.model_copy(update={"overwrite": True})).points == 1


def test_a_table_in_ras_is_carried_in_lps_and_said(folder: Path) -> None:
    save_transform(Transform.rigid(np.eye(3), (10.0, 20.0, 30.0), (0, 0, 0)), folder)
    (folder / "ras.csv").write_text("# CoordinateSystem = RAS\nx,y,z\n1,2,3\n", encoding="utf-8")
    result = warp(made(folder, zarr=None, like=None, points=folder / "ras.csv", out=folder / "q.csv"))
    _, rows = _rows(folder / "q.csv")
    assert [float(rows[0][a]) for a in ("x", "y", "z", "fixed_x", "fixed_y", "fixed_z")] == [
        9,
        18,
        33,
        -1,
        -2,
        3,
    ]
    assert result.notes == (
        "ras.csv: its points are RAS, as it says; they were converted to LPS (x and y change their sign)",
    )


def test_points_where_nothing_can_be_written(folder: Path, small_disk: Path) -> None:
    points, out = folder / "p.csv", folder / "new" / "deep" / "q.csv"
    points.write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    assert warp(made(folder, zarr=None, points=points, out=out)).points == 1
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for target, match in (
        (small_disk / "q.csv", r"q\.csv cannot be written \(Read-only file system\)"),
        (small_disk / "new" / "q.csv", r"q\.csv cannot be written \(Read-only file system\)"),
        (folder / "transform.json" / "q.csv", r"q\.csv cannot be written \(.*transform\.json is no folder\)"),
    ):
        with pytest.raises(VolumeError, match=match):
            warp(made(folder, zarr=None, points=points, out=target))
    for name in ("q.zarr", "q.nii.gz", "q"):
        with pytest.raises(ConfigError, match="points are written as CSV"):
            warp(made(folder, zarr=None, points=points, out=folder / name))
    with pytest.raises(ConfigError, match=r"the output .*p\.csv is the input"):
        warp(made(folder, zarr=None, points=points, out=points, overwrite=True))
