"""TIFF: what OME-XML and ImageJ say of order and size, and what is left when they are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers import open_source

SHAPE = (6, 20, 24)
ARRAY = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
CHANNELS = np.stack([ARRAY, ARRAY + 1])
BOX = Box((1, 3, 5), (4, 17, 20))


def holds(path: Path, array: np.ndarray) -> None:
    expected = array[None] if array.ndim == 3 else array
    source = open_source(path)
    np.testing.assert_array_equal(source.read(), expected)
    np.testing.assert_array_equal(source.read(BOX), expected[(slice(None), *BOX.slices)])


# ---------------------------------------------------------------------- ImageJ


def imagej(path: Path, array: np.ndarray, axes: str = "ZYX", **options: Any) -> Path:
    """x of 16.5 and y of 8 units a pixel."""
    metadata = {"axes": axes, **options.pop("metadata", {})}
    tifffile.imwrite(path, array, imagej=True, resolution=(1 / 16.5, 1 / 8), metadata=metadata, **options)
    return path


@pytest.mark.parametrize(
    ("units", "spacing", "expected", "unit"),
    [
        ({"unit": "nm", "zunit": "micron"}, 0.025, (25.0, 8.0, 16.5), "nanometer"),
        ({"unit": "nm", "yunit": "micron"}, 25, (25.0, 8000.0, 16.5), "nanometer"),
        ({"unit": "micron", "yunit": "nm", "zunit": "mm"}, 2, (2000.0, 0.008, 16.5), "micrometer"),
        ({"unit": "angstrom"}, 10, (1.0, 0.8, 1.65), "nanometer"),
        ({"unit": "inch", "zunit": "mm"}, 2, (2.0, 203.2, 419.1), "millimeter"),
        ({"unit": "\\u00B5m"}, 2, (2.0, 8.0, 16.5), "micrometer"),
    ],
)
def test_imagej_units_of_each_axis(
    tmp_path: Path, units: dict[str, str], spacing: float, expected: tuple[float, ...], unit: str
) -> None:
    grid = open_source(imagej(tmp_path / "a.tif", ARRAY, metadata={**units, "spacing": spacing})).grid()
    np.testing.assert_allclose(grid.spacing_zyx, expected, rtol=1e-6)
    assert grid.unit == unit


def test_an_imagej_unit_that_is_no_length_is_named(tmp_path: Path) -> None:
    path = imagej(tmp_path / "a.tif", ARRAY, metadata={"unit": "nm", "zunit": "frame", "spacing": 2})
    with pytest.raises(VolumeError, match=r"'frame', which is no length; .*--spacing"):
        open_source(path).grid()


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX", "TZCYX", "CYX", "YX"])
@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}])
def test_imagej_hyperstacks(tmp_path: Path, axes: str, options: dict[str, Any]) -> None:
    """ImageJ's own order is t, z, c, y, x: the writer brings them into it."""
    array = {
        "ZCYX": CHANNELS.swapaxes(0, 1), "CZYX": CHANNELS.swapaxes(0, 1), "TZCYX": CHANNELS.swapaxes(0, 1)[None],
        "CYX": CHANNELS[:, 0], "YX": ARRAY[0],
    }[axes]  # fmt: skip
    written = "ZCYX" if axes == "CZYX" else axes
    path = imagej(tmp_path / "a.tif", array, written, metadata={"unit": "um", "spacing": 2}, **options)
    expected = CHANNELS if "Z" in axes else CHANNELS[:, :1] if "C" in axes else ARRAY[None, :1]
    np.testing.assert_array_equal(open_source(path).read(), expected)
    assert open_source(path).grid().spacing_zyx[1:] == pytest.approx((8.0, 16.5))


def test_imagej_colours(tmp_path: Path) -> None:
    colours = (np.stack([ARRAY, ARRAY + 1, ARRAY + 2], -1) % 251).astype(np.uint8)
    path = imagej(tmp_path / "a.tif", colours, "ZYXS", metadata={"unit": "um", "spacing": 2})
    holds(path, np.moveaxis(colours, -1, 0))


def test_imagej_negative_spacing_is_that_of_imagej(tmp_path: Path) -> None:
    source = open_source(imagej(tmp_path / "a.tif", ARRAY, metadata={"unit": "um", "spacing": -2.5}))
    assert source.grid().spacing_zyx == pytest.approx((2.5, 8.0, 16.5))
    assert any("sign is left out" in note for note in source.notes)


