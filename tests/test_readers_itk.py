"""MetaImage and NRRD: what their headers leave open or say in an unusual way, against SimpleITK."""

from __future__ import annotations

import bz2
import gzip
import itertools
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers import Source, open_source

ARRAY = np.arange(5 * 6 * 7, dtype="<i2").reshape(5, 6, 7)
META = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "-5 6 7", "ElementSpacing": "1 2 3", "DistanceUnits": "mm",
    "DimSize": "7 6 5", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
}  # fmt: skip
NRRD: dict[str, str | None] = {
    "type": "short", "dimension": "3", "space": "left-posterior-superior",
    "space dimension": None, "sizes": "7 6 5",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)", "kinds": "domain domain domain", "endian": "little",
    "encoding": "raw", "space origin": "(-5,6,7)", "space units": '"mm" "mm" "mm"',
}  # fmt: skip


def meta(path: Path, data: bytes = ARRAY.tobytes(), **changed: str | None) -> Path:
    """A MetaImage; fields that are None are left out. Data behind the header only where it is LOCAL."""
    fields = {k: v for k, v in ({**META, **changed}).items() if v is not None}
    fields["ElementDataFile"] = fields.pop("ElementDataFile")
    text = "".join(f"{name} = {value}\n" for name, value in fields.items())
    path.write_bytes(text.encode() + (data if fields["ElementDataFile"].upper() == "LOCAL" else b""))
    return path


def nrrd(path: Path, data: bytes = ARRAY.tobytes(), changed: dict[str, str | None] | None = None) -> Path:
    """A NRRD; fields that are None are left out. Data behind the header only where no file is named."""
    fields = {k: v for k, v in ({**NRRD, **(changed or {})}).items() if v is not None}
    text = "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in fields.items()) + "\n"
    path.write_bytes(text.encode() + (b"" if "data file" in fields else data))
    return path


def is_as_itk(source: Source, path: Path, array: np.ndarray = ARRAY) -> None:
    """Every corner where SimpleITK has it, and the voxels of `array`."""
    grid, image = source.grid(), sitk.ReadImage(str(path))
    for z, y, x in itertools.product(*[(0, n - 1) for n in grid.shape_zyx]):
        np.testing.assert_allclose(
            grid.world_mm((z, y, x)), image.TransformIndexToPhysicalPoint((x, y, z)), atol=1e-6
        )
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    np.testing.assert_array_equal(source.read()[0], array)


# ---------------------------------------------------------------------- order and direction of the file


@pytest.mark.parametrize("signs", [s for s in itertools.product((1, -1), repeat=3) if s != (1, 1, 1)])
@pytest.mark.parametrize("name", ["n.mha", "n.mhd"])
def test_negative_spacing_turns_the_axis(tmp_path: Path, signs: tuple[int, ...], name: str) -> None:
    spacing = " ".join(str(s * n) for s, n in zip(signs, (1, 2, 3), strict=True))
    (tmp_path / "s.raw").write_bytes(ARRAY.tobytes())
    local = "LOCAL" if name == "n.mha" else "s.raw"
    path = meta(tmp_path / name, ElementSpacing=spacing, ElementDataFile=local)
    source = open_source(path)
    is_as_itk(source, path)
    grid = source.grid()
    assert grid.spacing_zyx == (3, 2, 1)
    np.testing.assert_array_equal(grid.direction, np.diag(signs))
    assert grid.world_mm((2, 1, 1)).tolist() == [-5 + signs[0], 6 + 2 * signs[1], 7 + 6 * signs[2]]
    assert "its spacing is negative along" in source.notes[0]
    # A spacing that is given replaces the lengths, never the direction.
    given = source.grid((6, 4, 2))
    assert given.spacing_zyx == (6, 4, 2)
    np.testing.assert_array_equal(given.direction, np.diag(signs))


def test_negative_spacing_on_turned_axes(tmp_path: Path) -> None:
    path = meta(tmp_path / "n.mha", ElementSpacing="1 2 -3", TransformMatrix="0 1 0 -1 0 0 0 0 1")
    is_as_itk(open_source(path), path)


