"""What needs no training: contrast is nothing to self-similarities and gradients, and turned volumes are found."""

import numpy as np
import pytest
from registration_cases import errors_vox, seen, specimen, store, turn
from scipy import ndimage

from comir_hpc.config import RegisterSettings
from comir_hpc.register import plan_register, register
from comir_hpc.representations.features import Features
from comir_hpc.representations.gradient import gradient_magnitude, normalised
from comir_hpc.representations.mind import self_similarity
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform

SHAPE = (40, 44, 36)
SEARCH = {"rotations": 300, "search_voxels": 20, "candidates": 4}


def gradients(image):
    return normalised(gradient_magnitude(image, Grid(image.shape, (1.0, 1.0, 1.0)), 1.2), image < np.inf)


@pytest.mark.parametrize(
    ("described", "smoothed", "atol"), [(self_similarity, 0, 2e-4), (gradients, 1, 2e-3)]
)
@pytest.mark.parametrize(("gain", "offset"), [(3.0, 7.0), (-1.0, 0.0), (-0.2, 100.0)])
def test_brightness_contrast_and_inversion_change_nothing(described, smoothed, atol, gain, offset):
    noise = np.random.default_rng(0).normal(size=(12, 13, 14))
    image = ndimage.gaussian_filter(noise, smoothed).astype(np.float32)
    one = described(image)
    assert one.min() >= 0
    assert 0.5 < one.max() <= 1
    np.testing.assert_allclose(described((gain * image + offset).astype(np.float32)), one, atol=atol)


@pytest.mark.parametrize(
    ("representation", "degrees", "given", "largest_vox"),
    [
        ("mind", 100, SEARCH, 0.2),
        # The search by correlation is that of test_representation_door.
        ("gradient", 12, {"initial": "identity"}, 0.3),
    ],
)
def test_a_turned_and_inverted_volume_is_registered(representation, degrees, given, largest_vox, tmp_path):
    grid = Grid(SHAPE, (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
    truth = Transform.rigid(turn(degrees), (2.0, -1.5, 1.0), grid.centre_mm)
    values, mask = specimen(brightness=4.0)
    moved = seen(values, grid, grid, truth)
    store(tmp_path / "fixed.zarr", values, grid)
    store(tmp_path / "moving.zarr", np.where(moved > 0.5, 9 - moved, 0).astype(np.float32), grid)
    settings = RegisterSettings(
        fixed=tmp_path / "fixed.zarr",
        moving=tmp_path / "moving.zarr",
        out=tmp_path / "out",
        representation=representation,
        threads=1,
        **given,
    )
    assert {"mind": "self-similarity", "gradient": "gradient magnitude"}[representation] in plan_register(
        settings
    )["fixed"]
    result = register(settings)
    assert errors_vox(result.transform, truth, Features(values[None], mask, grid)) < largest_vox
    # A start that is given may be trusted, too: the checks search everywhere, from another position.
    assert result.verdict == "PASS"
    if representation == "mind":
        assert result.result.probability > 0.9


@pytest.mark.parametrize(
    ("representation", "verdicts"), [("mind", ("WARN", "FAIL")), ("intensity", ("FAIL",))]
)
def test_specimens_that_share_only_their_outline_never_pass(representation, verdicts, tmp_path):
    """The same outline, other structures. Self-similarities agree on the outline, which is something."""
    grid = Grid(SHAPE, (1.0, 1.0, 1.0))
    for name, seed in (("fixed", 0), ("moving", 7)):
        store(tmp_path / f"{name}.zarr", specimen(seed=seed, brightness=4.0)[0], grid)
    result = register(
        RegisterSettings(
            fixed=tmp_path / "fixed.zarr",
            moving=tmp_path / "moving.zarr",
            out=tmp_path / "out",
            representation=representation,
            threads=1,
            **SEARCH,
        )
    )
    assert result.verdict in verdicts
