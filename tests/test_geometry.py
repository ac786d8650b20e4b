"""Grids against ITK on real headers, boxes against sets of voxels, and plans that write every voxel exactly once."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from comir_hpc.data.embedded import embedded_volume
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.space.grid import MM_PER_UNIT, Box, Grid, unit_name
from comir_hpc.space.plan import Block, plan_blocks
from comir_hpc.transforms import itk_image
from comir_hpc.volumes.readers import open_source

sizes = st.tuples(*[st.integers(1, 30)] * 3)
small = st.tuples(*[st.integers(1, 12)] * 3)
lengths = st.tuples(*[st.floats(0.05, 20)] * 3)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any grid: oblique, flipped, of any unit."""
    turn = Rotation.from_euler(
        "xyz", [draw(st.floats(-180, 180)) for _ in range(3)], degrees=True
    ).as_matrix()
    flip = np.diag([draw(st.sampled_from([-1, 1])) for _ in range(3)])
    origin = draw(st.tuples(*[st.floats(-500, 500)] * 3))
    unit = draw(st.sampled_from(["micrometer", "millimeter", "nanometer"]))
    return Grid(draw(sizes), draw(lengths), origin, tuple(map(tuple, (turn @ flip).tolist())), unit)


def of_nifti(image: nibabel.Nifti1Image, path: Path) -> tuple[Grid, sitk.Image]:
    nibabel.save(image, path)
    return open_source(path).grid(), sitk.ReadImage(str(path))


def agree(grid: Grid, image: sitk.Image) -> None:
    """Voxels to world and back, as SimpleITK does it."""
    assert image.GetSize()[::-1] == grid.shape_zyx
    rng = np.random.default_rng(0)
    for point_zyx in rng.uniform(-3, 60, (20, 3)):
        world = image.TransformContinuousIndexToPhysicalPoint(point_zyx[::-1].tolist())
        np.testing.assert_allclose(grid.world_mm(point_zyx), world, atol=1e-3)
        back = image.TransformPhysicalPointToContinuousIndex(world)
        np.testing.assert_allclose(grid.index_zyx(world), back[::-1], atol=1e-3)


# ---------------------------------------------------------------------- grids


@pytest.mark.parametrize("modality", ["t1w", "t2w"])
@pytest.mark.parametrize("angles", [(0, 0, 0), (90, 0, 0), (17, -48, 123)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_real_headers_turned_and_flipped(
    tmp_path: Path, modality: str, angles: tuple[float, ...], flips: tuple[int, int, int]
) -> None:
    """The embedded head's own NIfTI header, its affine turned and its axes flipped."""
    original = nibabel.load(embedded_volume(modality))
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = turn @ original.affine @ np.diag([*flips, 1])
    image = nibabel.Nifti1Image(np.asarray(original.dataobj), affine, original.header)
    image.set_qform(affine, code=int(original.header["qform_code"]) or 1)
    grid, itk = of_nifti(image, tmp_path / "head.nii")
    agree(grid, itk)
    corner = affine @ np.array([5, 6, 7, 1.0])
    np.testing.assert_allclose(grid.world_mm((7, 6, 5)), corner[:3] * (-1, -1, 1), atol=1e-3)
    assert np.sign(np.linalg.det(np.asarray(grid.direction))) == np.sign(np.prod(flips))


def test_embedded_pair_lies_on_one_grid() -> None:
    first, second = (open_source(embedded_volume(m)).grid() for m in ("t1w", "t2w"))
    assert first.agrees_with(second)
    assert first.spacing_mm == pytest.approx((2, 2, 2))
    assert first.overlap_fraction(second) == 1.0


@given(grids())
@settings(max_examples=50, deadline=None)
def test_world_and_index_undo_each_other_and_agree_with_itk(grid: Grid) -> None:
    points = np.random.default_rng(0).uniform(-10, 50, (7, 3))
    tolerance = 1e-6 * max(1.0, np.abs(points).max())
    np.testing.assert_allclose(grid.index_zyx(grid.world_mm(points)), points, atol=tolerance * 10)
    image = itk_image(np.zeros(grid.shape_zyx, np.uint8), grid)
    scale = max(max(grid.spacing_mm), 1e-9)
    for point in points:
        expected = image.TransformContinuousIndexToPhysicalPoint(point[::-1].tolist())
        np.testing.assert_allclose(grid.world_mm(point), expected, atol=1e-6 * scale + 1e-9)
    homogeneous = np.append(points[0], 1) @ grid.matrix_mm.T
    np.testing.assert_allclose(homogeneous[:3], grid.world_mm(points[0]), atol=1e-9 * scale + 1e-12)


@given(grids())
@settings(max_examples=50, deadline=None)
def test_grids_survive_json(grid: Grid) -> None:
    assert Grid.from_dict(json.loads(json.dumps(grid.as_dict()))) == grid


def test_units_are_mm_in_the_world() -> None:
    for unit, mm in MM_PER_UNIT.items():
        grid = Grid((4, 5, 6), (3.0, 2.0, 1.0), (10.0, 20.0, 30.0), unit=unit)
        np.testing.assert_allclose(grid.world_mm((1, 1, 1)), np.array([11, 22, 33]) * mm)
        np.testing.assert_allclose(grid.extent_mm, np.array([12, 10, 6]) * mm)
        np.testing.assert_allclose(grid.origin_mm, np.array([10, 20, 30]) * mm)
        np.testing.assert_allclose(grid.centre_mm, grid.world_mm((1.5, 2, 2.5)))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("um", "micrometer"),
        ("µm", "micrometer"),
        ("micrometre", "micrometer"),
        ("mm", "millimeter"),
        (" nm ", "nanometer"),
    ],
)
def test_names_of_units(text: str, name: str) -> None:
    assert unit_name(text) == name