def test_negative_spacings_of_nrrd(tmp_path: Path) -> None:
    changed = {"spacings": "1 -2 3", "space": None, "space directions": None, "space origin": None,
               "space units": None, "units": '"mm" "mm" "mm"'}  # fmt: skip
    path = nrrd(tmp_path / "n.nrrd", changed=changed)
    is_as_itk(open_source(path), path)
    assert open_source(path).grid().direction[1][1] == -1


@pytest.mark.parametrize("space", ["left-posterior-superior", "RAS", "right-anterior-superior", "LAS"])
def test_anatomical_spaces_need_no_note(tmp_path: Path, space: str) -> None:
    path = nrrd(tmp_path / "s.nrrd", changed={"space": space})
    is_as_itk(open_source(path), path)
    assert open_source(path).notes == ()


@pytest.mark.parametrize("space", ["scanner-xyz", "3D-right-handed", None])
def test_spaces_without_a_body_are_said(tmp_path: Path, space: str | None) -> None:
    path = nrrd(tmp_path / "s.nrrd", changed={"space": space, "space dimension": None if space else "3"})
    source = open_source(path)
    is_as_itk(source, path)
    assert "its axes are taken as LPS" in source.notes[0]


def test_a_direction_that_is_left_open_is_refused(tmp_path: Path) -> None:
    changed = {"space directions": "(1,0,0) (0,2,0) none"}
    with pytest.raises(VolumeError, match="leaves an axis of space without one") as error:
        open_source(nrrd(tmp_path / "d.nrrd", changed=changed))
    assert "--spacing" not in str(error.value)


@pytest.mark.parametrize("spacings", ["1 2 nan", "nan nan nan"])
def test_a_spacing_that_is_left_open_is_asked_for(tmp_path: Path, spacings: str) -> None:
    changed = {
        "spacings": spacings,
        "space": None,
        "space directions": None,
        "space origin": None,
        "space units": None,
    }
    with pytest.raises(VolumeError, match="no voxel spacing in this NRRD file; give it with --spacing"):
        open_source(nrrd(tmp_path / "d.nrrd", changed=changed)).grid()


@pytest.mark.parametrize("format_", ["mha", "nrrd"])
def test_slightly_sheared_axes(tmp_path: Path, format_: str) -> None:
    if format_ == "mha":
        path = meta(tmp_path / "s.mha", TransformMatrix="1 0 0 0.001 1 0 0 0 1")
    else:
        path = nrrd(tmp_path / "s.nrrd", changed={"space directions": "(1,0,0) (0.002,2,0) (0,0,3)"})
    source, image = open_source(path), sitk.ReadImage(str(path))
    assert "sheared by up to 0.0573 degrees" in source.notes[0]
    middle = source.grid().world_mm((2, 2.5, 3))
    np.testing.assert_allclose(middle, image.TransformContinuousIndexToPhysicalPoint((3, 2.5, 2)), atol=1e-5)
    corner = source.grid().world_mm((0, 0, 0)) - image.GetOrigin()
    assert 1e-4 < np.linalg.norm(corner) < 0.01


def test_strongly_sheared_axes_are_refused(tmp_path: Path) -> None:
    path = meta(tmp_path / "s.mha", TransformMatrix="1 0 0 0.4 1 0 0 0 1")
    with pytest.raises(VolumeError, match=r"s\.mha: its axes are sheared.*resample") as error:
        open_source(path)
    assert "--spacing" not in str(error.value)


def test_lengths_inside_the_matrix_count(tmp_path: Path) -> None:
    path = meta(tmp_path / "s.mha", TransformMatrix="2 0 0 0 1 0 0 0 -1")
    is_as_itk(open_source(path), path)
    assert open_source(path).grid().spacing_zyx == (3, 2, 2)


# ---------------------------------------------------------------------- units


