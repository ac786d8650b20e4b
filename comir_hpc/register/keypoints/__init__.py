"""Find the starts of a registration by keypoints: what looks alike in both volumes, and the motions that it agrees on.

==============  ==========================================================================
`extrema`       keypoints of volumes: extrema of differences of Gaussians
`spheres`       what a neighbourhood looks like, however it is turned, and how it is turned
`sift`          keypoints of slices: SIFT of scikit-image, in every channel
`channels`      channels that turn like a picture, of those that do not
`matches`       which keypoints are each other's nearest, and clearly so
`consensus`     maps that many matches agree on
==============  ==========================================================================

In a volume the scales are those at which its representation is made. The coarse ones show what both modalities share,
the finer ones place it better. All are tried. The starts are then improved on whole maps, like those of the global
search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from comir_hpc.config.register import RegisterSettings
from comir_hpc.host.progress import Progress, part_of
from comir_hpc.register.coarse import CoarseFeatures, coarsen
from comir_hpc.register.keypoints.channels import turnable
from comir_hpc.register.keypoints.consensus import FEWEST, Agreed, agreed, distinct
from comir_hpc.register.keypoints.extrema import matched
from comir_hpc.register.keypoints.matches import Matches
from comir_hpc.register.keypoints.sift import matched_slices, slice_spacing_mm
from comir_hpc.register.starts import Scale
from comir_hpc.representations.measures import Measure
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform

_WIDER = 1.5  # the second grid of keypoints of each scale, in voxels of the scale
_MOST_SCALES = 3
_FEWEST_KEYPOINTS = 12
_APART_VOX = 2.0  # answers nearer than that are one
_OF_ONE_SCALE = 8  # answers of one scale that are improved
_REMEDY = "use --initial global, which compares the whole volumes"


@dataclass(frozen=True, eq=False)
class FromKeypoints:
    """What keypoints say of a pair.

    Attributes
    ----------
    answers : list of Transform
        Maps from fixed to moving points that matches agree on, the best of each scale first.
    note : str
        How many keypoints, matches and agreeing ones there were, at the scale where most agreed.
    failure : str or None
        Why there is no answer; None if there is one.
    """

    answers: list[Transform]
    note: str = ""
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class _Seen:
    """Matches at one spacing, and the maps that they agree on."""

    spacing_mm: float
    matches: Matches
    answers: list[Agreed]

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sort by what agrees, then by matches, then by keypoints."""
        agreeing = self.answers[0].count if self.answers else 0
        return agreeing, len(self.matches), min(self.matches.num_fixed, self.matches.num_moving)

    @property
    def counted(self) -> str:
        found = self.matches
        return (
            f"{found.num_fixed} keypoints (fixed) and {found.num_moving} (moving) at {self.spacing_mm:.3g} mm"
        )


@dataclass(frozen=True, eq=False)
class KeypointFinder:
    """Find the maps that keypoints agree on.

    Attributes
    ----------
    settings : RegisterSettings
        Number of keypoints, the ratio of a match, and the kind of transform.
    measure : Measure
        How the two volumes are compared.
    points_mm : (N, 3)
        Fixed points at which distances between answers are measured.
    noun : str
        What is compared, in the plural, for messages.
    """

    settings: RegisterSettings
    measure: Measure
    points_mm: FloatArray
    noun: str

    def find(self, scales: Sequence[Scale], spacing_mm: float, progress: Progress | None) -> FromKeypoints:
        """Look at all scales, and sort the answers: the best one of each scale first, then the second ones.

        Parameters
        ----------
        scales : sequence of Scale
            Features at the scales that they were made at, the coarsest first and the compared ones last. The coarsest
            three are looked at.
        spacing_mm : float
            Side of a voxel of the keypoints if there is only one scale, in mm.
        progress : callable, optional
            Function that is called as ``progress(what, done, total)``.
        """
        planar = scales[-1].fixed.grid.planar
        places = list(_slices(scales[-1]) if planar else _spacings(scales[:_MOST_SCALES], spacing_mm))
        report, seen = part_of(progress, "search"), []
        for number, (scale, spacing) in enumerate(places):
            seen.append(self._at(scale, spacing, planar))
            if report is not None:
                report(number + 1, len(places))
        # Scales with more agreement come first. The sort is stable: of equal ones the coarser.
        seen.sort(key=lambda one: one.rank, reverse=True)
        longest = max(len(one.answers) for one in seen)
        answers = [one.answers[n].transform for n in range(longest) for one in seen if n < len(one.answers)]
        best = seen[0]
        if not answers:
            return FromKeypoints([], failure=self._failure(best))
        note = f"{best.counted}, {len(best.matches)} matches, of which {best.answers[0].count} agree on one motion"
        return FromKeypoints(answers, note)

    def _at(self, scale: Scale, spacing_mm: float, planar: bool) -> _Seen:
        sides: list[CoarseFeatures] = [coarsen(side, spacing_mm) for side in (scale.fixed, scale.moving)]
        fixed, moving = turnable(*sides, signed=self.measure.correlates)
        match = matched_slices if planar else matched
        matches = match(fixed, moving, self.settings.keypoints, self.settings.match_ratio)
        found = agreed(matches, spacing_mm, axes=2 if planar else 3, kind=self.settings.linear_transform)
        return _Seen(
            spacing_mm, matches, distinct(found, self.points_mm, _APART_VOX * spacing_mm, _OF_ONE_SCALE)
        )

    def _failure(self, best: _Seen) -> str:
        found = best.matches
        if min(found.num_fixed, found.num_moving) < _FEWEST_KEYPOINTS:
            return (
                f"{best.counted}, expected at least {_FEWEST_KEYPOINTS} in each: these {self.noun} show too few "
                f"distinct structures; {_REMEDY}"
            )
        if len(found) < FEWEST:
            return f"{best.counted}, and {len(found)} matches, expected at least {FEWEST}; {_REMEDY}"
        return (
            f"{best.counted}, {len(found)} matches, but no {FEWEST} of them agree on one motion; check that both "
            f"volumes show the same specimen, or {_REMEDY}"
        )


def _spacings(scales: Sequence[Scale], spacing_mm: float) -> Iterator[tuple[Scale, float]]:
    """List the grids on which keypoints of volumes are looked for, the coarsest first."""
    if len(scales) == 1:
        finer = max(spacing_mm / _WIDER, scales[0].spacing_mm)
        yield scales[0], spacing_mm
        if finer < spacing_mm:
            yield scales[0], finer
        return
    for scale in scales:
        yield scale, _WIDER * scale.spacing_mm
        yield scale, scale.spacing_mm


def _slices(scale: Scale) -> Iterator[tuple[Scale, float]]:
    """Choose the grid of slices: SIFT has scales of its own."""
    yield scale, slice_spacing_mm(scale.fixed, scale.spacing_mm)
