"""The crossing between our arrays, grids and transforms and those of SimpleITK.

SimpleITK orders a voxel index (x, y, z) where our arrays are (z, y, x). That order lives in this file only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike, NDArray

from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.protocol import PointMap

Lattice = tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], list[float]]


def itk_image(array_zyx: NDArray[Any], grid: Grid, *, flat: bool = False) -> sitk.Image:
    """Make a SimpleITK image, in mm, of an array (z, y, x), or a vector image of (c, z, y, x).

    Booleans become uint8 and float16 float32, which ITK lacks.

    Parameters
    ----------
    flat : bool
        Whether the image is one of two dimensions: a single slice in the plane z = 0 of the world.

    Raises
    ------
    VolumeError
        If the array's shape is not the grid's.
    """
    if array_zyx.shape[-3:] != grid.shape_zyx or array_zyx.ndim not in (3, 4):
        raise VolumeError(f"an array of shape {array_zyx.shape} does not fit a grid of {grid}")
    if array_zyx.dtype == np.bool_:
        array_zyx = array_zyx.astype(np.uint8)
    elif array_zyx.dtype == np.float16:
        array_zyx = array_zyx.astype(np.float32)
    if flat:
        array_zyx = np.squeeze(array_zyx, axis=-3)
    if array_zyx.ndim == (3 if flat else 4):
        # SimpleITK keeps the values of one voxel side by side, so the channels become the last axis.
        image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(array_zyx, 0, -1)), isVector=True)
    else:
        image = sitk.GetImageFromArray(np.ascontiguousarray(array_zyx))
    axes = image.GetDimension()
    # Reversed first and cut then: a flat image keeps x and y.
    image.SetSpacing(grid.spacing_mm[::-1][:axes])
    image.SetOrigin(grid.origin_mm[:axes])
    image.SetDirection([number for row in grid.direction[:axes] for number in row[:axes]])
    return image


def array_and_grid(image: sitk.Image) -> tuple[NDArray[Any], Grid]:
    """Return array (z, y, x), or (c, z, y, x) of a vector image, and grid of a three-dimensional SimpleITK image."""
    if image.GetDimension() != 3:
        raise VolumeError(f"the image has {image.GetDimension()} dimensions, expected 3")
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    grid = Grid(
        shape_zyx=array.shape[-3:],
        spacing_zyx=image.GetSpacing()[::-1],
        origin_xyz=image.GetOrigin(),
        direction=(tuple(direction[0]), tuple(direction[1]), tuple(direction[2])),
    )
    return array, grid


def itk_transform(transform: Affine, *, flat: bool = False) -> sitk.AffineTransform:
    """Return SimpleITK's form of a transform, about the same centre; `flat`: of the plane z = 0, which it keeps."""
    return transform.to_sitk(flat=flat)


def from_itk(transform: sitk.Transform, *, flat: bool = False) -> Affine:
    """Return our form of any linear SimpleITK transform, a composite of linear ones included.

    `flat` is for transforms of the plane z = 0.

    Raises
    ------
    RegistrationError
        If it is not linear or not three-dimensional (flat: two-dimensional).
    """
    axes = 2 if flat else 3
    if transform.GetDimension() != axes or not transform.IsLinear():
        raise RegistrationError(
            f"{transform.GetName()} in {transform.GetDimension()} dimensions is not a linear transform in {axes}"
        )
    centre = np.zeros(3)
    with contextlib.suppress(AttributeError):  # a translation, or a composite, has none
        centre[:axes] = transform.Downcast().GetCenter()
    at_centre = np.asarray(transform.TransformPoint(centre[:axes].tolist()))
    if not np.isfinite(at_centre).all():
        raise RegistrationError(
            f"transform ({transform.GetName()}) is not finite: it sends its centre to {at_centre}"
        )
    # The columns are read off the transform itself: how far it moves the end of 1 mm along each axis. So it does not
    # matter what the parameters of ITK's many linear classes mean.
    matrix = np.eye(4)
    for axis, unit in enumerate(np.eye(axes)):
        moved = transform.TransformPoint((centre[:axes] + unit).tolist())
        matrix[:axes, axis] = np.asarray(moved) - at_centre
    matrix[:axes, 3] = at_centre - matrix[:axes, :axes] @ centre[:axes]
    return Affine(matrix, centre)


@contextlib.contextmanager
def silent_itk() -> Iterator[None]:
    """Keep ITK from printing warnings: what is wrong with a file is said in our error."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def itk_lattice(grid: Grid) -> Lattice:
    """Return SimpleITK's description of a grid: size and origin as (x, y, z), spacing, direction row by row."""
    direction = [number for row in grid.direction for number in row]
    return grid.shape_zyx[::-1], grid.origin_mm, grid.spacing_mm[::-1], direction


