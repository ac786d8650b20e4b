"""Starts are improved before they are chosen: parts of a specimen, long ones, several scales, several channels."""

from dataclasses import replace

import numpy as np
import pytest
from registration_cases import errors_vox, features_pair, seen, specimen, stretched_pair, turn
from scipy import ndimage

from comir_hpc.register.alignment import Alignment
from comir_hpc.register.coarse import coarsen
from comir_hpc.register.global_search import search
from comir_hpc.register.long_specimens import axial_rotations, is_long
from comir_hpc.register.starts import Scale, StartFinder
from comir_hpc.representations import CORRELATION
from comir_hpc.representations.criteria import MaskedCorrelation
from comir_hpc.representations.features import Features
from comir_hpc.representations.mind import self_similarity
from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import reverse_axes, so3_grid
from comir_hpc.transforms import Transform

CENTRE = (22.0, 13.0, 39.0)
TRUTH = Transform.rigid(turn(137), (3.0, -2.0, 1.0), CENTRE)
ROTATIONS = reverse_axes(so3_grid(300))


def finder(fixed, count=4, voxels=20):
    points = fixed.grid.world_mm(np.argwhere(fixed.mask)[::50])
    return StartFinder(CORRELATION, points, count, voxels, 1)


def off(degrees=12.0, shift=(2.0, -1.5, 1.0)):
    return TRUTH.compose(Transform.rigid(turn(degrees, (1, -1, 2)), shift, CENTRE))


# ------------------------------------------------------------------------------------------- improving one answer


@pytest.mark.parametrize("kind", ["plain", "two channels", "described"])
def test_a_rough_answer_is_improved(kind):
    fixed, moving = features_pair(TRUTH)
    if kind == "two channels":
        fixed, moving = (
            replace(side, values=np.concatenate([side.values, ndimage.gaussian_filter(side.values**2, 1)]))
            for side in (fixed, moving)
        )
    if kind == "described":
        fixed, moving = (replace(side, describe=self_similarity) for side in (fixed, moving))
    alignment = Alignment(coarsen(fixed, 2.0), coarsen(moving, 2.0, finer=2))
    start = alignment.at(off())
    found = alignment.improve(off(), 15)
    assert errors_vox(off(), TRUTH, fixed) > 3
    assert errors_vox(found.transform, TRUTH, fixed) < 0.3
    assert found.evidence > start.evidence
    assert found.transform.is_rigid
    assert found.overlap > 0.9


def test_an_affine_answer_is_improved():
    truth, fixed, moving, start = stretched_pair(CENTRE)
    alignment = Alignment(coarsen(fixed, 1.5), coarsen(moving, 1.5, finer=2))
    rigid, affine = (alignment.improve(start, 25, kind).transform for kind in ("rigid", "affine"))
    assert errors_vox(affine, truth, fixed) < 0.15 < errors_vox(rigid, truth, fixed)


def test_evidence_is_the_correlation_of_the_overlap_and_volumes_apart_have_none():
    fixed, moving = features_pair(Transform.identity())
    alignment = Alignment(coarsen(fixed, 2.0), coarsen(moving, 2.0))
    same = alignment.at(Transform.identity())
    assert same.correlation == pytest.approx(1, abs=1e-3)
    assert same.overlap > 0.9
    away = alignment.improve(Transform.rigid(np.eye(3), (500.0, 0, 0), CENTRE))
    assert (away.correlation, away.overlap, away.steps) == (0.0, 0.0, 0)


# ------------------------------------------------------------------------------------------- starts


def test_most_starts_lead_to_the_truth():
    fixed, moving = features_pair(TRUTH)
    starts, found = finder(fixed).at_one_scale(Scale(fixed, moving), ROTATIONS, None)
    errors = [errors_vox(start, TRUTH, fixed) for start, _ in starts]
    assert errors[0] < 0.5
    assert sum(error < 1 for error in errors) >= 2  # half of four
    assert len(starts) == 4
    assert [score for _, score in starts[:2]] == sorted((score for _, score in starts[:2]), reverse=True)
    assert errors_vox(found.transform(int(found.scores.argmax())), TRUTH, fixed) > errors[0]


def test_the_rough_pass_finds_what_the_exact_one_does(monkeypatch):
    fixed, moving = (replace(side, describe=self_similarity) for side in features_pair(TRUTH))
    fast = search(fixed, moving, ROTATIONS[:150], voxels=12)
    monkeypatch.setattr(MaskedCorrelation, "rough", property(lambda self: self))
    slow = search(fixed, moving, ROTATIONS[:150], voxels=12)
    best = int(slow.scores.argmax())
    assert int(fast.scores.argmax()) == best
    assert fast.scores[best] == pytest.approx(slow.scores[best], abs=1e-5)
    assert np.allclose(fast.pivots_mm[best], slow.pivots_mm[best])
    assert np.corrcoef(fast.scores, slow.scores)[0, 1] > 0.9


