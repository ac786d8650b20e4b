"""`comir-hpc view`: one page, without anything from elsewhere, that shows volumes on top of each other.

It is a page and not a server: it can be opened on any machine, sent to somebody, or copied from a cluster, and nothing
listens on a port. So the volumes are in it, at a level that fits.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from comir_hpc.config.view import ViewSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.host.files import write_text
from comir_hpc.host.places import require_apart
from comir_hpc.host.progress import Progress
from comir_hpc.recipes.scene import Layer, Scene, scene_of
from comir_hpc.runs.result import RESULT_FILE
from comir_hpc.space.grid import MM_PER_UNIT, Grid
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.conventions.grids import ras_from_index
from comir_hpc.transforms.itk import itk_displacements
from comir_hpc.transforms.protocol import PointMap

NIIVUE = "niivue-0.69.0.umd.js"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
_FIELD_SIDE = 40  # samples of a bent transform along the longest side of the fixed grid
_GZIP_LEVEL = 4
# What the viewer reads exactly; everything else becomes float64, which keeps integers up to 2^53.
_TYPES = ("uint8", "int16", "uint16", "int32", "float32", "float64")


@dataclass(frozen=True)
class Viewed:
    """A page that was written.

    The page holds the volumes at a level that fits. The notes say which it is, and what is not shown.

    Attributes
    ----------
    path : Path
        Path of the page.
    notes : tuple of str
        What is shown, and what is not, in sentences.
    """

    path: Path
    notes: tuple[str, ...] = ()


def view(settings: ViewSettings, *, progress: Progress | None = None) -> Viewed:
    """Write the page.

    Raises
    ------
    ConfigError
        If results and volumes are mixed, or the output is an input.
    VolumeError
        If a volume cannot be read or does not fit into memory, or something is at the place of the page.
    RegistrationError
        If the result of a registration cannot be read.
    """
    out = page_path(settings)
    require_apart(out, *(path for path in settings.shown if not (path / RESULT_FILE).is_file()))
    if out.exists() and not settings.overwrite and not _is_ours(out):
        raise VolumeError(
            f"{out} exists and is no page of `comir-hpc view`; choose another --out, or pass --overwrite"
        )
    with tempfile.TemporaryDirectory() as spare:
        scene = scene_of(settings, Path(spare), progress)
        text = _page(scene)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    except OSError as error:
        raise VolumeError(
            f"{out} cannot be written ({error.strerror or error}); give another --out"
        ) from error
    return Viewed(out, tuple(scene.notes))


def plan_view(settings: ViewSettings) -> dict[str, Any]:
    """Say what `view` would write."""
    return {"shown": ", ".join(map(str, settings.shown)), "page": str(page_path(settings))}


def page_path(settings: ViewSettings) -> Path:
    """Return where the page goes."""
    first = settings.shown[0]
    if settings.out is not None:
        if settings.out.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"--out {settings.out}: a page is written; expected a name that ends in .html")
        return settings.out
    if (first / RESULT_FILE).is_file():
        return first / "view.html"
    name = first.absolute().name.split(".")[0] or "volume"
    return first.absolute().parent / f"{name}-view.html"


def _is_ours(path: Path) -> bool:
    try:
        return path.is_file() and b'id="content"' in path.read_bytes()
    except OSError:
        return False


def _page(scene: Scene) -> str:
    first, *others = scene.layers
    unit = first.grid.unit
    factor = MM_PER_UNIT[unit]
    same = all(one.grid.agrees_with(first.grid) for one in others)
    board = np.zeros(first.grid.shape_zyx, np.float32)
    content = {
        "unit": {"millimeter": "mm", "micrometer": "um", "nanometer": "nm", "centimeter": "cm"}.get(
            unit, "m"
        ),
        "mmPerUnit": factor,
        "fixed": _record(first, factor),
        "over": [_record(one, factor) for one in others],
        "first": scene.first,
        "sameGrid": same,
        "board": _nifti(board, first.grid, factor) if same and others else "",
        "notes": scene.notes,
        **_motion(scene.transform, first.grid),
    }
    parts: dict[str, Callable[[], str]] = {
        "@TITLE@": lambda: html.escape(scene.title),
        # In a script element, only its own end tag could end it.
        "@NIIVUE@": lambda: _niivue().replace("</script", "<\\/script"),
        "@CONTENT@": lambda: json.dumps(content).replace("<", "\\u003c"),
    }
    text = (files("comir_hpc") / "recipes" / "viewer" / "view.html").read_text(encoding="utf-8")
    for mark, part in parts.items():
        text = part().join(text.split(mark))
    return text


def _niivue() -> str:
    content = (files("comir_hpc") / "recipes" / "viewer" / NIIVUE).read_bytes()
    if hashlib.sha256(content).hexdigest() != NIIVUE_SHA256:
        raise VolumeError(f"{NIIVUE} is not the file that came with comir-hpc; install the package again")
    return content.decode()


def _record(layer: Layer, factor: float) -> dict[str, Any]:
    return {
        "name": layer.name,
        "labels": layer.labels,
        "window": layer.window,
        "classes": layer.classes,
        "nifti": _nifti(layer.values, layer.grid, factor),
    }


def _nifti(values: NDArray[Any], grid: Grid, factor: float) -> str:
    """Return a volume (z, y, x) as NIfTI, compressed, in base64; lengths are in units of `factor` mm."""
    dtype = (
        values.dtype.name if values.dtype.name in _TYPES else "uint8" if values.dtype == bool else "float64"
    )
    dtype = "float32" if values.dtype == np.float16 else dtype
    matrix = ras_from_index(grid)
    # The viewer draws in mm: lengths of micrometres would be too small for it.
    matrix[:3] /= factor
    make: Any = nibabel.Nifti1Image
    image = make(np.asarray(values.transpose(2, 1, 0), dtype=dtype), matrix)
    # Compressed with a time of 0, the same volumes give the same page.
    return base64.b64encode(gzip.compress(image.to_bytes(), _GZIP_LEVEL, mtime=0)).decode()


def _motion(transform: PointMap | None, grid: Grid) -> dict[str, Any]:
    """Describe how far points go: a matrix, or samples of the displacement in mm, LPS."""
    if transform is None:
        return {}
    whole = as_affine(transform)
    if whole is not None:
        return {"matrix": whole.matrix_mm.tolist()}
    factors = [max(1, math.ceil(n / _FIELD_SIDE)) for n in grid.shape_zyx]
    coarse = grid.downsampled(factors)
    import SimpleITK as sitk

    vectors = sitk.GetArrayFromImage(itk_displacements(transform, coarse))
    return {
        "field": {
            "shape": list(coarse.shape_zyx),
            "indexFromLps": np.linalg.inv(coarse.matrix_mm).tolist(),
            "values": np.round(vectors.astype(np.float64), 4).ravel().tolist(),
        }
    }
