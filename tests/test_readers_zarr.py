"""Zarr stores: every version of OME-Zarr, any level, order, unit and direction, and claims that cannot be true."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from comir_hpc.config import IngestSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.geometry import Grid
from comir_hpc.ingest import ingest
from comir_hpc.readers import open_source
from comir_hpc.readers.lengths import mm_of
from comir_hpc.volume import Volume

SHAPE = (6, 20, 24)
ARRAY = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)


def space(*names: str, unit: str | None = "micrometer") -> list[dict[str, Any]]:
    return [{"name": n, "type": "space", **({"unit": unit} if unit else {})} for n in names]


def scale(*values: float) -> dict[str, Any]:
    return {"type": "scale", "scale": list(values)}


def shift(*values: float) -> dict[str, Any]:
    return {"type": "translation", "translation": list(values)}


def write(
    path: Path,
    array: np.ndarray,
    axes: Any,
    steps: list[dict[str, Any]] | None = None,
    *,
    version: str = "0.4",
    further: dict[str, Any] | None = None,
    group: str = "",
) -> Path:
    """An image of one level, in zarr v2 up to version 0.4 and v3 from 0.5 on."""
    form = 3 if version >= "0.5" else 2
    root = zarr.open_group(store=str(path), mode="a", zarr_format=form)
    node = root.require_group(group) if group else root
    node.create_array("0", data=array, chunks=array.shape)
    dataset = {"path": "0", **({"coordinateTransformations": steps} if steps else {})}
    image = {"version": version, "datasets": [dataset], **({"axes": axes} if axes else {}), **(further or {})}
    entries = {"multiscales": [image]}
    node.attrs.update({"ome": {"version": version, **entries}} if form == 3 else entries)
    return path


def reads(path: Path, array: np.ndarray, dataset: str | None = None) -> None:
    found = open_source(path, dataset).read()
    np.testing.assert_array_equal(found, array[None] if array.ndim == 3 else array)


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
    with pytest.raises(VolumeError, match=r"level 0 has \(96, 80, 64\) voxels.*\(95, 80, 64\)"):
        open_source(own)


# ---------------------------------------------------------------------- units


def test_units_that_differ_an_axis_are_converted(tmp_path: Path) -> None:
    axes = space("z") + space("y", "x", unit="nanometer")
    write(tmp_path / "mix.zarr", ARRAY, axes, [scale(2, 500, 500), shift(10, 1000, 3000)])
    grid = open_source(tmp_path / "mix.zarr").grid()
    assert (grid.spacing_zyx, grid.unit) == ((2.0, 0.5, 0.5), "micrometer")
    assert grid.origin_xyz == (3.0, 1.0, 10.0)
    axes = space("z", unit="nanometer") + space("y", "x", unit="millimeter")
    write(tmp_path / "other.zarr", ARRAY, axes, [scale(40, 0.001, 0.002)])
    grid = open_source(tmp_path / "other.zarr").grid()
    assert (grid.spacing_zyx, grid.unit) == ((40.0, 1000.0, 2000.0), "nanometer")


@pytest.mark.parametrize(
    ("unit", "expected", "grid_unit"),
    [
        ("angstrom", 1.348, "nanometer"), ("picometer", 0.01348, "nanometer"), ("nanometer", 13.48, "nanometer"),
        ("micrometer", 13.48, "micrometer"), ("um", 13.48, "micrometer"), ("millimetre", 13.48, "millimeter"),
        ("centimeter", 13.48, "centimeter"), ("decimeter", 1348.0, "millimeter"), ("meter", 13.48, "meter"),
        ("kilometer", 13480.0, "meter"), ("inch", 342.392, "millimeter"), ("foot", 4108.704, "millimeter"),
        ("yard", 12326.112, "millimeter"),
    ],
)  # fmt: skip
def test_units_of_length(tmp_path: Path, unit: str, expected: float, grid_unit: str) -> None:
    write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x", unit=unit), [scale(13.48, 13.48, 13.48)])
    grid = open_source(tmp_path / "a.zarr").grid()
    assert (grid.spacing_zyx, grid.unit) == ((expected,) * 3, grid_unit)


def test_every_length_of_the_standard_is_known() -> None:
    """The list of OME-Zarr 0.4 and 0.5; the millimetres are those of the SI brochure and of the international yard."""
    names = [
        "angstrom", "attometer", "centimeter", "decimeter", "exameter", "femtometer", "foot", "gigameter", "hectometer",
        "inch", "kilometer", "megameter", "meter", "micrometer", "mile", "millimeter", "nanometer", "parsec",
        "petameter", "picometer", "terameter", "yard", "yoctometer", "yottameter", "zeptometer", "zettameter",
    ]  # fmt: skip
    assert all(mm_of(name) for name in names)
    assert [mm_of(n) for n in ("Mm", "mm", "MM", "pixel", None, "")] == [1e9, 1.0, None, None, None, None]
    assert mm_of("mile") == 1609344.0
    assert mm_of("parsec") == pytest.approx(3.0857e19, rel=1e-4)


def test_one_unit_that_is_missing_is_no_spacing(tmp_path: Path) -> None:
    axes = space("z", unit=None) + space("y", "x", unit="nanometer")
    write(tmp_path / "a.zarr", ARRAY, axes, [scale(2, 500, 500), shift(1, 2, 3)])
    source = open_source(tmp_path / "a.zarr")
    with pytest.raises(VolumeError, match=r"z None, y nanometer, x nanometer, and not all.*--spacing"):
        source.grid()
    with pytest.raises(VolumeError, match="--spacing"):
        source.grid(unit="um")  # it would make 500 um of 500 nm
    assert source.grid((2, 0.5, 0.5), "um").spacing_zyx == (2.0, 0.5, 0.5)
    write(tmp_path / "b.zarr", ARRAY, space("z", "y", "x", unit=None), [scale(2, 0.5, 0.5)])
    assert open_source(tmp_path / "b.zarr").grid(unit="um").spacing_zyx == (2.0, 0.5, 0.5)


def test_one_unit_that_is_no_length_can_be_given(tmp_path: Path) -> None:
    write(
        tmp_path / "a.zarr", ARRAY, space("z", "y", "x", unit="pixel"), [scale(2, 0.5, 0.25), shift(1, 2, 3)]
    )
    source = open_source(tmp_path / "a.zarr")
    with pytest.raises(VolumeError, match=r"no unit of length.*the unit of its axes is pixel; .*--unit"):
        source.grid()
    grid = source.grid(unit="um")
    assert (grid.spacing_zyx, grid.origin_xyz) == ((2.0, 0.5, 0.25), (3.0, 2.0, 1.0))


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


@pytest.mark.parametrize(
    ("order", "dims"),
    [
        ("xyz", "xyz"),
        ("yxz", "yxz"),
        ("zyxc", "zyxc"),
        ("xyzct", "xyzct"),
        ("yx", "yx"),
        ("xy", "xy"),
        ("cyx", "cyx"),
    ],
)
def test_order_of_axes(tmp_path: Path, order: str, dims: str) -> None:
    sizes = {"t": 1, "c": 2, "z": 6, "y": 20, "x": 24}
    array = np.arange(np.prod([sizes[a] for a in order])).reshape([sizes[a] for a in order]).astype("int32")
    factors = {"t": 7.0, "c": 1.0, "z": 2.0, "y": 0.5, "x": 0.25}
    places = {"t": 9.0, "c": 0.0, "z": 30.0, "y": 20.0, "x": 10.0}
    kinds = {"t": "time", "c": "channel"}
    axes = [{"name": a, "type": kinds.get(a, "space"), "unit": "micrometer"} for a in dims]
    steps = [scale(*(factors[a] for a in order)), shift(*(places[a] for a in order))]
    write(tmp_path / "a.zarr", array, axes, steps)
    source = open_source(tmp_path / "a.zarr")
    full = array
    for missing in (a for a in "tczyx" if a not in order):
        full, order = full[None], missing + order
    expected = full.transpose([order.index(a) for a in "tczyx"])[0]
    np.testing.assert_array_equal(source.read(), expected)
    z = (2.0, 30.0) if "z" in dims else (1.0, 0.0)
    assert source.grid().spacing_zyx == (z[0], 0.5, 0.25)
    assert source.grid().origin_xyz == (10.0, 20.0, z[1])


def test_several_time_points_are_refused(tmp_path: Path) -> None:
    axes = [{"name": "t", "type": "time"}, *space("z", "y", "x")]
    write(tmp_path / "t.zarr", np.stack([ARRAY, ARRAY]), axes, [scale(1, 2, 1, 1)])
    with pytest.raises(VolumeError, match=r"axes \(t, z, y, x\) of \(2, 6, 20, 24\): 2 time points"):
        open_source(tmp_path / "t.zarr")


def test_axes_that_are_not_understood_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", ARRAY, space("foo", "y", "x"), [scale(1, 1, 1)])
    with pytest.raises(VolumeError, match=r"axes \(foo, y, x\).*expected z, y, x"):
        open_source(tmp_path / "a.zarr")
    write(tmp_path / "b.zarr", ARRAY, space("y", "x"), [scale(1, 1)])
    with pytest.raises(VolumeError, match=r"2 axes \(y, x\) and its array has shape \(6, 20, 24\)"):
        open_source(tmp_path / "b.zarr")


# ---------------------------------------------------------------------- where it lies


def test_scale_and_translation_at_both_levels(tmp_path: Path) -> None:
    """Level: index -> 2 i + 4; image: 10 times that, plus 3 (z), as the standard orders them."""
    further = {"coordinateTransformations": [scale(10, 10, 10), shift(3, 0, 0)]}
    write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x"), [scale(2, 1, 1), shift(4, 0, 1)], further=further)
    grid = open_source(tmp_path / "a.zarr").grid()
    assert (grid.spacing_zyx, grid.origin_xyz) == ((20.0, 10.0, 10.0), (10.0, 0.0, 43.0))


def test_a_negative_scale_is_a_direction(tmp_path: Path) -> None:
    write(
        tmp_path / "a.zarr", ARRAY, space("z", "y", "x", unit="millimeter"), [scale(-3, 2, 1), shift(7, 0, 0)]
    )
    source = open_source(tmp_path / "a.zarr")
    for grid in (source.grid(), source.grid((3, 2, 1), "mm")):
        assert grid.spacing_zyx == (3.0, 2.0, 1.0)
        np.testing.assert_allclose(grid.world_mm((5, 0, 0)), (0, 0, 7 - 15))


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_scale_that_is_no_number_can_be_given(tmp_path: Path, bad: float) -> None:
    steps = [scale(bad, -2, 1), shift(0, 7, 0)]
    write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x", unit="millimeter"), steps)
    source = open_source(tmp_path / "a.zarr")
    with pytest.raises(VolumeError, match=r"scale is \[0\.0, 2\.0, 1\.0\].*--spacing"):
        source.grid()
    # The direction that the file does say is kept.
    np.testing.assert_allclose(source.grid((3, 2, 1), "mm").world_mm((1, 1, 0)), (0, 5, 3))


def test_a_translation_without_a_scale_keeps_its_place(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x", unit="millimeter"), [shift(3, 4, 5)])
    assert open_source(tmp_path / "a.zarr").grid((1, 1, 1)).origin_xyz == (5.0, 4.0, 3.0)


def test_anatomical_orientation(tmp_path: Path) -> None:
    """RFC 4: axes of a RAS world become LPS by a change of sign of x and y; an exchange of axes is one."""

    def oriented(**leads: str) -> list[dict[str, Any]]:
        return [
            {**axis, "orientation": {"type": "anatomical", "value": leads[axis["name"]]}}
            for axis in space("z", "y", "x", unit="millimeter")
        ]

    steps = [scale(3, 2, 1), shift(30, 20, 10)]
    ras = oriented(x="left-to-right", y="posterior-to-anterior", z="inferior-to-superior")
    grid = open_source(write(tmp_path / "ras.zarr", ARRAY, ras, steps)).grid()
    np.testing.assert_allclose(grid.world_mm((1, 1, 1)), (-11, -22, 33))
    lps = oriented(x="right-to-left", y="anterior-to-posterior", z="inferior-to-superior")
    grid = open_source(write(tmp_path / "lps.zarr", ARRAY, lps, steps)).grid()
    np.testing.assert_allclose(grid.world_mm((1, 1, 1)), (11, 22, 33))
    coronal = oriented(x="right-to-left", y="superior-to-inferior", z="anterior-to-posterior")
    grid = open_source(write(tmp_path / "cor.zarr", ARRAY, coronal, steps)).grid()
    np.testing.assert_allclose(grid.world_mm((1, 1, 1)), (11, 33, -22))
    twice = oriented(x="right-to-left", y="left-to-right", z="inferior-to-superior")
    with pytest.raises(VolumeError, match="along one line in a patient"):
        open_source(write(tmp_path / "twice.zarr", ARRAY, twice, steps))
    mouse = oriented(x="right-to-left", y="dorsal-to-ventral", z="rostral-to-caudal")
    source = open_source(write(tmp_path / "mouse.zarr", ARRAY, mouse, steps))
    np.testing.assert_allclose(source.grid().world_mm((1, 1, 1)), (11, 22, 33))
    assert any("dorsal-to-ventral" in note for note in source.notes)


def test_coordinate_systems_of_0_6(tmp_path: Path) -> None:
    turn = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # z' = -y, y' = z
    parts = [scale(3, 2, 1), {"type": "rotation", "rotation": turn}, shift(30, 20, 10)]
    steps = {"type": "sequence", "input": "0", "output": "physical", "transformations": parts}
    systems = [{"name": "other", "axes": space("z", "y", "x", unit="meter")},
               {"name": "physical", "axes": space("z", "y", "x", unit="millimeter")}]  # fmt: skip
    path = write(
        tmp_path / "six.zarr", ARRAY, None, [steps], version="0.6", further={"coordinateSystems": systems}
    )
    source = open_source(path)
    grid = source.grid()
    assert (grid.spacing_zyx, grid.unit) == ((3.0, 2.0, 1.0), "millimeter")
    z, y, x = np.array(turn) @ (3 * 1, 2 * 2, 1 * 3) + (30, 20, 10)
    np.testing.assert_allclose(grid.world_mm((1, 2, 3)), (x, y, z))
    assert any("physical, not in other" in note for note in source.notes)


def test_what_is_no_regular_grid_is_refused(tmp_path: Path) -> None:
    shear = {"type": "affine", "affine": [[1, 0, 0, 0], [0, 1, 0.4, 0], [0, 0, 1, 0]]}
    with pytest.raises(VolumeError, match=r"a\.zarr: its affine shears the axes"):
        open_source(write(tmp_path / "a.zarr", ARRAY, space("z", "y", "x"), [shear]))
    field = {"type": "displacements", "path": "field"}
    with pytest.raises(VolumeError, match=r"transformation 'displacements'.*cannot be read"):
        open_source(write(tmp_path / "b.zarr", ARRAY, space("z", "y", "x"), [field]))


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
    begin = time.perf_counter()
    with pytest.raises(VolumeError, match=rf"{side} x {side} x {side} voxels.*stores {int(stored)} of its"):
        open_source(path)
    assert time.perf_counter() - begin < 5


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
