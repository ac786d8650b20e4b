"""Deformations with a known answer, on a small phantom; and what must not be bent."""

from dataclasses import asdict

import numpy as np
import pytest
import SimpleITK as sitk
from registration_cases import OBLIQUE, specimen, store
from scipy import ndimage

from comir_hpc.config import RegisterSettings
from comir_hpc.config.base import validate
from comir_hpc.errors import ConfigError, RegistrationError
from comir_hpc.register import register
from comir_hpc.register.deform import _judged, make_maps
from comir_hpc.register.deform.bspline import fit_bspline
from comir_hpc.register.deform.held_out import Gain, HeldOut
from comir_hpc.register.deform.information import find_by_information, with_air
from comir_hpc.register.deform.lattice import Lattice, from_velocity, inverted, sampled
from comir_hpc.register.deform.two_ways import TwoWays
from comir_hpc.register.deform.velocity import Velocity, find_velocity
from comir_hpc.register.deform.warping import carried, exponential, indices, pooled, sample
from comir_hpc.report.deformation import deformation_numbers
from comir_hpc.representations.features import Features
from comir_hpc.runs.deformation import DeformationRecord, TwoWaysRecord
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine, ItkTransform, read_transform
from comir_hpc.transforms.jacobian import folded, least_determinant

SHAPE = (40, 44, 36)


