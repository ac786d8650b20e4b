"""Rotate voxel grids without interpolation: finite groups of signed axis permutations.

Every matrix acts on column vectors (z, y, x) in voxel index space, about the array's centre. On anisotropic voxels a
rotation of index space is no rotation of the world; `group_for_spacing` picks the elements for which it is one.

Only numpy is imported at first. Tensors are recognised by their methods, so that the command line can name groups
without loading torch. Derivations: docs/theory.md, sections 2 and 5.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from comir_hpc.errors import ConfigError
from comir_hpc.space.rotations import AXES, FloatArray, covering_radius_deg

if TYPE_CHECKING:
    import torch


IntArray = NDArray[np.int64]


VolumeT = TypeVar("VolumeT", NDArray[Any], "torch.Tensor")


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of signed axis permutations: maps of the voxel grid onto itself, exact for any data.

    Parameters
    ----------
    name : str
        Name of the group, one of `GROUP_NAMES`.
    matrices : (G, 3, 3) int64, read-only
        Elements in zyx index space, the identity first.
    """

    name: str
    matrices: IntArray

    def __len__(self) -> int:
        return len(self.matrices)

    def index(self, matrix: ArrayLike) -> int:
        """Return the number of the element equal to `matrix` (3, 3).

        Raises
        ------
        ConfigError
            If the matrix is not an element of the group.
        """
        hits = np.flatnonzero((self.matrices == np.asarray(matrix)).all(axis=(1, 2)))
        if not len(hits):
            raise ConfigError(
                f"{np.asarray(matrix).tolist()} is none of the {len(self)} elements of group {self.name}"
            )
        return int(hits[0])

    @cached_property
    def table(self) -> IntArray:
        """Composition table, (G, G): ``matrices[table[i, j]] == matrices[i] @ matrices[j]``."""
        products = self.matrices[:, None] @ self.matrices[None]
        return np.array([[self.index(product) for product in row] for row in products], dtype=np.int64)

    @cached_property
    def inverses(self) -> IntArray:
        """Number of every element's inverse, (G,)."""
        # The elements are orthogonal, so that the transpose undoes one.
        return np.array([self.index(matrix.T) for matrix in self.matrices], dtype=np.int64)

    def compose(self, i: int, j: int) -> int:
        """Return the number of the element that applies j first and i after it."""
        return int(self.table[i, j])

    def inverse(self, i: int) -> int:
        """Return the number of the element that undoes i."""
        return int(self.inverses[i])

    @property
    def tied_axes(self) -> tuple[tuple[int, ...], ...]:
        """Array axes (0 is z) that elements carry onto each other: ((0, 1, 2),) for O, ((0,), (1, 2)) for D4."""
        # Axis j is carried onto axis i if any element has an entry there. In a group this is an equivalence.
        carried = (self.matrices != 0).any(axis=0)
        return tuple(sorted({tuple(int(axis) for axis in np.flatnonzero(row)) for row in carried}))

    @property
    def needs_cubic(self) -> bool:
        """Whether an element carries z onto y or x; such groups need cubic patches and isotropic pooling."""
        return bool(self.matrices[:, 0, 1:].any())

    @property
    def is_planar(self) -> bool:
        """Whether every element leaves z alone, so that the group acts on single slices (2D)."""
        return bool((self.matrices[:, 0, 0] == 1).all())

    @property
    def rotations(self) -> IntArray:
        """Elements that keep handedness (determinant +1), (H, 3, 3)."""
        return np.asarray(self.matrices[np.round(np.linalg.det(self.matrices)) == 1])

    @cached_property
    def farthest_angle_deg(self) -> float:
        """Largest angle, in degrees, from any rotation to the nearest element.

        Over SO(3) it is 62.8 for O, 98.4 for D4, 120 for D2 and 180 for the trivial group. Planar groups are measured
        over the turns in the plane: 45 for C4. Training on the group alone leaves this much uncovered, which joint
        continuous rotations have to cover.
        """
        if self.is_planar:
            return 180.0 / len(self.rotations)
        return covering_radius_deg(self.rotations)

    def require_invariant(self, values_zyx: Sequence[float], label: str) -> None:
        """Refuse a per-axis quantity, such as a patch shape or pooling factors, that the group would change.

        Parameters
        ----------
        values_zyx : three numbers
            The quantity along each array axis.
        label : str
            Name of the quantity, for the message.

        Raises
        ------
        ConfigError
            If two axes that an element carries onto each other hold different values.
        """
        for axes in self.tied_axes:
            if len({values_zyx[axis] for axis in axes}) > 1:
                tied = ", ".join(AXES[axis] for axis in axes)
                # Only groups with which this quantity works are offered.
                smaller = ("C2",) if self.is_planar else ("D4", "D2")
                free = [name for name in smaller if _keeps(_group(name), values_zyx)]
                raise ConfigError(
                    f"{label} is {tuple(values_zyx)} along (z, y, x), but group {self.name} carries the axes "
                    f"{tied} onto each other and needs equal values there; make them equal, "
                    f"or use group {' or '.join([*free, 'trivial'])}"
                )


