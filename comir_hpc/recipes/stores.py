"""Volumes of any format where a verb takes a store: each file is ingested once and its store used again.

The name of such a store carries the fingerprint of its source (path, size and time of every file). So two files of one
name do not meet in one store, and a file that has changed gets a new one.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from numpy.typing import NDArray

from comir_hpc.config.base import AnySettings
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.host.progress import Progress
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.readers import Source, in_memory, open_source
from comir_hpc.volumes.volume import Kind, Volume

Tell = Callable[[str], None]

_DIGITS = 8  # of the fingerprint: two sources of one name in one folder meet in one of four billion cases


@dataclass(frozen=True)
class StorePlans(Generic[AnySettings]):
    """What a dry run knows of files that are to be ingested.

    Attributes
    ----------
    settings : Settings or None
        The settings with stores as volumes; None if a store is still to be made.
    plans : tuple of dict
        One plan for each file that is still to be ingested.
    """

    settings: AnySettings | None
    plans: tuple[dict[str, Any], ...]


def with_stores(
    settings: AnySettings,
    folder: Path,
    *,
    processes: int = 1,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> AnySettings:
    """Return settings whose volumes are stores; what is none is ingested into `folder` first.

    Parameters
    ----------
    settings : Settings
        Checked settings of a verb.
    folder : Path
        Folder in which new stores are made.
    processes : int
        Number of processes that do the same at this moment. Several would write one store at once, so they are refused.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.
    tell : callable, optional
        Gets what is made, and every note of what a file leaves open and how it is taken.

    Raises
    ------
    VolumeError
        If a file cannot be ingested, or a store cannot be opened. All are looked at before the first is ingested.
    ConfigError
        If a store has to be made and several processes ask for it.
    """
    sources: dict[Path, Source] = {}

    def look(path: Path) -> Path:
        if is_store(path):
            Volume.open(path)
            return path
        sources[path] = open_source(path)
        if processes > 1 and not _finished(_store_of(sources[path], folder)):
            raise ConfigError(
                f"{path} is no store, and {processes} processes would make one at once; run `comir-hpc ingest "
                f"{shlex.quote(str(path))} OUT.zarr` first and give OUT.zarr"
            )
        return path

    def change(path: Path) -> Path:
        source = sources.get(path)
        return path if source is None else _stored(source, folder, progress, tell)

    settings.with_volumes(look)  # all, before the first is ingested, which may take long
    return settings.with_volumes(change)


def plan_stores(settings: AnySettings, folder: Path) -> StorePlans[AnySettings]:
    """Say what `with_stores` would do; nothing is written.

    Raises
    ------
    VolumeError
        If a file cannot be ingested, as far as its header tells.
    """
    plans: dict[Path, dict[str, Any]] = {}

    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.ingest import plan_ingest

    def change(path: Path) -> Path:
        if is_store(path):
            return path
        store = store_of(path, folder)
        if not _finished(store):
            plans[store] = {"ingest": str(path), "store": str(store), **_ingesting(path, store, plan_ingest)}
        return store

    changed = settings.with_volumes(change)
    return StorePlans(None if plans else changed, tuple(plans.values()))


def as_store(path: Path, folder: Path, *, progress: Progress | None = None, tell: Tell | None = None) -> Path:
    """Return the store of a volume in any format: `path` itself if it is one, otherwise one that is made in `folder`.

    Raises
    ------
    VolumeError
        If the file cannot be ingested.
    """
    return path if is_store(path) else _stored(open_source(path), folder, progress, tell)


def _stored(source: Source, folder: Path, progress: Progress | None, tell: Tell | None) -> Path:
    """Return the store of a file, which is made unless it is there."""
    path, store = source.path, _store_of(source, folder)
    if _finished(store):
        if tell is not None:
            for note in source.notes:  # what was assumed of the file holds for its store, too
                tell(note)
        return store
    if tell is not None:
        tell(f"ingesting {path} -> {store}")
    from comir_hpc.ingest import ingest

    folder.mkdir(parents=True, exist_ok=True)
    result = _ingesting(path, store, lambda chosen: ingest(chosen, progress=progress))
    if tell is not None:
        for note in result.notes:
            tell(note)
    return store


def array_as_store(
    array: NDArray[Any],
    grid: Grid,
    store: Path,
    *,
    kind: Kind = "image",
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Path:
    """Return the store of an array in memory, which `store_of_array` names; it is made unless it is there.

    Raises
    ------
    VolumeError
        If the array cannot be ingested.
    """
    if not _finished(store):
        from comir_hpc.ingest import ingest_array

        store.parent.mkdir(parents=True, exist_ok=True)
        result = ingest_array(array, grid, store, kind=kind, overwrite=True, progress=progress)
        if tell is not None:
            for note in result.notes:
                tell(note)
    return store


def store_of_array(
    array: NDArray[Any], grid: Grid, folder: Path, *, name: str = "array", kind: Kind = "image"
) -> Path:
    """Return where the store of an array is, or would be: its name carries voxels, grid and kind.

    Raises
    ------
    VolumeError
        If shape and grid differ, or the values are of a type that no volume keeps.
    """
    voxels = in_memory(array, grid, name).fingerprint()
    content = json.dumps([voxels, grid.as_dict(), kind]).encode()
    return _named(name, hashlib.sha256(content).hexdigest(), folder)


def is_store(path: Path) -> bool:
    """Return whether a path is a volume of ours, finished or not; so is one named .zarr that does not exist."""
    # Opened as a volume, it is refused in the words for one that is missing.
    if path.suffix == ".zarr" and not path.exists():
        return True
    try:
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        return isinstance(attributes["comir"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def store_of(path: Path, folder: Path) -> Path:
    """Return the path where the store of a file is, or would be.

    Raises
    ------
    VolumeError
        If nothing is there, or the format is unknown.
    """
    return _store_of(open_source(path), folder)


def _store_of(source: Source, folder: Path) -> Path:
    return _named(source.path.resolve().name, source.fingerprint(), folder)


def _named(name: str, fingerprint: str, folder: Path) -> Path:
    return folder / f"{Path(name).name.split('.')[0] or 'volume'}-{fingerprint[:_DIGITS]}.zarr"


def _finished(store: Path) -> bool:
    try:
        record = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
        return record["attributes"]["comir"]["complete"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _ingesting(path: Path, store: Path, action: Callable[[IngestSettings], Any]) -> Any:
    """Ingest or plan it; an error that names options says whose they are.

    A store that another version began is made anew: its name is ours, so nobody else's data can be there.
    """
    try:
        return action(IngestSettings(source=path, out=store, overwrite=True))
    except (VolumeError, ConfigError) as error:
        if "--" not in str(error):
            raise
        raise VolumeError(
            f"{error}. These are options of `comir-hpc ingest {shlex.quote(str(path))} OUT.zarr`: run that, and give "
            "OUT.zarr here"
        ) from error
