"""Where a NIfTI header says its voxels lie: its forms, pixdim and units.

The standard (method 3) takes sizes and directions from the sform alone; a qform takes its sizes from pixdim (method 2).
Which of two forms that disagree counts is ITK's choice, since transforms that we export are applied by ITK's tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Matrix, Vector
from comir_hpc.volumes.readers.placement import UNSEEN_VOX, placement_ras

_UNITS = {1: "meter", 2: "millimeter", 3: "micrometer"}
_LPS = np.diag([-1.0, -1.0, 1.0])
# ITK takes a sform for a turned grid only if its unit axes, multiplied by their transpose, are the identity to 1e-4.
_ITK_PERPENDICULAR = 1e-4


@dataclass(frozen=True)
class NiftiPlace:
    """What a header says of the world.

    Attributes
    ----------
    spacing_zyx : three float, or None
        Voxel spacing along z, y, x in `unit`; None where the header has no usable number.
    origin_xyz, direction
        World (LPS), as in `Grid`.
    unit : str
        The file's, or millimeter where it names none.
    unit_assumed : bool
        Whether the header names no unit of length, so that one is assumed.
    notes : tuple of str
        Sentences on what was open or contradictory, and how it was taken.
    """

    spacing_zyx: Vector | None
    origin_xyz: Vector
    direction: Matrix
    unit: str
    unit_assumed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Form:
    """One affine of the header: columns and origin (RAS, the file's unit)."""

    name: str
    columns: NDArray[np.float64]
    origin: NDArray[np.float64]

    @property
    def affine(self) -> NDArray[np.float64]:
        """Affine (3, 4) of index to world: the columns and the origin side by side."""
        return np.column_stack([self.columns, self.origin])


def nifti_place(header: Any, shape_zyx: Sequence[int], path: Path, num_axes: int) -> NiftiPlace:
    """Read spacing, origin, direction and unit out of a NIfTI-1 or -2 header of nibabel.

    Parameters
    ----------
    header : nibabel.Nifti1Header or Nifti2Header
        Header as it stands in the file, with nothing mended.
    shape_zyx : three int
        Voxels of the volume along z, y, x.
    path : Path
        Path of the file, for errors and notes.
    num_axes : int
        Axes of the image; of two, the slice has no thickness.

    Raises
    ------
    VolumeError
        If the form that counts describes no perpendicular axes, or its numbers are not finite.
    """
    unit, notes = _unit(header, path.name)
    assumed = bool(notes)
    pixdim, said, known = _pixdim(header, path.name, num_axes)
    sform, qform = _sform(header, num_axes), _qform(header, pixdim)
    if sform is not None and not known:
        qform = None  # its sizes are those of pixdim
    code = int(header["sform_code"])
    chosen, choice = _chosen(sform, qform, shape_zyx, path.name, code, unit)
    notes += said + _code_notes(header, path.name)
    if chosen is None:
        if sform is None and int(header["qform_code"]) > 0:
            raise VolumeError(
                f"{path}: its qform is no rotation (quaternion b, c, d {_quaternion(header)}) and"
                " there is no sform: set one right in the file or export it again"
            )
        chosen = _Form("pixdim", _LPS * pixdim, np.zeros(3))
        choice = (
            f"{path.name}: neither sform nor qform is set: axes are taken as LPS x, y, z and the origin as 0"
        )
    notes += [choice] if choice else []
    notes += _handedness_notes(header, path.name) if chosen.name == "qform" else []
    place = placement_ras(chosen.affine, shape_zyx, path)
    spacing: Vector | None = place.spacing_zyx
    if chosen.name != "sform" and not known:
        spacing = None
    elif chosen.name == "sform":
        spacing, note = _method_3(place.spacing_zyx, pixdim, shape_zyx, path.name)
        # A sign was ignored already, and said.
        notes += [note] if note else []
    return NiftiPlace(spacing, place.origin_xyz, place.direction, unit, assumed, (*notes, *place.notes))


def _handedness_notes(header: Any, name: str) -> list[str]:
    """Say how pixdim[0] is taken where it is neither of the numbers it may be: readers differ, and mirror the volume."""
    said = float(header["pixdim"][0])
    if said in (-1.0, 0.0, 1.0):
        return []
    return [
        f"{name}: pixdim[0] is {said:.9g}, which has to be 1 or -1 and says whether the qform is left-handed; it is taken "
        f"by its sign, as {-1 if said < 0 else 1}, as ITK does; nibabel takes 1"
    ]


def _code_notes(header: Any, name: str) -> list[str]:
    """Note codes of forms that NIfTI does not have."""
    codes = {form: int(header[f"{form}_code"]) for form in ("sform", "qform")}
    return [
        f"{name}: {form}_code {code} is none of NIfTI's (0 to 5); the {form} counts as "
        f"{'set' if code > 0 else 'not set'}, as in ITK"
        for form, code in codes.items()
        if not 0 <= code <= 5
    ]


def _unit(header: Any, name: str) -> tuple[str, list[str]]:
    """Read the unit of length, and note where the header names none that exists."""
    code = int(header["xyzt_units"]) & 7
    if code in _UNITS:
        return _UNITS[code], []
    said = (
        "the file names no unit of length"
        if code == 0
        else f"NIfTI has no unit of length {code} (xyzt_units)"
    )
    return "millimeter", [
        f"{name}: {said}: its numbers are taken as millimetres, as ITK does, unless --unit says another"
    ]


def _pixdim(header: Any, name: str, num_axes: int) -> tuple[NDArray[np.float64], list[str], bool]:
    """Read the lengths of pixdim[1] to [3], 1 where there is none.

    Notes follow, and whether all lengths that count are numbers above 0.
    """
    raw = np.asarray(header["pixdim"], dtype=np.float64)[1:4]
    sizes = np.abs(raw)
    good = np.isfinite(sizes) & (sizes > 0)
    notes = []
    if (raw[:num_axes] < 0).any():
        notes.append(
            f"{name}: pixdim is {_listed(raw)} (x, y, z); NIfTI knows no negative sizes, so the sign is ignored, as "
            "nibabel does; ITK's tools may mirror that axis"
        )
    return np.where(good, sizes, 1.0), notes, bool(good[:num_axes].all())


def _sform(header: Any, num_axes: int) -> _Form | None:
    if int(header["sform_code"]) <= 0:
        return None
    affine = np.asarray(header.get_sform(), dtype=np.float64)
    columns = affine[:3, :3].copy()
    if num_axes == 2 and not np.linalg.norm(columns[:, 2]) > 0:
        columns[:, 2] = np.cross(
            columns[:, 0], columns[:, 1]
        )  # a slice needs no third axis, but has a normal
        columns[:, 2] /= np.linalg.norm(columns[:, 2]) or 1.0
    return _Form("sform", columns, affine[:3, 3])


def _qform(header: Any, pixdim: NDArray[np.float64]) -> _Form | None:
    """Return the qform with sizes from pixdim; None where there is none, or its quaternion is longer than 1."""
    if int(header["qform_code"]) <= 0:
        return None
    clean = header.copy()
    # Signs and zeros are gone from these, as every reader takes them; the note on them is made elsewhere.
    clean["pixdim"][1:4] = pixdim
    # NIfTI's own library looks at the sign of this number alone; 0 counts as positive.
    clean["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    try:
        affine = np.asarray(clean.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return None
    return _Form("qform", affine[:3, :3], affine[:3, 3]) if np.isfinite(affine).all() else None


def _chosen(
    sform: _Form | None, qform: _Form | None, shape_zyx: Sequence[int], name: str, code: int, unit: str
) -> tuple[_Form | None, str]:
    """Choose the form that counts, and note where another one says something else."""
    if sform is None or qform is None:
        return sform or qform, ""
    last = np.asarray(shape_zyx[::-1], dtype=np.float64) - 1
    # The largest displacement of a corner is at most the sum over the axes.
    steps = (sform.columns - qform.columns) * last
    apart = float(np.linalg.norm(steps, axis=0).sum() + np.linalg.norm(sform.origin - qform.origin))
    finest = float(np.linalg.norm(qform.columns, axis=0).min())
    if apart <= 0.01 * finest:  # a hundredth of a voxel is rounding
        return (sform if _perpendicular(sform) else qform), ""
    taken = sform if code == 1 and _perpendicular(sform) else qform
    sheared = "" if _perpendicular(sform) else ", whose axes are sheared,"
    return taken, (
        f"{name}: sform (code {code}){sheared} and qform disagree by up to {apart:.3g} {unit}; "
        f"the {taken.name} is used, as ITK does"
    )


def _perpendicular(form: _Form) -> bool:
    lengths = np.linalg.norm(form.columns, axis=0)
    if not np.isfinite(lengths).all() or not (lengths > 0).all():
        return False
    axes = form.columns / lengths
    return bool(np.abs(axes @ axes.T - np.eye(3)).max() <= _ITK_PERPENDICULAR)


def _method_3(
    lengths_zyx: Vector, pixdim: NDArray[np.float64], shape_zyx: Sequence[int], name: str
) -> tuple[Vector, str]:
    """Return the voxel sizes of a sform, in pixdim's digits where the two agree, and a note where they do not."""
    z, y, x = (float(p) for p in pixdim[::-1])
    # NIfTI-1 keeps both in single precision, which has about seven digits.
    if np.allclose(lengths_zyx, (z, y, x), rtol=1e-6, atol=0):
        return (z, y, x), ""
    apart = np.abs(np.asarray(lengths_zyx) / (z, y, x) - 1) * np.asarray(shape_zyx)
    if apart.max() <= UNSEEN_VOX:
        return lengths_zyx, ""
    return lengths_zyx, (
        f"{name}: voxels are {_listed(lengths_zyx)} by the sform and {_listed((z, y, x))} by pixdim (z, y, x); the "
        "sform's are used, as NIfTI says (method 3); ITK's tools take pixdim"
    )


def _quaternion(header: Any) -> list[float]:
    return [round(float(header[f"quatern_{letter}"]), 4) for letter in "bcd"]


def _listed(values: Sequence[float] | NDArray[np.float64]) -> str:
    return " x ".join(f"{v:.6g}" for v in values)
