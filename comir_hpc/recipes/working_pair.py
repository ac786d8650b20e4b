"""Two volumes on one working grid under an alignment, with a part held out: what `adapt` trains and judges on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.representations.encoding.loading import load_encoder
from comir_hpc.representations.features import specimen_mask
from comir_hpc.representations.held_out import PlaceRetrieval, retrieve_places
from comir_hpc.representations.working import WorkingGrids
from comir_hpc.runs.model import Model
from comir_hpc.space.grid import Box, FloatArray, Grid, Triple, as_triple
from comir_hpc.transforms import Transform
from comir_hpc.volumes.resampled import Resampled
from comir_hpc.volumes.volume import Volume

Mask = NDArray[np.bool_]

_PATCHES = (32, 24, 16)  # sides to train with: the largest one that fits
_GAP = 8  # voxels between what is trained on and what is held out; a turned patch reaches over its box by up to six
_POINTS = 2000  # points of the specimen at which two alignments are compared


@dataclass(frozen=True, eq=False)
class AlignedStores:
    """An aligned pair, written as two stores on one grid.

    Attributes
    ----------
    fixed, moving : Path
        The stores.
    patch : three int
        Sides of the training's patches, in voxels.
    within : two times three int
        First voxel, and the one after the last, of the box to train in.
    held_out : (z, y, x) bool
        Specimen outside that box.
    """

    fixed: Path
    moving: Path
    patch: Triple
    within: tuple[Triple, Triple]
    held_out: Mask

    def judge(self, run: Path, modalities: tuple[str, str], device: str) -> PlaceRetrieval:
        """Measure how many held-out cells find their place in the other modality, with the encoders of a run."""
        maps = [
            load_encoder(run, name, device=device).encode_volume(Volume.open(store), 0)[0]
            for name, store in zip(modalities, (self.fixed, self.moving), strict=True)
        ]
        return retrieve_places(maps[0], maps[1], self.held_out)


@dataclass(frozen=True, eq=False)
class WorkingPair:
    """Both volumes on the finest working grid of a model, each on its own axes.

    Attributes
    ----------
    fixed, moving : (z, y, x) float32
        Intensities of the first channel.
    fixed_mask, moving_mask : (z, y, x) bool
        Specimens.
    fixed_grid, moving_grid : Grid
        Their grids.
    spacing_mm : float
        Finest spacing of the grids, in mm.
    """

    fixed: NDArray[np.float32]
    moving: NDArray[np.float32]
    fixed_mask: Mask
    moving_mask: Mask
    fixed_grid: Grid
    moving_grid: Grid
    spacing_mm: float

    @classmethod
    def open(cls, fixed: Path, moving: Path, model: Model) -> Self:
        """Read both volumes on the grids that a model sees them on.

        Raises
        ------
        VolumeError, RegistrationError
            If a volume cannot be read, or has no specimen.
        """
        volumes = [Volume.open(path) for path in (fixed, moving)]
        grids = WorkingGrids.for_model(model, volumes)
        seen = [Resampled(volume, grids.grid(volume, 0)) for volume in volumes]
        masks = [specimen_mask(one.volume, one.grid) for one in seen]
        values = [np.asarray(one.read()[0], dtype=np.float32) for one in seen]
        return cls(
            fixed=values[0],
            moving=values[1],
            fixed_mask=masks[0],
            moving_mask=masks[1],
            fixed_grid=seen[0].grid,
            moving_grid=seen[1].grid,
            spacing_mm=min(grids.spacings_zyx[0]),
        )

    @property
    def side_mm(self) -> float:
        """Mean side of the box around the fixed specimen, in mm."""
        inside = np.argwhere(self.fixed_mask)
        return float(((np.ptp(inside, axis=0) + 1) * self.fixed_grid.spacing_mm).mean())

    @property
    def points_mm(self) -> FloatArray:
        """Points of the fixed specimen in the world (x, y, z), in mm, (N, 3)."""
        inside = np.argwhere(self.fixed_mask)
        return self.fixed_grid.world_mm(inside[:: max(1, len(inside) // _POINTS)])

    def distance_mm(self, one: Transform, other: Transform) -> float:
        """Measure how far two alignments send points of the fixed specimen from each other, on average, in mm."""
        return float(one.distance_mm(other, self.points_mm).mean())

    def aligned(self, transform: Transform, folder: Path, held_out: float | None) -> AlignedStores | None:
        """Write both volumes on the fixed grid, cut to what both show, and choose what is held out.

        Parameters
        ----------
        transform : Transform
            From fixed to moving.
        folder : Path
            Where the two stores go.
        held_out : float or None
            Share of the specimen that is held out, at the far end of the longest axis; None trains on all of it.

        Returns
        -------
        AlignedStores or None
            None if too little is left to train on.
        """
        from comir_hpc.ingest import ingest_array

        moving, shown, specimen = self._on_fixed(transform)
        both = specimen & self.fixed_mask
        if not both.any():
            return None
        cut = ndimage.find_objects(shown.astype(np.int8))[0]
        both = both[cut]
        boxes = _divided(both, held_out)
        if boxes is None:
            return None
        within, patch, rest = boxes
        first, last = ([getattr(s, end) for s in cut] for end in ("start", "stop"))
        grid = self.fixed_grid.crop(Box(as_triple(first, int), as_triple(last, int)))
        stores = []
        for name, values in (("fixed", self.fixed), ("moving", moving)):
            stores.append(folder / f"{name}.zarr")
            ingest_array(
                np.ascontiguousarray(values[cut]), grid, stores[-1], chunk=32, shard=128, overwrite=True
            )
        return AlignedStores(stores[0], stores[1], patch, within, both & rest)

    def _on_fixed(self, transform: Transform) -> tuple[NDArray[np.float32], Mask, Mask]:
        """Interpolate the moving volume on the fixed grid; say where it shows something, and where its specimen is."""
        matrix = np.linalg.inv(self.moving_grid.matrix_mm) @ transform.matrix_mm @ self.fixed_grid.matrix_mm
        # Beyond its border the moving volume goes on as its own air. Zero may be a value of the specimen.
        outside = float(np.median(self.moving[~self.moving_mask])) if (~self.moving_mask).any() else 0.0

        def on_fixed(values: NDArray[np.float32], order: Literal[0, 1], beyond: float) -> NDArray[np.float32]:
            return ndimage.affine_transform(
                values, matrix[:3, :3], matrix[:3, 3], self.fixed.shape, order=order, cval=beyond
            )

        shown = on_fixed(np.ones(self.moving.shape, np.float32), 0, 0.0)
        specimen = on_fixed(self.moving_mask.astype(np.float32), 0, 0.0)
        return on_fixed(self.moving, 1, outside), shown > 0.5, specimen > 0.5


def _divided(specimen: Mask, held_out: float | None) -> tuple[tuple[Triple, Triple], Triple, Mask] | None:
    """Divide a specimen across its longest axis: the box to train in, the patch for it, and the mask of the rest."""
    shape = specimen.shape
    stop = list(shape)
    rest = np.zeros(shape, dtype=np.bool_)
    if held_out is not None:
        axis = int(np.argmax([np.ptp(np.flatnonzero(specimen.any(axis=_others(a)))) for a in range(3)]))
        # Counted in voxels of specimen and not in planes: the ends of a specimen are thin.
        share = specimen.sum(axis=_others(axis)).cumsum() / specimen.sum()
        end = int(np.searchsorted(share, 1 - held_out))
        stop[axis] = end - _GAP // 2
        rest[tuple(slice(end + _GAP // 2, None) if a == axis else slice(None) for a in range(3))] = True
    patch = next((side for side in _PATCHES if min(stop) >= side), None)
    if patch is None:
        return None
    z, y, x = stop
    return ((0, 0, 0), (z, y, x)), (patch, patch, patch), rest


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)
