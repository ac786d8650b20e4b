"""Single slices through the whole pipeline: 2D as the special case of one voxel along z."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from phantoms import store as store_phantom
from PIL import Image
from registration_cases import FLIPPED, OBLIQUE, seen, specimen, store
from scipy import ndimage
from scipy.spatial.transform import Rotation
from trained_run import write_run

from comir_hpc.config import (
    InferSettings,
    IngestSettings,
    RegisterSettings,
    TrainSettings,
    WarpSettings,
    validate,
)
from comir_hpc.data.embedded import Displacement, displace, phantom_pair
from comir_hpc.errors import ConfigError, RegistrationError, VolumeError
from comir_hpc.evaluate import evaluate
from comir_hpc.infer import infer
from comir_hpc.ingest import ingest
from comir_hpc.learning.patches import specimen_mask as patch_mask
from comir_hpc.register import plan_register, register
from comir_hpc.register.slices import SlicePlane
from comir_hpc.report import report
from comir_hpc.representations.encoding import load_encoder, nearest_level
from comir_hpc.representations.features import specimen_mask
from comir_hpc.space.grid import IDENTITY, Box, Grid
from comir_hpc.space.rotations import angle_deg, so2_grid
from comir_hpc.train import train
from comir_hpc.transforms import Transform, from_itk, itk_image, itk_transform, load_transform, save_transform
from comir_hpc.volumes.readers import in_memory, open_source
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp import warp

SIDE = 72
# A slice of a coronal scan: rows to the feet, columns to the patient's left, the normal to the back.
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))


def turn_about(axis, degrees):
    return Rotation.from_rotvec(np.radians(degrees) * np.asarray(axis, dtype=float)).as_matrix()


def one_slice(seed=0):
    """Values (1, y, x) of a specimen without symmetry, and its mask."""
    values, mask = specimen((1, SIDE, SIDE - 8), seed=seed, brightness=8.0)
    return values, mask


def in_plane(grid, degrees, along_x, along_y):
    """Motion of a slice in its own plane, fixed to moving; shifts in mm along its axes."""
    x, y, normal = np.asarray(grid.direction).T
    return Transform.rigid(turn_about(normal, degrees), along_x * x + along_y * y, grid.centre_mm)


def pair_on_disk(folder, grid, onto, truth, seed=0):
    values, mask = one_slice(seed)
    store(folder / "f.zarr", values, grid, foreground_above=2.0)
    moved = seen_slice(values, grid, onto, truth)
    store(folder / "m.zarr", moved, onto, foreground_above=2.0)
    return grid.world_mm(np.argwhere(mask))


def seen_slice(values, grid, onto, truth):
    """Like `seen`; scipy must not look off the only slice for rounding."""
    thick = np.repeat(values, 3, axis=0)
    thicker = Grid(thick.shape, grid.spacing_zyx, tuple(grid.world_mm((-1.0, 0, 0))), grid.direction)
    return seen(thick, thicker, onto, truth)


def by_information(folder, **more):
    return RegisterSettings(
        fixed=folder / "f.zarr", moving=folder / "m.zarr", out=folder / "out", representation="intensity",
        threads=1, **{"rotations": 90, "candidates": 4, "search_voxels": 20, **more},
    )  # fmt: skip


# ---------------------------------------------------------------------- the grid


def test_a_grid_of_one_slice_is_measured_in_its_plane() -> None:
    grid = Grid((1, 40, 60), (0.1, 2.0, 1.0), unit="cm")
    assert grid.planar
    assert grid.axes == (1, 2)
    assert grid.finest_mm == 10
    assert grid.mean_side_mm == pytest.approx((800 + 600) / 2)
    assert grid.agrees_with(Grid((1, 40, 60), (7, 2.0, 1.0), unit="cm"))
    assert not grid.agrees_with(Grid((1, 40, 60), (0.1, 2.0, 1.01), unit="cm"))
    volume = Grid((2, 40, 60), (0.1, 2.0, 1.0))
    assert (volume.planar, volume.axes, volume.finest_mm) == (False, (0, 1, 2), 0.1)


def test_turns_of_the_plane_are_even_and_leave_z_alone() -> None:
    turns = so2_grid(8)
    np.testing.assert_allclose(turns[0], np.eye(3), atol=1e-15)
    np.testing.assert_allclose(angle_deg(turns), [0, 45, 90, 135, 180, 135, 90, 45], atol=1e-9)
    np.testing.assert_allclose(turns[:, 0], np.tile([1.0, 0, 0], (8, 1)), atol=1e-15)
    np.testing.assert_allclose(turns[2] @ (0, 0, 1), (0, 1, 0), atol=1e-15)  # a quarter carries x onto y
    with pytest.raises(ConfigError, match="at least 1"):
        so2_grid(0)


# ---------------------------------------------------------------------- files


def counted() -> np.ndarray:
    return np.arange(30 * 40, dtype=np.uint16).reshape(30, 40)


def write_2d(path: Path, values: np.ndarray) -> Path:
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".png":
            Image.fromarray(values).save(path)
        case ".tif":
            tags = {"unit": "um"} if "imagej" in path.name else None
            tifffile.imwrite(path, values, imagej=tags is not None, resolution=(2, 4), metadata=tags)
        case _:
            image = sitk.GetImageFromArray(values)
            image.SetSpacing((0.5, 0.25))
            image.SetOrigin((3, 4))
            image.SetDirection((0, -1, 1, 0))
            sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize(
    "name", ["a.npy", "a.png", "a.tif", "imagej.tif", "a.mha", "a.nrrd", "a.nii", "a.nii.gz"]
)
def test_a_file_of_two_axes_is_one_slice(tmp_path: Path, name: str) -> None:
    source = open_source(write_2d(tmp_path / name, counted()))
    assert source.shape == (1, 1, 30, 40)
    np.testing.assert_array_equal(source.read()[0, 0], counted())
    np.testing.assert_array_equal(source.read(Box((0, 3, 5), (1, 9, 30)))[0, 0], counted()[3:9, 5:30])
    if name in ("a.npy", "a.png", "a.tif"):  # resolution tags are a screen's or a printer's
        with pytest.raises(VolumeError, match=r"no voxel spacing.*--spacing Z Y X"):
            source.grid()
        assert source.grid((5, 2, 1), "um").spacing_zyx == (5, 2, 1)
        return
    np.testing.assert_allclose(source.grid().spacing_zyx, (1, 0.25, 0.5))
    assert any("no slice thickness" in note for note in source.notes)
    if name != "imagej.tif":
        world = np.array(source.grid().world_mm((0, 2, 4)))
        np.testing.assert_allclose(world, (3 - 2 * 0.25, 4 + 4 * 0.5, 0), atol=1e-6)


def test_colours_are_channels_and_what_jpeg_does_is_said(tmp_path: Path) -> None:
    values = np.stack([counted() % 251, counted() % 7, counted() % 13], axis=-1).astype(np.uint8)
    source = open_source(write_2d(tmp_path / "a.png", values))
    np.testing.assert_array_equal(source.read()[:, 0], values.transpose(2, 0, 1))
    Image.fromarray(values).save(tmp_path / "a.jpg")
    assert "JPEG has changed" in open_source(tmp_path / "a.jpg").notes[0]


@pytest.mark.parametrize(("shape", "order"), [((30, 40, 1), (2, 0, 1)), ((30, 1, 40), (1, 0, 2))])
def test_a_slice_across_another_axis_is_put_upright(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    grid = Grid(shape, (2.0, 3.0, 4.0), (1, 2, 3), OBLIQUE)
    source = in_memory(counted().reshape(shape), grid, "scan")
    np.testing.assert_array_equal(source.read(Box((0, 1, 2), (1, 7, 9)))[0, 0], counted()[1:7, 2:9])
    # The same voxel is at the same place in the world, and --spacing is still in the file's order.
    there, here = np.array([7, 11]), np.array([0, 7, 11])
    single = shape.index(1)
    np.testing.assert_allclose(
        source.grid().world_mm(here), grid.world_mm(np.insert(there, single, 0)), atol=1e-9
    )
    assert source.grid((7, 8, 9), "mm").spacing_zyx == tuple((7, 8, 9)[axis] for axis in order)
    assert "across" in source.notes[0]


# ---------------------------------------------------------------------- the plane


@pytest.mark.parametrize("direction", [IDENTITY, OBLIQUE, FLIPPED, CORONAL])
def test_slices_of_one_plane_are_compared_as_they_lie(direction) -> None:
    fixed = Grid((1, 30, 40), (5, 1, 2), (4, -3, 7), direction)
    along = np.asarray(direction)[:, 0]
    moving = Grid((1, 50, 50), (1, 1, 1), tuple(np.add((4, -3, 7), 9 * along)), direction)
    frame = SlicePlane.from_grids(fixed, moving)
    assert frame.tilt_deg == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(frame.world(Transform.identity()).matrix_mm, np.eye(4), atol=1e-12)
    for grid, to in ((fixed, frame.fixed), (moving, frame.moving)):
        np.testing.assert_allclose(to.apply(grid.world_mm((0, 7, 9)))[2], 0, atol=1e-12)


def test_a_slice_seen_from_behind_is_not_mirrored() -> None:
    fixed = Grid((1, 30, 40), (1, 1, 1))
    behind = Grid((1, 30, 40), (1, 1, 1), (39, 0, 0), ((-1, 0, 0), (0, 1, 0), (0, 0, -1)))
    frame = SlicePlane.from_grids(fixed, behind)
    np.testing.assert_allclose(frame.world(Transform.identity()).matrix_mm, np.eye(4), atol=1e-12)


def test_a_tilted_plane_is_turned_by_the_smallest_rotation() -> None:
    fixed = Grid((1, 30, 40), (1, 1, 1))
    tilted = Grid((1, 30, 40), (1, 1, 1), (5, 6, 20), tuple(map(tuple, turn_about((0, 1, 0), 25))))
    frame = SlicePlane.from_grids(fixed, tilted)
    found = frame.world(Transform.identity())
    assert frame.tilt_deg == pytest.approx(25)
    assert found.rotation_deg == pytest.approx(25)
    on_plane = tilted.index_zyx(found.apply(fixed.corners_mm() * (1, 1, 0)))
    np.testing.assert_allclose(on_plane[:, 0], 0, atol=1e-9)
    turned = Transform.rigid(turn_about((0, 0, 1), 40), (3, 1, 0), (0, 0, 0))
    np.testing.assert_allclose(
        frame.world_rotations(turned.rotation_xyz[None])[0], frame.world(turned).rotation_xyz, atol=1e-12
    )


def test_volumes_are_left_in_the_world() -> None:
    frame = SlicePlane.from_grids(Grid((9, 9, 9), (1, 1, 1), direction=OBLIQUE), Grid((9, 9, 9), (2, 1, 1)))
    transform = Transform.rigid(turn_about((0, 1, 0), 30), (1, 2, 3), (4, 5, 6))
    np.testing.assert_array_equal(frame.world(transform).matrix_mm, transform.matrix_mm)
    np.testing.assert_array_equal(frame.world(transform).centre_mm, transform.centre_mm)


def test_flat_crossing_to_simpleitk() -> None:
    grid = Grid((1, 3, 5), (9, 2, 1), (4, 5, 0), ((0, -1, 0), (1, 0, 0), (0, 0, 1)))
    values = np.arange(15.0).reshape(1, 3, 5)
    image = itk_image(values, grid, flat=True)
    assert image.GetDimension() == 2
    place = image.TransformIndexToPhysicalPoint((4, 2))
    np.testing.assert_allclose(place, grid.world_mm((0, 2, 4))[:2])
    assert image[4, 2] == values[0, 2, 4]
    transform = Transform.rigid(turn_about((0, 0, 1), 40), (3, 1, 0), (7, 8, 0))
    back = from_itk(itk_transform(transform, flat=True), flat=True)
    np.testing.assert_allclose(back.matrix_mm, transform.matrix_mm, atol=1e-12)
    with pytest.raises(RegistrationError, match="in 2 dimensions is not a linear transform in 3"):
        from_itk(sitk.Euler2DTransform())


# ---------------------------------------------------------------------- registration


@pytest.mark.parametrize(
    ("direction", "degrees"), [(IDENTITY, 73.0), (OBLIQUE, -150.0), (FLIPPED, 28.0), (CORONAL, 12.0)]
)
def test_a_known_motion_in_the_plane_is_recovered(tmp_path: Path, direction, degrees: float) -> None:
    grid = Grid((1, SIDE, SIDE - 8), (3.0, 1.5, 1.5), (5, -7, 30), direction)
    truth = in_plane(grid, degrees, 6.0, -4.0)
    # Another scanner: more pixels, another corner, and thinner slices.
    corner = grid.world_mm((0, -6, -9))
    onto = Grid((1, SIDE + 12, SIDE + 10), (0.5, 1.5, 1.5), tuple(corner), direction)
    points = pair_on_disk(tmp_path, grid, onto, truth)
    found = register(by_information(tmp_path))
    assert found.transform.distance_mm(truth, points).mean() < 0.15 * 1.5
    assert 0.9 < found.record["overlap"] < 1  # of areas: the thicknesses differ
    assert found.record["candidates"][0]["matrix_lps_mm"] == found.transform.matrix_mm.tolist()
    np.testing.assert_allclose(
        found.transform.matrix_mm, load_transform(tmp_path / "out/transform.tfm").matrix_mm
    )
    # No point leaves the plane.
    np.testing.assert_allclose(onto.index_zyx(found.transform.apply(points))[:, 0], 0, atol=1e-6)
    with np.load(tmp_path / "out/search.npz") as landscape:
        normal = np.asarray(direction)[:, 2]
        np.testing.assert_allclose(landscape["rotations"] @ normal, np.tile(normal, (90, 1)), atol=1e-9)


@pytest.mark.parametrize("how", [{"initial": "identity"}, {"initial": "moments"}, {"transform": "affine"}])
def test_an_aligned_pair_stays(tmp_path: Path, how: dict) -> None:
    grid = Grid((1, SIDE, SIDE - 8), (1, 1.5, 1.5), direction=OBLIQUE)
    points = pair_on_disk(tmp_path, grid, grid, Transform.identity())
    found = register(by_information(tmp_path, **how))
    assert found.transform.distance_mm(Transform.identity(), points).mean() < 0.1 * 1.5
    assert "notes" not in found.record


def test_tilted_slices_say_so(tmp_path: Path) -> None:
    grid = Grid((1, SIDE, SIDE - 8), (1, 1.5, 1.5))
    tilted = Grid(
        grid.shape_zyx, grid.spacing_zyx, (30, -20, 5), tuple(map(tuple, turn_about((1, 0, 0), 20)))
    )
    values, _ = one_slice()
    store(tmp_path / "f.zarr", values, grid, foreground_above=2.0)
    store(tmp_path / "m.zarr", values, tilted, foreground_above=2.0)
    found = register(by_information(tmp_path, initial="moments"))
    index = np.argwhere(values > 4)
    np.testing.assert_allclose(tilted.index_zyx(found.transform.apply(grid.world_mm(index))), index, atol=0.1)
    assert "tilted by 20.0 degrees" in found.record["notes"][0]


def test_a_slice_and_a_volume_are_refused(tmp_path: Path) -> None:
    values, _ = one_slice()
    store(tmp_path / "f.zarr", values, Grid(values.shape, (1, 1, 1)), foreground_above=2.0)
    thick, _ = specimen((20, 24, 24), brightness=8.0)
    store(tmp_path / "m.zarr", thick, Grid(thick.shape, (1, 1, 1)), foreground_above=2.0)
    for run in (register, plan_register):
        with pytest.raises(
            RegistrationError, match=r"f\.zarr \(fixed\) is a single slice.*m\.zarr \(moving\) a vol"
        ):
            run(by_information(tmp_path))
    assert not (tmp_path / "out").exists()


def test_too_small_a_slice_is_refused(tmp_path: Path) -> None:
    values = np.full((1, 3, 40), 9.0, dtype=np.float32)
    values[0, 1] = 8
    for name in ("f", "m"):
        store(tmp_path / f"{name}.zarr", values, Grid(values.shape, (1, 1, 1)), foreground_above=2.0)
    with pytest.raises(RegistrationError, match="fewer than 4 voxels along an axis"):
        register(by_information(tmp_path))


def test_masks_of_a_slice_are_those_of_its_plane(tmp_path: Path) -> None:
    values = np.zeros((1, 40, 40), dtype=np.float32)
    values[0, 5:35, 5:35] = 10
    values[0, 14:24, 14:24] = 0  # a hole in the specimen
    values[0, 2, 2] = 10  # a speck in the air
    volume = store(tmp_path / "v.zarr", values, Grid(values.shape, (1, 1, 1)), foreground_above=2.0)
    expected = np.zeros((1, 40, 40), dtype=bool)
    expected[0, 5:35, 5:35] = True
    inner = (slice(None), slice(8, 32), slice(8, 32))
    found = specimen_mask(volume, 0)
    np.testing.assert_array_equal(found[inner], expected[inner])
    assert not found[0, 2, 2]
    above = torch.from_numpy(values > 2)[None, None]
    flat = ndimage.uniform_filter((values[0] > 2).astype(float), 5, mode="nearest") > 0.5
    np.testing.assert_array_equal(patch_mask(above).numpy()[0, 0, 0, 4:-4, 4:-4], flat[4:-4, 4:-4])


# ---------------------------------------------------------------------- encoders


def test_the_thickness_of_a_slice_does_not_matter_to_an_encoder(tmp_path: Path) -> None:
    values, _ = one_slice()
    thin = store(tmp_path / "thin.zarr", values, Grid(values.shape, (0.01, 2, 2)), foreground_above=2.0)
    assert nearest_level(thin, (2, 2, 2)) == 0
    with pytest.raises(VolumeError, match=r"the model was trained at 2 x 4 x 4 mm"):
        nearest_level(store(tmp_path / "fine.zarr", values, Grid(values.shape, (2, 9, 9))), (2, 4, 4))
    run = write_run(tmp_path / "run")
    with pytest.raises(VolumeError, match=r"thin\.zarr is a single slice.*trained on volumes"):
        load_encoder(run, "one", device="cpu").require_fitting(thin)
    names = {"fixed_modality": "one", "moving_modality": "two", "out": tmp_path / "out"}
    with pytest.raises(VolumeError, match="trained on volumes"):
        plan_register(RegisterSettings(fixed=thin.path, moving=thin.path, model=run, **names))


def slices_on_disk(folder: Path, spacing=(5.0, 2.0, 2.0), count=3) -> list[dict[str, Path]]:
    """Slices of a phantom, each a pair of its own."""
    pair = phantom_pair((48, 64, 72), seed=3)
    places = np.linspace(18, 30, count).astype(int)
    return [
        {
            name: store_phantom(folder / f"{name}{z}.zarr", values[z][None], spacing, above=20.0)
            for name, values in zip(("one", "two"), pair, strict=True)
        }
        for z in places
    ]


def planar_settings(pairs: list[dict[str, Path]], **more) -> TrainSettings:
    record = {
        "modalities": ["one", "two"],
        "pairs": [{k: str(v) for k, v in pair.items()} for pair in pairs],
        "network": {"widths": [8, 16]},
        "sampling": {"patch": [1, 32, 32], "pairs_per_step": 8},
        "optimiser": {"steps": 60},
        "engine": {"precision": "fp32", "device": "cpu"},
        "tracking": {"mlflow": None, "picture_every": 60},
    }
    return validate(TrainSettings, {**record, **more})


def test_training_on_slices_refuses_what_is_not_planar(tmp_path: Path) -> None:
    pairs = slices_on_disk(tmp_path, count=1)
    cubes = planar_settings(pairs, sampling={"patch": [32, 32, 32]})
    with pytest.raises(ConfigError, match=r"is a single slice, sampling\.patch is .*use \[1, 32, 32\]"):
        train(cubes, tmp_path / "run")
    solid = planar_settings(pairs, sampling={"patch": [1, 32, 32], "group": "D4"})
    with pytest.raises(ConfigError, match=r"use C4 or auto"):
        train(solid, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_group_of_oblong_pixels_is_c2(tmp_path: Path) -> None:
    pairs = slices_on_disk(tmp_path, spacing=(5.0, 2.0, 4.0), count=1)
    train(planar_settings(pairs, optimiser={"steps": 1}), tmp_path / "run")
    assert json.loads((tmp_path / "run/model.json").read_text(encoding="utf-8"))["group"] == "C2"


def test_slices_from_training_to_report(tmp_path: Path) -> None:
    pairs = slices_on_disk(tmp_path)
    run = tmp_path / "run"
    train(planar_settings(pairs), run)
    model = json.loads((run / "model.json").read_text(encoding="utf-8"))
    assert model["group"] == "C4"
    assert model["options"]["planar"]
    encoder = load_encoder(run, "one", device="cpu")
    assert encoder.network.total_stride_zyx[0] == 1
    assert encoder.network.receptive_halo_zyx[0] == 0
    assert {tuple(p["one"].name for p in pairs)} == {
        tuple(Path(k).name for k in model["inputs"] if "one" in k)
    }

    # The second modality of the middle slice, turned and shifted.
    fixed, aligned = Volume.open(pairs[1]["one"]), Volume.open(pairs[1]["two"])
    drawn = Displacement.in_plane(
        np.random.default_rng(5), aligned.grid.shape_zyx, largest_deg=30, largest_shift=0.1
    )
    moved, scanner, truth = displace(aligned.read()[0], aligned.grid, drawn, 96)
    assert scanner.shape_zyx == (1, 96, 96)
    np.save(tmp_path / "moving.npy", moved[0])
    ingest(
        IngestSettings(
            source=tmp_path / "moving.npy", out=tmp_path / "npy.zarr", spacing=(1, 2, 2), unit="mm"
        )
    )
    moving = store(tmp_path / "moving.zarr", moved, scanner, foreground_above=20.0)
    np.testing.assert_array_equal(Volume.open(tmp_path / "npy.zarr").read(), moving.read())

    settings = {"model": run, "device": "cpu", "precision": "fp32"}
    infer(InferSettings(zarr=moving.path, modality="two", out=tmp_path / "r.zarr", **settings))
    whole, _ = load_encoder(run, "two", device="cpu", precision="fp32").encode_volume(moving, 0)
    np.testing.assert_array_equal(Volume.open(tmp_path / "r.zarr").read(), whole)

    out = tmp_path / "out"
    register(
        RegisterSettings(
            fixed=fixed.path,
            moving=moving.path,
            fixed_modality="one",
            moving_modality="two",
            out=out,
            threads=1,
            moving_representation=tmp_path / "r.zarr",
            rotations=180,
            candidates=4,
            symmetrise="C4",
            **settings,
        )
    )
    save_transform(truth, tmp_path / "truth")
    (row,) = evaluate([out], tmp_path / "truth/transform.tfm").rows
    assert row.success
    assert row.tre_voxels == pytest.approx(row.tre_mm / 2)

    warp(
        WarpSettings(
            transform=out / "transform.tfm", zarr=moving.path, like=fixed.path, out=tmp_path / "w.zarr"
        )
    )
    warped, expected = Volume.open(tmp_path / "w.zarr").read()[0, 0], aligned.read()[0, 0]
    inside = ndimage.binary_erosion(expected > 20, iterations=4)
    assert np.corrcoef(warped[inside], expected[inside])[0, 1] > 0.9

    with np.load(out / "panels.npz") as panels:
        assert {key.split("_")[0] for key in panels} == {"slice"}
        assert panels["slice_after"].shape == fixed.grid.shape_zyx[1:]
    page = report(out).read_text(encoding="utf-8")
    assert "Slice <small>across z</small>" in page
    assert "--columns: 100.0fr" in page
    assert "Axial" not in page
    assert "Best score by direction" not in page


def test_slices_of_a_volume_train_a_planar_encoder(tmp_path: Path) -> None:
    pair = phantom_pair((24, 48, 56), seed=1)
    volumes = {
        name: store_phantom(tmp_path / f"{name}.zarr", values, (3.0, 2.0, 2.0), above=20.0)
        for name, values in zip(("one", "two"), pair, strict=True)
    }
    train(planar_settings([volumes], optimiser={"steps": 2}), tmp_path / "run")
    encoder = load_encoder(tmp_path / "run", "one", device="cpu", precision="fp32")
    volume = Volume.open(volumes["one"])
    whole, _ = encoder.encode_volume(volume, 0, skip_background=False)
    one = store_phantom(tmp_path / "slice.zarr", pair[0][11][None], (3.0, 2.0, 2.0), above=20.0)
    # The slice is normalised by the volume's statistics, which are not its own.
    Volume.open(one, writable=True).update_metadata(intensity=volume.metadata["intensity"])
    alone, _ = encoder.encode_volume(Volume.open(one), 0, skip_background=False)
    np.testing.assert_allclose(alone[:, 0], whole[:, 11], atol=1e-5)


# ---------------------------------------------------------------------- warp, report


@pytest.mark.parametrize(("interpolation", "order"), [("linear", 1), ("cubic", 3)])
def test_warp_of_a_slice(tmp_path: Path, interpolation: str, order: int) -> None:
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 50)), 2).astype(np.float32)
    # A thick fixed slice, a thin moving one: only their middles meet.
    moving = Grid((1, 40, 50), (0.1, 1, 1), direction=OBLIQUE)
    fixed = Grid((1, 36, 44), (9.0, 1, 1), direction=OBLIQUE)
    store(tmp_path / "m.zarr", values[None] + 5, moving)
    store(tmp_path / "f.zarr", np.full((1, 36, 44), 2, np.float32), fixed)
    x, y, normal = np.asarray(OBLIQUE).T
    transform = Transform.rigid(turn_about(normal, 20), 3 * x - 2 * y, fixed.centre_mm)
    path, _ = save_transform(transform, tmp_path)
    result = warp(
        WarpSettings(
            transform=path,
            zarr=tmp_path / "m.zarr",
            like=tmp_path / "f.zarr",
            out=tmp_path / "w.zarr",
            interpolation=interpolation,
        )
    )
    assert result.inside > 0.9
    index = np.stack(np.meshgrid([0], np.arange(36), np.arange(44), indexing="ij"), axis=-1)
    place = moving.index_zyx(transform.apply(fixed.world_mm(index)))[0]
    expected = (
        ndimage.map_coordinates(values, place[..., 1:].transpose(2, 0, 1), order=order, mode="mirror") + 5
    )
    inside = ((place[..., 1:] > 1) & (place[..., 1:] < (38, 48))).all(axis=-1)
    np.testing.assert_allclose(
        Volume.open(tmp_path / "w.zarr").read()[0, 0][inside], expected[inside], atol=1e-4
    )


def test_the_report_turns_a_coronal_slice_head_up() -> None:
    from comir_hpc.runs.pictures import oriented

    plane = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    panels = {f"slice_{kind}": plane for kind in ("fixed", "before", "after")}
    # Rows of the array grow to the head: the last one belongs on top. Columns grow to the left of the patient.
    to_head = np.array(((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)))
    np.testing.assert_array_equal(oriented(panels, "slice", to_head)["fixed"], plane[::-1])
    np.testing.assert_array_equal(oriented(panels, "slice", np.eye(3))["fixed"], plane)
    np.testing.assert_array_equal(oriented(panels, "slice", np.diag([-1.0, 1, 1]))["fixed"], plane[:, ::-1])


def test_a_nifti_slice_keeps_its_place(tmp_path: Path) -> None:
    """One sagittal slice cut from a volume, as fslroi leaves it: x is the single axis."""
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (10, -20, 5)
    nibabel.save(nibabel.Nifti1Image(counted().T[None].astype(np.float32), affine), tmp_path / "s.nii.gz")
    ingest(IngestSettings(source=tmp_path / "s.nii.gz", out=tmp_path / "s.zarr"))
    volume = Volume.open(tmp_path / "s.zarr")
    assert volume.grid.planar
    np.testing.assert_array_equal(volume.read()[0, 0], counted())
    ras = affine @ (0, 11, 7, 1)
    np.testing.assert_allclose(volume.grid.world_mm((0, 7, 11)), ras[:3] * (-1, -1, 1), atol=1e-4)
