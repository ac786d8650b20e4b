"""Zarr stores: every version of OME-Zarr, any level, and claims that cannot be true."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr_images import ARRAY, SHAPE, reads, scale, shift, space, write

from comir_hpc.config import IngestSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.ingest import ingest
from comir_hpc.space.grid import Box, Grid
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.volume import Volume

# ---------------------------------------------------------------------- levels of our own stores


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A volume of ours with three levels, turned as a NIfTI file's in RAS."""
    grid = Grid((96, 80, 64), (2.0, 2.0, 2.0), (95.5, 131.5, -77.5), ((-1, 0, 0), (0, -1, 0), (0, 0, 1)))
    values = np.random.default_rng(0).integers(0, 999, (1, *grid.shape_zyx)).astype(np.int16)
    volume = Volume.create(tmp_path / "l.zarr", grid, "int16", chunk=96, shard=96)
    volume.write(grid.box, values)
    volume.build_pyramid()
    volume.finish()
    return tmp_path / "l.zarr"


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("by_path", [False, True])
def test_any_level_of_an_own_store_lies_where_it_lies(own: Path, level: int, by_path: bool) -> None:
    volume = Volume.open(own)
    assert volume.num_levels > 1
    source = open_source(own / str(level)) if by_path else open_source(own, str(level))
    grid = source.grid()
    assert grid == volume.level_grid(level)
    assert grid.direction == ((-1, 0, 0), (0, -1, 0), (0, 0, 1))
    assert grid.origin_mm == ((95.5, 131.5, -77.5), (94.5, 130.5, -76.5))[level]
    assert grid.spacing_mm == (2.0 * 2**level,) * 3
    np.testing.assert_array_equal(source.read(), volume.read(level=level))


def test_a_level_is_ingested_with_its_place(own: Path, tmp_path: Path) -> None:
    ingest(IngestSettings(source=own, dataset="1", out=tmp_path / "l1.zarr"))
    ingest(IngestSettings(source=own / "1", out=tmp_path / "again.zarr"))
    expected = Volume.open(own).level_grid(1)
    assert Volume.open(tmp_path / "l1.zarr").grid == expected
    assert Volume.open(tmp_path / "again.zarr").grid == expected


def test_an_own_store_of_integers_for_floats_gives_the_floats(tmp_path: Path) -> None:
    grid = Grid(SHAPE, (1.0, 1.0, 1.0))
    volume = Volume.create(tmp_path / "q.zarr", grid, "int8", chunk=8, shard=24, scale=[0.25])
    volume.write(grid.box, (ARRAY % 100).astype(np.int8)[None])
    volume.finish()
    source = open_source(tmp_path / "q.zarr")
    assert source.dtype == np.float32
    reads(tmp_path / "q.zarr", (ARRAY % 100).astype(np.float32) * 0.25)


def test_an_own_store_whose_grid_and_voxels_differ_is_refused(own: Path) -> None:
    record = json.loads((own / "zarr.json").read_text())
    record["attributes"]["comir"]["grid"]["shape_zyx"] = [95, 80, 64]
    (own / "zarr.json").write_text(json.dumps(record))
    with pytest.raises(VolumeError, match=r"\(95, 80, 64\) voxels .*its array of \(1, 96, 80, 64\)"):
        open_source(own)


# ---------------------------------------------------------------------- versions and layouts


