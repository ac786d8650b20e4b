"""Paths that are no file to read: one line each, at once."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers import open_source


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may read everything: be somebody else for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(before)


def refused(path: Path) -> str:
    begin = time.process_time()
    with pytest.raises(VolumeError) as error:
        open_source(path)
    assert time.process_time() - begin < 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.tif", "a.h5", "a.zarr", "a"])
def test_circles_of_links(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / f"b{name}")
    (tmp_path / f"b{name}").symlink_to(tmp_path / name)
    assert "a symbolic link that leads back to itself" in refused(tmp_path / name)


def test_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.nii").symlink_to(tmp_path / "gone.nii")
    assert "gone.nii, which does not exist" in refused(tmp_path / "a.nii")


@pytest.mark.parametrize(
    "name", ["p.nii", "p.nii.gz", "p.hdr", "p.mgz", "p.nrrd", "p.mha", "p.tif", "p.h5", "p.npy", "p.png"]
)
def test_pipes_and_sockets(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is a pipe" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket is short
        try:
            server.bind(name)
        finally:
            os.chdir(here)
        assert "is a socket" in refused(tmp_path / name)


def test_a_device() -> None:
    assert "is a device" in refused(Path("/dev/null"))


@pytest.mark.parametrize("header", ["v.mhd", "v.nhdr", "v.hdr"])
def test_a_pipe_that_a_header_names(tmp_path: Path, header: str) -> None:
    (tmp_path / "v.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 7 6 5\nElementType = MET_SHORT\nElementDataFile = v.img\n"
    )
    (tmp_path / "v.nhdr").write_text("NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nencoding: raw\n"
                                     "endian: little\ndata file: v.img\n")  # fmt: skip
    nibabel.save(nibabel.Nifti1Pair(np.zeros((7, 6, 5), np.int16), np.eye(4)), tmp_path / "v.hdr")
    (tmp_path / "v.img").unlink()
    os.mkfifo(tmp_path / "v.img")
    assert "v.img is a pipe" in refused(tmp_path / header)


def test_a_header_that_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "v.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 7 6 5\nElementType = MET_SHORT\nElementDataFile = .\n"
    )
    assert "which is a folder" in refused(tmp_path / "v.mhd")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that everybody may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_files_and_folders_of_others(open_to_all: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
    closed = open_to_all / "closed"
    closed.mkdir()
    nibabel.save(image, open_to_all / "a.nii")
    nibabel.save(image, closed / "b.nii")
    (open_to_all / "a.nii").chmod(0)
    closed.chmod(0)
    try:
        with ordinary_user():
            assert "a.nii may not be read (permission denied)" in refused(open_to_all / "a.nii")
            assert "closed may not be read (permission denied)" in refused(closed)
            assert "permission denied on a folder above it" in refused(closed / "b.nii")
    finally:
        closed.chmod(0o700)


def test_very_long_names(tmp_path: Path) -> None:
    assert "characters is too long" in refused(tmp_path / ("x" * 300 + ".nii"))


@pytest.mark.parametrize(("side", "what"), [(8000, "holds at most"), (60000, "claims to be larger")])
def test_pictures_that_claim_too_much(
    tmp_path: Path, side: int, what: str, recwarn: pytest.WarningsRecorder
) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "p.png").write_bytes(content)
    assert what in refused(tmp_path / "p.png")
    assert not recwarn.list


@pytest.mark.parametrize("name", ["e.jpg", "e.png"])
def test_what_a_picture_says_and_nobody_follows_is_said(tmp_path: Path, name: str) -> None:
    pixels = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    source = open_source(tmp_path / name)
    assert source.shape == (1, 1, 48, 64)
    assert "orientation 6): its pixels are read as stored" in source.notes[-1]
    Image.fromarray(pixels).save(
        tmp_path / "a.png", save_all=True, append_images=[Image.fromarray(255 - pixels)]
    )
    source = open_source(tmp_path / "a.png")
    assert source.notes == ("a.png: it holds 2 pictures: the first one is read",)
    np.testing.assert_array_equal(source.read()[0, 0], pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_flat_pictures_are_within_their_bound(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3000, 2000)).save(tmp_path / "flat.png", optimize=True, compress_level=9)
    assert open_source(tmp_path / "flat.png").shape[-2:] == (2000, 3000)
    if mode in ("L", "RGB"):
        Image.new(mode, (3000, 2000)).save(tmp_path / "flat.jpg", quality=1, optimize=True, progressive=True)
        assert open_source(tmp_path / "flat.jpg").shape[-2:] == (2000, 3000)
