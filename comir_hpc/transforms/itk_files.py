"""Files that ITK writes: recognised by their content, checked, and read by SimpleITK."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk

from comir_hpc.errors import RegistrationError
from comir_hpc.transforms.itk import ItkTransform, silent_itk

_ITK_TEXT = "#Insight Transform File"


def is_itk_file(path: Path, head: bytes) -> bool:
    """Return whether a file is a transform of ITK, by its content.

    Parameters
    ----------
    head : bytes
        Beginning of the file.

    Raises
    ------
    RegistrationError
        If it is one that SimpleITK would read wrongly.
    """
    if head.lstrip().startswith(_ITK_TEXT.encode()):
        _check_itk_text(path)
        return True
    if h5py.is_hdf5(path):
        return _check_itk_hdf5(path)
    return path.suffix.lower() == ".mat" and _is_matlab_4(path.read_bytes())


def _is_matlab_4(content: bytes) -> bool:
    """Return whether a file is what ITK writes as .mat.

    Such a file holds arrays, each with a header of five integers, a name, and numbers.
    """
    place, kinds = 0, set()
    while place + 20 <= len(content):
        kind, rows, columns, _, length = struct.unpack_from("<5i", content, place)
        kinds.add(kind)
        # Kind 0 are numbers of 8 bytes, kind 10 of 4, and a file has one of them throughout. The bounds keep other
        # files, read as if they were headers, from leading anywhere.
        if kinds not in ({0}, {10}) or min(rows, columns) < 0 or not 0 < length < 80:
            return False
        place += 20 + length + rows * columns * (8 if kind == 0 else 4)
    return 0 < place == len(content)


def _check_itk_text(path: Path) -> None:
    """Refuse what SimpleITK reads wrongly or complains of in the words of its parser."""
    if path.suffix.lower() not in (".tfm", ".txt"):
        raise RegistrationError(f"{path} is a transform of ITK; rename it to end in .tfm, as ITK expects")
    kinds: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "Transform":
            kinds.append(value.strip())
        if key.strip() not in ("Parameters", "FixedParameters"):
            continue
        for number in value.split():
            try:
                finite = bool(np.isfinite(float(number)))
            except ValueError:
                finite = False
            if not finite:
                raise RegistrationError(
                    f"{path} is a transform of ITK in which {number[:30]!r} stands where a finite number is expected; "
                    "write it again"
                )
    _refuse_a_list(path, kinds)


def _check_itk_hdf5(path: Path) -> bool:
    try:
        with h5py.File(path) as file:
            group = file.get("TransformGroup")
            if not isinstance(group, h5py.Group):
                return False
            members = [group[name] for name in sorted(group, key=lambda name: (len(name), name))]
            kinds = [np.ravel(member["TransformType"][()])[0].decode() for member in members]
            # Every array is opened here, because ITK's own HDF5 prints what it stumbles over.
            file.visititems(lambda name, item: None)
    except (OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RegistrationError(
            f"{path} is an HDF5 file that is damaged or cut off; copy it again"
        ) from error
    _refuse_a_list(path, kinds)
    return True


def _refuse_a_list(path: Path, kinds: list[str]) -> None:
    if len(kinds) > 1 and not kinds[0].startswith("CompositeTransform"):
        raise RegistrationError(
            f"{path} is a list of {len(kinds)} transforms that does not say in which order they are applied; write "
            "them as one CompositeTransform of ITK"
        )


def read_itk_file(path: Path) -> ItkTransform:
    """Read a transform of ITK.

    Raises
    ------
    RegistrationError
        If it is damaged, or of a kind that is not known here.
    """
    try:
        with silent_itk():
            return ItkTransform(sitk.ReadTransform(str(path)))
    # ITK quotes the file in its message: of a damaged one that may be no text.
    except (RuntimeError, UnicodeDecodeError) as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(
            f"{path} is a transform of ITK that is damaged, cut off or of a kind that is not known here; write it again"
        ) from error