@dataclass(frozen=True, eq=False)
class ItkTransform(PointMap):
    """Any three-dimensional transform of ITK, linear or not.

    Parameters
    ----------
    itk : SimpleITK.Transform
        Maps fixed points to moving points. It is not changed.
    notes : tuple of str
        Assumptions that were made when the transform was read, for the user.

    Raises
    ------
    RegistrationError
        If it is not three-dimensional, a linear part of it is not invertible, or a number of it is not finite.
    """

    itk: sitk.Transform
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.itk.GetDimension() != 3:
            raise RegistrationError(
                f"the transform ({self.itk.GetName()}) has {self.itk.GetDimension()} dimensions, expected 3"
            )
        for piece in _pieces(self.itk):
            if piece.IsLinear():
                from_itk(piece)
            elif not np.isfinite(_numbers(piece)).all():
                raise RegistrationError(
                    f"the transform ({piece.GetName()}) holds numbers that are not finite"
                )

    def apply(self, points_mm: ArrayLike) -> FloatArray:
        """Return the moving-space points (..., 3) of fixed-space points (..., 3), LPS (x, y, z) in mm."""
        points = np.asarray(points_mm, dtype=np.float64)
        # SimpleITK takes one point at a call.
        moved = [self.itk.TransformPoint(point) for point in points.reshape(-1, 3).tolist()]
        return np.asarray(moved, dtype=np.float64).reshape(points.shape)

    def apply_to_grid(self, grid: Grid) -> FloatArray:
        """Return the moving-space points (z, y, x, 3) of all voxel centres of a fixed grid."""
        # One call, in ITK's own code, instead of one for each voxel.
        shifts = sitk.TransformToDisplacementField(self.itk, sitk.sitkVectorFloat64, *itk_lattice(grid))
        voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape_zyx), indexing="ij"), axis=-1)
        moved: FloatArray = grid.world_mm(voxels) + sitk.GetArrayFromImage(shifts)
        return moved

    def to_sitk(self) -> sitk.Transform:
        """Return SimpleITK's form of the map: the very transform."""
        return self.itk

    def inverse(self) -> ItkTransform:
        """Return the map from moving to fixed points, where ITK knows one.

        Raises
        ------
        RegistrationError
            If ITK knows none, as of a B-spline.
        """
        try:
            return ItkTransform(self.itk.GetInverse(), self.notes)
        except RuntimeError as error:
            raise RegistrationError(
                f"this transform ({self.itk.GetName()}) has no inverse in closed form"
            ) from error

    @property
    def parts(self) -> tuple[PointMap, ...]:
        """Pieces of a composite in the order in which they are applied; an `Affine` for each linear one."""
        pieces = _pieces(self.itk)
        if len(pieces) == 1 and not self.itk.IsLinear():
            return (self,)
        return tuple(from_itk(p) if p.IsLinear() else ItkTransform(p) for p in pieces)


def itk_on_grid(transform: PointMap, grid: Grid) -> sitk.Transform:
    """Return SimpleITK's form of any transform, exact at the voxel centres of a fixed grid.

    An `Affine` and what was read by ITK have a form of ITK's own. Of everything else the displacement of each voxel is
    held: 24 bytes a voxel.
    """
    if isinstance(transform, Affine):
        return itk_transform(transform)
    if isinstance(transform, ItkTransform):
        return transform.itk
    return sitk.DisplacementFieldTransform(itk_displacements(transform, grid))


def itk_displacements(transform: PointMap, grid: Grid) -> sitk.Image:
    """Return the displacements in mm, LPS (x, y, z), of all voxels of a fixed grid: a vector image of float64."""
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape_zyx), indexing="ij"), axis=-1)
    shifts = np.moveaxis(transform.apply_to_grid(grid) - grid.world_mm(voxels), -1, 0)
    return itk_image(shifts, grid)


def itk_form(transform: PointMap) -> sitk.Transform:
    """Return ITK's own form of a transform: of several parts a CompositeTransform.

    Raises
    ------
    RegistrationError
        If a part is no transform that ITK knows.
    """
    forms = []
    for part in transform.parts:
        if isinstance(part, Affine):
            forms.append(itk_transform(part))
        elif isinstance(part, ItkTransform):
            forms.append(part.itk)
        else:
            raise RegistrationError(
                f"ITK has no form of a {type(part).__name__}; sample it on a grid first (itk_on_grid)"
            )
    # ITK applies the transform first that was added last.
    return forms[0] if len(forms) == 1 else sitk.CompositeTransform(forms[::-1])


def _pieces(transform: sitk.Transform) -> list[sitk.Transform]:
    """Return what a transform of ITK is made of, in the order in which it is applied.

    A linear composite is one piece. So is the composite that SimpleITK makes of a transform that it can apply but has
    no class for, such as the fields that antsRegistration writes.
    """
    whole = transform.Downcast()
    if not isinstance(whole, sitk.CompositeTransform) or whole.IsLinear():
        return [whole]
    try:
        # ITK applies the transform first that was added last.
        members = [whole.GetNthTransform(n) for n in reversed(range(whole.GetNumberOfTransforms()))]
    except RuntimeError:
        return [whole]
    return [piece for member in members for piece in _pieces(member)]


def _numbers(transform: sitk.Transform) -> NDArray[np.float64]:
    """Return the numbers that a bent transform is made of; none of a composite that cannot be taken apart."""
    if isinstance(transform, sitk.CompositeTransform):
        return np.zeros(0)
    if isinstance(transform, sitk.DisplacementFieldTransform):
        return np.asarray(sitk.GetArrayFromImage(transform.GetDisplacementField()), dtype=np.float64)
    return np.asarray(transform.GetParameters(), dtype=np.float64)
