"""Analyze 7.5 and MGH, as nibabel reads them."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.io import savemat
from scipy.spatial.transform import Rotation

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers import Source, open_source

ARRAY = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


def is_as_nibabel(source: Source, image: nibabel.spatialimages.SpatialImage) -> None:
    """Voxels, and every corner in the world."""
    np.testing.assert_array_equal(source.read()[0], np.asarray(image.dataobj).transpose(2, 1, 0))
    grid, shape = source.grid(), image.shape
    for x, y, z in np.ndindex(2, 2, 2):
        place = np.array([x, y, z]) * (np.array(shape) - 1)
        world = image.affine[:3, :3] @ place + image.affine[:3, 3]
        np.testing.assert_allclose(grid.world_mm(place[::-1]), world * (-1, -1, 1), atol=1e-4)


# ---------------------------------------------------------------------- Analyze


def analyze(path: Path, kind: type = nibabel.AnalyzeImage, order: str = "<", dtype: str = "int16") -> None:
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    image = kind(ARRAY.astype(dtype).transpose(2, 1, 0), None, header)
    image.header.set_zooms((0.5, 1.25, 3))
    nibabel.save(image, path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_analyze(tmp_path: Path, order: str, dtype: str) -> None:
    analyze(tmp_path / "a.img", order=order, dtype=dtype)
    for name in ("a.img", "a.hdr"):
        source = open_source(tmp_path / name)
        is_as_nibabel(source, nibabel.load(tmp_path / "a.img"))
        assert source.kind == "Analyze 7.5"
        assert source.streamed
        assert source.dtype == dtype
        np.testing.assert_allclose(source.grid().spacing_zyx, (3, 1.25, 0.5))
        np.testing.assert_array_equal(
            source.grid().direction, np.diag([1, -1, 1])
        )  # x to the left, y to the front
        assert "does not say how its axes lie" in source.notes[0]
        assert "taken as millimetres" in source.notes[1]


@pytest.mark.parametrize("names", [("A.HDR", "A.IMG"), ("a.hdr.gz", "a.img.gz"), ("A.HDR", "A.img")])
def test_names_of_analyze(tmp_path: Path, names: tuple[str, str]) -> None:
    analyze(tmp_path / "b.img")
    expected = open_source(tmp_path / "b.img")
    for name, plain in zip(names, ("b.hdr", "b.img"), strict=True):
        content = (tmp_path / plain).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for name in names:
        source = open_source(tmp_path / name)
        np.testing.assert_array_equal(source.read(), expected.read())
        assert source.grid() == expected.grid()


def test_the_origin_and_the_matrix_of_spm(tmp_path: Path) -> None:
    analyze(tmp_path / "s.img", nibabel.Spm99AnalyzeImage)
    content = bytearray((tmp_path / "s.hdr").read_bytes())
    content[253:259] = np.array([3, 2, 4], dtype="<i2").tobytes()
    (tmp_path / "s.hdr").write_bytes(bytes(content))
    is_as_nibabel(open_source(tmp_path / "s.img"), nibabel.load(tmp_path / "s.img"))
    np.testing.assert_allclose(open_source(tmp_path / "s.img").grid().world_mm((3, 1, 2)), 0, atol=1e-6)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (10, 20, 30), degrees=True).as_matrix() @ np.diag([2, 3, 4])
    savemat(tmp_path / "s.mat", {"M": matrix, "mat": matrix}, format="4")
    source = open_source(tmp_path / "s.img")
    is_as_nibabel(source, nibabel.load(tmp_path / "s.img"))
    assert "the matrix of the .mat file beside it" in source.notes[0]
    assert tmp_path / "s.mat" in source.files


def test_analyze_without_sizes_asks_for_them(tmp_path: Path) -> None:
    analyze(tmp_path / "z.img")
    content = bytearray((tmp_path / "z.hdr").read_bytes())
    content[84:88] = bytes(4)  # pixdim[2]
    (tmp_path / "z.hdr").write_bytes(bytes(content))
    with pytest.raises(VolumeError, match=r"z\.img: no voxel spacing.*--spacing"):
        open_source(tmp_path / "z.img").grid()


def test_other_headers_are_named(tmp_path: Path) -> None:
    (tmp_path / "e.hdr").write_bytes(b"ENVI\ndescription = {a satellite}\n" * 20)
    (tmp_path / "e.img").write_bytes(bytes(1000))
    with pytest.raises(VolumeError, match=r"e\.hdr is no header of NIfTI or Analyze 7\.5"):
        open_source(tmp_path / "e.img")


def test_analyze_that_claims_too_much(tmp_path: Path) -> None:
    analyze(tmp_path / "c.img")
    content = bytearray((tmp_path / "c.hdr").read_bytes())
    content[40:48] = np.array([3, 32767, 32767, 32767], dtype="<i2").tobytes()
    (tmp_path / "c.hdr").write_bytes(bytes(content))
    with pytest.raises(VolumeError, match=r"c\.img is truncated: 420 bytes.*expected 70362301923326"):
        open_source(tmp_path / "c.hdr")


# ---------------------------------------------------------------------- MGH


def mgh_image(shape: tuple[int, ...] = (7, 6, 5), dtype: str = "int16") -> nibabel.MGHImage:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (10, 20, 30), degrees=True).as_matrix() @ np.diag([1, 2, 3])
    affine[:3, 3] = (5, -6, 7)
    return nibabel.MGHImage(np.arange(np.prod(shape)).reshape(shape).astype(dtype), affine)


@pytest.mark.parametrize("name", ["m.mgh", "m.mgz", "M.MGZ", "M.MGH", "m.mgh.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_mgh(tmp_path: Path, name: str, dtype: str) -> None:
    image = mgh_image(dtype=dtype)
    nibabel.save(image, tmp_path / "plain.mgh")
    content = (tmp_path / "plain.mgh").read_bytes()
    packed = name.lower().endswith("z")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    source = open_source(tmp_path / name)
    is_as_nibabel(source, nibabel.load(tmp_path / "plain.mgh"))
    assert source.dtype == dtype
    assert source.streamed != packed
    assert source.notes == ()
    np.testing.assert_allclose(source.grid().spacing_zyx, (3, 2, 1), rtol=1e-6)


def test_frames_of_mgh_are_channels(tmp_path: Path) -> None:
    nibabel.save(mgh_image((7, 6, 5, 3)), tmp_path / "f.mgh")
    assert open_source(tmp_path / "f.mgh").shape == (3, 5, 6, 7)
    expected = np.asarray(nibabel.load(tmp_path / "f.mgh").dataobj).transpose(3, 2, 1, 0)
    np.testing.assert_array_equal(open_source(tmp_path / "f.mgh").read(), expected)


def test_mgh_without_an_orientation_is_said(tmp_path: Path) -> None:
    nibabel.save(mgh_image(), tmp_path / "g.mgh")
    content = bytearray((tmp_path / "g.mgh").read_bytes())
    content[28:30] = bytes(2)  # goodRASFlag
    (tmp_path / "g.mgh").write_bytes(bytes(content))
    source = open_source(tmp_path / "g.mgh")
    is_as_nibabel(source, nibabel.load(tmp_path / "g.mgh"))
    assert "goodRASFlag 0" in source.notes[0]


@pytest.mark.parametrize(
    "change", [(0, b"\0\0\0\2"), (4, b"\x7f\xff\xff\xff"), (4, bytes(4)), (20, b"\0\0\0\x63")]
)
def test_damaged_mgh(tmp_path: Path, change: tuple[int, bytes]) -> None:
    nibabel.save(mgh_image(), tmp_path / "d.mgh")
    content = bytearray((tmp_path / "d.mgh").read_bytes())
    content[change[0] : change[0] + 4] = change[1]
    (tmp_path / "d.mgh").write_bytes(bytes(content))
    with pytest.raises(VolumeError, match=r"d\.mgh"):
        open_source(tmp_path / "d.mgh")
