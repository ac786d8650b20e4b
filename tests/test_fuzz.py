"""Files that are nearly right, of every format, seeded: no traceback, no other volume in silence, no long message."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from dicom_files import phantom, slices
from file_mutations import MAKERS
from fuzzing import try_one
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless
from zarr_images import ARRAY, scale, space, write

from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.points import read_point_table
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.readers.codestreams import claimed_size
from comir_hpc.volumes.readers.source import reading
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp.points import require_table_name

TRIES = 55
"""Of each format; ten formats, about 30 seconds on one core."""


@pytest.mark.parametrize("kind", MAKERS)
def test_files_that_are_nearly_right(tmp_path: Path, kind: str) -> None:
    tries = [try_one(kind, seed, tmp_path / "file") for seed in range(TRIES)]
    failures = [f"{one.what}: {one.why}" for one in tries if one.verdict == "failed"]
    assert not failures, f"{len(failures)} of {TRIES}: " + "\n".join(failures[:5])
    # A fuzz that refuses everything, or never meets a refusal, tests nothing.
    verdicts = Counter(one.verdict for one in tries)
    assert verdicts["alike"] + verdicts["noted"] > TRIES // 30
    assert verdicts["refused"] > TRIES // 10


# ---------------------------------------------------------------------- what the fuzz found, each with its value


def changed(folder: Path, **values: object) -> Path:
    """One DICOM slice with other elements; None takes one away."""

    def change(ds: Dataset, k: int) -> None:
        for keyword, value in values.items():
            if value is None:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)

    slices(folder, phantom((3, 6, 5)), change=change)
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"SamplesPerPixel": 0}, "0 samples"),
        ({"PixelRepresentation": 2}, "PixelRepresentation is 2"),
        ({"HighBit": 1000}, "number 1000 of 16"),
        ({"BitsAllocated": None}, "no BitsAllocated"),
        ({"PhotometricInterpretation": "nan"}, "'nan'"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": None}, "no SamplesPerPixel"),
    ],
)
def test_pixels_that_no_dicom_reader_knows(tmp_path: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(VolumeError, match=words):
        open_source(changed(tmp_path / "d", **values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"BitsStored": None}, "all 16 bits of a pixel are taken"),
        ({"PhotometricInterpretation": None}, "taken as MONOCHROME2"),
        ({"PixelRepresentation": None}, "taken as unsigned"),
    ],
)
def test_what_dicom_leaves_open_is_a_note(tmp_path: Path, values: dict[str, object], words: str) -> None:
    source = open_source(changed(tmp_path / "d", **values))
    assert any(words in note for note in source.notes)
    np.testing.assert_array_equal(source.read()[0], phantom((3, 6, 5)))


def test_dicom_pixels_beyond_the_rows_are_a_note(tmp_path: Path) -> None:
    source = open_source(changed(tmp_path / "d", Rows=4))
    assert any("20 bytes follow" in note for note in source.notes)
    np.testing.assert_array_equal(source.read()[0], phantom((3, 6, 5))[:, :4])


@pytest.mark.parametrize("implicit", [False, True])
def test_dicom_without_a_transfer_syntax_is_a_note(tmp_path: Path, implicit: bool) -> None:
    for file in changed(tmp_path / "d").iterdir():
        whole = pydicom.dcmread(file)
        with file.open("wb") as stream:  # without the mark and the elements before the image's own
            pydicom.filewriter.dcmwrite(stream, _bare(whole), implicit_vr=implicit, little_endian=True)
    source = open_source(tmp_path / "d")
    form = "implicit" if implicit else "explicit"
    assert [n for n in source.notes if "transfer syntax" in n] == [
        f"d: it names no transfer syntax: its elements look like {form} little endian, and are read so"
    ]
    np.testing.assert_array_equal(source.read()[0], phantom((3, 6, 5)))


def _bare(whole: Dataset) -> Dataset:
    """The elements of a file without those about the file."""
    bare = Dataset()
    bare.update({e.tag: e for e in whole})
    return bare


def test_control_characters_of_a_file_stay_out_of_messages_and_notes(tmp_path: Path) -> None:
    # A line break is white space, and ends a UID of pydicom's: what else steers a terminal, too.
    folder = changed(tmp_path / "d")
    file = sorted(folder.iterdir())[0]
    whole = pydicom.dcmread(file)
    whole.SeriesInstanceUID, whole.SeriesDescription = "1.2.3.9", "a\x1b[31mb\x07"
    whole.save_as(file)
    with pytest.raises(VolumeError, match="2 DICOM series") as caught:
        open_source(folder)
    assert str(caught.value).isprintable()
    assert "a\\x1b[31mb\\x07" in str(caught.value)
    notes = open_source(folder, "1.2.3.9").notes
    assert all(map(str.isprintable, notes))
    assert any("\\x1b[31m" in note for note in notes)
    assert str(VolumeError("one\ntwo \u202e")) == "one two \\u202e"


def test_dicom_slope_beyond_single_precision(tmp_path: Path) -> None:
    values = open_source(changed(tmp_path / "d", RescaleSlope=1e99, RescaleIntercept=0)).read()
    np.testing.assert_allclose(values[0], phantom((3, 6, 5)) * 1e99)


@pytest.mark.parametrize("syntax", [b"1.2.840.10008.1.2.4\0", b"1.2.840.113619.5.2\0\0"])
def test_unknown_byte_order_is_refused(tmp_path: Path, syntax: bytes) -> None:
    file = next(changed(tmp_path / "d").iterdir())
    content = file.read_bytes()
    assert b"1.2.840.10008.1.2.1\0" in content
    file.write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", syntax, 1))
    with pytest.raises(VolumeError, match=r"transfer syntax .* is not known"):
        open_source(file)


def test_compressed_frame_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    size = struct.pack(">4I", 60000, 60000, 0, 0)
    stream = b"\xff\x4f\xff\x51" + struct.pack(">HH", 41, 0) + size + size + b"\0" * 40
    assert claimed_size(stream) == (60000, 60000)
    jpeg = (
        b"\xff\xd8\xff\xe0"
        + struct.pack(">H", 4)
        + b"xx\xff\xc0"
        + struct.pack(">HBHH", 11, 8, 65500, 6)
        + b"\0" * 6
    )
    assert claimed_size(jpeg) == (65500, 6)
    assert claimed_size(b"RLE") is None

    def change(ds: Dataset, k: int) -> None:
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = encapsulate([stream + b"\0" * (len(stream) % 2)])
        ds["PixelData"].is_undefined_length = True

    slices(tmp_path / "j", phantom((2, 6, 5)), change=change)
    with pytest.raises(VolumeError, match="says 60000 x 60000 pixels, the header 6 x 5"):
        open_source(tmp_path / "j").read()


def test_tile_that_is_not_stored_has_the_value_for_no_data(tmp_path: Path) -> None:
    path, array = tmp_path / "sparse.tif", np.arange(2 * 16 * 32, dtype="u1").reshape(2, 16, 32)
    nodata = [(42113, "s", 0, "7", True)]
    tifffile.imwrite(path, array, tile=(16, 16), photometric="minisblack", metadata=None, extratags=nodata)
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].tags[324].valueoffset
    content = bytearray(path.read_bytes())
    content[at : at + 4] = b"\0\0\0\0"  # the first tile's place
    path.write_bytes(content)
    found, truth = open_source(path).read()[0], tifffile.imread(path)
    np.testing.assert_array_equal(found, truth)
    assert any("1 of its strips or tiles are not stored" in note for note in open_source(path).notes)
    assert (found[0, :, :16] == 7).all()
    assert (found[0, :, 16:] == array[0, :, 16:]).all()


@pytest.mark.parametrize(("order", "samples"), [("<", 1), (">", 1), ("<", 3)])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_page_that_is_not_stored_is_a_note(tmp_path: Path, number: int, order: str, samples: int) -> None:
    """Not packed, and its place (tag 273) is 0."""
    path, array = tmp_path / "m.tif", np.arange(4 * 6 * 5 * samples, dtype="u2").reshape(4, 6, 5, samples) + 1
    photometric = "rgb" if samples == 3 else "minisblack"
    tifffile.imwrite(path, array.squeeze(), photometric=photometric, metadata=None, byteorder=order)
    with tifffile.TiffFile(path) as file:
        at = [page.tags[273].valueoffset for page in file.pages][number]
    content = bytearray(path.read_bytes())
    content[at : at + 4] = b"\0\0\0\0"
    path.write_bytes(content)
    source = open_source(path)
    assert [note for note in source.notes if "not stored" in note] == [
        "m.tif: 1 of its strips or tiles are not stored (their place or length is 0): they are read as 0, the value "
        "for no data"
    ]
    array[number] = 0
    np.testing.assert_array_equal(source.read(), np.moveaxis(array, -1, 0))


def test_slice_in_a_folder_that_is_not_stored_is_a_note(tmp_path: Path) -> None:
    for k in range(3):
        tifffile.imwrite(tmp_path / f"s{k}.tif", np.full((4, 5), k + 1, "u1"), metadata=None)
    with tifffile.TiffFile(tmp_path / "s1.tif") as file:
        at = file.pages[0].tags[273].valueoffset
    content = bytearray((tmp_path / "s1.tif").read_bytes())
    content[at : at + 4] = b"\0\0\0\0"
    (tmp_path / "s1.tif").write_bytes(content)
    source = open_source(tmp_path)
    assert any("1 of its strips or tiles are not stored" in note for note in source.notes)
    assert source.read()[0, :, 0, 0].tolist() == [1, 0, 3]


def test_chain_of_pages_that_leads_to_no_page(tmp_path: Path) -> None:
    path = tmp_path / "ij.tif"
    tifffile.imwrite(path, np.zeros((4, 5, 6), "u1"), imagej=True, byteorder="<")
    (second,) = struct.unpack("<I", _next(path))
    content = bytearray(path.read_bytes())
    content[second : second + 2] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=f"at byte {second} where page 2"):
        open_source(path)


def _next(path: Path) -> bytes:
    """The offset of the second page, as it stands behind the first one's tags."""
    content = path.read_bytes()
    (at,) = struct.unpack("<I", content[4:8])
    (tags,) = struct.unpack("<H", content[at : at + 2])
    return content[at + 2 + 12 * tags : at + 6 + 12 * tags]