@pytest.mark.parametrize("unit", ["um", "nm", "cm"])
def test_units_that_itk_does_not_read_are_said(tmp_path: Path, unit: str) -> None:
    source = open_source(meta(tmp_path / "u.mha", DistanceUnits=unit))
    assert source.grid().spacing_zyx == (3, 2, 1)
    assert "ITK's tools take them as millimetres" in source.notes[0]


def test_axes_in_different_units(tmp_path: Path) -> None:
    path = nrrd(tmp_path / "u.nrrd", changed={"space units": '"um" "um" "mm"'})
    grid = open_source(path).grid()
    np.testing.assert_allclose(grid.spacing_mm, (3, 2e-3, 1e-3))
    np.testing.assert_allclose(grid.origin_mm, (-5e-3, 6e-3, 7))
    assert "its axes are in um, um, mm (x, y, z)" in open_source(path).notes[0]
    path = nrrd(tmp_path / "v.nrrd", changed={"space units": '"um" "um" "s"'})
    with pytest.raises(VolumeError, match="not all are known lengths"):
        open_source(path)


def test_a_unit_that_is_not_named_can_be_given(tmp_path: Path) -> None:
    grid = open_source(meta(tmp_path / "u.mha", DistanceUnits=None)).grid(unit="um")
    assert (grid.spacing_zyx, grid.origin_xyz, grid.unit) == ((3, 2, 1), (-5, 6, 7), "micrometer")
    with pytest.raises(VolumeError, match="its spacing is in millimeter, --unit says micrometer"):
        open_source(meta(tmp_path / "u.mha")).grid(unit="um")


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["S.MHA", "S.NRRD", "s.Mha", "S.MHD", "S.NHDR"])
@pytest.mark.parametrize("packed", [False, True])
def test_capitals(tmp_path: Path, name: str, packed: bool) -> None:
    data = ARRAY.tobytes()
    separate = name in ("S.MHD", "S.NHDR")
    if "NRRD" in name or "NHDR" in name:
        changed: dict[str, str | None] = {"encoding": "gzip"} if packed else {}
        path = nrrd(tmp_path / name, gzip.compress(data), {**changed, **({"data file": "S.RAW"} if separate else {})}) \
            if packed else nrrd(tmp_path / name, data, {"data file": "S.RAW"} if separate else {})  # fmt: skip
        data = gzip.compress(data) if packed else data
    else:
        data = zlib.compress(data) if packed else data
        path = meta(
            tmp_path / name,
            data,
            CompressedData=str(packed),
            ElementDataFile="S.RAW" if separate else "LOCAL",
        )
    (tmp_path / "S.RAW").write_bytes(data)
    source = open_source(path)
    np.testing.assert_array_equal(source.read()[0], ARRAY)
    assert source.grid().spacing_zyx == (3, 2, 1)


@pytest.mark.parametrize("local", ["LOCAL", "Local", "local"])
def test_local_data(tmp_path: Path, local: str) -> None:
    path = meta(tmp_path / "l.mha", ElementDataFile=local)
    is_as_itk(open_source(path), path)


def test_a_data_file_in_other_letters(tmp_path: Path) -> None:
    (tmp_path / "SCAN.RAW").write_bytes(ARRAY.tobytes())
    with pytest.raises(VolumeError, match=r"SCAN\.RAW beside it.*rename it"):  # ITK opens it with the header
        open_source(nrrd(tmp_path / "s.nhdr", changed={"data file": "scan.raw"}))
    path = meta(tmp_path / "s.mhd", ElementDataFile="scan.raw")
    source = open_source(path)
    np.testing.assert_array_equal(source.read()[0], ARRAY)
    assert any("SCAN.RAW beside it is taken" in note for note in source.notes)
    assert tmp_path / "SCAN.RAW" in source.files
    (tmp_path / "SCAN.RAW").unlink()
    with pytest.raises(VolumeError, match=r"scan\.raw, which does not exist"):
        open_source(path)


# ---------------------------------------------------------------------- where the voxels lie


