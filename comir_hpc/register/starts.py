"""Find the rough answers that are refined: search, improve the best answers quickly, and keep the most promising.

A search looks at one scale. Where a representation offers several (`Representation.searched_levels`), the coarsest is
searched first, on maps that were made at that scale: sharp maps that are averaged down lose what they show. The next
scale is searched, too, if the first left the choice open. Answers of both are then compared on the finer of the two,
which is the same measure for all.

The search tries a grid of rotations, and the truth lies between them. So many of its answers are improved by a few
Gauss-Newton steps each (`alignment`) before any is given up. Measured on heads (T1w to EPI): from 15 degrees and 10 mm
off, 12 of 12 came back to the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.host.progress import Progress, part_of
from comir_hpc.register.alignment import Aligned, Alignment
from comir_hpc.register.coarse import coarsen
from comir_hpc.register.global_search import (
    FAR_VOXELS,
    Search,
    choose_starts,
    distinct,
    search,
    search_spacing_mm,
)
from comir_hpc.representations.features import Features
from comir_hpc.representations.measures import Measure
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform

Start = tuple[Transform, float | None]

_IMPROVED = 64  # answers of one search that are improved
_APART_VOX = 1.5  # distance from which they count as different, in voxels of the search
_FINER = 0.8  # voxel on which they are improved, in voxels of the search
_OWN_SCALE = 1.5  # voxel of the search, in voxels of maps that were made for it
# Lead over the best other answer, from which the next scale is not searched. Right answers on T1w to EPI had 0.23 to
# 0.37; without a right one among them the best two differed by less than 0.05.
_CLEAR = 0.15
# Rivals are not further from each other than this share of the longest side: half a turn moves a ball by 0.4 of it.
_FAR_SHARE = 0.3
_STEPS, _MORE_STEPS = 8, 12
# Share of a scale's evidence below which the next finer scale is not followed. Right answers on T1w to EPI kept 0.8 to
# 0.9 of it. On a smooth template (T1 to EPI, 8 mm) 0.6 was left, and the answer moved from 3 mm to 13 mm off the truth.
_LOST = 0.7
# Rotations that are scored exactly after a rough look by mutual information. On T1w to EPI the best 8 of 4000
# were among the first 168 of the rough look.
_CLOSER = 256
_FINEST = 4  # answers that are improved on the finest grid, where a step takes long
# Voxels along the longest side at which all rotations are tried. If more are asked for, the best answers are improved
# on so many: an FFT of twice the side takes ten times as long.
_MOST_SEARCHED = 28


@dataclass(frozen=True, eq=False)
class Scale:
    """Features of both volumes, made on grids of one spacing.

    Maps that were made at a coarse spacing are not the fine ones averaged. So every scale has features of its own.

    Attributes
    ----------
    fixed, moving : Features
        Features of the two volumes, with the same number of channels.
    """

    fixed: Features
    moving: Features

    @property
    def spacing_mm(self) -> float:
        """Finest spacing of both grids."""
        return min(self.fixed.grid.finest_mm, self.moving.grid.finest_mm)


@dataclass(frozen=True, eq=False)
class Initial:
    """Where the refinement starts.

    Attributes
    ----------
    starts : list of (transform, score)
        Rough answers, the most promising first.
    search : Search or None
        Landscape of the search that they come from; None without one.
    left : int or None
        Level that the answers were left at, because finer ones show too little; None if it is the compared one.
    notes : tuple of str
        What the user should know, in sentences.
    failure : str or None
        Why there is no start; None if there is one.
    """

    starts: list[Start]
    search: Search | None = None
    left: int | None = None
    notes: tuple[str, ...] = ()
    failure: str | None = None

    def require_any(self) -> None:
        """Refuse to go on without a start.

        Raises
        ------
        RegistrationError
            If there is none.
        """
        if self.failure is not None:
            raise RegistrationError(self.failure)


@dataclass(frozen=True, eq=False)
class StartFinder:
    """Find the starts of one pair.

    It holds what does not change from scale to scale. Each scale brings features of its own.

    Attributes
    ----------
    measure : Measure
        How the two volumes are compared.
    points_mm : (N, 3)
        Fixed points at which distances between answers are measured.
    count : int
        Number of starts that are wanted.
    voxels : int
        Voxels along the longest side of the fixed specimen, on which answers are told apart.
    threads : int
        Number of threads.
    """

    measure: Measure
    points_mm: FloatArray
    count: int
    voxels: int
    threads: int

    def at_one_scale(
        self, scale: Scale, rotations_xyz: FloatArray, progress: Progress | None
    ) -> tuple[list[Start], Search]:
        """Search features averaged to the scale of the search."""
        improves = self.measure.correlates and not scale.fixed.grid.planar
        voxels = min(self.voxels, _MOST_SEARCHED) if improves else self.voxels
        found = search(
            scale.fixed, scale.moving, rotations_xyz, voxels=voxels, measure=self.measure,
            closer=0 if self.measure.correlates else _CLOSER,  # what is improved is scored exactly anyway
            threads=self.threads, progress=part_of(progress, "search"),
        )  # fmt: skip
        if not self.measure.correlates:
            chosen = choose_starts(found, self.points_mm, self.count)
            return [(found.transform(index), float(found.scores[index])) for index in chosen], found
        improved = self._improved(scale, _FINER * found.spacing_mm, self._candidates(found))
        if self.voxels > voxels:
            wanted = [one.transform for one in improved[: 4 * self.count]]
            improved = self._improved(scale, found.spacing_mm * voxels / self.voxels, wanted)
        return self._chosen(improved, self._far_mm(found.spacing_mm)), found

    def through_scales(
        self,
        searched: Sequence[Scale],
        finer: Sequence[Scale],
        rotations_xyz: FloatArray,
        progress: Progress | None,
    ) -> tuple[list[Start], Search, Scale | None]:
        """Search at one or two scales, coarse ones first, and carry the answers through the finer ones.

        Finer maps are followed while they show the same. Where the evidence falls off, what they show is not in both
        volumes: a smooth volume has no fine structure.

        Returns
        -------
        starts, search
            What was found, and the landscape of the coarsest search.
        scale : Scale or None
            Scale at which the answers were left, because the next finer one shows too little; None if all were
            followed.
        """
        pool: list[Aligned] = []
        first: Search | None = None
        far_mm = self._far_mm(search_spacing_mm(searched[0].fixed, self.voxels))
        before: tuple[list[Aligned], Scale] | None = None
        for number, scale in enumerate(searched):
            if number:
                before = pool, searched[number - 1]
                pool = self._carried(scale, pool, far_mm, 2 * self.count)
                if self._clear(pool, far_mm) and not _is_lost(pool, before[0]):
                    continue
            spacing = max(search_spacing_mm(scale.fixed, self.voxels), _OWN_SCALE * scale.spacing_mm)
            found = search(
                scale.fixed, scale.moving, rotations_xyz[number :: len(searched)], voxels=self.voxels,
                measure=self.measure, spacing_mm=spacing, threads=self.threads,
                progress=part_of(progress, "search"),
            )  # fmt: skip
            first = first or found
            improved = self._improved(scale, _FINER * spacing, self._candidates(found))
            if number:
                improved = self._carried(scale, improved, far_mm, 2 * self.count)
            pool = sorted(pool + improved, key=lambda one: -one.evidence)
            if before is not None and _is_lost(pool, before[0]):
                return self._chosen(before[0], far_mm), first, before[1]
        assert first is not None
        starts, left = self._followed(pool, searched[-1], finer, far_mm)
        return starts, first, left

    def from_answers(
        self,
        answers: Sequence[Transform],
        searched: Sequence[Scale],
        finer: Sequence[Scale],
        spacing_mm: float,
        steps: int = _MORE_STEPS,
    ) -> tuple[list[Start], Scale | None]:
        """Improve answers that come from elsewhere, and carry them through the finer scales.

        Parameters
        ----------
        answers : sequence of Transform
            Rough answers, the most promising first.
        searched, finer : sequence of Scale
            Coarse scales, and the finer ones down to the compared one; without coarse ones, only the latter.
        spacing_mm : float
            Side of a voxel on which answers are improved if there are no coarse scales, in mm.
        steps : int
            Most steps that improve an answer on the last coarse scale.

        Returns
        -------
        starts
            The most promising ones, the best first.
        scale : Scale or None
            Scale at which they were left, as in `through_scales`.
        """
        if not self.measure.correlates:
            return [(answer, None) for answer in answers[: self.count]], None
        if not searched:
            improved = self._improved(finer[-1], _FINER * spacing_mm, answers)
            return self._chosen(improved, self._far_mm(spacing_mm)), None
        last = searched[-1]
        pool = self._improved(last, last.spacing_mm, answers, steps)
        return self._followed(pool, last, finer, self._far_mm(_OWN_SCALE * last.spacing_mm))

    # ------------------------------------------------------------------ parts

    def _followed(
        self, pool: Sequence[Aligned], last: Scale, finer: Sequence[Scale], far_mm: float
    ) -> tuple[list[Start], Scale | None]:
        """Carry answers through finer scales, as long as these show the same."""
        for number, scale in enumerate(finer):
            is_finest = number == len(finer) - 1
            carried = self._carried(
                scale, pool, far_mm, max(_FINEST, self.count // 2) if is_finest else self.count
            )
            if _is_lost(carried, pool):
                return self._chosen(pool, far_mm), last
            pool, last = carried, scale
        return self._chosen(pool, far_mm), None

    def _far_mm(self, spacing_mm: float) -> float:
        """Choose the distance from which answers are rivals."""
        longest = float(np.ptp(self.points_mm, axis=0).max())
        return min(FAR_VOXELS * spacing_mm, _FAR_SHARE * longest)

    def _candidates(self, found: Search) -> list[Transform]:
        separation = _APART_VOX * found.spacing_mm
        return [found.transform(index) for index in distinct(found, self.points_mm, _IMPROVED, separation)]

    def _improved(
        self, scale: Scale, spacing_mm: float, answers: Sequence[Transform], steps: int = _STEPS
    ) -> list[Aligned]:
        """Improve answers at a scale, and sort them, the best first."""
        alignment = Alignment(coarsen(scale.fixed, spacing_mm), coarsen(scale.moving, spacing_mm, finer=2))
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(lambda answer: alignment.improve(answer, steps), answers))
        return sorted(found, key=lambda one: -one.evidence)

    def _clear(self, answers: Sequence[Aligned], far_mm: float) -> bool:
        """Say whether the best answer leads clearly."""
        rivals = self._apart(answers, far_mm, 2)
        best, rival = rivals[0].evidence, rivals[1].evidence if len(rivals) > 1 else 0.0
        return best > 0 and 1 - rival / best >= _CLEAR

    def _apart(self, answers: Sequence[Aligned], far_mm: float, count: int) -> list[Aligned]:
        chosen: list[Aligned] = []
        for one in answers:
            if len(chosen) == count:
                break
            distances = [
                one.transform.distance_mm(other.transform, self.points_mm).mean() for other in chosen
            ]
            if all(distance >= far_mm for distance in distances):
                chosen.append(one)
        return chosen

    def _carried(self, scale: Scale, answers: Sequence[Aligned], far_mm: float, count: int) -> list[Aligned]:
        """Improve the most promising answers of a coarser scale at a finer one."""
        kept = self._promising(answers, far_mm, count, 0.5 * scale.spacing_mm)
        return self._improved(scale, scale.spacing_mm, [one.transform for one in kept], _MORE_STEPS)

    def _promising(
        self, answers: Sequence[Aligned], far_mm: float, count: int, near_mm: float = 0.0
    ) -> list[Aligned]:
        """Choose answers: half of them the best, and half the best that are far from each other.

        How many of the best lead to one answer says how sure it is. But those at least `near_mm` apart come first: a
        scale may have a second optimum beside the right one. Without a rival, nothing says how much better the winner
        is.
        """
        half = (count + 1) // 2
        chosen = self._apart(answers, near_mm, half)
        for candidates in (answers, self._apart(answers, far_mm, count)):
            for one in candidates:
                if len(chosen) < half and not any(one is other for other in chosen):
                    chosen.append(one)
            half = count
        return sorted(chosen, key=lambda one: -one.evidence)

    def _chosen(self, answers: Sequence[Aligned], far_mm: float) -> list[Start]:
        return [(one.transform, one.evidence) for one in self._promising(answers, far_mm, self.count)]


def _is_lost(finer: Sequence[Aligned], coarser: Sequence[Aligned]) -> bool:
    """Say whether the best answer of a finer scale has too little of the evidence that there was at the coarser one."""
    return finer[0].evidence < _LOST * coarser[0].evidence