def _keeps(group: Group, values_zyx: Sequence[float]) -> bool:
    return all(len({values_zyx[axis] for axis in axes}) == 1 for axes in group.tied_axes)


def _proper(matrix: IntArray) -> bool:
    return bool(round(float(np.linalg.det(matrix))) == 1)


def _along_z(matrix: IntArray) -> bool:
    return bool(matrix[0, 0] != 0)


def _diagonal(matrix: IntArray) -> bool:
    return bool((np.abs(matrix) == np.eye(3)).all())


def _in_plane(matrix: IntArray) -> bool:
    return bool(matrix[0, 0] == 1)


# Each group is the signed permutations (48 of them) that pass all its tests.
_TESTS: dict[str, tuple[Callable[[IntArray], bool], ...]] = {
    "trivial": (_in_plane, _diagonal, lambda matrix: bool(matrix[1, 1] == matrix[2, 2] == 1)),
    "D2": (_proper, _diagonal),
    "D4": (_proper, _along_z),
    "O": (_proper,),
    "D2h": (_diagonal,),
    "D4h": (_along_z,),
    "Oh": (),
    "C2": (_proper, _diagonal, _in_plane),
    "C4": (_proper, _in_plane),
    "C4v": (_in_plane,),
}


GROUP_NAMES = tuple(_TESTS)


def rotation_group(name: str) -> Group:
    """Return a group of exact grid rotations by its Schoenflies name.

    Parameters
    ----------
    name : str
        Name of the group: ``O`` (24 elements, isotropic voxels), ``D4`` (8, four-fold axis z), ``D2`` (4) or
        ``trivial`` (1). For single slices: ``C4`` (4 quarter turns about z) or ``C2`` (2). With reflections, which
        change handedness and serve as joint augmentation only: ``Oh`` (48), ``D4h`` (16), ``D2h`` (8), ``C4v`` (8).

    Raises
    ------
    ConfigError
        If the name is unknown; the message says which one is nearest.
    """
    if name not in _TESTS:
        near = difflib.get_close_matches(
            name.upper(), [known.upper() for known in GROUP_NAMES], n=1, cutoff=0.5
        )
        meant = [known for known in GROUP_NAMES if near and known.upper() == near[0]]
        hint = f"did you mean {meant[0]}? " if meant else ""
        raise ConfigError(f"unknown group {name!r}; {hint}known groups: {', '.join(GROUP_NAMES)}")
    return _group(name)


