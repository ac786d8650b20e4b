"""Say in a sentence what was measured of an answer, with its unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from comir_hpc.register.checks.calibration import Spread
    from comir_hpc.register.checks.measured import Measured


_NOTHING_VOX = 1e-6  # distances below it are what rounding leaves
UNITS = {
    "agreement": "correlation",
    "chance": "standard deviations",
    "information": "standard deviations",
    "margin": "share",
    "overlap": "share",
    "settled": "mm",
    "halves": "mm",
    "undone": "mm",
    "swapped": "mm",
    "second": "mm",
    "loosest": "share",
    "mirror": "share",
    "again": "mm",
    "itself": "mm",
}
"""Unit of every piece of evidence, by its name; distances are written in mm."""

TITLES = {
    "agreement": "agreement",
    "chance": "agreement above chance",
    "information": "information above chance",
    "margin": "lead over the best other answer",
    "overlap": "overlap",
    "settled": "moved by more steps",
    "halves": "halves apart",
    "undone": "known motions undone",
    "swapped": "roles swapped",
    "second": "second criterion",
    "loosest": "loosest motion",
    "mirror": "lead over the mirror",
    "again": "found again",
    "itself": "found in itself",
}


@dataclass(frozen=True)
class Piece:
    """One piece of evidence as it is written down and shown.

    Attributes
    ----------
    name : str
        Name of the number in `Measured`.
    value : float or None
        The number in `unit`; None if it could not be measured.
    unit : str
        Unit of the value.
    sentence : str
        What it says, in a sentence without a full stop.
    title : str
        What it is, in a few words.
    right, wrong : tuple of float
        Values of right and of wrong answers in the calibration, in `unit`: their 5th, 25th, 50th, 75th and 95th
        percentile; empty where none is known.
    """

    name: str
    value: float | None
    unit: str
    sentence: str
    title: str = ""
    right: tuple[float, ...] = ()
    wrong: tuple[float, ...] = ()


def pieces_of(
    measured: Measured, voxel_mm: float, compared: str, spreads: Mapping[str, Spread] | None = None
) -> list[Piece]:
    """Put every number that was measured into words.

    Parameters
    ----------
    voxel_mm : float
        Side of a voxel of the checks.
    compared : str
        What was compared, in the plural.
    spreads : mapping, optional
        What right and wrong answers of the calibration had, by the name of the number.
    """
    found = []
    for name, unit in UNITS.items():
        scale = voxel_mm if unit == "mm" else 1.0
        value = getattr(measured, name)
        if value is not None:
            # What is left of a distance by rounding is no distance: "1e-14 mm" tells a reader nothing.
            value = 0.0 if unit == "mm" and abs(value) < _NOTHING_VOX else value * scale
        known = (spreads or {}).get(name)
        right, wrong = ((), ()) if known is None else (known.right, known.wrong)
        found.append(
            Piece(
                name=name,
                value=value,
                unit=unit,
                sentence=sentence(name, value, measured.loosest_words, compared),
                title=TITLES[name],
                right=tuple(scale * one for one in right),
                wrong=tuple(scale * one for one in wrong),
            )
        )
    return found


def deviation_piece(times: float) -> Piece:
    """Put into words how far the maps' statistics are from those of training."""
    return Piece(
        name="deviation",
        value=times,
        unit="times",
        sentence=f"the maps vary {times:.2g} times as much as those of the encoders' training",
        title="spread of the maps",
    )


def sentence(name: str, value: float | None, loosest: str, compared: str) -> str:
    """Say what one number means; distances are in mm."""
    if value is None:
        return _UNMEASURED[name]
    percent = f"{100 * value:.0f} %"
    texts = {
        "agreement": f"on the grid of the checks the {compared} correlate at {value:.2f}",
        "chance": f"the agreement lies {value:.0f} standard deviations above that of the same volumes with their "
        "blocks dealt out anew",
        "information": "the mutual information of the intensities lies "
        f"{value:.0f} standard deviations above that of the same volumes with their blocks dealt out anew",
        "margin": f"it leads the best other answer by {percent}"
        if value >= 0
        else f"another answer agrees better, by {-100 * value:.0f} %",
        "overlap": f"{percent} of the smaller specimen overlaps",
        "settled": f"more steps on the grid of the checks move it by {value:.2g} mm",
        "halves": f"two halves registered apart end {value:.2g} mm from each other",
        "undone": f"moved away by known motions it comes back to {value:.2g} mm",
        "swapped": f"with the roles of the volumes exchanged it ends {value:.2g} mm away",
        "second": f"a second criterion, which found no part of it, has its optimum {value:.2g} mm away",
        "loosest": f"{loosest} by two voxels of the checks loses {percent} of the agreement, the least of all motions",
        "mirror": f"it leads the mirrored moving volume by {percent}"
        if value >= 0
        else f"the mirrored moving volume agrees better, by {-100 * value:.0f} %",
        "again": f"a repeated search, from another position, ends {value:.2g} mm away",
        "itself": "the method finds the moving volume in a turned copy of itself, with new noise, to "
        f"{value:.2g} mm",
    }
    return texts[name]


_UNMEASURED = {
    **dict.fromkeys(UNITS, "this could not be measured"),
    "chance": "the specimens share too few blocks to say how likely chance is",
    "information": "the specimens share too few blocks to say how likely chance is",
    "margin": "no other answer was there to compare this one with",
    "halves": "a half of the specimen alone cannot be registered",
    "swapped": "the volumes cannot be compared with their roles exchanged",
    "mirror": "the mirrored moving volume was not searched",
    "again": "the search was not repeated",
    "itself": "the method was not tried on a copy of the moving volume",
}