@pytest.mark.parametrize("text", ["px", "inch", "", "second"])
def test_unknown_units_name_the_known(text: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown unit of length .* expected one of nm, um, mm"):
        unit_name(text)


@given(grids(), st.tuples(*[st.integers(1, 4)] * 3))
@settings(max_examples=50, deadline=None)
def test_downsampled_voxels_lie_in_the_middle_of_their_blocks(
    grid: Grid, factors: tuple[int, int, int]
) -> None:
    coarse = grid.downsampled(factors)
    assert all(
        (c - 1) * f < n <= c * f for c, f, n in zip(coarse.shape_zyx, factors, grid.shape_zyx, strict=True)
    )
    for index in ((0, 0, 0), tuple(n - 1 for n in coarse.shape_zyx)):
        block = np.asarray([[i * f, (i + 1) * f - 1] for i, f in zip(index, factors, strict=True)])
        scale = max(grid.spacing_mm)
        np.testing.assert_allclose(
            coarse.world_mm(index), grid.world_mm(block.mean(axis=1)), atol=1e-6 * scale
        )
    # An outer corner stays where it is.
    first = grid.world_mm((-0.5, -0.5, -0.5))
    np.testing.assert_allclose(coarse.world_mm((-0.5, -0.5, -0.5)), first, atol=1e-6 * max(grid.spacing_mm))


@given(grids(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_crop_keeps_voxels_where_they_are(grid: Grid, data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, n - 1)) for n in grid.shape_zyx)
    crop = grid.crop(Box(start, grid.shape_zyx))
    assert crop.shape_zyx == tuple(n - a for n, a in zip(grid.shape_zyx, start, strict=True))
    np.testing.assert_allclose(
        crop.world_mm((0, 0, 0)), grid.world_mm(start), atol=1e-6 * max(grid.spacing_mm)
    )


def test_agreement_and_overlap() -> None:
    grid = Grid((10, 10, 10), (2.0, 1.0, 1.0))
    assert grid.agrees_with(Grid((10, 10, 10), (2000.0, 1000.0, 1000.0), unit="um"))
    assert not grid.agrees_with(Grid((10, 10, 10), (2.0, 1.0, 1.0), (0.01, 0, 0)))
    assert grid.agrees_with(Grid((10, 10, 10), (2.0, 1.0, 1.0), (0.0005, 0, 0)))
    assert not grid.agrees_with(Grid((10, 10, 11), (2.0, 1.0, 1.0)))
    half = Grid((10, 10, 10), (2.0, 1.0, 1.0), (5.0, 0, 0))
    assert grid.overlap_fraction(half) == pytest.approx(0.5)
    assert grid.overlap_fraction(Grid((10, 10, 10), (2.0, 1.0, 1.0), (500.0, 0, 0))) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spacing_zyx": (1, 0, 1)}, r"not positive.*--spacing Z Y X"),
        ({"spacing_zyx": (1, -2, 1)}, r"is negative(?!.*--spacing).*direction"),
        ({"spacing_zyx": (1, float("nan"), 1)}, "not positive"),
        ({"shape_zyx": (3, 0, 3)}, "is empty"),
        ({"origin_xyz": (0, float("inf"), 0)}, "not finite"),
        ({"origin_xyz": (0, 1e14, 0)}, "does not tell voxels"),
        ({"spacing_zyx": (1e300, 1, 1)}, "does not tell voxels"),
        ({"spacing_zyx": (1e308, 1e308, 1e308)}, "reach inf"),
        ({"direction": ((1, 0.2, 0), (0, 1, 0), (0, 0, 1))}, "sheared"),
        ({"direction": ((0, 0, 0), (0, 1, 0), (0, 0, 1))}, "not orthonormal"),
    ],
)
def test_impossible_grids_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(VolumeError, match=words):
        Grid(**{"shape_zyx": (3, 3, 3), "spacing_zyx": (1, 1, 1), **change})