@pytest.mark.parametrize(
    ("version", "axes"), [("0.1", None), ("0.2", None), ("0.3", list("tczyx")), ("0.3", list("czyx"))]
)
def test_old_versions(tmp_path: Path, version: str, axes: list[str] | None) -> None:
    array = np.stack([ARRAY, ARRAY + 1])
    write(tmp_path / "o.zarr", array if axes == list("czyx") else array[None], axes, version=version)
    reads(tmp_path / "o.zarr", array)
    source = open_source(tmp_path / "o.zarr")
    assert any("fixed order" in note for note in source.notes) == (axes is None)
    with pytest.raises(VolumeError, match=r"no voxel spacing.*--spacing"):
        source.grid()
    assert source.grid((2, 1, 1), "um").spacing_zyx == (2.0, 1.0, 1.0)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_bioformats2raw_layout(tmp_path: Path, version: str) -> None:
    path, steps = tmp_path / "b2r.zarr", [scale(1, 1, 2, 0.5, 0.5)]
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}, *space("z", "y", "x")]
    write(path, ARRAY[None, None], axes, steps, version=version, group="0")
    root = zarr.open_group(store=str(path), mode="a")
    root.attrs.update(
        {"bioformats2raw.layout": 3} if version == "0.4" else {"ome": {"bioformats2raw.layout": 3}}
    )
    root.require_group("OME").attrs["series"] = ["0"]
    write(path, ARRAY[None, None] > 9, axes, steps, version=version, group="0/labels/cells")
    reads(path, ARRAY)
    assert open_source(path).grid().spacing_zyx == (2.0, 0.5, 0.5)
    write(path, ARRAY[None, None] + 1, axes, steps, version=version, group="1")
    with pytest.raises(VolumeError, match=r"holds 2 images: 0, 1; name one with --dataset"):
        open_source(path)
    reads(path, ARRAY + 1, "1")
    reads(path, ARRAY + 1, "1/0")
    reads(path / "1", ARRAY + 1)
    reads(path / "1" / "0", ARRAY + 1)
    assert open_source(path / "1" / "0").grid().spacing_zyx == (2.0, 0.5, 0.5)


def test_labels_beside_an_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x"), [scale(2, 0.5, 0.5)])
    write(path, ARRAY % 3, space("z", "y", "x"), [scale(4, 1, 1)], group="labels/cells")
    zarr.open_group(store=str(path / "labels" / "cells"), mode="a").attrs["image-label"] = {"version": "0.4"}
    reads(path, ARRAY)
    assert not any("labels" in note for note in open_source(path).notes)
    labels = open_source(path, "labels/cells")
    assert labels.grid().spacing_zyx == (4.0, 1.0, 1.0)
    assert any("--labels" in note for note in labels.notes)
    reads(path, ARRAY % 3, "labels/cells")


# ---------------------------------------------------------------------- plain arrays


def test_plain_arrays_with_named_axes(tmp_path: Path) -> None:
    turned = ARRAY.transpose(2, 1, 0)
    zarr.create_array(store=str(tmp_path / "v3.zarr"), data=turned, dimension_names=("x", "y", "z"))
    reads(tmp_path / "v3.zarr", ARRAY)
    array = zarr.create_array(store=str(tmp_path / "v2.zarr"), data=turned, zarr_format=2)
    array.attrs["_ARRAY_DIMENSIONS"] = ["x", "y", "z"]
    reads(tmp_path / "v2.zarr", ARRAY)
    array.attrs["_ARRAY_DIMENSIONS"] = ["dim_0", "dim_1", "dim_2"]  # xarray's for none
    reads(tmp_path / "v2.zarr", turned)
    array.attrs["_ARRAY_DIMENSIONS"] = ["lon", "y", "z"]
    with pytest.raises(VolumeError, match=r"dimension names name the axes \(lon, y, z\)"):
        open_source(tmp_path / "v2.zarr")


def test_names_of_an_array_that_contradict_the_metadata(tmp_path: Path) -> None:
    for names, good in ((("z", "y", "x"), True), (("a", "b", "q"), True), (("x", "y", "z"), False)):
        path = write(
            tmp_path / f"{names[0]}.zarr", ARRAY, space("z", "y", "x"), [scale(1, 1, 1)], version="0.5"
        )
        record = json.loads((path / "0" / "zarr.json").read_text())
        record["dimension_names"] = list(names)
        (path / "0" / "zarr.json").write_text(json.dumps(record))
        if good:
            reads(path, ARRAY)
        else:
            with pytest.raises(VolumeError, match=r"order the axes \(z, y, x\), its array names them"):
                open_source(path)


