"""Displacement fields as OME-NGFF 0.6 keeps them: a multiscale group of one level, with a displacement axis first.

Such a group has a spacing and an origin but no directions. So a field is kept along the axes of its own grid, and the
scene turns points into that frame and back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import zarr

from comir_hpc.errors import RegistrationError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.itk import ItkTransform, array_and_grid, itk_image

_LEVEL = "s0"
_CHUNK = 64
_COPIES = 3  # copies of a field in float64 that exist while it is read


def write_displacements(field: ItkTransform, folder: Path) -> FloatArray | None:
    """Write a displacement field as a group of a store.

    Returns
    -------
    (4, 4) or None
        Matrix from the field's frame (z, y, x along its own axes, in mm from its first voxel) to the world (z, y, x);
        None where the transform is no displacement field.
    """
    whole = field.itk.Downcast()
    if not isinstance(whole, sitk.DisplacementFieldTransform):
        return None
    # A copy: ITK hands out its own field, of which the array is a view.
    vectors, grid = array_and_grid(sitk.Image(whole.GetDisplacementField()))
    directions = np.asarray(grid.direction)
    along = np.einsum("ji,jzyx->izyx", directions, vectors)[
        ::-1
    ]  # (z, y, x) components, along the field's axes
    group: Any = zarr.open_group(folder, mode="w", zarr_format=3)
    array = group.create_array(
        _LEVEL, shape=along.shape, dtype="float64", chunks=(3, *(min(_CHUNK, n) for n in grid.shape_zyx))
    )
    array[...] = np.ascontiguousarray(along)
    group.attrs["ome"] = displacements_entry(_LEVEL, grid)
    return frame_of(grid)


def displacements_entry(path: str, grid: Grid) -> dict[str, Any]:
    """Return the ``ome`` entry of a group with displacements in one array, along the axes of their own lattice."""
    space = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    return {
        "version": "0.6",
        "multiscales": [
            {
                "coordinateSystems": [
                    {
                        "name": "frame",
                        "axes": [{"name": "d", "type": "displacement", "discrete": True}, *space],
                    }
                ],
                "datasets": [
                    {
                        "path": path,
                        "coordinateTransformations": [
                            {
                                "type": "scale",
                                "scale": [1.0, *grid.spacing_mm],
                                "input": {"path": path},
                                "output": {"name": "frame"},
                            }
                        ],
                    }
                ],
            }
        ],
    }


def frame_of(grid: Grid) -> FloatArray:
    """Return the matrix (4, 4) from the frame of a lattice to the world, both in the order z, y, x, in mm."""
    directions = np.asarray(grid.direction)
    frame = np.eye(4)
    # Rows and columns in reverse, since the scene has its axes in the order z, y, x.
    frame[:3, :3] = directions[::-1, ::-1]
    frame[:3, 3] = grid.origin_mm[::-1]
    return frame


def read_displacements(folder: Path, interpolation: str) -> ItkTransform:
    """Read a displacement field that acts on coordinates in the order of its axes.

    Raises
    ------
    RegistrationError
        If the group is missing or damaged, is interpolated in another way than linearly, or does not fit into memory.
    """
    if interpolation != "linear":
        raise RegistrationError(
            f"{folder} is to be interpolated by {str(interpolation)[:30]}; expected linear"
        )
    try:
        group: Any = zarr.open_group(folder, mode="r")
        dataset = group.attrs["ome"]["multiscales"][0]["datasets"][0]
        array = group[dataset["path"]]
        spacing, origin = _placed(dataset["coordinateTransformations"][0])
        needed, free = _COPIES * 8 * int(np.prod(array.shape)), available_bytes()
        if needed > free:
            raise RegistrationError(
                f"{folder} needs {in_words(needed)} of memory as a displacement field, {in_words(free)} are free; use "
                "a larger machine"
            )
        values = np.asarray(array[...], dtype=np.float64)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(
            f"{folder} holds no displacement field of OME-NGFF 0.6 ({repr(error)[:80]}); copy the whole store again"
        ) from error
    if values.ndim != 4 or len(values) != 3 or len(spacing) != 4:
        raise RegistrationError(
            f"{folder} is an array of shape {values.shape}; expected (3, ...): one vector of three at each voxel"
        )
    if not np.isfinite(values).all():
        raise RegistrationError(f"{folder} holds displacements that are not finite; write it again")
    # The first axis of the coordinates takes the place of ITK's x, which our arrays keep last.
    lattice = Grid(
        values.shape[:0:-1], (spacing[3], spacing[2], spacing[1]), (origin[1], origin[2], origin[3])
    )
    return ItkTransform(sitk.DisplacementFieldTransform(itk_image(values.transpose(0, 3, 2, 1), lattice)))


def _placed(entry: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return scale and translation of a dataset: a scale, or a sequence of a scale and a translation."""
    steps = entry["transformations"] if entry["type"] == "sequence" else [entry]
    scale = next(list(map(float, step["scale"])) for step in steps if step["type"] == "scale")
    shift = next(
        (list(map(float, s["translation"])) for s in steps if s["type"] == "translation"), [0.0] * len(scale)
    )
    if [step["type"] for step in steps] not in (["scale"], ["scale", "translation"]):
        raise ValueError("a scale, or a scale and a translation")
    return scale, shift