def test_imagej_counts_that_contradict_the_pages(tmp_path: Path) -> None:
    path = imagej(tmp_path / "a.tif", ARRAY, metadata={"unit": "um", "spacing": 2})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"slices=6", b"slices=3"))
    source = open_source(path)
    np.testing.assert_array_equal(source.read()[0], tifffile.imread(path))
    assert any("3 slices and 6 images, and it has 6 pages: 3 are read" in note for note in source.notes)
    path = imagej(tmp_path / "b.tif", CHANNELS.swapaxes(0, 1), "ZCYX", metadata={"unit": "um", "spacing": 2})
    path.write_bytes(path.read_bytes().replace(b"slices=6", b"slices=9"))
    with pytest.raises(VolumeError, match=r"2 channels, 9 slices and 12 images.*order is not known") as error:
        open_source(path)
    assert "--spacing" not in str(error.value)


def test_a_large_imagej_stack_has_one_page(tmp_path: Path) -> None:
    """Above 4 GB ImageJ writes the first page only, and the voxels of all slices behind it."""
    text = "ImageJ=1.54f\nimages=6\nslices=6\nunit=um\nspacing=2.0\n"
    tifffile.imwrite(tmp_path / "a.tif", ARRAY[0], description=text, metadata=None, resolution=(4, 2))
    with (tmp_path / "a.tif").open("ab") as file:
        file.write(ARRAY[1:].tobytes())
    holds(tmp_path / "a.tif", ARRAY)
    assert open_source(tmp_path / "a.tif").notes == ()
    assert open_source(tmp_path / "a.tif").grid().spacing_zyx == (2.0, 0.5, 0.25)


# ---------------------------------------------------------------------- OME-XML


def ome(path: Path, array: np.ndarray = ARRAY, axes: str = "ZYX", **metadata: Any) -> Path:
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.25, **metadata}
    tifffile.imwrite(path, array, photometric="minisblack", ome=True, metadata={"axes": axes, **sizes})
    return path


def rewrite(path: Path, old: str, new: str) -> Path:
    """Put another text of the same length into the file."""
    assert len(new) <= len(old)
    raw = path.read_bytes()
    assert raw.count(old.encode()) == 1
    path.write_bytes(raw.replace(old.encode(), new.ljust(len(old)).encode()))
    return path


def reads_with_given_spacing(path: Path, note: str, array: np.ndarray = ARRAY) -> None:
    """Without a spacing one line that says why; with one the pixels, and a note that says the same."""
    holds(path, array)
    source = open_source(path)
    with pytest.raises(VolumeError, match=rf"{path.name}: no voxel spacing.*{note}.*--spacing") as error:
        source.grid()
    assert "\n" not in str(error.value)
    assert source.grid((2.25, 0.5, 0.25), "um").spacing_zyx == (2.25, 0.5, 0.25)
    assert any(note in n for n in source.notes)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}, {"bigtiff": True}])
def test_ome_xml_that_is_not_well_formed(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "bad.ome.tif"
    tifffile.imwrite(
        path, ARRAY, photometric="minisblack", metadata={"axes": "ZYX", "Name": "probe"}, **options
    )
    rewrite(path, 'Name="probe"', 'Name="pr&be"')
    reads_with_given_spacing(path, "not well-formed")


def test_ome_xml_that_is_not_well_formed_beside_colours(tmp_path: Path) -> None:
    colours = (np.stack([ARRAY, ARRAY + 1, ARRAY + 2], -1) % 251).astype(np.uint8)
    path = tmp_path / "bad.ome.tif"
    tifffile.imwrite(path, colours, photometric="rgb", metadata={"axes": "ZYXS", "Name": "probe"})
    rewrite(path, 'Name="probe"', 'Name="pr&be"')
    reads_with_given_spacing(path, "not well-formed", np.moveaxis(colours, -1, 0))


def test_ome_decimal_comma(tmp_path: Path) -> None:
    path = rewrite(ome(tmp_path / "comma.ome.tif"), 'PhysicalSizeZ="2.25"', 'PhysicalSizeZ="2,25"')
    reads_with_given_spacing(path, "PhysicalSizeZ '2,25', which is no positive number")


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ('PhysicalSizeZ="2.25"', "", "lacks PhysicalSizeZ"),
        ('PhysicalSizeZ="2.25"', 'PhysicalSizeZ="-2.2"', "'-2.2', which is no positive number"),
        ('PhysicalSizeZ="2.25"', 'PhysicalSizeZ="NaN"', "'NaN', which is no positive number"),
        ('<TiffData IFD="0" PlaneCount="6"/>', "", "at odds with its pages"),
        ('SizeX="24"', 'SizeX="30"', "at odds with its pages"),
        (' SizeZ="6"', "", "OME metadata are damaged"),
        ('SizeZ="6"', 'SizeZ="q"', "OME metadata are damaged"),
    ],
)
def test_damaged_ome_metadata(tmp_path: Path, old: str, new: str, note: str) -> None:
    reads_with_given_spacing(rewrite(ome(tmp_path / "a.ome.tif"), old, new), note)