# ---------------------------------------------------------------------- claims


def claim(path: Path, shape: tuple[int, ...], *, form: int = 3) -> None:
    """Let the metadata of an array claim another shape."""
    file = path / ("zarr.json" if form == 3 else ".zarray")
    record = json.loads(file.read_text())
    record["shape"] = list(shape)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("side", [10**5, 10**7, 10**9])
@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_claims_are_held_against_what_is_stored(
    tmp_path: Path, side: int, form: int, ome: bool, stored: bool
) -> None:
    path = tmp_path / "big.zarr"
    data = ARRAY if stored else np.zeros(SHAPE, np.uint16)
    if ome:
        write(path, data, space("z", "y", "x"), [scale(1, 1, 1)], version="0.4" if form == 2 else "0.5")
    else:
        zarr.create_array(store=str(path), data=data, zarr_format=form, chunks=SHAPE)
    claim(path / "0" if ome else path, (side,) * 3, form=form)
    begin = time.process_time()
    with pytest.raises(VolumeError, match=rf"{side} x {side} x {side} voxels.*stores {int(stored)} of its"):
        open_source(path)
    assert time.process_time() - begin < 5


def test_a_chunk_beyond_memory_is_refused(tmp_path: Path) -> None:
    zarr.create_array(store=str(tmp_path / "c.zarr"), shape=(10**5,) * 3, chunks=(10**5,) * 3, dtype="u2")
    with pytest.raises(VolumeError, match=r"in chunks of .* GiB.*smaller chunks"):
        open_source(tmp_path / "c.zarr")


def test_a_sparse_volume_is_believed(tmp_path: Path) -> None:
    """One chunk of 512 is stored, of 2 GiB: a segmentation of one cell looks like this."""
    array = zarr.create_array(
        store=str(tmp_path / "s.zarr"), shape=(1024, 1024, 1024), chunks=(128,) * 3, dtype="u2"
    )
    array[:2, :2, :2] = 7
    assert open_source(tmp_path / "s.zarr").shape == (1, 1024, 1024, 1024)


