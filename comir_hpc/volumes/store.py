"""What is on disk around the voxels of a volume: its arrays, its metadata, and the word that it is complete.

A store is complete when the command that writes it said so at its end. That word and the list of files (`inventory`)
are one write of one file, which appears by a rename. Whoever writes voxels again takes the word back first. So a store
that says that it is complete has the files that it had when it was finished, or says by its list that it has not.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from comir_hpc.errors import VolumeError
from comir_hpc.host.files import flush
from comir_hpc.space.grid import Box, Grid, Triple
from comir_hpc.volumes.chunks import as_zyx
from comir_hpc.volumes.inventory import LOOKED_AT_ONCE, Inventory, shard_path, shards_of
from comir_hpc.volumes.shards import Shards

if TYPE_CHECKING:  # a type only: the chain of imports stays short
    from comir_hpc.volumes.region import Region

# Entries of the metadata that say nothing about the voxels.
_ABOUT_THE_RUN = ("predicted", "needed", "measured", "command")
_FILES = "comir_files"


class Store:
    """Arrays and metadata of one volume, without its voxels; see `Volume`.

    Parameters
    ----------
    path : Path
        Folder of the store.
    group : zarr.Group
        Root group of the store, open.
    lenient : bool
        Accept that levels of the pyramid are missing, to make them again.
    """

    region: Region | None = None
    """Mask that restricts where the specimen counts, set by who opens the volume; None for everywhere."""

    def __init__(self, path: Path, group: zarr.Group, *, lenient: bool = False) -> None:
        self.path = path
        self._group = group
        attributes: dict[str, Any] = dict(group.attrs)
        try:
            self.grid = Grid.from_dict(attributes["comir"]["grid"])
            self._arrays = _level_arrays(path, group, attributes, lenient)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise VolumeError(
                f"{path}: its metadata are damaged ({type(error).__name__}: {error}); run the command that wrote it "
                "again with --overwrite"
            ) from error
        self._shards = [Shards(path / array.path) for array in self._arrays]
        self._quantised: dict[str, list[float]] | None = attributes["comir"].get("quantised")
        self._complete = bool(attributes["comir"].get("complete"))
        self._unseen: Inventory | None = None

    # ------------------------------------------------------------------ arrays

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of the values on disk, which `write` takes."""
        return np.dtype(self._arrays[0].dtype)

    @property
    def num_channels(self) -> int:
        """Number of channels, the length of the c axis."""
        return int(self._arrays[0].shape[0])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of voxels of level 0 along c, z, y, x."""
        return (self.num_channels, *self.grid.shape_zyx)

    @property
    def num_levels(self) -> int:
        """Number of levels in the pyramid, at least 1."""
        return len(self._arrays)

    @property
    def shard_zyx(self) -> Triple:
        """Number of voxels (z, y, x) in one shard of level 0: the unit of writing."""
        return self._shard_zyx(0)

    @property
    def chunk_zyx(self) -> Triple:
        """Number of voxels (z, y, x) in one chunk of level 0: the unit of reading."""
        return as_zyx(self._arrays[0].chunks)

    def level_factors(self, level: int) -> Triple:
        """Return the voxels of level 0 along z, y, x in one voxel of `level`."""
        factors = self.metadata.get("levels", [[1, 1, 1]])[level]
        return int(factors[0]), int(factors[1]), int(factors[2])

    def level_grid(self, level: int) -> Grid:
        """Return the grid of one level of the pyramid."""
        return self.grid.downsampled(self.level_factors(level))

    @property
    def metadata(self) -> dict[str, Any]:
        """The `comir` namespace of the store's attributes (a copy)."""
        record: Any = self._group.attrs["comir"]
        return dict(record)

    @property
    def source(self) -> str | None:
        """Path of what `ingest` made the store of; None where that is not known."""
        made_from = self.metadata.get("made_from")
        source = made_from.get("source") if isinstance(made_from, dict) else None
        return source if isinstance(source, str) else None

    def _shard_zyx(self, level: int) -> Triple:
        return as_zyx(self._arrays[level].shards or self._arrays[level].chunks)

    def shard_files(self, box: Box, *, level: int = 0) -> Iterator[Path]:
        """Yield the files of the shards that `box` touches, whether they exist or not (an empty shard has none)."""
        for place in product(range(self.num_channels), *shards_of(box, self._shard_zyx(level))):
            yield shard_path(self.path, level, place)

    # ------------------------------------------------------------------ metadata and completeness

    def update_metadata(self, **entries: Any) -> None:
        """Set entries of the `comir` namespace."""
        self._set(comir={**self.metadata, **entries})

    def _set(self, **namespaces: Any) -> None:
        """Set namespaces of the store's attributes in one write; None takes one away."""
        now = {**dict(self._group.attrs), **namespaces}
        self._group.attrs.put({name: value for name, value in now.items() if value is not None})
        flush(self.path / "zarr.json")

    @property
    def complete(self) -> bool:
        """Whether the command that writes this volume has finished."""
        return self._complete

    def finish(self, **entries: Any) -> None:
        """Mark the volume complete and list its files, in one write; from now on `open` trusts it."""
        comir = {**self.metadata, **entries, "complete": True}
        self._set(comir=comir, **{_FILES: Inventory.on_disk(self.path, self._shard_counts()).record()})
        self._complete = True

    def withdraw(self, ome: dict[str, Any] | None = None, **entries: Any) -> None:
        """Take back the word that the volume is complete, before something of it is written again.

        Parameters
        ----------
        ome : dict, optional
            New metadata of OME-Zarr, set in the same write, as are the `entries` of the `comir` namespace.
        """
        standard = {"ome": ome} if ome else {}
        self._set(comir={**self.metadata, **entries, "complete": False}, **standard, **{_FILES: None})
        self._complete, self._unseen = False, None

    def _shard_counts(self) -> list[tuple[int, ...]]:
        """Count the shards along c, z, y, x of every level."""
        return [
            tuple(-(-n // s) for n, s in zip(a.shape, a.shards or a.chunks, strict=True))
            for a in self._arrays
        ]

    @property
    def recorded(self) -> bool:
        """Whether the store lists its files; those that older versions finished do not."""
        return _FILES in self._group.attrs

    def damage(self) -> list[str]:
        """Look at every file that the store lists; say of each what is wrong with it."""
        inventory = self._inventory()
        return inventory.damage() if inventory else []

    def _inventory(self) -> Inventory | None:
        if not self.recorded:
            return None
        record, counts = self._group.attrs[_FILES], self._shard_counts()
        try:
            return Inventory.from_record(self.path, record, counts)
        except ValueError as error:
            raise VolumeError(
                f"{self.path}: its list of files is damaged: {error}; {self.repair()}"
            ) from error

    def _require_files(self) -> None:
        inventory = self._inventory()
        if inventory is None:
            self._require_credible()
        elif inventory.num_files > LOOKED_AT_ONCE:
            self._unseen = inventory
        else:
            self._refuse(inventory.damage(), inventory.num_files)

    def _require_credible(self) -> None:
        """Refuse a volume without a list of files whose size cannot be that of what is stored."""
        from comir_hpc.volumes.readers.claims import require_credible  # readers import volumes

        for array in self._arrays:
            files = (f for f in (self.path / array.path / "c").rglob("*") if f.is_file())
            require_credible(
                self.path, array.shape, array.dtype, array.shards or array.chunks,
                lambda enough, files=files: sum(1 for _, _ in zip(files, range(enough), strict=False)),  # type: ignore[misc]
            )  # fmt: skip

    def _refuse(self, damage: list[str], num_files: int) -> None:
        if damage:
            listed = ", ".join(damage[:2]) + (", ..." if damage[2:] else "")
            raise VolumeError(
                f"{self.path}: {len(damage)} of {num_files} shard files are not as they were written ({listed}); "
                f"{self.repair()}"
            )

    def repair(self, *, content: bool = False) -> str:
        """Say what mends a damaged volume; `content` when the damage is inside a file, where only --verify looks."""
        command = _command(self.metadata, self.path)
        if command is None:
            return "write it again with what wrote it"
        options = "the options it was made with" + (" and --verify" if content else "")
        return f"mend it: run `{command}` again, with {options}"

    def fingerprint(self) -> str:
        """Return a digest that changes when the content may have changed: metadata, and every file's size and time."""
        said = {key: value for key, value in self.metadata.items() if key not in _ABOUT_THE_RUN}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for file in sorted(self.path.rglob("*")):
            # Metadata are in already, without what they say of the run that made the volume.
            if file.is_file() and file.name != "zarr.json":
                stat = file.stat()
                # Size and time, not content: reading a terabyte to see whether it changed would cost as much as using
                # it.
                digest.update(f"{file.relative_to(self.path)} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]


def _level_arrays(
    path: Path, group: zarr.Group, attributes: dict[str, Any], lenient: bool
) -> list[zarr.Array[Any]]:
    """Open the levels that the metadata name; if `lenient`, those before the first that is missing."""
    names = [dataset["path"] for dataset in attributes["ome"]["multiscales"][0]["datasets"]]
    if names != [str(level) for level in range(len(names))] or not names:
        raise VolumeError(
            f"{path}: a level of the pyramid lies outside of the store: its metadata name {names}, expected 0, 1, ...; "
            "run the command that wrote it again with --overwrite"
        )
    arrays: list[zarr.Array[Any]] = []
    for name in names:
        array = array_of(group, name)
        if array is None:
            if lenient and arrays:
                break
            command = _command(attributes["comir"], path)
            again = " with --overwrite" if not arrays else ""
            raise VolumeError(
                f"{path}: a level of the pyramid is missing ({name}/zarr.json); run the command that wrote it again"
                f"{again}" + (f": {command}" if command else "")
            )
        arrays.append(array)
    shape = tuple(attributes["comir"]["grid"]["shape_zyx"])
    if len(arrays[0].shape) != 4 or arrays[0].shape[1:] != shape:
        raise VolumeError(
            f"{path}: its metadata speak of {shape} voxels (z, y, x), its array of {arrays[0].shape} (c, z, y, x); one "
            "of them is damaged: run the command that wrote it again with --overwrite"
        )
    return arrays


def _command(comir: dict[str, Any], path: Path) -> str | None:
    """Return the command line that makes a store again, where its metadata know it."""
    words = comir.get("command")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
        return None
    return shlex.join(["comir-hpc", *words, str(path)])


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any] | None:
    """Return an array of a group, None where there is none, or none that can be read."""
    try:
        found = group.get(name)
    except (ValueError, KeyError, TypeError):  # the metadata are damaged
        return None
    return found if isinstance(found, zarr.Array) else None
