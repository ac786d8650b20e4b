"""Recognise by name what is often wrong with a pair: another size, a sliver of overlap, a specimen alike when turned.

A cause never raises a verdict. It is said where the evidence for it is clear, so that the user knows where to look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from comir_hpc.register.alignment import Alignment
from comir_hpc.register.coarse import CoarseFeatures, coarsen
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:
    from comir_hpc.register.checks.measured import Measured
    from comir_hpc.register.checks.probe import Probe

_SLIVER = 0.5  # overlap below which the agreement is that of less than half of the smaller specimen
_OTHER_SIZE = 1.08  # a scaling that is named, if evidence grows with it
_GROWS = 1.15
_ABSURD_SIZE = 1.6  # ratio of the specimens' sizes that no partial view explains by itself
_ALIKE = 0.5  # self-likeness of a specimen under the motion between two answers
_UNDETERMINED = 0.02  # share of the agreement; see `Measured.loosest`
_NOTHING = 4.0  # standard deviations above chance, below which the volumes have nothing in common
_AFFINE_STEPS = 8
CLOSE = 0.25
"""Relative lead below which two answers agree nearly as well."""

FOUND_VOX = 3.0
"""Distance in voxels of the checks within which a search has found what it looked for."""


@dataclass(frozen=True)
class Cause:
    """Something that is probably wrong, or not determined, with a pair.

    Attributes
    ----------
    name : str
        A short name, as it is written to result.json.
    sentence : str
        What was found, and where to look.
    """

    name: str
    sentence: str


def causes_of(
    probe: Probe, answer: Transform, measured: Measured, rival: Transform | None = None
) -> list[Cause]:
    """List the causes that the evidence allows to name.

    Parameters
    ----------
    rival : Transform, optional
        The best other answer.
    """
    found = []
    if measured.overlap < _SLIVER:
        found.append(
            Cause(
                "sliver",
                f"only {100 * measured.overlap:.0f} % of the smaller specimen overlaps: most of what one volume shows "
                "is not in the other",
            )
        )
    if measured.loosest < _UNDETERMINED:
        found.append(Cause("loose", f"{measured.loosest_words} is not determined by what both volumes show"))
    if size := _other_size(probe, answer):
        found.append(size)
    if rival is not None and measured.margin is not None and measured.margin < CLOSE:
        likeness = _self_likeness(probe, answer, rival)
        if likeness > _ALIKE:
            turn = rival.inverse().compose(answer).rotation_deg
            found.append(
                Cause(
                    "symmetric",
                    f"the specimen looks much alike after a turn by {turn:.0f} degrees, and both answers agree nearly "
                    "as well",
                )
            )
    blind = measured.itself is not None and measured.itself > FOUND_VOX
    if blind:
        found.append(
            Cause(
                "blind",
                "the method does not find the moving volume in a turned copy of itself: it cannot see this specimen, "
                "which is too smooth, too noisy or alike when turned; try another --representation, or train encoders",
            )
        )
    if measured.chance is not None and measured.chance < _NOTHING:
        sees = measured.itself is not None and not blind
        found.append(
            Cause(
                "unrelated",
                "nothing that the two volumes show agrees in this place more than by chance: two specimens, two "
                "parts of one, or contrasts that have nothing in common"
                + (
                    " (the method itself sees the moving volume: it finds it in a turned copy)"
                    if sees
                    else ""
                ),
            )
        )
    return found


def _other_size(probe: Probe, answer: Transform) -> Cause | None:
    """Find out whether one specimen is larger than the other, which a rigid motion cannot mend."""
    volumes = [_volume(side) for side in (probe.fixed, probe.moving)]
    axes = 2 if probe.fixed.planar else 3
    ratio = (volumes[1] / volumes[0]) ** (1 / axes)
    if max(ratio, 1 / ratio) > _ABSURD_SIZE:
        return Cause(
            "size",
            f"the moving specimen is {ratio:.2g} times as large as the fixed one along each side: check the spacings "
            "and units of both files, or it is another part",
        )
    rigid = probe.alignment.at(answer)
    scaled = probe.alignment.improve(answer, _AFFINE_STEPS, "affine")
    factor = float(abs(np.linalg.det(scaled.transform.matrix_mm[:3, :3])) ** (1 / axes))
    if max(factor, 1 / factor) > _OTHER_SIZE and scaled.evidence > _GROWS * max(rigid.evidence, 0.0):
        return Cause(
            "scale",
            f"the volumes agree better if the moving one is {factor:.2f} times as large: check its spacing, or allow "
            "--transform affine",
        )
    return None


def _volume(side: CoarseFeatures) -> float:
    weights, frame = side.weights, side.frame
    step = abs(float(np.linalg.det(frame)))
    if len(weights) == 1:
        step = float(np.linalg.norm(frame[:, -1]) ** 2)
    return float(weights.sum(dtype=np.float64)) * step


def _self_likeness(probe: Probe, answer: Transform, rival: Transform) -> float:
    """Correlate the fixed volume with itself, moved as one answer has to be moved to become the other."""
    itself = Alignment(probe.fixed, coarsen(probe.sides[0], probe.spacing_mm, finer=2))
    return itself.improve(rival.inverse().compose(answer).about(itself.centre_mm), 4).correlation
