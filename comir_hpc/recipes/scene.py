"""What a page of `comir-hpc view` shows: volumes as they lie, or a result with all that is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.config.view import ViewSettings
from comir_hpc.errors import ConfigError, RegistrationError, VolumeError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.host.progress import Progress
from comir_hpc.recipes.stores import as_store
from comir_hpc.runs.refinement import EVIDENCE, read_refinement
from comir_hpc.runs.result import RESULT_FILE, Result, read_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.files import read_transform
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.volumes.volume import Volume

_MOST_OVER = 5  # volumes that lie on the first one
_COPIES = 6  # copies of a volume in float32 that exist while it is written


@dataclass(frozen=True, eq=False)
class Layer:
    """One volume as it is shown.

    Attributes
    ----------
    name : str
        Name on the page.
    values : (z, y, x)
        Voxels.
    grid : Grid
        Grid of the voxels.
    labels : bool
        Whether a value is a name, and not an amount.
    window : two float or None
        Values that are shown darkest and brightest; None where the viewer finds them.
    classes : tuple of str
        What the values 0, 1, ... mean, where they are few.
    """

    name: str
    values: NDArray[Any]
    grid: Grid
    labels: bool
    window: tuple[float, float] | None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Scene:
    """What lies on top of each other.

    Attributes
    ----------
    title : str
        Title of the page.
    layers : list of Layer
        The fixed volume first.
    transform : PointMap or None
        Map from fixed to moving points, whose displacement is read at the cross-hair.
    notes : list of str
        What is shown, and what is not, in sentences.
    first : int
        Number of the layer on the fixed one that is shown at first; -1 for none.
    """

    title: str
    layers: list[Layer]
    transform: PointMap | None
    notes: list[str]
    first: int


def scene_of(settings: ViewSettings, spare: Path, progress: Progress | None) -> Scene:
    """Read what the settings name; files are ingested into `spare`.

    Raises
    ------
    ConfigError
        If results and volumes are mixed, or too many are given.
    VolumeError
        If a volume cannot be read or does not fit into memory.
    RegistrationError
        If the result of a registration cannot be read.
    """
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
    return Scene(" and ".join(path.name for path in settings.shown), layers, None, notes, len(layers) - 2)


def _scene_of_result(folder: Path, side: int, progress: Progress | None) -> Scene:
    """Read the fixed volume of a result, and the moving one on its grid, before, after and refined; and the blocks."""
    result = read_result(folder)
    paths = [_input(folder, result, role) for role in ("fixed", "moving")]
    fixed, moving = (Volume.open(path) for path in paths)
    notes: list[str] = []
    first = _own(fixed, "fixed", side, notes)
    names = [folder / name for name in ("transform.h5", "transform.tfm") if (folder / name).is_file()]
    ways: list[tuple[str, PointMap]] = [("moving before", Affine.identity())]
    if names:
        ways.append(("moving after", read_transform(names[0])))
    else:
        notes.append(f"the registration found no transform (verdict {result.verdict}): there is no after")
    field = _field_of(folder, result, notes)
    if field is not None:
        ways.append(("moving refined", read_transform(field)))
    layers = [first]
    for number, (name, way) in enumerate(ways):
        if progress is not None:
            progress("resample", number, len(ways))
        layers.append(_resampled(moving, name, way, first.grid, notes))
    if field is not None:
        layers += _blocks(field, first.grid)
    transform = ways[-1][1] if len(ways) > 1 else None
    return Scene(f"{folder.name}: {result.verdict}", layers, transform, notes, len(ways) - 1)


def _field_of(folder: Path, result: Result, notes: list[str]) -> Path | None:
    """Find the field that refines this very registration."""
    record = read_refinement(folder)
    if record is None or record.registration != result.fingerprint:
        return None
    field = Path(record.field)
    if field.is_dir():
        return field
    notes.append(f"the field that refines it is no longer at {field}, and is not shown")
    return None


def _blocks(field: Path, grid: Grid) -> list[Layer]:
    """Show what became of every block, and how much better its held-out cubes agree, on the fixed grid."""
    evidence = Volume.open(field / EVIDENCE)
    channels, states = (tuple(evidence.metadata[key]) for key in ("channels", "states"))
    values = evidence.read()
    of_voxel = np.linalg.inv(evidence.grid.matrix_mm) @ grid.matrix_mm

    def on_grid(block: NDArray[np.float32]) -> NDArray[np.float32]:
        found = ndimage.affine_transform(
            block, of_voxel[:3, :3], of_voxel[:3, 3], grid.shape_zyx, order=0, mode="nearest"
        )
        return np.asarray(found, dtype=np.float32)

    before, after, state = (values[channels.index(name)] for name in ("before", "after", "state"))
    gain = np.nan_to_num(after - before)  # 0 where nothing could be held out
    most = float(np.abs(gain).max())
    return [
        Layer("blocks", on_grid(state).astype(np.uint8), grid, True, None, states),
        Layer("gain of the blocks", on_grid(gain), grid, False, (0.0, most) if most else None),
    ]


def _input(folder: Path, result: Result, role: str) -> Path:
    record = result.inputs.get(role)
    if record is None:
        raise RegistrationError(f"{folder / RESULT_FILE} names no {role} volume; run the registration again")
    return Path(record.path)


def _own(volume: Volume, name: str, side: int, notes: list[str]) -> Layer:
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
    return Layer(name, volume.read(level=level)[0], grid, _has_labels(volume), _window(volume))


def _resampled(volume: Volume, name: str, way: PointMap, grid: Grid, notes: list[str]) -> Layer:
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.warp.resampling import Resampler

    _require_memory(volume, grid)
    labels = _has_labels(volume)
    if volume.num_channels > 1:
        notes.append(f"{name} has {volume.num_channels} channels, of which the first is shown")
    outside = [0.0] * volume.num_channels
    resampler = Resampler(volume, way, grid, "nearest" if labels else "linear", outside)
    return Layer(name, resampler(grid.box)[0], grid, labels, _window(volume))


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
