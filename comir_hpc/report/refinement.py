"""The field that refines a registration block by block: figures, pictures, and a map of what became of the blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comir_hpc.report.contents import Contents
from comir_hpc.report.deformation import deformation_pictures
from comir_hpc.report.panels import PlanePictures
from comir_hpc.report.wording import Number, figure
from comir_hpc.runs.pictures import Arrays, Picture, png_uri, upright
from comir_hpc.runs.refinement import RefinementRecord

# By the number of the state: no content, refused, fell back, kept. Apart for the colour-blind.
_COLOURS = np.array([(0.2, 0.2, 0.2), (0.8, 0.1, 0.4), (0.95, 0.6, 0.1), (0.1, 0.5, 0.85)], dtype=np.float32)
_MAP = "what became of every block: blue kept, orange fell back, red refused, grey without specimen"


def describe_refinement(
    contents: Contents, direction: NDArray[np.float64] | None = None
) -> dict[str, Any] | None:
    """Describe the field; None where the registration was not refined.

    Parameters
    ----------
    contents : Contents
        What the folder holds.
    direction : (3, 3), optional
        ITK direction of the fixed grid, by which planes are turned upright.
    """
    record = contents.refinement
    if record is None:
        return None
    return {
        "field": record.field,
        "sentence": _sentence(record),
        "folds": record.folded_points,
        "numbers": _numbers(record),
        "planes": _planes(contents.panels or {}, contents.refined or {}, direction),
    }


def _sentence(record: RefinementRecord) -> str:
    states = record.states
    return (
        f"Of {sum(states.values())} blocks {states.get('kept', 0)} were kept. {states.get('fell back', 0)} did not "
        f"improve by more than chance and {states.get('refused', 0)} were refused: they keep the answer of the "
        f"registration. {states.get('no content', 0)} hold no specimen."
    )


def _numbers(record: RefinementRecord) -> list[Number]:
    size = " × ".join(map(str, record.core_voxels))
    change = f"{figure(record.before)} → {figure(record.after)}"
    most = f"mean over the blocks with specimen; at most {figure(record.largest_mm)} mm"
    return [
        Number("Smoothness", f"{figure(record.smoothness_mm)} mm", f"{record.compared} were compared"),
        Number(
            "Blocks", f"{size} voxels", f"of {figure(record.spacing_mm)} mm, without what neighbours share"
        ),
        Number("Held out", change, "agreement of the cubes in blocks that were kept"),
        Number("Displacement", f"{figure(record.displacement_mm)} mm", most),
        Number("Folds", str(record.folded_points), f"least determinant {figure(record.least_determinant)}"),
        Number("Inverse", f"{figure(record.inverse_residual_mm)} mm", "mean of there and back"),
    ]


def _planes(panels: Arrays, refined: Arrays, direction: NDArray[np.float64] | None) -> list[PlanePictures]:
    """Make the pictures of a deformation with the map of states beside them."""
    columns = np.eye(3) if direction is None else np.asarray(direction, dtype=np.float64)
    planes = []
    for plane in deformation_pictures(panels, refined, direction):
        states = refined.get(f"{plane.name}_state")
        if states is None or states.shape != panels[f"{plane.name}_fixed"].shape:
            planes.append(plane)
            continue
        beside = plane.pictures["magnitude"]
        chosen = np.clip(np.nan_to_num(states), 0, len(_COLOURS) - 1).astype(int)
        colours = upright(_COLOURS[chosen], plane.name, columns)
        image = Image.fromarray(np.round(255 * colours).astype(np.uint8))
        drawn = np.asarray(image.resize((beside.width, beside.height), Image.Resampling.NEAREST)) / 255
        picture = Picture(png_uri(drawn), beside.width, beside.height, _MAP)
        planes.append(replace(plane, pictures={**plane.pictures, "state": picture}))
    return planes