def test_image_that_names_no_level_is_not_a_plain_array(tmp_path: Path) -> None:
    path = write(tmp_path / "m.zarr", ARRAY, space("x", "y", "z"), [scale(1, 1, 1)])
    attributes = json.loads((path / ".zattrs").read_bytes())
    attributes["multiscales"][0]["datasets"] = []
    (path / ".zattrs").write_text(json.dumps(attributes), encoding="utf-8")
    with pytest.raises(VolumeError, match="name no array, so axes and place are not known"):
        open_source(path)


@pytest.mark.parametrize("cell", ["1\f", "٣", "1_0"])
def test_number_that_only_python_reads(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"x,y,z\n{cell},2,3\n", encoding="utf-8")
    with pytest.raises(VolumeError, match="expected a number in mm"):
        read_point_table(path)


def test_own_store_that_claims_what_it_does_not_hold(tmp_path: Path) -> None:
    path, side = tmp_path / "v.zarr", 10**9
    volume = Volume.create(path, Grid((8, 8, 8), (1, 1, 1)), "u2", chunk=8, shard=8)
    volume.write(volume.grid.box, np.ones((1, 8, 8, 8), "u2"))
    volume.finish()
    for file, change in (
        (path / "0" / "zarr.json", lambda entry: entry.update(shape=[1, side, side, side])),
        (path / "zarr.json", lambda entry: entry["attributes"]["comir"]["grid"].update(shape_zyx=[side] * 3)),
        (path / "zarr.json", lambda entry: entry["attributes"].pop("comir_files", None)),
    ):
        entry = json.loads(file.read_bytes())
        change(entry)
        file.write_text(json.dumps(entry), encoding="utf-8")
        with pytest.raises(VolumeError):
            Volume.open(path)
    with pytest.raises(VolumeError, match="and stores 1 of its"):
        Volume.open(path)