FORMS = {
    "v2 dots": {"zarr_format": 2},
    "v2 folders": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "v2 without a fill value": {"zarr_format": 2, "fill_value": None},
    "v3": {"fill_value": 9},
    "v3 with keys of v2": {"chunk_key_encoding": {"name": "v2", "separator": "."}, "fill_value": 3},
    "v3 with dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "shards": {"shards": (4, 6, 8), "fill_value": 5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("many", [False, True])
def test_chunks_that_are_not_stored_are_the_fill_value(tmp_path: Path, form: str, many: bool) -> None:
    """What zarr-python reads, whether a few chunks are there or all but a few; and a note."""
    path = tmp_path / "s.zarr"
    array = zarr.create_array(
        store=str(path), shape=(31, 20, 25), chunks=(2, 3, 4), dtype="u2", **FORMS[form]
    )
    rng = np.random.default_rng(0)
    for z, y, x in rng.integers(0, (30, 19, 24), (4, 3)):
        array[z : z + 3, y : y + 2, x : x + 5] = 1000
    if many:
        array[:28] = rng.integers(100, 999, (28, 20, 25))
    source = open_source(path)
    truth = zarr.open_array(path, mode="r")
    np.testing.assert_array_equal(source.read()[0], truth[...])
    for box in (Box((3, 4, 5), (4, 20, 6)), Box((0, 0, 0), (1, 1, 1)), Box((28, 17, 20), (31, 20, 25))):
        np.testing.assert_array_equal(source.read(box)[0], truth[box.slices])
    marks = (".zarray", ".zattrs", "zarr.json")
    files = sum(file.is_file() and file.name not in marks for file in path.rglob("*"))
    claimed = 8 * 4 * 4 if form == "shards" else 16 * 7 * 7
    assert 0 < files < claimed
    fill = FORMS[form].get("fill_value") or 0
    (note,) = (note for note in source.notes if "are stored" in note)
    assert f"s.zarr: {files} of its {claimed} chunks are stored; the others are read as {fill}, the" in note


def test_an_array_that_is_all_there_has_no_such_note(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x"), [scale(2, 1, 1)])
    assert not any("are stored" in note for note in open_source(path).notes)


@pytest.mark.parametrize("axes", ["zyx", "czyx", "tczyx"])
def test_hardly_any_chunks_of_many_are_read_at_once(tmp_path: Path, axes: str) -> None:
    """A header that says 20,000 slices, of which three are there: zarr-python would ask for 90,000 chunks."""
    sizes = dict(zip("tczyx", (1, 2, 6, 5, 4), strict=True))
    data = np.arange(1, 1 + np.prod([sizes[a] for a in axes]), dtype="u2").reshape([sizes[a] for a in axes])
    zarr.create_array(
        store=str(tmp_path / "l.zarr"), data=data, chunks=(2,) * len(axes), dimension_names=list(axes)
    )
    claimed = {**sizes, "z": 20_000}
    claim(tmp_path / "l.zarr", tuple(claimed[a] for a in axes))
    begin = time.process_time()
    source = open_source(tmp_path / "l.zarr")
    values = source.read()
    assert time.process_time() - begin < 2
    np.testing.assert_array_equal(values[:, :6], data.reshape(-1, 6, 5, 4))
    assert not values[:, 6:].any()
    count = 3 * 3 * 2
    assert any(f"{count} of its 60000 chunks are stored" in note for note in source.notes)


def test_coordinates_that_double_precision_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    axes = space("z", "y", "x")
    far = write(tmp_path / "far.zarr", ARRAY, axes, [scale(2, 1, 1), shift(1e9, 0, 0)])
    assert open_source(far).grid().origin_xyz == (0, 0, 1e9)
    absurd = write(tmp_path / "absurd.zarr", ARRAY, axes, [scale(2, 1, 1), shift(1e30, 0, 0)])
    with pytest.raises(VolumeError, match=r"absurd\.zarr: its coordinates reach 1e\+30 micrometer"):
        open_source(absurd).grid()


def test_an_own_store_that_claims_too_much_is_one_line(own: Path) -> None:
    record = json.loads((own / "zarr.json").read_text())
    record["attributes"]["comir"]["grid"]["shape_zyx"] = [10**9] * 3
    (own / "zarr.json").write_text(json.dumps(record))
    claim(own / "0", (1, 10**9, 10**9, 10**9))
    with pytest.raises(VolumeError, match="1000000000 x 1000000000 x 1000000000 voxels"):
        open_source(own)


# ---------------------------------------------------------------------- damage


def test_damage_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x"), [scale(2, 1, 1)])
    shutil.rmtree(path / "0")
    with pytest.raises(VolumeError, match=r"name the array '0', which is missing"):
        open_source(path)
    for text in ("[]", "{", '{"multiscales": 3}', '{"multiscales": [{"datasets": [{}]}]}'):
        (path / ".zattrs").write_text(text)
        with pytest.raises(VolumeError, match=r"a\.zarr"):
            open_source(path)
    with pytest.raises(VolumeError):
        open_source(path, "../a.zarr/0")


def test_the_place_of_a_level_is_part_of_its_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x"), [scale(2, 1, 1)])
    before = open_source(path / "0").fingerprint()
    record = json.loads((path / ".zattrs").read_text())
    record["multiscales"][0]["datasets"][0]["coordinateTransformations"] = [scale(200, 1, 1)]
    (path / ".zattrs").write_text(json.dumps(record))
    assert open_source(path / "0").fingerprint() != before
    with pytest.raises(ConfigError):
        open_source(path).grid(unit="parrot")