def test_damaged_ome_metadata_never_lose_the_order(tmp_path: Path) -> None:
    """Two channels of six slices as one stack of twelve would be a wrong volume."""
    path = ome(tmp_path / "c.ome.tif", CHANNELS, "CZYX", Name="probe")
    holds(path, CHANNELS)
    rewrite(path, 'Name="probe"', 'Name="pr&be"')
    with pytest.raises(
        VolumeError, match=r"not well-formed.*order of its 12 pages.*SizeZ 6, SizeC 2"
    ) as error:
        open_source(path)
    assert "--spacing" not in str(error.value)
    path = rewrite(ome(tmp_path / "z.ome.tif", Name="probe"), 'Name="probe"', 'Name="pr&be"')
    rewrite(path, 'SizeZ="6"', 'SizeZ="3"')
    with pytest.raises(VolumeError, match=r"order of its 6 pages"):
        open_source(path)


@pytest.mark.parametrize(
    ("old", "new", "missing"), [('SizeZ="6"', 'SizeZ="9"', 3), ('Count="6"', 'Count="4"', 2)]
)
def test_ome_planes_that_are_not_there(tmp_path: Path, old: str, new: str, missing: int) -> None:
    with pytest.raises(VolumeError, match=rf"planes, and {missing} of them are not in the file"):
        open_source(rewrite(ome(tmp_path / "a.ome.tif"), old, new))


def test_ome_pages_that_no_image_names(tmp_path: Path) -> None:
    path = rewrite(ome(tmp_path / "a.ome.tif"), 'SizeZ="6"', 'SizeZ="4"')
    source = open_source(path)
    np.testing.assert_array_equal(source.read()[0], ARRAY[:4])
    assert any("name 4 of its 6 pages; the others are left out" in note for note in source.notes)


@pytest.mark.parametrize(
    ("unit", "expected", "name"),
    [
        ("Å", (0.225, 0.05, 0.025), "nanometer"), ("nm", (2.25, 0.5, 0.25), "nanometer"),
        ("mm", (2.25, 0.5, 0.25), "millimeter"), ("dm", (225.0, 50.0, 25.0), "millimeter"),
        ("km", (2250.0, 500.0, 250.0), "meter"), ("in", (57.15, 12.7, 6.35), "millimeter"),
        ("thou", (0.05715, 0.0127, 0.00635), "millimeter"),
    ],
)  # fmt: skip
def test_ome_units(tmp_path: Path, unit: str, expected: tuple[float, ...], name: str) -> None:
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XYZ"}
    grid = open_source(ome(tmp_path / "a.ome.tif", **units)).grid()
    assert (grid.spacing_zyx, grid.unit) == (expected, name)


def test_ome_units_that_differ_or_are_none(tmp_path: Path) -> None:
    grid = open_source(ome(tmp_path / "a.ome.tif", PhysicalSizeZUnit="nm")).grid()
    assert (grid.spacing_zyx, grid.unit) == ((0.00225, 0.5, 0.25), "micrometer")
    path = ome(tmp_path / "b.ome.tif", PhysicalSizeZUnit="pixel")
    reads_with_given_spacing(path, "PhysicalSizeZUnit 'pixel', which is no length")


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX", "TCZYX", "ZTCYX"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}, {"bigtiff": True}])
def test_ome_orders(tmp_path: Path, axes: str, options: dict[str, Any]) -> None:
    array = CHANNELS[None].transpose(["TCZYX".index(a) for a in axes] if "T" in axes else [0, 1, 2, 3, 4])
    if "T" not in axes:
        array = CHANNELS.transpose(["CZYX".index(a) for a in axes])
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.25}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, array, photometric="minisblack", metadata={"axes": axes, **sizes}, **options)
    holds(path, CHANNELS)
    assert open_source(path).grid().spacing_zyx == (2.25, 0.5, 0.25)


