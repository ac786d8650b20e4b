"""The store: voxels in and out, whole shards only, metadata that the standard's validator accepts, exact pyramids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from scipy.spatial.transform import Rotation

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Grid
from comir_hpc.space.plan import plan_blocks
from comir_hpc.volumes.pyramid import downsample
from comir_hpc.volumes.volume import Intensity, Volume, best_shuffle, chunk_and_shard

OBLIQUE = tuple(map(tuple, Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix().tolist()))
GRID = Grid((20, 33, 41), (2.0, 1.0, 0.5), (10.0, -20.0, 30.0), OBLIQUE, "micrometer")


def noise(shape: tuple[int, ...], dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def filled(path: Path, grid: Grid = GRID, *, channels: int = 1, kind: str = "image", dtype: str = "uint16",
           chunk: int = 8, shard: int = 16) -> tuple[Volume, np.ndarray]:  # fmt: skip
    volume = Volume.create(path, grid, dtype, channels=channels, kind=kind, chunk=chunk, shard=shard)
    values = noise((channels, *grid.shape_zyx), dtype)
    for block in plan_blocks(grid.shape_zyx, volume.shard_zyx):
        volume.write(block.write, values[(slice(None), *block.write.slices)])
    return volume, values


# ---------------------------------------------------------------------- voxels


@given(
    st.tuples(*[st.integers(1, 14)] * 3),
    st.integers(2, 7),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
)
@settings(max_examples=20, deadline=None)
def test_what_is_written_block_by_block_is_read_in_any_box(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    chunk: int,
    times: int,
    core: int,
    channels: int,
) -> None:
    path = tmp_path_factory.mktemp("v") / "v.zarr"
    grid = Grid(shape, (1.0, 1.0, 1.0))
    volume = Volume.create(path, grid, "int16", channels=channels, chunk=chunk, shard=chunk * times)
    values = noise((channels, *shape), "int16")
    cores = tuple(s * core for s in volume.shard_zyx)
    for block in plan_blocks(shape, volume.shard_zyx, core_zyx=cores):
        volume.write(block.write, values[(slice(None), *block.write.slices)])
    volume = Volume.open(path, allow_incomplete=True)
    np.testing.assert_array_equal(volume.read(), values)
    rng = np.random.default_rng(1)
    start = [int(rng.integers(0, n)) for n in shape]
    box = Box(tuple(start), tuple(int(rng.integers(a, n)) + 1 for a, n in zip(start, shape, strict=True)))
    np.testing.assert_array_equal(volume.read(box), values[(slice(None), *box.slices)])
    stored = {f for f in (path / "0").rglob("*") if f.is_file() and f.name != "zarr.json"}
    assert stored <= set(volume.shard_files(grid.box))


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    volume, values = filled(tmp_path / "v.zarr", Grid((9, 9, 9), (1, 1, 1)), dtype=dtype)
    assert volume.dtype == np.dtype(dtype)
    assert volume.read().dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.read(), values)


@pytest.mark.parametrize(
    "box",
    [
        Box((0, 0, 0), (8, 16, 16)),
        Box((4, 0, 0), (20, 16, 16)),
        Box((16, 32, 32), (20, 33, 40)),
        Box((0, 0, 0), (0, 16, 16)),
        Box((16, 32, 32), (32, 48, 48)),
    ],
)
def test_only_whole_shards_are_written(tmp_path: Path, box: Box) -> None:
    volume = Volume.create(tmp_path / "v.zarr", GRID, "uint16", chunk=8, shard=16)
    with pytest.raises(VolumeError, match=r"not a whole number of shards along [zyx] .*plan_blocks"):
        volume.write(box, np.zeros((1, *box.shape), np.uint16))


def test_wrong_values_are_refused(tmp_path: Path) -> None:
    volume = Volume.create(tmp_path / "v.zarr", GRID, "uint16", chunk=8, shard=16)
    box = Box((0, 0, 0), (16, 16, 16))
    with pytest.raises(VolumeError, match=r"shape \(16, 16, 16\), expected \(1, 16, 16, 16\)"):
        volume.write(box, np.zeros((16, 16, 16), np.uint16))
    with pytest.raises(VolumeError, match="values are int16, the volume is uint16"):
        volume.write(box, np.zeros((1, 16, 16, 16), np.int16))
    for outside in (Box((0, 0, 0), (16, 16, 42)), Box((-1, 0, 0), (3, 3, 3)), Box((3, 3, 3), (3, 4, 4))):
        with pytest.raises(VolumeError, match="is not inside the volume"):
            volume.read(outside)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    volume, _ = filled(tmp_path / "v.zarr")
    shard = next(iter(volume.shard_files(Box((0, 0, 0), (16, 16, 16)))))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(VolumeError, match=r"v\.zarr: box z\[0:20\].* cannot be read"):
        volume.read()
    np.testing.assert_array_equal(volume.read(Box((16, 16, 16), (20, 33, 41))).shape, (1, 4, 17, 25))


def test_quantised_values_are_scaled_when_read(tmp_path: Path) -> None:
    grid = Grid((20, 9, 9), (1.0, 1.0, 1.0))
    volume = Volume.create(tmp_path / "v.zarr", grid, "int8", channels=2, chunk=8, shard=8, scale=[0.5, 2.0])
    values = np.random.default_rng(0).integers(-127, 128, (2, *grid.shape_zyx)).astype(np.int8)
    with pytest.raises(VolumeError, match="values are float32, the volume is int8"):
        volume.write(grid.box, values.astype(np.float32))
    volume.write(grid.box, values)
    assert volume.dtype == np.float32
    expected = values * np.array([0.5, 2.0], np.float32)[:, None, None, None]
    np.testing.assert_array_equal(volume.read(), expected)
    np.testing.assert_array_equal(volume.read_stored(), values)
    large = Grid((40, 40, 40), (1.0, 1.0, 1.0))
    other = Volume.create(tmp_path / "w.zarr", large, "int8", chunk=8, shard=16, scale=[0.25])
    filled_with = np.full((1, 40, 40, 40), 100, np.int8)
    other.write(large.box, filled_with)
    other.build_pyramid()
    assert other.read(level=1).max() == other.read().max() == 25.0


# ---------------------------------------------------------------------- opening


def test_grid_and_metadata_survive(tmp_path: Path) -> None:
    Volume.create(tmp_path / "v.zarr", GRID, "uint8", metadata={"from": "here"}).finish(more=[1, 2])
    volume = Volume.open(tmp_path / "v.zarr")
    assert volume.grid == GRID
    assert (volume.metadata["from"], volume.metadata["more"], volume.complete) == ("here", [1, 2], True)
    assert volume.shape == (1, *GRID.shape_zyx)


def test_unfinished_missing_and_foreign_stores(tmp_path: Path) -> None:
    Volume.create(tmp_path / "v.zarr", GRID, "uint8")
    with pytest.raises(VolumeError, match=r"v\.zarr is incomplete: .*run that command again"):
        Volume.open(tmp_path / "v.zarr")
    assert not Volume.open(tmp_path / "v.zarr", allow_incomplete=True).complete
    with pytest.raises(VolumeError, match="does not exist; expected an OME-Zarr"):
        Volume.open(tmp_path / "w.zarr")
    zarr.create_group(store=str(tmp_path / "g.zarr"))
    with pytest.raises(VolumeError, match=r"not made by comir-hpc.*comir-hpc ingest"):
        Volume.open(tmp_path / "g.zarr")
    zarr.create_group(store=str(tmp_path / "old.zarr"), zarr_format=2)
    (tmp_path / "file.zarr").write_text("x", encoding="utf-8")
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("{", encoding="utf-8")
    for name in ("old.zarr", "file.zarr", "broken.zarr"):
        with pytest.raises(VolumeError, match=f"{name} is not a zarr v3 group"):
            Volume.open(tmp_path / name)
    shutil.rmtree(tmp_path / "v.zarr" / "0")
    with pytest.raises(VolumeError, match="a level of the pyramid is missing"):
        Volume.open(tmp_path / "v.zarr", allow_incomplete=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a["comir"]["grid"].pop("spacing_zyx"), "metadata are damaged"),
        (lambda a: a["comir"].update(grid=7), "metadata are damaged"),
        (lambda a: a.update(ome=[]), "metadata are damaged"),
        (lambda a: a["ome"].update(multiscales=[]), "metadata are damaged"),
        (
            lambda a: a["ome"]["multiscales"][0]["datasets"][0].update(path="../w.zarr/0"),
            "outside of the store",
        ),
        (
            lambda a: a["comir"]["grid"].update(shape_zyx=[10**9] * 3),
            r"speak of \(1000000000, .* its array of",
        ),
        (lambda a: a["comir"].update(command={"a": 1}), None),
        (lambda a: a["comir"].update(command=[1, 2]), None),
    ],
)
def test_damaged_metadata_are_one_sentence(tmp_path: Path, change, words: str | None) -> None:
    volume, _ = filled(tmp_path / "v.zarr")
    volume.finish()
    record = json.loads((volume.path / "zarr.json").read_text(encoding="utf-8"))
    change(record["attributes"])
    (volume.path / "zarr.json").write_text(json.dumps(record), encoding="utf-8")
    if words is None:
        assert Volume.open(volume.path).repair() == "write it again with what wrote it"
        return
    with pytest.raises(VolumeError, match=rf"v\.zarr: .*{words}"):
        Volume.open(volume.path)


def test_create_replaces_only_when_told(tmp_path: Path) -> None:
    filled(tmp_path / "v.zarr")
    with pytest.raises(VolumeError, match="exists; choose another name or pass --overwrite"):
        Volume.create(tmp_path / "v.zarr", GRID, "uint16")
    volume = Volume.create(tmp_path / "v.zarr", GRID, "float32", overwrite=True)
    assert not volume.read().any()


def test_fingerprint_sees_voxels_and_metadata(tmp_path: Path) -> None:
    volume, values = filled(tmp_path / "v.zarr")
    seen = [volume.fingerprint()]
    assert volume.fingerprint() == seen[0]
    volume.update_metadata(note="x")
    seen.append(volume.fingerprint())
    box = Box((0, 0, 0), (16, 16, 16))
    volume.write(box, values[(slice(None), *box.slices)] + 1)
    seen.append(volume.fingerprint())
    assert len(set(seen)) == 3


# ---------------------------------------------------------------------- the standard


@pytest.mark.parametrize("kind", ["image", "labels", "representation"])
@pytest.mark.parametrize(
    "grid", [GRID, Grid((40, 70, 12), (5.0, 1.0, 1.0)), Grid((3, 3, 3), (1.0, 1.0, 1.0))]
)
def test_metadata_is_valid_ome_zarr(tmp_path: Path, grid: Grid, kind: str) -> None:
    volume, _ = filled(tmp_path / "v.zarr", grid, channels=2, kind=kind)
    for stage in ("created", "pyramid"):
        image = Image.from_zarr(zarr.open_group(str(tmp_path / "v.zarr"), mode="r"))
        multiscale = image.ome_attributes.multiscales[0]
        assert [a.name for a in multiscale.axes] == ["c", "z", "y", "x"]
        assert {a.unit for a in multiscale.axes if a.type == "space"} == {grid.unit}
        assert len(multiscale.datasets) == volume.num_levels
        for level, dataset in enumerate(multiscale.datasets):
            scale, translation = dataset.coordinateTransformations
            assert scale.scale[1:] == pytest.approx(volume.level_grid(level).spacing_zyx)
            # The standard has no rotation: what it can say is where voxel 0 lies along the array's own axes.
            along = np.asarray(grid.direction).T @ volume.level_grid(level).origin_xyz
            np.testing.assert_allclose(translation.translation[1:], along[::-1], atol=1e-9)
        if stage == "created":
            volume.build_pyramid()
    array = json.loads((tmp_path / "v.zarr" / "0" / "zarr.json").read_text(encoding="utf-8"))
    assert array["chunk_grid"]["configuration"]["chunk_shape"][0] == 1
    assert array["codecs"][0]["name"] == "sharding_indexed"


# ---------------------------------------------------------------------- pyramid


@pytest.mark.parametrize("kind", ["image", "labels"])
def test_pyramid_equals_whole_volume_downsampling(tmp_path: Path, kind: str) -> None:
    """Blockwise and layer by layer, to the same voxels as in one piece."""
    grid = Grid((45, 70, 51), (2.0, 1.0, 1.0))
    volume, values = filled(tmp_path / "v.zarr", grid, channels=2, kind=kind)
    volume.build_pyramid()
    factors = [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
    assert [volume.level_factors(n) for n in range(volume.num_levels)] == factors
    expected = values
    for level in (1, 2):
        step = tuple(b // a for a, b in zip(factors[level - 1], factors[level], strict=True))
        expected = downsample(expected, step, labels=kind == "labels")
        np.testing.assert_array_equal(volume.read(level=level), expected)
        assert volume.level_grid(level).shape_zyx == expected.shape[1:]
    before = {f: f.read_bytes() for f in (tmp_path / "v.zarr").rglob("*") if f.is_file()}
    volume.build_pyramid()
    assert {f: f.read_bytes() for f in (tmp_path / "v.zarr").rglob("*") if f.is_file()} == before


def test_pyramid_moves_nothing(tmp_path: Path) -> None:
    """The centre of mass of a blob lies at the same world point on every level."""
    grid = Grid((64, 80, 96), (1.0, 1.0, 1.0), (5.0, 6.0, 7.0), OBLIQUE)
    place = np.meshgrid(*map(np.arange, grid.shape_zyx), indexing="ij")
    blob = np.exp(-sum((p - c) ** 2 for p, c in zip(place, (30.3, 41.7, 50.2), strict=True)) / 150).astype(
        np.float32
    )
    volume = Volume.create(tmp_path / "v.zarr", grid, "float32", chunk=16, shard=32)
    for block in plan_blocks(grid.shape_zyx, volume.shard_zyx):
        volume.write(block.write, blob[block.write.slices][None])
    volume.build_pyramid()
    assert volume.num_levels == 3
    for level in range(3):
        weights = volume.read(level=level)[0].astype(np.float64)
        index = [
            float((weights * p).sum() / weights.sum())
            for p in np.meshgrid(*map(np.arange, weights.shape), indexing="ij")
        ]
        np.testing.assert_allclose(
            volume.level_grid(level).world_mm(index), grid.world_mm((30.3, 41.7, 50.2)), atol=0.02
        )


def test_filter_by_trial(tmp_path: Path) -> None:
    """Bitshuffle, unless another saves a tenth: few distinct floats compress best as they are."""
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(0, 30, (1, 32, 32, 32)), axis=3).astype(np.int16)
    few = (rng.integers(0, 40, (1, 32, 32, 32)) * 1.1).astype(np.float32)
    assert (best_shuffle(smooth), best_shuffle(few)) == ("bitshuffle", "noshuffle")
    sizes = {}
    for shuffle in ("bitshuffle", "noshuffle"):
        grid = Grid((32, 32, 32), (1.0, 1.0, 1.0))
        volume = Volume.create(tmp_path / shuffle, grid, "float32", chunk=32, shard=32, shuffle=shuffle)
        volume.write(grid.box, few)
        np.testing.assert_array_equal(volume.read(), few)
        sizes[shuffle] = next(volume.shard_files(grid.box)).stat().st_size
    assert sizes["noshuffle"] < 0.9 * sizes["bitshuffle"]


def test_chunks_and_shards() -> None:
    assert chunk_and_shard((1000, 1000, 1000), 64, 256) == ((64, 64, 64), (256, 256, 256))
    # Clipped to the volume, the shard still whole chunks.
    assert chunk_and_shard((100, 10, 300), 64, 256) == ((64, 10, 64), (128, 10, 256))
    with pytest.raises(
        VolumeError, match=r"shard of 100 voxels along z is not a whole number of chunks of 64.*--shard 64"
    ):
        chunk_and_shard((1000, 1000, 1000), 64, 100)


# ---------------------------------------------------------------------- intensity


def test_normalisation() -> None:
    intensity = Intensity(low=10, high=110, mean=60, std=25, foreground_above=20.5)
    values = np.array([0, 10, 60, 110, 60000], np.uint16)
    assert intensity.normalise(values).tolist() == [-2, -2, 0, 2, 2]
    assert intensity.normalise(values).dtype == np.float32
    assert intensity.foreground(np.array([20, 21])).tolist() == [False, True]