@pytest.mark.parametrize("yes", ["True", "true", "1"])
@pytest.mark.parametrize("field", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_byte_order_in_all_its_spellings(tmp_path: Path, yes: str, field: str) -> None:
    order = {"BinaryDataByteOrderMSB": None, field: yes}
    path = meta(tmp_path / "b.mha", ARRAY.astype(">i2").tobytes(), **order)
    assert open_source(path).streamed
    is_as_itk(open_source(path), path)


@pytest.mark.parametrize("skip", ["-1", "300"])
def test_header_size_of_local_data(tmp_path: Path, skip: str) -> None:
    path = meta(tmp_path / "h.mha", HeaderSize=skip)
    content = path.read_bytes()
    head = content[: -ARRAY.nbytes]
    path.write_bytes(head + bytes(300 - len(head)) + ARRAY.tobytes() if skip == "300" else content)
    is_as_itk(open_source(path), path)


@pytest.mark.parametrize("field", ["line skip", "lineskip"])
def test_lines_before_the_voxels(tmp_path: Path, field: str) -> None:
    (tmp_path / "d.raw").write_bytes(b"a line\n" + ARRAY.tobytes())
    path = nrrd(tmp_path / "l.nhdr", changed={field: "1", "data file": "d.raw"})
    is_as_itk(open_source(path), path)


@pytest.mark.parametrize("encoding", ["gzip", "gz", "ascii", "hex", "bzip2"])
def test_encodings_of_nrrd(tmp_path: Path, encoding: str) -> None:
    raw = ARRAY.tobytes()
    packed = {
        "gzip": gzip.compress(raw), "gz": gzip.compress(raw), "bzip2": bz2.compress(raw), "hex": raw.hex().encode(),
        "ascii": " ".join(map(str, ARRAY.ravel())).encode(),
    }  # fmt: skip
    path = nrrd(tmp_path / "e.nrrd", packed[encoding], {"encoding": encoding})
    try:
        sitk.ReadImage(str(path))
    except RuntimeError:
        with pytest.raises(VolumeError, match=r"e\.nrrd"):
            open_source(path).read()
        return
    is_as_itk(open_source(path), path)


def test_a_scaling_that_is_not_applied_is_said(tmp_path: Path) -> None:
    path = meta(
        tmp_path / "i.mha", ElementToIntensityFunctionSlope="2", ElementToIntensityFunctionOffset="-1000"
    )
    is_as_itk(open_source(path), path)
    assert "Slope 2 and Offset -1000 are not applied" in open_source(path).notes[0]


# ---------------------------------------------------------------------- damage and claims


@pytest.mark.parametrize("form", ["mha", "nrrd"])
@pytest.mark.parametrize("place", [0.3, 0.6, 1.0])
def test_damaged_streams_are_refused(tmp_path: Path, form: str, place: float) -> None:
    """ITK gives what lay in memory where a compressed MetaImage is torn."""
    noise = np.random.default_rng(0).integers(0, 999, ARRAY.shape).astype("<i2").tobytes()
    if form == "mha":
        packed = zlib.compress(noise)
        path = meta(tmp_path / "d.mha", packed, CompressedData="True")
    else:
        packed = gzip.compress(noise)
        path = nrrd(tmp_path / "d.nrrd", packed, {"encoding": "gzip"})
    content = bytearray(path.read_bytes())
    content[len(content) - len(packed) + int(place * (len(packed) - 5))] ^= 0x5A
    path.write_bytes(bytes(content))
    with pytest.raises(VolumeError, match=r"d\.(mha|nrrd) cannot be read"):
        open_source(path).read()


def test_packed_voxels_of_every_kind(tmp_path: Path) -> None:
    packed = zlib.compress(ARRAY.tobytes())
    (tmp_path / "s.zraw").write_bytes(packed)
    for name, data in (("c.mha", "LOCAL"), ("c.mhd", "s.zraw")):
        more = {"CompressedData": "True", "CompressedDataSize": str(len(packed)), "ElementDataFile": data}
        path = meta(tmp_path / name, packed, **more)
        is_as_itk(open_source(path), path)
        assert not open_source(path).streamed
    # Without its size ITK cannot unpack it, and gives what lay in memory.
    path = meta(tmp_path / "c.mha", packed, CompressedData="True")
    np.testing.assert_array_equal(open_source(path).read()[0], ARRAY)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["mha", "nrrd"])