def smooth(shape=SHAPE, sigma=6.0, largest=3.0, seed=3):
    """A displacement (3, z, y, x) in voxels: smoothed noise, scaled."""
    rng = np.random.default_rng(seed)
    field = np.stack(
        [ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap") for _ in range(3)]
    )
    return (field * largest / np.sqrt((field**2).sum(0)).max()).astype(np.float32)


def bent_pair(field, grid):
    """Features of a specimen and of the same bent: a fixed voxel p shows what the moving voxel p + field(p) does."""
    values, mask = specimen(SHAPE)
    places = np.indices(SHAPE).astype(float)
    back = -field.astype(float)
    for _ in range(30):
        back = -np.stack([ndimage.map_coordinates(f, places + back, order=1, mode="nearest") for f in field])
    moved, moved_mask = (
        ndimage.map_coordinates(v.astype(np.float32), places + back, order=1) for v in (values, mask)
    )
    return Features(values[None], mask, grid), Features(moved[None], moved_mask > 0.5, grid)


def error_vox(displacement, field, mask):
    return float(np.sqrt(((displacement - field) ** 2).sum(axis=0))[mask].mean())


@pytest.mark.parametrize("direction", [OBLIQUE, ((-1, 0, 0), (0, 1, 0), (0, 0, 1))])
def test_velocity_finds_a_known_deformation_on_oblique_and_flipped_grids(direction):
    field = smooth()
    grid = Grid(SHAPE, (2.0, 2.0, 2.0), (5.0, -8.0, 20.0), direction)
    fixed, moving = bent_pair(field, grid)
    found = from_velocity(find_velocity([make_maps(fixed, moving, Affine.identity(), alike=True)], 8.0))
    there = carried(found.displacement_mm, found.grid, grid) / 2.0
    before = error_vox(0 * field, field, fixed.mask)
    after = error_vox(there, field, fixed.mask)
    assert before > 1.2
    assert after < 0.3
    assert folded(found.determinant) == 0
    # ITK's form, asked for world points, says the same as the lattice does.
    points = grid.world_mm(np.argwhere(fixed.mask)[::97])
    true = grid.world_mm(np.argwhere(fixed.mask)[::97] + field[:, fixed.mask].T[::97])
    moved = ItkTransform(found.itk()).apply(points)
    assert np.linalg.norm(moved - true, axis=1).mean() < 2.0 * 0.35


def test_values_that_run_the_other_way_are_brought_to_run_the_same():
    field = smooth()
    fixed, moving = bent_pair(field, Grid(SHAPE, (1.0, 1.0, 1.0)))
    against = Features(1.5 - 2 * moving.values, moving.mask, moving.grid)
    found = [
        find_velocity([make_maps(fixed, side, Affine.identity(), alike=alike)], 6.0)
        for side, alike in ((moving, True), (against, False))
    ]
    errors = [error_vox(carried(f.displacement_mm(), f.grid, fixed.grid), field, fixed.mask) for f in found]
    assert errors[1] < 0.4
    assert errors[1] < errors[0] + 0.1


def test_information_finds_a_known_deformation_between_values_that_no_line_relates():
    field = smooth()
    grid = Grid(SHAPE, (2.0, 2.0, 2.0), (5.0, -8.0, 20.0), OBLIQUE)
    fixed, moving = bent_pair(field, grid)
    other = Features(np.cos(4 * moving.values), moving.mask, grid)
    maps = with_air(make_maps(fixed, other, Affine.identity(), alike=False), None, 10.0)
    found = from_velocity(find_by_information([maps], fixed, 10.0))
    errors = [
        error_vox(carried(f.displacement_mm, f.grid, grid) / 2.0, field, fixed.mask)
        for f in (found, from_velocity(find_by_information([maps], fixed, 10.0, start=found)))
    ]
    assert errors[0] < 0.4
    assert errors[1] < errors[0] + 0.05
    assert folded(found.determinant) == 0


def test_two_ways_that_agree_bear_a_bend_out_and_two_errors_do_not():
    grid = Grid(SHAPE, (2.0, 2.0, 2.0))
    fixed = Features(np.zeros((1, *SHAPE), np.float32), np.ones(SHAPE, bool), grid)
    bends = [Lattice(grid, smooth(seed=n), -smooth(seed=n)) for n in (3, 4)]
    near = Lattice(grid, bends[0].displacement_mm + 0.2 * bends[1].displacement_mm, bends[0].backward_mm)
    agreed = TwoWays.compared(bends[0], near, fixed)
    assert agreed.refusal is None
    assert agreed.apart_mm == pytest.approx(0.2 * TwoWays.compared(*bends, fixed).intensities_mm, rel=1e-5)
    assert "do not agree" in TwoWays.compared(*bends, fixed).refusal
    # The report says it, and result.json takes it as it is.
    record = DeformationRecord(kind="field", kept=True, two_ways=TwoWaysRecord(**asdict(agreed)))
    said = {number.label: number.value for number in deformation_numbers(record)}
    assert said["Two ways apart"] == f"{agreed.apart_mm:.3g} mm"


def test_flow_of_a_velocity_and_of_its_negative_undo_each_other():
    velocity = smooth(largest=4.0)
    there, back = exponential(velocity), exponential(-velocity)
    round_trip = there + sample(back, indices(SHAPE) + there)
    inner = (slice(None),) + (slice(6, -6),) * 3
    assert np.abs(there[inner]).max() > 2
    assert np.sqrt((round_trip[inner] ** 2).sum(axis=0)).max() < 0.1


def test_a_velocity_whose_lattice_folds_is_smoothed_until_it_does_not():
    rng = np.random.default_rng(0)
    wild = Velocity(
        (6 * rng.standard_normal((3, 12, 12, 12))).astype(np.float32), Grid((12, 12, 12), (1.0,) * 3)
    )
    found = from_velocity(wild)
    assert found.smoothings > 0
    assert folded(found.determinant) == folded(found.inverse.determinant) == 0


@pytest.mark.parametrize(("folds", "kept"), [(False, True), (True, False)])
def test_what_folds_much_is_refused_although_held_out_cubes_agree_better(folds, kept):
    grid = Grid((12, 12, 12), (1.0,) * 3)
    rng = np.random.default_rng(0)
    vectors = ((3.0 if folds else 0.1) * rng.standard_normal((3, *grid.shape_zyx))).astype(np.float32)
    lattice = Lattice(grid, vectors, vectors)
    fixed = Features(np.ones((1, *grid.shape_zyx), np.float32), np.ones(grid.shape_zyx, bool), grid)
    gain = Gain(before=0.1, after=0.4, gain=0.3, error=0.01, cubes=20)
    found = _judged(lattice, None, gain, None, fixed, Affine.identity(), "bspline", 4.0)
    assert found.record["kept"] is kept
    assert (found.transform is not None) is kept
    if folds:
        assert found.record["folded_share"] > 0.01
        assert "folds space at" in found.record["reason"]


def test_determinant_of_a_stretch_a_fold_and_a_hidden_fold():
    grid = Grid((6, 6, 6), (1.0, 2.0, 3.0), direction=OBLIQUE)
    index = np.moveaxis(np.indices(grid.shape_zyx), 0, -1).astype(float)
    np.testing.assert_allclose(least_determinant(grid.world_mm(index * (1, 1, 1.5)), grid), 1.5)
    np.testing.assert_allclose(least_determinant(grid.world_mm(index * (1, -1, 1)), grid), -1)
    # One plane of points crosses its neighbour. Central differences stay positive there: (2 - 0.5) / 2.
    hidden = index.copy()
    hidden[3, ..., 0] += 1.5
    place = hidden[..., 0]
    assert ((place[4] - place[2]) / 2 > 0).all()
    determinant = least_determinant(grid.world_mm(hidden), grid)
    assert folded(determinant) == 2 * 36  # the points on both sides of the cell that is turned inside out
    assert folded(determinant, index[..., 0] == 3) == 36


def test_iterated_inverse_of_a_sampled_transform():
    grid = Grid(SHAPE, (1.0, 1.5, 2.0), (4.0, 5.0, 6.0), OBLIQUE)
    field = smooth(largest=2.0)
    first = Lattice(grid, field, inverted(field, grid))
    again = sampled(ItkTransform(first.itk()), grid)
    np.testing.assert_allclose(again.displacement_mm, field, atol=1e-4)
    fixed = Features(np.zeros((1, *SHAPE), np.float32), specimen(SHAPE)[1], grid)
    assert again.figures(fixed)["inverse_residual_mm"]["p95"] < 0.02
    assert first.figures(fixed)["displacement_mm"]["largest"] == pytest.approx(
        np.sqrt((field**2).sum(0))[fixed.mask].max(), rel=1e-5
    )


def test_cubes_are_held_out_and_judge_gain():
    values, mask = specimen(SHAPE)
    held = HeldOut(mask, 4, seed=1)
    assert 0.05 < held.mask.sum() / mask.sum() < 0.16
    assert held.num_cubes >= 8
    moved = np.roll(values, 2, axis=0)[None]
    weights = mask.astype(np.float32)
    better = held.gain(values[None], (moved, weights), (values[None], weights), True)
    assert better.refusal is None
    assert better.after == pytest.approx(1)
    worse = held.gain(values[None], (values[None], weights), (moved, weights), True)
    assert "does not improve" in worse.refusal
    same = held.gain(values[None], (moved, weights), (moved, weights), True)
    assert same.gain == 0
    assert "does not improve" in same.refusal
    few = HeldOut(np.pad(np.ones((6, 6, 6), bool), 6), 4, seed=0)
    unseen = few.gain(
        values[None, :18, :18, :18], *[(moved[:, :18, :18, :18], np.ones((18, 18, 18)))] * 2, True
    )
    assert "cubes" in unseen.refusal


def test_pooled_and_carried_agree_on_where_coarse_voxels_lie():
    grid = Grid((12, 10, 8), (1.0, 1.0, 1.0))
    ramp = np.indices(grid.shape_zyx).astype(np.float32)
    coarse = pooled(ramp, 2)
    inner = (slice(None),) + (slice(1, -1),) * 3
    np.testing.assert_allclose(
        carried(coarse, grid.downsampled((2, 2, 2)), grid)[inner], ramp[inner], atol=1e-5
    )


@pytest.fixture(scope="module")
def bent_stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bent")
    grid = Grid(SHAPE, (2.0, 2.0, 2.0), (5.0, -8.0, 20.0))
    values, mask = specimen(SHAPE, brightness=4.0)
    field = smooth()
    places = np.indices(SHAPE).astype(float)
    back = -field.astype(float)
    for _ in range(30):
        back = -np.stack([ndimage.map_coordinates(f, places + back, order=1, mode="nearest") for f in field])
    moved = ndimage.map_coordinates(values, places + back, order=1)
    store(folder / "fixed.zarr", values, grid)
    store(folder / "moving.zarr", moved.astype(np.float32), grid)
    return folder, grid, mask, field


def settings(folder, out, **given):
    given = {"representation": "intensity", "initial": "identity", "checks": "quick", "threads": 1, **given}
    return RegisterSettings(fixed=folder / "fixed.zarr", moving=folder / "moving.zarr", out=out, **given)


@pytest.mark.parametrize(("kind", "length"), [("field", 8.0), ("bspline", 8.0)])
def test_register_bends_and_its_files_are_read_again(bent_stores, tmp_path, kind, length):
    folder, grid, mask, field = bent_stores
    done = register(settings(folder, tmp_path / kind, transform=kind, smoothness_mm=length))
    result = done.result
    assert result.bends, result.deformation.reason
    assert result.transform_file == "transform.h5"
    assert not (tmp_path / kind / "transform.tfm").exists()
    assert not (tmp_path / kind / "transform.json").exists()
    index = np.argwhere(mask)[::37]
    points = grid.world_mm(index)
    true = grid.world_mm(index + field[:, mask].T[::37])
    whole = read_transform(tmp_path / kind / "transform.h5")
    affine = read_transform(tmp_path / kind / "affine.tfm")
    errors = [np.linalg.norm(t.apply(points) - true, axis=1).mean() / 2.0 for t in (affine, whole)]
    assert errors[1] < 0.6
    assert errors[1] < 0.5 * errors[0]
    back = sitk.ReadTransform(str(tmp_path / kind / "inverse.h5"))
    returned = np.array([back.TransformPoint(p) for p in whole.apply(points).tolist()])
    assert np.linalg.norm(returned - points, axis=1).mean() < 0.1
    assert result.deformation.folded_points == 0
    assert register(settings(folder, tmp_path / kind, transform=kind, smoothness_mm=length)).skipped


def test_identity_stays_identity(bent_stores, tmp_path):
    folder, grid, mask, _ = bent_stores
    same = RegisterSettings(
        fixed=folder / "fixed.zarr",
        moving=folder / "fixed.zarr",
        out=tmp_path / "same",
        representation="intensity",
        initial="identity",
        checks="quick",
        transform="field",
        smoothness_mm=8.0,
        threads=1,
    )
    done = register(same)
    points = grid.world_mm(np.argwhere(mask)[::37])
    found = read_transform(done.folder / done.result.transform_file)
    assert np.linalg.norm(found.apply(points) - points, axis=1).mean() / 2.0 < 0.1
    assert done.result.deformation.reason
    assert f"not bent ({done.result.deformation.reason})" in done.summary


def test_a_spline_is_the_field_that_it_is_fitted_to():
    """On turned axes of three spacings: a spline of the same mesh comes back, and a smooth field to a hundredth."""
    a, c = np.cos(0.4), np.sin(0.4)
    grid = Grid(
        (18, 15, 20), (8.0, 7.0, 6.0), (5.0, -8.0, 20.0), ((a, -c, 0.0), (c, a, 0.0), (0.0, 0.0, 1.0))
    )

    def lattice_of(vectors_mm):
        along = np.moveaxis(vectors_mm @ np.asarray(grid.direction), -1, 0)[::-1].astype(np.float32)
        return Lattice(grid, along, -along)

    points = grid.world_mm(np.moveaxis(np.indices(grid.shape_zyx), 0, -1))
    inner = tuple(slice(1, -1) for _ in range(3))  # ITK moves nothing on the last faces of a domain
    given = fit_bspline(lattice_of(np.zeros((*grid.shape_zyx, 3))), 24.0)
    given.SetParameters(np.random.default_rng(0).normal(0, 3, len(given.GetParameters())).tolist())
    moved = ItkTransform(given).apply(points) - points
    rows = np.random.default_rng(1).random((*grid.shape_zyx, 3))
    wave = np.sin(points @ np.array([0.03, 0.02, 0.04]))[..., None] * np.array([3.0, -2.0, 4.0])
    for vectors, length, limit in ((moved, 24.0, 2e-3), (wave, 24.0, 0.02), (rows, 2.0, 2e-3)):
        found = ItkTransform(fit_bspline(lattice_of(vectors), length)).apply(points) - points
        off = np.linalg.norm(found - vectors, axis=-1)[inner]
        assert off.mean() < limit * np.linalg.norm(vectors, axis=-1).mean()


def test_what_cannot_be_bent_is_refused_by_name(bent_stores, tmp_path):
    folder, *_ = bent_stores
    with pytest.raises(ConfigError, match="does not bend"):
        validate(RegisterSettings, {"fixed": "a", "moving": "b", "smoothness_mm": 3.0})
    with pytest.raises(RegistrationError, match="--smoothness-mm 500"):
        register(settings(folder, tmp_path / "long", transform="field", smoothness_mm=500.0))
    with pytest.raises(RegistrationError, match=r"--smoothness-mm 0\.1"):
        register(settings(folder, tmp_path / "short", transform="bspline", smoothness_mm=0.1))
    values = specimen(SHAPE, brightness=4.0)[0][20:21]
    store(tmp_path / "slice.zarr", values, Grid(values.shape, (2.0, 2.0, 2.0)))
    flat = RegisterSettings(
        fixed=tmp_path / "slice.zarr",
        moving=tmp_path / "slice.zarr",
        out=tmp_path / "flat",
        representation="intensity",
        transform="field",
    )
    with pytest.raises(RegistrationError, match="single slices"):
        register(flat)
