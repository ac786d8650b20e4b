"""Give an anatomy two appearances that have nothing in common but structure, and spoil each as a scanner would.

A view is made in three steps: brightness of every material, or a random curve over a real volume; what one scanner
shows and the other does not; blur, slices, bias and noise. Values are floats around 0 to 1; `normalised` ends it.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from comir_hpc.learning.synthetic.anatomies import Anatomy
from comir_hpc.learning.synthetic.fields import Floats, reach_of, smooth_noise

# Probabilities of what happens to one view. They are those of the mix that was seen to register unseen pairs; a mix
# with many more structures in one view only registered nothing.
_MERGES, _MERGED = 0.4, 0.3
_MISSING, _VOID, _TEXTURE = 0.2, 0.08, 0.5
_SLICES, _LOOSE_AXIS, _INVERTED_AIR = 0.15, 0.35, 0.1
_BLUR, _LOOSE_BLUR = (0.3, 1.0), 1.5
_NOISE, _BIAS = 0.08, 0.35


def brightness(rng: np.random.Generator, anatomy: Anatomy, points: Floats) -> Floats:
    """Give every material a random brightness, (z, y, x) float32.

    In some views some materials look like others: no scanner tells all materials apart. Air is dark in nearly all.
    """
    means = rng.random(anatomy.count)
    if rng.random() < _MERGES:
        alike = rng.random(anatomy.count) < _MERGED
        means[alike] = means[rng.integers(anatomy.count, size=int(alike.sum()))]
    image = means[anatomy.labels].astype(np.float32)
    if rng.random() < _TEXTURE:
        spread = rng.uniform(0.02, 0.15, anatomy.count).astype(np.float32)
        image += smooth_noise(rng, points, 1, cell=rng.uniform(2, 6))[0] * spread[anatomy.labels]
    image[anatomy.rim] = rng.random()
    image[anatomy.air] = rng.random() if rng.random() < _INVERTED_AIR else rng.uniform(0, 0.1)
    return image


def curved(rng: np.random.Generator, image: Floats) -> Floats:
    """Send values (0 to 1) through a random curve that may rise and fall; the darkest stay nearly dark."""
    knots = np.linspace(0, 1, int(rng.integers(4, 9)))
    heights = rng.random(len(knots))
    if rng.random() >= _INVERTED_AIR:
        heights[0] = rng.uniform(0, 0.1)
    return np.interp(image, knots, heights).astype(np.float32)


def spoiled(rng: np.random.Generator, image: Floats, points: Floats) -> Floats:
    """Take parts away, then blur, slice, shade and add noise, as one scanner does and the other does not."""
    if rng.random() < _MISSING:
        image = _without_part(rng, image, points)
    if rng.random() < _VOID:
        # Noise of deviation 1: about a fifteenth of the voxels are above this.
        gone = smooth_noise(rng, points, 1, cell=rng.uniform(5, 10))[0] > 1.5
        image = np.where(gone, np.float32(0), image)
    sigma = np.full(3, rng.uniform(*_BLUR))
    if rng.random() < _LOOSE_AXIS:
        sigma[rng.integers(3)] = rng.uniform(_BLUR[1], _LOOSE_BLUR)
    image = ndimage.gaussian_filter(image, sigma, mode="nearest")
    if rng.random() < _SLICES:
        image = _sliced(rng, image)
    field = smooth_noise(rng, points, 1, cell=30.0)[0]
    image = image * np.exp(field * np.float32(rng.uniform(0, _BIAS)))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, _NOISE))
    return np.asarray(image + noise, dtype=np.float32)


def _without_part(rng: np.random.Generator, image: Floats, points: Floats) -> Floats:
    """Hide what lies beyond a plane, or inside a ball."""
    normal = rng.standard_normal(3).astype(np.float32)
    normal /= np.linalg.norm(normal)
    reach = reach_of(points)
    if rng.random() < 0.5:
        gone = points @ normal > reach * rng.uniform(0.3, 0.8)
    else:
        centre = normal * reach * np.float32(rng.uniform(0.2, 1.0))
        gone = np.square(points - centre).sum(axis=-1) < (reach * rng.uniform(0.2, 0.5)) ** 2
    return np.where(gone, np.float32(rng.random() * 0.3), image)


def _sliced(rng: np.random.Generator, image: Floats) -> Floats:
    """Average over slices of several voxels along one axis, and interpolate between them again."""
    axis, thick = int(rng.integers(3)), float(rng.uniform(1.5, 3.0))
    # A slice is about a box of this thickness, whose blur a Gaussian of 0.42 times its full width at half maximum
    # has.
    image = ndimage.gaussian_filter1d(image, 0.42 * thick, axis=axis, mode="nearest")
    length = image.shape[axis]
    places = np.arange(rng.uniform(0, thick), length, thick)
    taken = np.clip(np.rint(places).astype(int), 0, length - 1)
    slices = np.take(image, taken, axis=axis)
    between = np.interp(np.arange(length), places, np.arange(len(places)))
    low = np.floor(between).astype(int)
    high = np.minimum(low + 1, len(places) - 1)
    share = (between - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    return np.asarray(
        np.take(slices, low, axis=axis) * (1 - share) + np.take(slices, high, axis=axis) * share
    )


def normalised(rng: np.random.Generator, image: Floats) -> Floats:
    """Bring values to mean 0 and deviation 1, then vary both, as volumes' statistics differ from patches' ones."""
    # A patch may show one material only, and nothing may be divided by zero.
    deviation = max(float(image.std()), 1e-3)
    gain, shift = np.exp(rng.normal(0, 0.25)), rng.normal(0, 0.35)
    return np.asarray((image - image.mean()) * np.float32(gain / deviation) + np.float32(shift))