def test_claims_beyond_the_file(tmp_path: Path, form: str, packed: bool) -> None:
    side = "60000 60000 60000"
    if form == "mha":
        path = meta(
            tmp_path / "c.mha", zlib.compress(ARRAY.tobytes()), DimSize=side, CompressedData=str(packed)
        )
    else:
        encoding = "gzip" if packed else "raw"
        path = nrrd(
            tmp_path / "c.nrrd", gzip.compress(ARRAY.tobytes()), {"sizes": side, "encoding": encoding}
        )
    begin = time.process_time()
    with pytest.raises(VolumeError, match=r"c\.(mha|nrrd).*(432000000000000|truncated)"):
        open_source(path)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "changed",
    [{"NDims": "4096"}, {"NDims": "x"}, {"DimSize": "7 6"}, {"DimSize": "7 -6 5"}, {"DimSize": "7 0 5"},
     {"Offset": "1 raw 3"}, {"TransformMatrix": "1 0 0 0 1 0"}, {"ElementSpacing": "1 2"}, {"ElementSpacing": "1 x 3"},
     {"HeaderSize": "1e9x"}, {"ElementType": "MET_NONSENSE"}, {"ElementNumberOfChannels": "many"}],
)  # fmt: skip
def test_meta_headers_that_make_no_sense(tmp_path: Path, changed: dict[str, str]) -> None:
    with pytest.raises(VolumeError, match=r"m\.mha"):
        open_source(meta(tmp_path / "m.mha", **changed)).read()


def test_field_names_count_in_their_capitals(tmp_path: Path) -> None:
    """MetaIO does not know them otherwise, so a spacing in other letters is none."""
    path = meta(tmp_path / "m.mha", ElementSpacing=None, elementspacing="9 9 9")
    with pytest.raises(VolumeError, match="no voxel spacing"):
        open_source(path).grid()


def test_a_spacing_of_zero_is_asked_for_by_name_and_the_direction_kept(tmp_path: Path) -> None:
    path = meta(tmp_path / "z.mha", ElementSpacing="1 -2 0", TransformMatrix="0 1 0 1 0 0 0 0 1")
    with pytest.raises(
        VolumeError, match=r"z\.mha: spacing \(0\.0, 2\.0, 1\.0\).*not positive.*--spacing Z Y X"
    ):
        open_source(path).grid()
    grid = open_source(path).grid((3, 2, 1))
    np.testing.assert_array_equal(grid.direction, [[0, -1, 0], [1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("kind", ["list", "vector", "2-vector"])
@pytest.mark.parametrize("first", [True, False])
def test_channels_of_nrrd_at_either_end(tmp_path: Path, first: bool, kind: str, encoding: str) -> None:
    array = np.arange(2 * 5 * 6 * 7, dtype="<i2").reshape(2, 5, 6, 7)
    stored = (
        np.moveaxis(array, 0, -1) if first else array
    )  # the fastest axis of the file is the last of the array
    vectors, kinds = "(1,0,0) (0,2,0) (0,0,-3)", "domain domain domain"
    changed: dict[str, str | None] = {
        "dimension": "4", "sizes": "2 7 6 5" if first else "7 6 5 2", "encoding": encoding,
        "space directions": f"none {vectors}" if first else f"{vectors} none",
        "kinds": f"{kind} {kinds}" if first else f"{kinds} {kind}",
    }  # fmt: skip
    raw = np.ascontiguousarray(stored).tobytes()
    path = nrrd(tmp_path / "c.nrrd", gzip.compress(raw) if encoding == "gzip" else raw, changed)
    source = open_source(path)
    np.testing.assert_array_equal(source.read(), array)
    assert source.grid().spacing_zyx == (3, 2, 1)
    np.testing.assert_array_equal(source.grid().direction, np.diag([1, 1, -1]))
