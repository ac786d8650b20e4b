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
from comir_hpc.errors import ConfigError, RegistrationError, VolumeError
from comir_hpc.host.files import write_text
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.host.places import require_apart
from comir_hpc.host.progress import Progress
from comir_hpc.recipes.stores import as_store
from comir_hpc.runs.result import RESULT_FILE, Result, read_result
from comir_hpc.space.grid import MM_PER_UNIT, Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.conventions.grids import ras_from_index
from comir_hpc.transforms.files import read_transform
from comir_hpc.transforms.itk import itk_displacements
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.volumes.volume import Volume

NIIVUE = "niivue-0.69.0.umd.js"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
_MOST_OVER = 5  # volumes that lie on the first one
_FIELD_SIDE = 40  # samples of a bent transform along the longest side of the fixed grid
_COPIES = 6  # copies of a volume in float32 that exist while it is written
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


@dataclass(frozen=True, eq=False)
class _Layer:
    name: str
    values: NDArray[Any]
    grid: Grid
    labels: bool
    window: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class _Scene:
    title: str
    layers: list[_Layer]
    transform: PointMap | None
    notes: list[str]


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
        scene = _scene(settings, Path(spare), progress)
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


def _scene(settings: ViewSettings, spare: Path, progress: Progress | None) -> _Scene:
    results = [path for path in settings.shown if (path / RESULT_FILE).is_file()]
    if results and len(settings.shown) > 1:
        raise ConfigError(
            f"{results[0]} is the result of a registration, and {len(settings.shown) - 1} more paths are given; give "
            "one result, or volumes alone"
        )
    if len(settings.shown) > 1 + _MOST_OVER:
        raise ConfigError(
            f"{len(settings.shown)} volumes are given; at most {1 + _MOST_OVER} are shown at once"
        )
    if results:
        return _scene_of_result(results[0], settings.side, progress)
    stores = [as_store(path, spare, progress=progress) for path in settings.shown]
    volumes = [Volume.open(path) for path in stores]
    notes: list[str] = []
    layers = [
        _own(volume, path.name, settings.side, notes)
        for volume, path in zip(volumes, settings.shown, strict=True)
    ]
    return _Scene(" and ".join(path.name for path in settings.shown), layers, None, notes)


def _scene_of_result(folder: Path, side: int, progress: Progress | None) -> _Scene:
    """Read the fixed volume of a result, and the moving one on its grid, before and after."""
    result = read_result(folder)
    paths = [_input(folder, result, role) for role in ("fixed", "moving")]
    fixed, moving = (Volume.open(path) for path in paths)
    notes: list[str] = []
    first = _own(fixed, "fixed", side, notes)
    names = [folder / name for name in ("transform.h5", "transform.tfm") if (folder / name).is_file()]
    transform = read_transform(names[0]) if names else None
    ways: list[tuple[str, PointMap]] = [("moving before", Affine.identity())]
    if transform is None:
        notes.append(f"the registration found no transform (verdict {result.verdict}): there is no after")
    else:
        ways.append(("moving after", transform))
    layers = [first]
    for number, (name, way) in enumerate(ways):
        if progress is not None:
            progress("resample", number, len(ways))
        layers.append(_resampled(moving, name, way, first.grid, notes))
    return _Scene(f"{folder.name}: {result.verdict}", layers, transform, notes)


def _input(folder: Path, result: Result, role: str) -> Path:
    record = result.inputs.get(role)
    if record is None:
        raise RegistrationError(f"{folder / RESULT_FILE} names no {role} volume; run the registration again")
    return Path(record.path)


def _own(volume: Volume, name: str, side: int, notes: list[str]) -> _Layer:
    """Read the finest level of a volume that has at most the voxels of a cube."""
    level = next(
        (n for n in range(volume.num_levels) if math.prod(volume.level_grid(n).shape_zyx) <= side**3), None
    )
    if level is None:
        coarsest = volume.level_grid(volume.num_levels - 1)
        raise VolumeError(
            f"{volume.path}: its coarsest level has {coarsest}, more voxels than a cube of {side}; allow "
            "more with --side"
        )
    grid = volume.level_grid(level)
    _require_memory(volume, grid)
    if level:
        notes.append(f"{name} is shown at {grid}; its original has {volume.grid}")
    if volume.num_channels > 1:
        notes.append(f"{name} has {volume.num_channels} channels, of which the first is shown")
    return _Layer(name, volume.read(level=level)[0], grid, _has_labels(volume), _window(volume))


def _resampled(volume: Volume, name: str, way: PointMap, grid: Grid, notes: list[str]) -> _Layer:
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.warp.resampling import Resampler

    _require_memory(volume, grid)
    labels = _has_labels(volume)
    if volume.num_channels > 1:
        notes.append(f"{name} has {volume.num_channels} channels, of which the first is shown")
    outside = [0.0] * volume.num_channels
    resampler = Resampler(volume, way, grid, "nearest" if labels else "linear", outside)
    return _Layer(name, resampler(grid.box)[0], grid, labels, _window(volume))


def _require_memory(volume: Volume, grid: Grid) -> None:
    needed, free = _COPIES * 4 * math.prod(grid.shape_zyx) * volume.num_channels, available_bytes()
    if needed > free:
        raise VolumeError(
            f"{volume.path} at {grid} needs {in_words(needed)} of memory, {in_words(free)} are free; show a coarser "
            "level with a smaller --side"
        )


def _has_labels(volume: Volume) -> bool:
    return volume.metadata.get("kind") == "labels"


def _window(volume: Volume) -> tuple[float, float] | None:
    """Return the grey values between which a volume is shown; None where they are to be found by the viewer."""
    if "intensity" not in volume.metadata or _has_labels(volume):
        return None
    numbers = volume.intensity()
    low, high = numbers.foreground_above, numbers.high  # what is below is air
    return (float(low), float(high)) if high > low else None


def _page(scene: _Scene) -> str:
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


def _record(layer: _Layer, factor: float) -> dict[str, Any]:
    return {
        "name": layer.name,
        "labels": layer.labels,
        "window": layer.window,
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