def test_ome_images_of_several_sizes(tmp_path: Path) -> None:
    """Each image has a voxel size of its own."""
    path = tmp_path / "two.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for array, size in ((ARRAY, 0.5), (ARRAY[:3], 4.0)):
            sizes = {f"PhysicalSize{axis}": size for axis in "XYZ"}
            file.write(array, photometric="minisblack", metadata={"axes": "ZYX", **sizes})
    assert open_source(path, "0").grid().spacing_zyx == (0.5, 0.5, 0.5)
    assert open_source(path, "1").grid().spacing_zyx == (4.0, 4.0, 4.0)
    np.testing.assert_array_equal(open_source(path, "1").read()[0], ARRAY[:3])


# ---------------------------------------------------------------------- other kinds, other layouts


def test_slide_scanner(tmp_path: Path) -> None:
    colours = (np.arange(64 * 48 * 3) % 251).astype(np.uint8).reshape(64, 48, 3)
    text = "Aperio Image Library v1|AppMag = 20|MPP = 0.4990"
    tifffile.imwrite(
        tmp_path / "a.svs", colours, photometric="rgb", description=text, tile=(32, 32), metadata=None
    )
    source = open_source(tmp_path / "a.svs")
    np.testing.assert_array_equal(source.read()[:, 0], np.moveaxis(colours, -1, 0))
    assert (source.grid().spacing_zyx, source.grid().unit) == ((1.0, 0.499, 0.499), "micrometer")


def test_zeiss_lsm(tmp_path: Path) -> None:
    """Pages and thumbnails take turns; sizes are in metres, in a structure of Zeiss's own."""
    record = np.zeros((), [(name, f"<{kind}") for name, kind in tifffile.TIFF.CZ_LSMINFO])
    record["MagicNumber"], record["StructureSize"] = 67127628, record.nbytes
    for name, value in {"X": 24, "Y": 20, "Z": 6, "Channels": 1, "Time": 1}.items():
        record[f"Dimension{name}"] = value
    for name, value in {"X": 2.5e-7, "Y": 5e-7, "Z": 2e-6}.items():
        record[f"VoxelSize{name}"] = value
    with tifffile.TiffWriter(tmp_path / "a.lsm", byteorder="<") as file:
        for z, plane in enumerate(ARRAY):
            tags = [(34412, 1, record.nbytes, record.tobytes(), False)] if z == 0 else []
            file.write(plane, metadata=None, extratags=tags, contiguous=False)
            file.write(plane[::4, ::4], metadata=None, subfiletype=1, contiguous=False)
    holds(tmp_path / "a.lsm", ARRAY)
    source = open_source(tmp_path / "a.lsm")
    assert (source.grid().spacing_zyx, source.grid().unit) == ((2.0, 0.5, 0.25), "micrometer")
    assert any("thumbnails" in note for note in source.notes)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}, {"byteorder": ">"}])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_plain_stacks(tmp_path: Path, options: dict[str, Any], bigtiff: bool) -> None:
    tifffile.imwrite(tmp_path / "a.tif", ARRAY, photometric="minisblack", bigtiff=bigtiff, **options)
    holds(tmp_path / "a.tif", ARRAY)


@pytest.mark.parametrize("stack", [True, False])
def test_planar_colours(tmp_path: Path, stack: bool) -> None:
    """Colour planes are written one behind the other, in a page each."""
    colours = (np.stack([ARRAY, ARRAY + 1, ARRAY + 2], 1) % 251).astype(np.uint8)
    values = colours if stack else colours[0]
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="rgb", planarconfig="separate", compression="zlib"
    )
    expected = colours.swapaxes(0, 1) if stack else colours[0][:, None]
    np.testing.assert_array_equal(open_source(tmp_path / "a.tif").read(), expected)


def test_a_page_that_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            file.pages[0].tags[name].overwrite(10**5)
    with pytest.raises(VolumeError, match=r"1 x 100000 x 100000 voxels \(9\.3 GiB\) and has 2\d\d bytes"):
        open_source(path)
