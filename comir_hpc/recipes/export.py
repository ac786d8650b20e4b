"""`comir-hpc export`: a transform in the form of another tool, or an encoder as TorchScript."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comir_hpc.config.export import ExportSettings
from comir_hpc.config.words import TransformForm
from comir_hpc.errors import ConfigError, RegistrationError, VolumeError
from comir_hpc.host.places import require_apart
from comir_hpc.recipes.stores import is_store
from comir_hpc.runs.result import INVERSE_FILE, RESULT_FILE, Result, read_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.composite import as_affine, notes_on
from comir_hpc.transforms.conventions.exported import default_ending, export_transform, require_ending
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.transforms.files import read_transform
from comir_hpc.transforms.inversion import Inverse, inverse_of
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.transforms.stored import in_memory
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.volume import Volume

_IN_A_RESULT = ("transform.h5", "transform.tfm", "transform.json")


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    The notes say what the form means to the tool that reads it, and what of the transform it holds only nearly.

    Attributes
    ----------
    path : Path
        Path of the file.
    what : str
        What it holds, for the user.
    notes : tuple of str
        Sentences on what was assumed, and on what the form means or cannot keep.
    """

    path: Path
    what: str
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Line for the user: where it is, and what it holds."""
        return f"{self.path}: {self.what}"


@dataclass(frozen=True, eq=False)
class _Given:
    """A transform with what is known about the volumes that it lies between."""

    path: Path
    transform: PointMap
    grids: GridPair
    result: Result | None


def export(settings: ExportSettings) -> Exported:
    """Write a transform in the form of another tool, or an encoder as TorchScript.

    Raises
    ------
    RegistrationError
        If the transform cannot be read, the form cannot hold a part of it or needs grids that are not known, or its
        inverse does not exist.
    ConfigError
        If options contradict each other, or the output is the input.
    VolumeError
        If a volume cannot be opened, or something is at the place of the output.
    CheckpointError
        If the encoder cannot be loaded.
    """
    _require_consistent(settings)
    if settings.to == "torchscript":
        from comir_hpc.recipes.torchscript import write_encoder

        run = settings.transform
        out = settings.out or run / f"{settings.modality or 'encoder'}.pt"
        _require_place(out, settings)
        return Exported(out, *write_encoder(run, settings.modality, out))
    form: TransformForm = settings.to
    given = _given(settings)
    transform, grids, notes = given.transform, given.grids, list(notes_on(given.transform, given.path.name))
    what = "fixed to moving points"
    if settings.inverse:
        kept = given.path.with_name(INVERSE_FILE)
        if given.result is not None and as_affine(transform) is None and kept.is_file():
            inverse = Inverse(read_transform(kept))
            notes.append(f"the inverse is the one that register wrote, {kept}; result.json has its residual")
        else:
            inverse = inverse_of(transform, grids.fixed, grids.moving)
        if as_affine(transform) is None and inverse.residual_mm:
            notes.append(
                f"the inverse is a field on the moving grid: there and back, points miss by {inverse.residual_mm:.3g} "
                f"mm (mean) and {inverse.worst_mm:.3g} mm (worst), over the {inverse.covered:.0%} of it that come from "
                "inside the fixed grid"
            )
        transform, grids, what = inverse.transform, grids.swapped, "moving to fixed points"
    out = settings.out or _beside(given.path, settings, default_ending(transform, form))
    require_ending(out, form)
    _require_place(out, settings)
    notes += export_transform(transform, form, out, grids)
    if given.result is not None and given.result.verdict == "FAIL":
        notes.append("the verdict of this registration is FAIL: the transform is not to be trusted")
    return Exported(out, f"the transform from {what}, in the form of {form}", tuple(notes))


def plan_export(settings: ExportSettings) -> dict[str, Any]:
    """Say what `export` would write.

    Raises
    ------
    ComirError
        If `export` would raise it before it computes anything.
    """
    _require_consistent(settings)
    if settings.to == "torchscript":
        return {"run": str(settings.transform), "modality": settings.modality or "shared", "to": settings.to}
    given = _given(settings)
    return {
        "transform": str(given.path),
        "parts": ", ".join(type(part).__name__ for part in given.transform.parts),
        "to": settings.to,
        "inverse": settings.inverse,
        "fixed": str(given.grids.fixed or "not known"),
        "moving": str(given.grids.moving or "not known"),
    }


def grid_of(path: Path) -> Grid:
    """Return the grid of a volume in any format; no voxel is read.

    Raises
    ------
    VolumeError
        If it cannot be opened, or does not say its spacing.
    """
    return Volume.open(path).grid if is_store(path) else open_source(path).grid()


def _require_consistent(settings: ExportSettings) -> None:
    alone = {
        "--inverse": settings.inverse, "--from": settings.form, "--fixed": settings.fixed, "--moving": settings.moving,
    }  # fmt: skip
    given = [name for name, value in alone.items() if value]
    if settings.to == "torchscript" and given:
        raise ConfigError(f"{', '.join(given)} mean nothing with --to torchscript; leave them out")
    if settings.to != "torchscript" and settings.modality is not None:
        raise ConfigError(f"--modality means nothing with --to {settings.to}; leave it out")


def _given(settings: ExportSettings) -> _Given:
    """Read the transform, with the grids that the options or its folder name."""
    path = settings.transform
    folder = path if (path / RESULT_FILE).is_file() else path.parent
    result = None
    if (folder / RESULT_FILE).is_file() and (folder == path or path.name in _IN_A_RESULT):
        result = read_result(folder)
    if folder == path:
        found = next((path / name for name in _IN_A_RESULT if (path / name).is_file()), None)
        if found is None:
            raise RegistrationError(
                f"{path} holds no transform: the registration found none (verdict {result and result.verdict}); see "
                "its report, and register again"
            )
        path = found
    grids = GridPair(*(_grid(settings, result, role) for role in ("fixed", "moving")))
    return _Given(path, in_memory(read_transform(path, settings.form, grids)), grids, result)


def _grid(settings: ExportSettings, result: Result | None, role: str) -> Grid | None:
    named: Path | None = getattr(settings, role)
    if named is not None:
        return grid_of(named)
    record = result.inputs.get(role) if result is not None else None
    return record.space if record is not None else None


def _beside(path: Path, settings: ExportSettings, ending: str) -> Path:
    name = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    words = [name, *(["inverse"] if settings.inverse else []), settings.to]
    return path.with_name("_".join(words) + ending)


def _require_place(out: Path, settings: ExportSettings) -> None:
    """Refuse a name that is taken, or an input; a store is replaced only by another scene."""
    require_apart(out, *_inputs(settings))
    if out.exists() and not settings.overwrite:
        raise VolumeError(f"{out} exists; choose another --out, or pass --overwrite")
    if out.is_dir() and is_store(out):
        raise VolumeError(f"{out} is a volume; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(
            f"{out} cannot be written ({error.strerror or error}); make room or get access"
        ) from error


def _inputs(settings: ExportSettings) -> Iterator[Path]:
    # Into a folder that a verb wrote, an export belongs; over its files it does not, which `exists` refuses.
    if not settings.transform.is_dir():
        yield settings.transform
    yield from (path for path in (settings.fixed, settings.moving) if path is not None)
