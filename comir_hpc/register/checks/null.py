"""Say how likely chance is: the same pair with its moving volume cut into blocks that are dealt out anew.

Blocks keep the texture of both volumes and lose their places. What agreement is left is that of unrelated volumes with
this pair's statistics, so an agreement is held against its own pair and not against those of a training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from comir_hpc.representations.criteria import Array32
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:
    from comir_hpc.register.checks.probe import Probe

Measures = Callable[[Array32, Array32], float]

_BLOCK = 5  # voxels; a slice's blocks are squares
_DEALS = 8
_FEWEST = 8  # blocks inside the specimen
_HELD = 0.6  # share of a block that has to lie in both specimens
_LEAST_SPREAD = 1e-3


def above_chance(probe: Probe, answer: Transform) -> tuple[float | None, float | None]:
    """Measure how many standard deviations agreement and mutual information lie above those of shuffled blocks.

    Both are None if the specimens have too few blocks in common.
    """
    cube, weights = probe.seen(answer)
    image, image_weights = probe.seen_image(answer)
    agreement = _above(cube, weights, probe.correlation)
    information = _above(
        image[None], image_weights, lambda values, held: probe.shared_information(values[0], held)
    )
    return agreement, information


def _above(values: Array32, weights: Array32, measure: Measures) -> float | None:
    """Compare what blocks in their own places measure with what they measure in others."""
    places = _inside(weights)
    if len(places) < _FEWEST:
        return None
    own = np.zeros_like(weights)
    for place in places:
        own[place] = weights[place]
    found = measure(values, own)
    rng = np.random.default_rng(0)
    chance = []
    for _ in range(_DEALS):
        order = rng.permutation(len(places))
        dealt, held = values.copy(), np.zeros_like(weights)
        for to, source in zip(places, order, strict=True):
            dealt[(slice(None), *to)] = values[(slice(None), *places[source])]
            held[to] = weights[to] * weights[places[source]]
        chance.append(measure(dealt, held))
    return float((found - np.mean(chance)) / max(float(np.std(chance)), _LEAST_SPREAD))


def _inside(weights: Array32) -> list[tuple[slice, ...]]:
    """List the blocks that lie in both specimens."""
    sides = [min(_BLOCK, n) for n in weights.shape]
    places: list[tuple[slice, ...]] = []
    for index in np.ndindex(*(n // s for n, s in zip(weights.shape, sides, strict=True))):
        place = tuple(slice(i * s, (i + 1) * s) for i, s in zip(index, sides, strict=True))
        if weights[place].mean() >= _HELD:
            places.append(place)
    return places