@cache
def _group(name: str) -> Group:
    signed = [
        np.diag(signs) @ np.eye(3, dtype=np.int64)[list(order)]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    # The first in this order is the identity, which callers rely on.
    matrices = np.array([matrix for matrix in signed if all(test(matrix) for test in _TESTS[name])])
    matrices.setflags(write=False)  # the group is cached, hence shared
    return Group(name, matrices)


def group_for_spacing(
    spacing_zyx: Sequence[float], *, tolerance: float = 0.05, planar: bool = False
) -> Group:
    """Return the largest rotation group under which voxels of this spacing keep their shape (`auto`).

    Pass the spacing at which the data was acquired. Thick slices that were resampled to cubes keep their blur along z,
    so that D4 is still the right group for them.

    Parameters
    ----------
    spacing_zyx : three float
        Distance between voxels, in any one unit.
    tolerance : float
        Largest relative difference between spacings that count as equal.
    planar : bool
        Whether these are single slices. The group is then C4 if y and x agree, otherwise C2.

    Raises
    ------
    ConfigError
        If the spacing is not three positive finite numbers.
    """
    spacing = np.asarray(spacing_zyx, dtype=float)
    if spacing.shape != (3,) or not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ConfigError(f"spacing is {spacing_zyx}; expected three positive numbers (z, y, x)")

    def equal(values: FloatArray) -> bool:
        return bool(values.max() <= values.min() * (1 + tolerance))

    # Only z is looked at as the axis that differs: no group here has its four-fold axis along y or x.
    square = equal(spacing[1:])
    if planar:
        return _group("C4" if square else "C2")
    if square:
        return _group("O" if equal(spacing) else "D4")
    return _group("D2")


def act(volume: VolumeT, matrix: ArrayLike) -> VolumeT:
    """Rotate (and reflect) the last three axes about the array's centre: ``(T_g x)(v) = x(g^-1 v)``.

    No value is changed or interpolated. ``act(act(x, h), g)`` equals ``act(x, g @ h)``, and ``g.T`` undoes
    ``g``. A box that is not a cube changes its shape with its axes.

    Parameters
    ----------
    volume : array or tensor, (..., z, y, x)
        Values of any dtype. Gradients pass through tensors.
    matrix : (3, 3)
        Signed permutation in zyx order, such as an element of a `Group`.

    Returns
    -------
    An array or a tensor, as `volume` is. A numpy result is a view. A tensor is a view if nothing is mirrored, and
    otherwise a copy, because torch has no negative strides.

    Raises
    ------
    ConfigError
        If the volume has fewer than three axes or the matrix is no signed permutation.
    """
    # Only of a signed permutation are the rows of absolute values orthonormal: no two of them share a column.
    g = np.asarray(matrix)
    if g.shape != (3, 3) or not np.array_equal(np.abs(g) @ np.abs(g).T, np.eye(3)):
        raise ConfigError(
            f"{g.tolist()} is no signed permutation of three axes; act is exact for those only, "
            "other rotations need resampling"
        )
    leading: int = volume.ndim - 3
    if leading < 0:
        raise ConfigError(
            f"an array of shape {tuple(volume.shape)} cannot be turned; expected (..., z, y, x)"
        )
    # g[i, j] != 0 says that input axis j becomes output axis i, mirrored when the entry is -1.
    source: list[int] = np.abs(g).argmax(axis=1).tolist()
    order = [*range(leading), *(leading + j for j in source)]
    mirrored = tuple(leading + i for i in range(3) if g[i, source[i]] < 0)
    if isinstance(volume, np.ndarray):
        return np.flip(volume.transpose(order), mirrored)
    turned = volume.permute(order)
    return turned.flip(mirrored) if mirrored else turned


def act_each(batch: VolumeT, matrices: ArrayLike) -> VolumeT:
    """Turn every sample of a batch by its own matrix: ``out[n] = act(batch[n], matrices[n])``.

    Parameters
    ----------
    batch : array or tensor, (n, ..., z, y, x)
        Samples, one after the other. Sides that the matrices exchange must be equal.
    matrices : (n, 3, 3)
        Signed permutation of each sample, in zyx order.

    Raises
    ------
    ConfigError
        If the numbers differ, a matrix is no signed permutation, or a sample would change its shape.
    """
    each = np.asarray(matrices)
    if len(each) != len(batch):
        raise ConfigError(f"{len(each)} matrices for {len(batch)} samples; expected one each")
    turned = [act(sample, matrix) for sample, matrix in zip(batch, each, strict=True)]
    if any(sample.shape != batch.shape[1:] for sample in turned):
        raise ConfigError(
            f"samples of {tuple(batch.shape[-3:])} voxels (z, y, x) change shape under the given rotations; "
            "use a cubic patch, or group D4 or D2"
        )
    if isinstance(batch, np.ndarray):
        return np.stack(turned)
    import torch

    return torch.stack(turned)
