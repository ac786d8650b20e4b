"""What a file is that was given as a transform and is none that we read, and what to do with it.

Other tools write matrices and fields in worlds and directions of their own. A file that does not say which is never
read by a guess: it would be applied wrongly without a word. So each kind is recognised by its content and refused by
its name, with the command that converts it.
"""

from __future__ import annotations

import re
from pathlib import Path

KNOWN = (
    "ITK's .tfm, .txt, .mat and .h5, transform.json of register, displacement fields of ANTs (.nii.gz), parameter "
    "files of elastix, .lta of FreeSurfer, scenes of OME-NGFF, or a matrix with --from"
)
_SNIFFED = 1 << 16  # bytes from the beginning of a file by which it is recognised
_IMAGES = (
    ".nii", ".nii.gz", ".hdr", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".tif", ".tiff", ".png", ".jpg", ".jpeg",
    ".dcm", ".mgz", ".mgh", ".ims", ".czi",
)  # fmt: skip
_SAY_FORM = (
    "say which with --from: matrix-lps or matrix-ras (fixed to moving points in mm), or fsl (flirt -omat)"
)
_CONVERT = "convert it to a transform of ITK (.tfm), from fixed to moving points in LPS mm"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|nan|[-+]?inf", re.IGNORECASE)

# What the text of a file begins with or holds, what the file is then, and what to do.
_TEXTS: tuple[tuple[str, str, str], ...] = (
    (r"^MNI Transform File", "an .xfm file of MINC", _CONVERT),
    (r"^DOF", "a .dof file of IRTK or MIRTK", _CONVERT),
    (
        r"Markups fiducial file|^#?\s*columns\s*=",
        "a list of points (fiducials of 3D Slicer)",
        "give it with --points, and the transform of register with --transform",
    ),
    (
        r"^\s*(?:[^\n,;\t]*[,;\t])*\s*\"?[xX]\"?\s*[,;\t]\s*\"?[yY]\"?\s*[,;\t]\s*\"?[zZ]\"?",
        "a table of points",
        "give it with --points, and the transform of register with --transform",
    ),
    (r"^\s*<", "an XML file", f"expected {KNOWN}"),
)  # fmt: skip


def what_it_is(path: Path) -> tuple[str, str]:
    """Return what a file is and what to do with it, each as words for a sentence.

    Parameters
    ----------
    path : Path
        A file or folder that exists and that no reader of transforms took.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    name = path.name.lower()
    if path.is_dir():
        return _folder(path)
    with path.open("rb") as file:
        head = file.read(_SNIFFED)
    if not head:
        return "empty (0 bytes)", "write it again"
    if name.endswith(".m3z"):
        return (
            "a warp of FreeSurfer",
            f"convert it: mri_warp_convert --inm3z {path.name} --outitk warp.nii.gz",
        )
    if name.endswith(_IMAGES):
        return "an image, no transform", (
            "give it with --zarr or --like; if it is a field of displacements (LPS, mm), say --from itk"
        )
    if head.startswith((b"\x89HDF", b"MATLAB 5", b"\x93NUMPY", b"PK")):
        kind = {b"\x89": "an HDF5", b"M": "a MATLAB 5", b"\x93": "a numpy", b"P": "a zip"}[head[:1]]
        return f"{kind} file without a transform of ITK", f"expected {KNOWN}"
    return _text(path, head)


def _folder(path: Path) -> tuple[str, str]:
    inside = path / "transform.tfm"
    if inside.is_file():
        return "a folder", f"give the file in it: {inside}"
    if path.suffix == ".zarr":
        return "a volume, no transform", "give it with --zarr or --like"
    return "a folder", f"expected {KNOWN}"


def _text(path: Path, head: bytes) -> tuple[str, str]:
    if b"\0" in head:
        return "a file of an unknown kind", f"expected {KNOWN}"
    text = head.decode("utf-8-sig", errors="replace")
    for pattern, kind, remedy in _TEXTS:
        if re.search(pattern, text, re.MULTILINE):
            return kind, remedy.format(name=path.name)
    rows = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "%"))]
    # One row more than a matrix of 16 numbers can have, so that a longer list is not taken for one.
    fields = [re.split(r"[\s,;]+", row.strip(" \t,;[]")) for row in rows[:17]]
    if rows and all(_NUMBER.fullmatch(field) for row in fields for field in row):
        return _numbers(path, fields)
    kind = "a table" if path.suffix.lower() in (".csv", ".tsv") else "a text that is no transform"
    return kind, f"expected {KNOWN}"


def _numbers(path: Path, fields: list[list[str]]) -> tuple[str, str]:
    count = sum(map(len, fields))
    if count in (12, 16):
        rows = f"{len(fields)} x {len(fields[0])}" if len(fields) > 1 else f"one row of {count}"
        return f"a matrix in text ({rows} numbers) that does not say of which world and direction", _SAY_FORM
    return f"a text of numbers ({len(fields)} rows), no transform", f"expected {KNOWN}"