# ---------------------------------------------------------------------- boxes


def voxels(box: Box) -> set[tuple[int, ...]]:
    return {tuple(v) for v in np.argwhere(np.ones(box.shape)) + box.start}


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    start = draw(st.tuples(*[st.integers(-4, 4)] * 3))
    return Box(start, tuple(a + draw(st.integers(-2, 5)) for a in start))


@given(boxes(), boxes())
@settings(max_examples=100, deadline=None)
def test_boxes_are_sets_of_voxels(first: Box, second: Box) -> None:
    assert first.size == len(voxels(first))
    assert voxels(first.intersect(second)) == voxels(first) & voxels(second)
    assert first.contains(second) == (voxels(second) <= voxels(first))
    assert voxels(first.shifted((1, -2, 3))) == {(z + 1, y - 2, x + 3) for z, y, x in voxels(first)}


@given(boxes(), st.tuples(*[st.integers(0, 3)] * 3))
@settings(max_examples=50, deadline=None)
def test_a_grown_box_and_its_slices(box: Box, margin: tuple[int, int, int]) -> None:
    if box.size == 0:
        return
    outer = box.grown(margin)
    values = np.arange(outer.size).reshape(outer.shape)
    inner = values[box.slices_in(outer)]
    assert inner.shape == box.shape
    assert inner[0, 0, 0] == values[margin]
    assert str(Box((0, 1, 2), (3, 4, 5))) == "z[0:3] y[1:4] x[2:5]"


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 8, 8), (9, 8, 8), (11, 8, 5), (20, 30, 7), (8, 16, 8)])
def test_the_two_largest_blocks_are_known_without_making_them(shape: tuple[int, int, int]) -> None:
    plan = plan_blocks(shape, (8, 8, 8))
    sizes = sorted((block.write.size for block in plan), reverse=True)
    assert plan.largest_two == (*sizes, 0)[:2]


@given(
    sizes, small, st.tuples(*[st.integers(1, 4)] * 3), st.tuples(*[st.integers(0, 5)] * 3), st.integers(1, 9)
)
@settings(max_examples=100, deadline=None)
def test_every_voxel_is_written_once_in_whole_shards(
    shape: tuple[int, int, int],
    shard: tuple[int, int, int],
    times: tuple[int, int, int],
    halo: tuple[int, int, int],
    parts: int,
) -> None:
    core = tuple(s * t for s, t in zip(shard, times, strict=True))
    plan = plan_blocks(shape, shard, core_zyx=core, halo_zyx=halo)
    whole, written = Box((0, 0, 0), shape), np.zeros(shape, np.int32)
    owner: dict[tuple[int, ...], int] = {}
    for block in plan:
        assert whole.contains(block.read)
        assert block.read.contains(block.write)
        assert block.read == block.write.grown(halo).intersect(whole)
        assert block.write.size > 0
        written[block.write.slices] += 1
        ranges = [
            range(a // s, -(-b // s))
            for a, b, s in zip(block.write.start, block.write.stop, shard, strict=True)
        ]
        for place in np.ndindex(*map(len, ranges)):
            key = tuple(r[p] for r, p in zip(ranges, place, strict=True))
            assert owner.setdefault(key, block.index) == block.index
    assert written.min() == written.max() == 1
    assert [b.index for b in plan] == list(range(len(plan)))
    shares = [plan.part(i, parts) for i in range(1, parts + 1)]
    assert [i for share in shares for i in share] == list(range(len(plan)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(sizes, small, sizes)
@settings(max_examples=150, deadline=None)
def test_a_core_is_whole_shards_or_is_refused(
    shape: tuple[int, int, int], shard: tuple[int, int, int], core: tuple[int, int, int]
) -> None:
    fits = all(c % s == 0 or c >= n for c, s, n in zip(core, shard, shape, strict=True))
    if fits:
        assert sum(b.write.size for b in plan_blocks(shape, shard, core_zyx=core)) == int(np.prod(shape))
        return
    with pytest.raises(ConfigError, match=r"core of .* is not a multiple of the shard"):
        plan_blocks(shape, shard, core_zyx=core)


def test_a_plan_of_a_huge_volume_costs_nothing() -> None:
    plan = plan_blocks((100_000, 100_000, 100_000), (256, 256, 256))
    assert len(plan) == 391**3
    last = plan[len(plan) - 1]
    assert last == Block(391**3 - 1, Box((99840,) * 3, (100_000,) * 3), Box((99840,) * 3, (100_000,) * 3))
    with pytest.raises(IndexError):
        plan[len(plan)]
    with pytest.raises(ConfigError, match="part 3/2 does not exist"):
        plan.part(3, 2)
