"""OME-Zarr's metadata: units, order of the axes, and where the voxels lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr_images import ARRAY, scale, shift, space, write

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.readers.lengths import mm_of

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


# ---------------------------------------------------------------------- order of the axes


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
