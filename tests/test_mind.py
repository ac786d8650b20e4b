"""MIND-SSC: what it is, and that a curved contrast hardly matters to it."""

import numpy as np
from scipy import ndimage

from comir_hpc.representations.mind import neighbour_pairs, self_similarity

IMAGE = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)


def plain_self_similarity(image, axes=(0, 1, 2)):
    """The definition, by loops."""
    pairs = neighbour_pairs(list(axes))

    def value(place):
        return float(image[tuple(np.clip(p, 0, n - 1) for p, n in zip(place, image.shape, strict=True))])

    patch = [np.array(o) for o in np.ndindex(3, 3, 3)]
    patch = [o - 1 for o in patch if all(o[a] == 1 for a in range(3) if a not in axes)]
    distances = np.zeros((len(pairs), *image.shape))
    for place in np.ndindex(image.shape):
        for k, (one, other) in enumerate(pairs):
            squares = [
                (value(place + np.array(one) + o) - value(place + np.array(other) + o)) ** 2 for o in patch
            ]
            distances[(k, *place)] = np.mean(squares)
    distances -= distances.min(axis=0)
    scale = distances.mean(axis=0)
    return np.exp(-distances / np.clip(scale, 1e-3 * scale.mean(), 1e3 * scale.mean()))


def test_there_are_twelve_pairs_of_neighbours_and_four_in_a_slice():
    pairs = neighbour_pairs([0, 1, 2])
    assert len(set(pairs)) == 12
    assert {float(np.linalg.norm(np.subtract(a, b))) for a, b in pairs} == {np.sqrt(2)}
    assert len(neighbour_pairs([1, 2])) == 4


def test_it_equals_the_definition_at_every_voxel():
    np.testing.assert_allclose(self_similarity(IMAGE), plain_self_similarity(IMAGE), atol=2e-5)
    np.testing.assert_allclose(
        self_similarity(IMAGE[:1]), plain_self_similarity(IMAGE[:1], (1, 2)), atol=2e-5
    )


def test_a_curved_contrast_changes_little_and_another_image_changes_much():
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(24, 24, 24)), 2).astype(np.float32)
    smooth /= smooth.std()
    here = self_similarity(smooth).ravel()
    for curve in (np.exp, lambda v: -np.arctan(v), lambda v: 1 / (1 + np.exp(2 * v))):
        assert np.corrcoef(here, self_similarity(curve(smooth).astype(np.float32)).ravel())[0, 1] > 0.8
    assert abs(np.corrcoef(here, self_similarity(np.roll(smooth, 9, axis=1)).ravel())[0, 1]) < 0.3


def test_a_constant_image_has_no_structure():
    assert (self_similarity(np.full((5, 5, 5), 3.0, np.float32)) == 1).all()


def test_turning_a_volume_permutes_its_channels():
    """The channels look along the axes: this is why volumes are turned before they are described."""
    quarter = self_similarity(np.ascontiguousarray(np.rot90(IMAGE, axes=(1, 2))))
    turned = np.rot90(self_similarity(IMAGE), axes=(2, 3))
    assert not np.allclose(quarter, turned, atol=1e-2)
    order = [int(np.argmin([np.abs(one - other).max() for other in turned])) for one in quarter]
    assert sorted(order) == list(range(12))
    np.testing.assert_allclose(quarter, turned[order], atol=2e-4)
