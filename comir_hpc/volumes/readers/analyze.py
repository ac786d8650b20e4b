"""Pairs of a header (.hdr) and its voxels (.img): NIfTI where the header says so, else Analyze 7.5.

Analyze says how large voxels are, not how the axes lie in the body. They are taken as nibabel takes them, and a note
says so.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.nifti import header_block, layout_of, magic_of, nifti_from, rescaled
from comir_hpc.volumes.readers.packed import gunzip_or_read
from comir_hpc.volumes.readers.paths import sibling
from comir_hpc.volumes.readers.placement import placement_ras
from comir_hpc.volumes.readers.raw import shape_of
from comir_hpc.volumes.readers.source import NO_THICKNESS, THICKNESS, Source, reading, storable

_SUFFIXES = {".hdr": ".img", ".img": ".hdr"}


def pair(path: Path) -> Source:
    """Open a NIfTI or Analyze pair by either of its two files; streamed unless it is compressed.

    Raises
    ------
    VolumeError
        If one of the two is missing, the header is of another kind or damaged, or the voxels are fewer than it says.
    """
    header, voxels = _two(path)
    block = header_block(header)
    magic = magic_of(block)
    if magic.startswith(b"ni"):
        return nifti_from(path, block, voxels, (header, voxels))
    if magic:
        raise VolumeError(
            f"{header} says that its voxels are in the same file ({magic[:3].decode()}); name it .nii"
        )
    if 348 not in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")):
        raise VolumeError(
            f"{header} is no header of NIfTI or Analyze 7.5 (its first bytes are {block[:8]!r}); .hdr and .img of "
            "other programs are not read: export the volume as NIfTI, NRRD or TIFF"
        )
    return _analyze(path, header, voxels, block)


def _two(path: Path) -> tuple[Path, Path]:
    """Return the paths of the header and of the voxels."""
    name = path.name.lower().removesuffix(".gz")
    other = sibling(path, _SUFFIXES[name[-4:]], (".hdr", ".hdr.gz", ".img", ".img.gz"))
    return (path, other) if name.endswith(".hdr") else (other, path)


def _analyze(path: Path, header: Path, voxels: Path, block: bytes) -> Source:
    kind, size = "Analyze 7.5", block[:348]
    stem = voxels.name[:-3] if voxels.name.lower().endswith(".gz") else voxels.name
    matrix = voxels.with_name(stem[: -len(".img")] + ".mat")
    spm = matrix.read_bytes() if matrix.is_file() else b""
    with (
        reading(path, kind, HeaderDataError, ImageFileError),
        LoggingOutputSuppressor(),
        np.errstate(all="ignore"),
    ):
        # SPM's form of Analyze: it knows the scaling and the .mat file, and is the plain one where they are missing.
        image: Any = nibabel.Spm2AnalyzeImage.from_file_map(  # type: ignore[no-untyped-call]
            {
                "header": FileHolder(fileobj=BytesIO(size)),
                "image": FileHolder(filename=str(voxels)),
                "mat": FileHolder(fileobj=BytesIO(spm)),
            }
        )
        shape, proxy = tuple(int(n) for n in image.shape), image.dataobj
        layout = layout_of(path, voxels, shape, np.dtype(proxy.dtype), int(proxy.offset))
        dtype = storable(layout.dtype, path)
        affine = np.asarray(image.affine, dtype=np.float64)
        slope, intercept = float(proxy.slope), float(proxy.inter)
        # The header's own bytes are read, since nibabel has already mended its copy of these numbers.
        pixdim = np.frombuffer(size, f"{image.header.endianness}f4", count=3, offset=80).astype(np.float64)
        said = size[56:60]  # vox_units
    czyx = shape_of(layout.shape, layout.axes)
    place = placement_ras(affine, czyx[1:], path)
    read, load_bytes, trailing = gunzip_or_read(path, layout)
    dtype, read = rescaled(dtype, read, slope, intercept)
    good = np.isfinite(pixdim[: len(shape)]) & (pixdim[: len(shape)] != 0)
    spacing = (THICKNESS, *place.spacing_zyx[1:]) if len(shape) == 2 else place.spacing_zyx
    return Source(
        path=path, kind=kind, shape=czyx, dtype=dtype, read_box=read,
        files=(header, voxels, *([matrix] if spm else [])),
        spacing_zyx=spacing if spm or good.all() else None, unit="millimeter", unit_assumed=True,
        origin_xyz=place.origin_xyz, direction=place.direction, load_bytes=load_bytes,
        notes=(*_notes(path, spm, said, pixdim), *place.notes, *trailing,
               *([f"{path.name}: {NO_THICKNESS}"] if len(shape) == 2 else ())),
    )  # fmt: skip


def _notes(path: Path, spm: bytes, said: bytes, pixdim: Any) -> list[str]:
    name, unit = path.name, said.split(b"\0")[0].decode("ascii", errors="replace").strip()
    named = "" if unit in ("", "mm") else f" though its header says {unit!r}"
    notes = [
        f"{name}: the matrix of the .mat file beside it says where its voxels lie"
        if spm
        else f"{name}: Analyze 7.5 does not say how its axes lie: x is taken to grow to the left, y to the front, z to "
        "the head, with the origin in the header's or the volume's middle, as nibabel does; check left and right",
        f"{name}: its numbers are taken as millimetres{named}, unless --unit says another",
    ]
    if (pixdim < 0).any():
        notes.append(f"{name}: pixdim is {pixdim.tolist()} (x, y, z); the signs are ignored, as nibabel does")
    return notes
