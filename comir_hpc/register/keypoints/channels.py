"""Make channels that turn like a picture, and not more of them than keypoints need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from comir_hpc.register.coarse import CoarseFeatures, standardised

_MOST_CHANNELS = 6  # a descriptor grows with the square of their number
_SIGMA_VOX = 1.0  # of the Gaussian whose derivative is taken
_LEAST_SLOPE = 0.01  # for each voxel, of values with a spread of 1: less is noise


def turnable(
    fixed: CoarseFeatures, moving: CoarseFeatures, *, signed: bool
) -> tuple[CoarseFeatures, CoarseFeatures]:
    """Make channels of both volumes that turn like a picture.

    * Channels that look along the axes of the grid (`Features.describe`) are not those of a volume that lies turned.
      What turns with it is the size of the gradient of the values that they describe. On the embedded pair, turned by
      140 degrees, its logarithm gave 22 and 33 right matches on grids of 5.0 and 3.8 mm. The mean and the spread of
      MIND's channels, which do not change either, gave 0 and 2.
    * Values that only tell each other (`signed` is false: intensities) become the size of their gradient, too: what is
      bright in one modality may be dark in the other, but both have an edge there.
    * Of many channels the main components of both volumes together are kept.
    """
    sides = [side if signed and side.describe is None else _edges(side) for side in (fixed, moving)]
    one, other = _main_components(sides[0], sides[1])
    return one, other


def _edges(side: CoarseFeatures) -> CoarseFeatures:
    """Make the logarithm of the gradient's size, so that the strong edges of one modality do not decide everything."""
    seen = side.values if side.describe is not None else side.values * side.weights
    edges = []
    for channel in seen:
        slope = ndimage.gaussian_gradient_magnitude(channel, _SIGMA_VOX)
        edges.append(standardised(np.log(np.maximum(slope, _LEAST_SLOPE))[None], side.weights))
    return replace(side, values=np.concatenate(edges), describe=None)


def _main_components(fixed: CoarseFeatures, moving: CoarseFeatures) -> tuple[CoarseFeatures, CoarseFeatures]:
    if len(fixed.values) <= _MOST_CHANNELS:
        return fixed, moving
    inside = np.concatenate([side.values[:, side.weights > 0.5] for side in (fixed, moving)], axis=1)
    main = np.linalg.eigh(np.cov(inside))[1][:, : -_MOST_CHANNELS - 1 : -1].astype(np.float32)
    one, other = (
        replace(side, values=np.tensordot(main.T, side.values, axes=1).astype(np.float32))
        for side in (fixed, moving)
    )
    return one, other