def test_file_without_permission_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="permission denied") as caught, reading(tmp_path, "TIFF"):
        raise PermissionError(13, "Permission denied", "scan.tif")
    assert "scan.tif" in str(caught.value)
    assert "export" not in str(caught.value)


def test_points_are_not_written_over_themselves(tmp_path: Path) -> None:
    points, link = tmp_path / "p.csv", tmp_path / "same.csv"
    points.write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    link.hardlink_to(points)
    for out in (points, link):
        with pytest.raises(ConfigError, match="is the input"):
            require_table_name(out, (points,))


def test_volumes_of_a_nifti_become_channels_with_a_note(tmp_path: Path) -> None:
    path, values = tmp_path / "bold.nii", np.arange(2 * 3 * 4 * 5, dtype="i2").reshape(5, 4, 3, 2)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    source = open_source(path)
    np.testing.assert_array_equal(source.read(), values.transpose(3, 2, 1, 0))
    assert any("its 2 volumes" in note and "channels" in note for note in source.notes)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ("TZYX", "extract one time point$"),
        ("TYX", "one time point .if its frames"),
        ("CZYXS", "extract one channel"),
    ],
)
def test_advice_on_axes_never_makes_time_points_slices(tmp_path: Path, axes: str, words: str) -> None:
    sizes = dict(zip("TCZYXS", (2, 3, 4, 5, 6, 3), strict=True))
    array = np.zeros([sizes[a] for a in axes], "u1")
    path = tmp_path / "m.ome.tif"
    tifffile.imwrite(path, array, metadata={"axes": axes}, photometric="rgb" if "S" in axes else "minisblack")
    with pytest.raises(VolumeError, match=words):
        open_source(path)


def test_no_advice_to_run_code_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.npy").write_bytes(b"no array at all")
    with pytest.raises(VolumeError) as caught:
        open_source(tmp_path / "m.npy")
    assert "pickle" not in str(caught.value)
