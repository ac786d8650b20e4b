"""Make channels that turn like a picture, and not more of them than keypoints need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from comir_hpc.register.coarse import CoarseFeatures, standardised
from comir_hpc.representations.criteria import Array32

_MOST_CHANNELS = 6  # a descriptor grows with the square of their number


def turnable(
    fixed: CoarseFeatures, moving: CoarseFeatures, *, signed: bool
) -> tuple[CoarseFeatures, CoarseFeatures]:
    """Make channels of both volumes that turn like a picture.

    * Channels that look along the axes of the grid (`Features.describe`) become their mean and their spread, which do
      not say which channel looks where.
    * Values that only tell each other (`signed` is false: intensities) become the size of their gradient: what is
      bright in one modality may be dark in the other, but both have an edge there.
    * Of many channels the main components of both volumes together are kept.
    """
    sides = [_without_axes(side) for side in (fixed, moving)]
    if not signed:
        sides = [_edges(side) for side in sides]
    one, other = _main_components(sides[0], sides[1])
    return one, other


def _without_axes(side: CoarseFeatures) -> CoarseFeatures:
    if side.describe is None:
        return side
    channels = side.describe(side.values[0])
    return _with(side, np.stack([channels.mean(axis=0), channels.std(axis=0)]))


def _edges(side: CoarseFeatures) -> CoarseFeatures:
    slopes = [ndimage.gaussian_gradient_magnitude(channel * side.weights, 1.0) for channel in side.values]
    return _with(side, np.stack(slopes))


def _with(side: CoarseFeatures, values: Array32) -> CoarseFeatures:
    """Replace the values, each channel brought to mean 0 and spread 1 in the mask."""
    ones = [standardised(channel[None], side.weights) for channel in values]
    return replace(side, values=np.concatenate(ones), describe=None)


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
