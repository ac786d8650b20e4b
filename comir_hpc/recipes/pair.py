"""`comir-hpc register`, from two volumes of any format to all that a user wants of them.

The registration itself is `comir_hpc.register`. Around it, what is wrong with the command is found before the first
voxel is read, the answer becomes a page, the moving volume is written on the fixed grid if that is asked for, and the
user learns what to do next.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from comir_hpc.config.register import RegisterPairSettings, volume_name
from comir_hpc.config.warp import WarpSettings
from comir_hpc.config.words import REPRESENTATIONS
from comir_hpc.errors import CheckpointError, VolumeError
from comir_hpc.host.places import require_apart
from comir_hpc.host.progress import Progress
from comir_hpc.runs.record import Record, make_record, read_record, write_record

if TYPE_CHECKING:
    from comir_hpc.register import RegisterResult

WARPED_FILE = "warped.json"
"""In the folder of a result: the single file to which its moving volume was written, as the file was then."""
_ROLES: tuple[Literal["fixed", "moving"], ...] = ("fixed", "moving")
_LARGEST_FILE = 2**30  # bytes of a volume for which the next command names one file, which is made in memory


class WarpedRecord(Record):
    """A file that holds the moving volume on the fixed grid, and the registration that it belongs to.

    Attributes
    ----------
    path : str
        Absolute path of the file.
    fingerprint : str
        Fingerprint of the registration.
    size, mtime_ns : int
        Bytes of the file, and the time at which it was written: they tell whether it is still the same.
    """

    path: str
    fingerprint: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, eq=False)
class RegisteredPair:
    """What came of two volumes.

    Attributes
    ----------
    result : RegisterResult
        Result of the registration.
    report : Path or None
        Page that shows it; None if none was asked for.
    warped : Path or None
        Moving volume on the fixed grid; None if it was not asked for, or the verdict is poorer than required.
    notes : tuple of str
        Sentences on what was assumed of the inputs, and on what the warped volume's format cannot keep.
    """

    result: RegisterResult
    report: Path | None = None
    warped: Path | None = None
    notes: tuple[str, ...] = ()


def require_usable(settings: RegisterPairSettings) -> None:
    """Refuse a command that cannot end well, before anything is ingested or compared.

    Raises
    ------
    CheckpointError
        If the model cannot be read, or has no encoder of a modality that is asked for.
    ConfigError, VolumeError
        If the warped volume cannot be written where it is asked for: the name's format is unknown, it is one of the
        inputs, or something is there.
    """
    _require_encoders(settings)
    out = settings.warped
    if out is None:
        return
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.warp.files import file_format, require_free_place

    one_file = file_format(out) is not None
    require_apart(out, settings.fixed, settings.moving)
    if one_file and _written(settings) is None:
        require_free_place(out, overwrite=settings.overwrite)


def register_pair(settings: RegisterPairSettings, *, progress: Progress | None = None) -> RegisteredPair:
    """Register two stores, write the page, and write the moving volume on the fixed grid if that is asked for.

    What is done already is not done again.

    Parameters
    ----------
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.

    Raises
    ------
    ComirError
        For the same reasons as `register`, `report` and `warp`. A poor answer is no error: with the verdict FAIL
        nothing is warped.
    """
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.register import register
    from comir_hpc.report import report

    _require_seen(settings)
    result = register(settings.registration, progress=progress)
    page = report(result.folder) if settings.report else None
    if page is None and not result.skipped:
        result.report.unlink(missing_ok=True)  # an earlier one shows another result
    if settings.mlflow is not None:
        from comir_hpc.runs.tracking.registration import log_registration

        log_registration(result.folder, settings.mlflow, settings.experiment, again=result.skipped)
    notes = tuple(result.result.notes)
    if settings.warped is None or not is_enough(result, settings):
        return RegisteredPair(result, page, None, notes)
    return RegisteredPair(result, page, settings.warped, notes + _warp(settings, result, progress))


def is_enough(result: RegisterResult, settings: RegisterPairSettings) -> bool:
    """Say whether a verdict is as good as the settings require; FAIL never is."""
    return result.verdict == "PASS" or (result.verdict == "WARN" and settings.require == "warn")


def plan_pair(settings: RegisterPairSettings) -> dict[str, Any]:
    """Say what `register_pair` would do and need.

    Raises
    ------
    ComirError
        If `register` would raise it before it reads voxels.
    """
    from comir_hpc.register import plan_register

    _require_seen(settings)
    plan = plan_register(settings.registration)
    if settings.report:
        plan["report"] = str(settings.out / "report.html")
    if settings.warped is not None:
        unless = "FAIL" if settings.require == "warn" else "FAIL or WARN"
        plan["warped"] = f"{settings.warped}, unless the verdict is {unless}"
    return plan


def next_command(
    asked: RegisterPairSettings, settings: RegisterPairSettings, result: RegisterResult
) -> str | None:
    """Return the command that leads on; None if none does.

    After a good answer it is the one that puts the moving volume on the fixed grid. Its output lies in the folder of
    the result, so that the stores which were made there of files are used again. Where the general model has failed, it
    is the one that trains encoders for this pair.

    Parameters
    ----------
    asked : RegisterPairSettings
        Settings with the files that the user named.
    settings : RegisterPairSettings
        Settings with the stores that were made of these files.
    """
    words: list[object] = ["comir-hpc"]
    if result.verdict != "FAIL":
        words += ["warp", "--zarr", asked.moving, "--transform", result.folder / result.result.transform_file]
        words += ["--like", asked.fixed, "--out", result.folder / _proposed_name(asked, settings)]
    elif asked.uses_general_model:
        words += ["adapt", asked.fixed, asked.moving, "--run", f"{result.folder}-run"]
    else:
        return None
    return shlex.join(map(str, words))


def _require_seen(settings: RegisterPairSettings) -> None:
    """Refuse what the general model cannot see, with what can: the user has chosen no model that could be another.

    Raises
    ------
    VolumeError
        If a volume is a single slice, or has several channels.
    """
    if not settings.uses_general_model:
        return
    from comir_hpc.volumes.volume import Volume

    for path in (settings.fixed, settings.moving):
        volume = Volume.open(path)
        if volume.grid.planar:
            raise VolumeError(
                f"{path} is a single slice, and the general model sees volumes only; add --representation intensity, "
                "or give --model with encoders that were trained on slices"
            )
        if volume.num_channels > 1:
            raise VolumeError(
                f"{path} has {volume.num_channels} channels, and the general model sees one; give a file with one of "
                "them, or --model with encoders that were trained on all"
            )


def _proposed_name(asked: RegisterPairSettings, settings: RegisterPairSettings) -> str:
    """Name the warped volume: in the format of the moving file if that can hold it, and as a store if it is large."""
    from comir_hpc.volumes.volume import Volume
    from comir_hpc.warp.files import FORMATS, require_fitting

    name = f"{volume_name(asked.moving)}_on_{volume_name(asked.fixed)}"
    moving, grid = Volume.open(settings.moving), Volume.open(settings.fixed).grid
    shape = (moving.num_channels, *grid.shape_zyx)
    own = next((s for s in FORMATS if asked.moving.name.lower().endswith(s)), None)
    large = math.prod(shape) * moving.dtype.itemsize > _LARGEST_FILE
    if large or (own is None and asked.moving.suffix == ".zarr"):
        return f"{name}.zarr"
    try:
        require_fitting(Path(own or ".nii.gz"), shape, moving.dtype)
    except VolumeError:
        return f"{name}.zarr"
    return f"{name}{own or '.nii.gz'}"


def _warp(
    settings: RegisterPairSettings, result: RegisterResult, progress: Progress | None
) -> tuple[str, ...]:
    """Write the moving volume on the fixed grid; return what the user should know about it."""
    from comir_hpc.warp import warp
    from comir_hpc.warp.files import file_format

    out, fingerprint = settings.warped, result.result.fingerprint
    assert out is not None
    before = _written(settings)
    if before is not None and before.fingerprint == fingerprint:
        return ()
    one_file = file_format(out) is not None
    done = warp(
        WarpSettings(
            transform=result.folder / result.result.transform_file,
            zarr=settings.moving,
            like=settings.fixed,
            out=out,
            overwrite=settings.overwrite or before is not None,
        ),
        progress=progress,
    )
    if one_file:
        stat = out.stat()
        record = {"path": str(out.absolute()), "fingerprint": fingerprint or "", "size": stat.st_size}
        record |= {"mtime_ns": stat.st_mtime_ns}
        write_record(result.folder / WARPED_FILE, make_record(WarpedRecord, record))
    return done.notes


def _written(settings: RegisterPairSettings) -> WarpedRecord | None:
    """Find the record of the file that is asked for, if an earlier call wrote it and it has not changed since."""
    path = settings.out / WARPED_FILE
    if settings.warped is None or not path.is_file():
        return None
    record = read_record(path, WarpedRecord, VolumeError, "remove it, and run the same command again")
    try:
        stat = settings.warped.stat()
    except OSError:
        return None
    now = (str(settings.warped.absolute()), stat.st_size, stat.st_mtime_ns)
    return record if now == (record.path, record.size, record.mtime_ns) else None


def _require_encoders(settings: RegisterPairSettings) -> None:
    """Refuse a model without the encoders that are asked for."""
    if not REPRESENTATIONS[settings.representation].trained:
        return
    from comir_hpc.runs.model import general_model, read_model

    if settings.uses_general_model:
        general_model()
    elif settings.model is not None:
        model = read_model(settings.model)
        for role in _ROLES:
            name = settings.modality_of(role) or (role if role in model.modalities else None)
            if model.encoder_name(name) is not None or settings.representation_of(role) is not None:
                continue
            raise CheckpointError(
                f"{settings.model} has encoders of {', '.join(model.modalities)}; --{role}-modality "
                + ("is missing" if name is None else f"is {name}")
                + ": give the one of them that the volume is"
            )
