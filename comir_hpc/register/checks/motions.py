"""Make small known motions of the fixed specimen along and about its main axes, and name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:
    from comir_hpc.register.checks.probe import Probe

_NAMES = ("long", "middle", "short")
_ALIKE = 1.15  # two main axes whose spreads differ by less cannot be told apart by their lengths


@dataclass(frozen=True, eq=False)
class Motion:
    """One way to move the specimen.

    Attributes
    ----------
    words : str
        The motion in words: "turning about the long axis".
    vector : (6,)
        Shift in mm and turn in radians, (x, y, z) each, that move points by 1 mm on average.
    centre_mm : (3,)
        Point that is turned about.
    """

    words: str
    vector: FloatArray
    centre_mm: FloatArray

    def by(self, distance_mm: float) -> Transform:
        """Make the motion that moves the specimen's points by so many mm on average."""
        shift, turn = np.split(distance_mm * self.vector, 2)
        return Transform.rigid(Rotation.from_rotvec(turn).as_matrix(), shift, self.centre_mm)


def main_motions(probe: Probe) -> list[Motion]:
    """Make the shifts along the main axes and the turns about them: six, or three of a slice in its plane."""
    axes, spreads = probe.axes
    middle = probe.points_mm.mean(axis=0)
    arms = probe.points_mm - middle
    found = []
    for number, axis in enumerate(axes.T):
        out_of_plane = probe.fixed.planar and abs(axis[2]) > 0.5
        words = axis_in_words(number, axis, spreads, probe.fixed.planar)
        if not out_of_plane:
            found.append(Motion(f"shifting along {words}", np.concatenate([axis, np.zeros(3)]), middle))
        reach = float(np.linalg.norm(np.cross(axis, arms), axis=1).mean())
        if reach > 0 and (out_of_plane or not probe.fixed.planar):
            about = "in the plane" if out_of_plane else f"about {words}"
            vector = np.concatenate([np.zeros(3), axis / reach])
            found.append(Motion(f"turning {about}", vector, middle))
    return found


def axis_in_words(number: int, axis: FloatArray, spreads: FloatArray, planar: bool) -> str:
    """Name a main axis by the specimen's shape, or by the world's axis that it is nearest to."""
    neighbours = [spreads[k] for k in (number - 1, number + 1) if 0 <= k < len(spreads)]
    own = max(float(spreads[number]), 1e-9)
    told = all(max(own, other) > _ALIKE * min(own, max(other, 1e-9)) for other in neighbours)
    if told and not planar:
        return f"the {_NAMES[number]} axis"
    nearest = int(np.argmax(np.abs(axis)))
    return f"the axis near {'xyz'[nearest]}"


def known_motions(probe: Probe, count: int, distance_mm: float, seed: int = 0) -> list[Transform]:
    """Draw motions of shifts and turns together, each of which moves points by about so many mm."""
    rng = np.random.default_rng(seed)
    motions = main_motions(probe)
    drawn = []
    for _ in range(count):
        weights = rng.normal(size=len(motions))
        weights /= np.linalg.norm(weights)
        vector = np.asarray(sum(w * m.vector for w, m in zip(weights, motions, strict=True)))
        drawn.append(Motion("", vector, motions[0].centre_mm).by(distance_mm))
    return drawn