def halved(features, axis=0, upper=False, padded=True):
    """Half of a specimen: the rest is padding (not known), or the grid ends there."""
    middle = features.mask.shape[axis] // 2
    part = slice(middle, None) if upper else slice(None, middle)
    keep = np.zeros(features.mask.shape, bool)
    keep[(slice(None),) * axis + (part,)] = True
    values = np.where(keep, features.values, 0)
    return replace(features, values=values, mask=features.mask & keep, known=keep if padded else None)


@pytest.mark.parametrize("which", ["fixed", "moving"])
def test_half_of_a_specimen_registers_to_the_whole(which):
    fixed, moving = features_pair(TRUTH)
    whole = fixed
    fixed, moving = (
        (halved(fixed), moving) if which == "fixed" else (fixed, halved(moving, axis=1, upper=True))
    )
    starts, _ = finder(fixed).at_one_scale(Scale(fixed, moving), ROTATIONS, None)
    assert errors_vox(starts[0][0], TRUTH, whole) < 1


def test_two_parts_that_overlap_by_two_thirds_register():
    fixed, moving = features_pair(TRUTH)
    whole, index = fixed, np.arange(fixed.mask.shape[2])
    upper = index >= 0.3 * len(index)
    fixed = replace(fixed, mask=fixed.mask & upper)
    along = fixed.grid.index_zyx(TRUTH.inverse().apply(moving.grid.world_mm(np.argwhere(moving.mask))))[:, 2]
    mask = np.zeros_like(moving.mask)
    mask[moving.mask] = along <= 0.75 * len(index)
    moving = replace(moving, mask=mask)
    starts, _ = finder(fixed).at_one_scale(Scale(fixed, moving), ROTATIONS, None)
    assert errors_vox(starts[0][0], TRUTH, whole) < 1


def test_scales_are_searched_from_coarse_to_fine():
    truth = TRUTH
    values, mask = specimen()
    grid = Grid(values.shape, (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))

    def scale(factor):
        shape = tuple(-(-n // factor) for n in grid.shape_zyx)
        coarse = Grid(shape, (float(factor),) * 3, grid.origin_xyz)
        blurred = ndimage.gaussian_filter(values, 0.5 * factor)
        sides = []
        for motion in (Transform.identity(), truth):
            inside = seen(mask.astype(np.float32), grid, coarse, motion) > 0.5
            sides.append(Features(seen(blurred, grid, coarse, motion)[None], inside, coarse))
        return Scale(*sides)

    fine = scale(1)
    starts, found, left = finder(fine.fixed).through_scales([scale(3), scale(2)], [scale(1)], ROTATIONS, None)
    assert left is None  # every scale shows the same
    assert errors_vox(starts[0][0], truth, fine.fixed) < 0.2
    assert found.spacing_mm == pytest.approx(4.5)  # one and a half voxels of the coarsest
    assert 2 <= len(starts) <= 4
    assert errors_vox(starts[-1][0], truth, fine.fixed) > 5  # a rival is kept, to measure the lead against


# ------------------------------------------------------------------------------------------- long specimens


def rod(truth):
    """A rod of 8 x 12 x 512 voxels with structures along it."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(12, 16, 520)), 1.5).astype(np.float32)
    mask = np.zeros(noise.shape, bool)
    mask[2:-2, 2:-2, 4:-4] = True
    values = np.where(mask, 3 + noise / noise.std(), 0).astype(np.float32)
    grid = Grid(values.shape, (1.0, 1.0, 1.0))
    onto = Grid(
        (520, 20, 24), (1.0, 1.0, 1.0), tuple((truth.apply(grid.centre_mm) - [11.5, 9.5, 259.5]).tolist())
    )
    inside = seen(mask.astype(np.float32), grid, onto, truth) > 0.5
    return Features(values[None], mask, grid), Features(seen(values, grid, onto, truth)[None], inside, onto)


def test_a_long_thin_specimen_is_found_end_to_end():
    truth = Transform.rigid(turn(90, (0, 1, 0)) @ turn(70, (1, 0, 0)), (3.0, -2.0, 40.0), (260.0, 8.0, 6.0))
    fixed, moving = rod(truth)
    assert is_long(fixed)
    rotations = axial_rotations(fixed, moving, 4000)
    assert rotations is not None
    assert len(rotations) == 360
    starts, _ = finder(fixed, voxels=32).at_one_scale(Scale(fixed, moving), rotations, None)
    assert errors_vox(starts[0][0], truth, fixed) < 2
    short, _ = features_pair(Transform.identity())
    assert axial_rotations(short, short, 10) is None
