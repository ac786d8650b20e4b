"""Transforms between two volumes.

A transform maps fixed-space points to moving-space points (ITK's resampling direction). To resample the moving volume
on the fixed grid, take each fixed voxel's world position, apply the transform, and look the moving volume up there.
Points are ITK's world, LPS (x, y, z) in millimetres.

=============  ============================================================================
`protocol`     `PointMap`: what every transform can do
`affine`       `Affine`: a matrix
`composite`    `Composite`: several transforms, one after the other
`itk`          `ItkTransform`: any transform of ITK; images and transforms to SimpleITK and back
`files`        read and write transform files; `itk_files`: those of ITK
`conventions`  the forms of other tools: elastix, FSL, FreeSurfer, OME-NGFF, matrices in text
`fields`       displacement fields in NIfTI files
`foreign`      what a file is that is no transform of ours, and what to do with it
=============  ============================================================================

Adding one
----------
A new kind of transform is one file with one class that inherits from `PointMap`:

>>> class Shift(PointMap):
...     def __init__(self, by_mm):
...         self.by_mm = np.asarray(by_mm, dtype=float)
...
...     def apply(self, points_mm):
...         return np.asarray(points_mm, dtype=float) + self.by_mm
...
...     def inverse(self):
...         return Shift(-self.by_mm)

`apply` is all that is needed: `warp` moves points and volumes with it, alone or inside a `Composite`. Without
`inverse`, points are carried from fixed to moving space only. To read it from a file, give `files.read_transform` a
branch that recognises the file by its content. To write it, let `parts` be transforms that ITK knows: `save_itk` then
writes it so that other tools can read it too. `itk_on_grid` makes a displacement field of any transform.
"""

from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import Composite, as_affine, notes_on
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.transforms.conventions.ngff import FIXED_WORLD, MOVING_WORLD
from comir_hpc.transforms.files import (
    DIRECTION,
    itk_text,
    load_transform,
    ngff_record,
    read_transform,
    save_itk,
    save_transform,
)
from comir_hpc.transforms.itk import (
    ItkTransform,
    array_and_grid,
    from_itk,
    itk_form,
    itk_image,
    itk_lattice,
    itk_on_grid,
    itk_transform,
)
from comir_hpc.transforms.protocol import PointMap

Transform = Affine
"""The name under which most of the package knows the affine transform."""

__all__ = [
    "DIRECTION",
    "FIXED_WORLD",
    "MOVING_WORLD",
    "Affine",
    "Composite",
    "GridPair",
    "ItkTransform",
    "PointMap",
    "Transform",
    "array_and_grid",
    "as_affine",
    "from_itk",
    "itk_form",
    "itk_image",
    "itk_lattice",
    "itk_on_grid",
    "itk_text",
    "itk_transform",
    "load_transform",
    "ngff_record",
    "notes_on",
    "read_transform",
    "save_itk",
    "save_transform",
]
