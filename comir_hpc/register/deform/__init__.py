"""Bend the fixed volume's space after the coarse answer: what rigid and affine motions leave over.

``moving point = affine(point + displacement(point))``: the displacement is applied first, in the fixed world, and then
the coarse answer. Nothing else is changed by it, so that the verdict on the coarse answer holds.

=============  ===========================================================================================
`field`        ``field``: on the maps first, then on the intensities
`velocity`     a stationary velocity, found on the maps by Gauss-Newton steps, and what is compared
`forces`       how well the maps agree about every voxel, and which way it has to move
`information`  a stationary velocity, found by the mutual information of the intensities
`two_ways`     whether maps and intensities, each by itself, lead to the same bend
`bspline`      ``bspline``: the field as a B-spline of ITK
`held_out`     the part of the specimen that takes no part, where the deformation has to prove itself
`lattice`      displacements on a lattice: to ITK's form, folds, the inverse and its residual
`drawn`        pictures of a deformation
`warping`      interpolation, and the flow of a velocity
=============  ===========================================================================================

A deformation is kept only if the agreement of the part that was held out improves by more than chance, and if maps and
intensities agree on it. Otherwise the coarse answer is the result, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.config.register import RegisterSettings
from comir_hpc.config.words import BENDING
from comir_hpc.errors import RegistrationError
from comir_hpc.register.deform.bspline import fit_bspline
from comir_hpc.register.deform.drawn import deformation_planes
from comir_hpc.register.deform.field import find_field
from comir_hpc.register.deform.held_out import Gain, HeldOut
from comir_hpc.register.deform.information import with_air
from comir_hpc.register.deform.lattice import Lattice, sampled
from comir_hpc.register.deform.two_ways import TwoWays
from comir_hpc.register.deform.velocity import Maps
from comir_hpc.register.deform.warping import carried
from comir_hpc.register.inputs import Inputs
from comir_hpc.register.pair import Pair
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import Composite
from comir_hpc.transforms.itk import ItkTransform

__all__ = ["Deformation", "bend", "deform", "require_deformable"]

_SMOOTHNESS_SHARE = 0.08  # smoothness length, as a share of the specimen's mean side, where none is given
_HELD_SHARE = 0.5  # side of a cube that is held out, in smoothness lengths: its surroundings reach into it
_MOST_COARSE = 3  # levels beside the one that is compared
_FEWEST_VOXELS = 28  # of a coarse level, along the shortest side of a volume
_Side = tuple[Features, NDArray[np.float32]]  # one volume: what is compared, and its intensities
_FOLDED_SHARE = 1e-4  # share of the specimen's points that may fold before the verdict is WARN
_MOST_FOLDED = 0.01  # share from which the deformation is refused: what folds so much follows noise


@dataclass(frozen=True, eq=False)
class Deformation:
    """What came of a deformation.

    Attributes
    ----------
    transform : Composite or None
        Displacement and coarse answer, from fixed to moving points; None where the coarse answer alone is the result.
    inverse : Composite or None
        Map from moving to fixed points.
    record : dict
        Figures of the deformation, as they are written to result.json.
    planes : dict of str to (rows, columns) or (rows, columns, 2) float32
        What the report draws.
    """

    transform: Composite | None
    inverse: Composite | None
    record: dict[str, Any]
    planes: dict[str, NDArray[np.float32]]

    def judged(self, verdict: str, reasons: list[str]) -> dict[str, Any]:
        """Return verdict, reasons and figures of the whole, from verdict and reasons of the coarse answer."""
        reasons = [*reasons, self.record["reason"]]
        if self.transform is not None and self.record["folded_share"] >= _FOLDED_SHARE:
            reasons.insert(
                0,
                f"the deformation folds space at {self.record['folded_points']} points of the specimen "
                f"({100 * self.record['folded_share']:.2g} %), where points are not carried one to one; a longer "
                "--smoothness-mm folds less, and --transform field does not fold",
            )
            verdict = "WARN" if verdict == "PASS" else verdict
        return {"verdict": verdict, "reasons": reasons, "deformation": self.record}


def require_deformable(settings: RegisterSettings, inputs: Inputs) -> None:
    """Refuse to bend what cannot be bent, before anything is computed.

    Raises
    ------
    RegistrationError
        If the volumes are single slices, or the smoothness length is shorter than a voxel of the comparison or longer
        than half of the fixed volume.
    """
    if settings.transform not in BENDING:
        return
    grid = inputs.fixed.representation.grid(inputs.fixed.level)
    if grid.planar:
        raise RegistrationError(
            f"--transform {settings.transform} bends volumes, and these are single slices; use --transform affine"
        )
    length = settings.smoothness_mm
    if length is not None and not grid.finest_mm <= length <= min(grid.extent_mm) / 2:
        raise RegistrationError(
            f"--smoothness-mm {length:g} is not between one voxel of the comparison ({grid.finest_mm:.3g} mm) and half "
            f"of the volume ({min(grid.extent_mm) / 2:.3g} mm); leave it out for a length that suits the specimen"
        )


def bend(
    pair: Pair,
    images: tuple[NDArray[np.float32], NDArray[np.float32]],
    inputs: Inputs,
    affine: Affine,
    verdict: str,
    settings: RegisterSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Deformation | None:
    """Bend space as the settings ask for; None if they do not. Nothing is built on a coarse answer that has failed.

    The parameters are those of `deform`, and the verdict on the coarse answer.
    """
    if settings.transform not in BENDING:
        return None
    if verdict == "FAIL":
        return _without(settings, "the affine answer has failed, so nothing was bent on top of it")
    try:
        return deform(pair, images, inputs, affine, settings, progress)
    except RegistrationError as error:
        return _without(settings, f"{error}; the affine answer is the result")


def deform(
    pair: Pair,
    images: tuple[NDArray[np.float32], NDArray[np.float32]],
    inputs: Inputs,
    affine: Affine,
    settings: RegisterSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Deformation:
    """Bend the space of the fixed volume so that the maps of both agree better than under the coarse answer.

    Parameters
    ----------
    pair : Pair
        Both volumes as they are compared.
    images : two arrays (z, y, x)
        Intensities of the fixed and the moving volume, on the same grids.
    inputs : Inputs
        The same volumes at their other levels.
    affine : Affine
        The coarse answer, from fixed to moving points.
    settings : RegisterSettings
        Kind of deformation and its smoothness.
    progress : callable, optional
        Function that is called as ``progress(done, total)``.
    """
    grid, alike = pair.fixed.grid, pair.measure.correlates
    length = settings.smoothness_mm or max(grid.finest_mm, _SMOOTHNESS_SHARE * pair.side_mm)
    held = HeldOut(pair.fixed.mask, _HELD_SHARE * length / grid.finest_mm, settings.seed)
    finest = make_maps(pair.fixed, pair.moving, affine, alike=alike)
    sides = [*_coarser(inputs), ((pair.fixed, images[0]), (pair.moving, images[1]))]
    maps = [make_maps(f, m, affine, alike=True) for (f, _), (m, _) in sides] if alike else []
    shown = []
    if settings.refines_on_intensities or not alike:
        seen = [
            (f.known, make_maps(_shown(f, a), _shown(m, b), affine, alike=False)) for (f, a), (m, b) in sides
        ]
        shown = [with_air(one, known, length) for known, one in seen]
    maps, shown = ([_compared(held, one, grid) for one in some] for some in (maps, shown))
    lattice, ways = find_field(maps, shown, pair.fixed, length, progress)
    spline = None
    if settings.transform == "bspline":
        # What is judged, and counted, is the spline and not the field that it stands for. It is sampled on the finest
        # grid: on the field's lattice it is not known well enough to be inverted (more than 0.1 mm there and back).
        spline = fit_bspline(lattice, length)
        lattice = sampled(ItkTransform(spline), grid)
    after = carried(lattice.displacement_mm, lattice.grid, grid)
    gain = held.gain(finest.fixed, finest.seen(), finest.seen(after), alike)
    return _judged(lattice, spline, gain, ways, pair.fixed, affine, settings.transform, length)


def make_maps(fixed: Features, moving: Features, affine: Affine, *, alike: bool) -> Maps:
    """Put two volumes together as they are compared, with the coarse answer between their voxels.

    Channels that look along the axes of a grid cannot be turned like a picture: the moving volume is then turned onto
    the fixed grid first, and described there.
    """
    between = np.linalg.inv(moving.grid.matrix_mm) @ affine.matrix_mm @ fixed.grid.matrix_mm
    maps = Maps(
        fixed.values,
        moving.values,
        fixed.grid,
        fixed.mask.astype(np.float32),
        None if moving.known is None else moving.known.astype(np.float32),
        between[:3, :3].astype(np.float32),
        between[:3, 3].astype(np.float32),
        alike,
    )
    if fixed.describe is None or moving.describe is None:
        return maps
    values, weights = maps.seen()
    return replace(
        maps,
        fixed=fixed.describe(fixed.values[0]),
        moving=moving.describe(values[0]),
        weights=weights,
        known=None,
        matrix=np.eye(3, dtype=np.float32),
        offset=np.zeros(3, dtype=np.float32),
    )


def _coarser(inputs: Inputs) -> list[tuple[_Side, _Side]]:
    """Make features and intensities of both volumes at up to three coarser levels, the coarsest first.

    Maps are made at each level, and not averaged from finer ones, which would lose what they show.
    """
    fixed, moving = inputs.fixed.representation, inputs.moving.representation
    found = []
    for level in range(inputs.fixed.level + 1, inputs.fixed.level + 1 + _MOST_COARSE):
        if level not in fixed.levels or min(fixed.grid(level).shape_zyx) < _FEWEST_VOXELS:
            break
        spacing = fixed.grid(level).finest_mm
        # The moving volume is seen at the level that comes nearest; where one level has one spacing, it is the same.
        near = min(
            (other for other in moving.levels if other >= inputs.moving.level),
            key=lambda other: abs(math.log(moving.grid(other).finest_mm / spacing)),
        )
        if min(moving.grid(near).shape_zyx) < _FEWEST_VOXELS:
            break
        found.append((fixed.features(level), moving.features(near)))
    return found[::-1]


def _shown(features: Features, image: NDArray[np.float32]) -> Features:
    return Features(image[None], features.mask, features.grid, features.known)


def _folds(figures: dict[str, Any]) -> str | None:
    """Say why a deformation that folds much is not kept; None if it folds little."""
    if figures["folded_share"] < _MOST_FOLDED:
        return None
    return (
        f"the deformation folds space at {figures['folded_points']} points of the specimen "
        f"({100 * figures['folded_share']:.2g} %); a longer --smoothness-mm folds less, and --transform field does not "
        "fold"
    )


def _without(settings: RegisterSettings, reason: str) -> Deformation:
    return Deformation(None, None, {"kind": settings.transform, "kept": False, "reason": reason}, {})


def _compared(held: HeldOut, maps: Maps, grid: Grid) -> Maps:
    """Take the cubes that are held out from what is compared; `grid` is that of the cubes."""
    there = carried(held.mask[None].astype(np.float32), grid, maps.grid)[0]
    return replace(maps, weights=(maps.weights * (1 - there)).astype(np.float32))


def _judged(
    lattice: Lattice,
    spline: sitk.Transform | None,
    gain: Gain,
    ways: TwoWays | None,
    fixed: Features,
    affine: Affine,
    kind: str,
    length_mm: float,
) -> Deformation:
    """Keep the deformation or refuse it, with its figures either way."""
    figures = lattice.figures(fixed)
    refusal = gain.refusal or (None if ways is None else ways.refusal) or _folds(figures)
    record = {
        "kind": kind,
        "smoothness_mm": length_mm,
        "kept": refusal is None,
        "reason": refusal
        or f"the agreement of {gain.cubes} cubes that were held out rose from {gain.before:.3f} to {gain.after:.3f}",
        "held_out": {
            "before": gain.before,
            "after": gain.after,
            "gain": gain.gain,
            "standard_error": gain.error if np.isfinite(gain.error) else None,
            "cubes": gain.cubes,
        },
        "two_ways": None if ways is None else asdict(ways),
        **figures,
    }
    planes = deformation_planes(lattice, fixed)
    if refusal is not None:
        return Deformation(None, None, record, planes)
    bent = ItkTransform(lattice.itk() if spline is None else spline)
    back = ItkTransform(lattice.inverse.itk())
    # The way back undoes the last step first.
    return Deformation(Composite((bent, affine)), Composite((affine.inverse(), back)), record, planes)
