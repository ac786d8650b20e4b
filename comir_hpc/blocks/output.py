"""An output's life: made once by whichever part comes first, completed once by whichever comes last.

Why a volume is never complete while a block of it is in flight, at whichever line a process is killed:

* Whoever writes blocks holds the lock of its part (`host.locks.writer`) from before the store is opened until its last
  block is recorded. It takes the word "complete" back (`Volume.withdraw`) before its first block.
* The word is given in one place, at the end of `job.carry_out`, by a process that holds the lock of the whole. So
  nobody else is writing; and the ledger is asked again after that lock was taken.
* Whoever is killed loses its locks and has taken the word back. The word is given again only when the ledger says that
  every block is done, and it does not say so of the block in which somebody was killed.
* Metadata are written by holders of these locks only: when the word is taken back (every part writes the same), and
  when it is given (by one process, which reads them first).
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comir_hpc.blocks.coarse import build_pyramid
from comir_hpc.blocks.ledger import Ledger
from comir_hpc.errors import VolumeError
from comir_hpc.space.plan import BlockPlan
from comir_hpc.volumes.volume import Volume


@dataclass(frozen=True)
class Output:
    """A store that is being made, with its blocks and its ledger.

    Parameters
    ----------
    volume : Volume
        The output volume, open for writing.
    plan : BlockPlan
        Blocks of the output.
    ledger : Ledger
        Record of the blocks that are done.
    verify : bool
        Whether the pyramid's content is compared with what was written before it is kept.
    """

    volume: Volume
    plan: BlockPlan
    ledger: Ledger
    verify: bool = False

    def missing(self) -> int:
        """Count the blocks that are still to be done."""
        return len(set(range(len(self.plan))) - self.ledger.done())

    def build_pyramid(self) -> None:
        """Write the levels above 0 that are not there whole."""
        build_pyramid(self.volume, self.plan, self.ledger, verify=self.verify)


def open_output(
    path: Path,
    ledger: Ledger,
    make: Callable[[Path], Volume],
    *,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    require_alone: Callable[[], None] = lambda: None,
) -> Volume:
    """Open the output that an earlier or parallel run of the same command made, or make it.

    The store appears under its name by one rename, with the ledger's fingerprint in its metadata, so nobody meets
    half of one. The caller keeps others out meanwhile (`Ledger.exclusive`), so parts that start at the same moment
    agree on one store.

    Parameters
    ----------
    make : callable
        Creates the (incomplete) volume at the path that it is given and returns it.
    record : mapping, optional
        Mapping that the fingerprint was made of. It is kept in the metadata as ``made_from``, so that a refusal can
        name what differs.
    overwrite : bool
        Whether a store of another fingerprint is replaced. A store of the same fingerprint is continued.
    require_alone : callable
        Raises while others are at work; called before a store is made or replaced.

    Raises
    ------
    VolumeError
        If something else is at `path`: a result of other inputs, model or parameters (unless `overwrite`), or no
        volume of ours (never replaced).
    """
    if path.exists() and _is_continued(path, ledger, record, overwrite=overwrite):
        return Volume.open(path, writable=True)
    require_alone()
    if path.exists():
        # By one rename, so that a stop here leaves the old store whole or gone, not in pieces.
        path.replace(_new_folder(ledger) / "replaced")
    # Before the new store has its name: what the ledger says of the old store's blocks must not count for it.
    ledger.clear()
    folder = _new_folder(ledger)
    spare = folder / path.name
    try:
        make(spare).update_metadata(fingerprint=ledger.fingerprint, made_from=_plain(record))
        spare.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Volume.open(path, writable=True)


def _is_continued(path: Path, ledger: Ledger, record: Mapping[str, Any] | None, *, overwrite: bool) -> bool:
    """Say whether a store is of this job, and usable; False where it may be replaced.

    Raises
    ------
    VolumeError
        If it may neither be continued nor replaced.
    """
    # Not `Volume.open`: a store whose arrays are damaged still says what it was made from.
    found = metadata_at(path)
    if found is None:
        raise VolumeError(
            f"{path} exists and is no volume of ours, so it is never replaced; choose another name"
        )
    whole = (path / "0" / "zarr.json").exists()
    if found.get("fingerprint", "none") == ledger.fingerprint and (whole or not overwrite):
        return True
    if not overwrite:
        raise VolumeError(
            f"{path} exists and was made from something else ({_differences(found, record)}); "
            "choose another name, or pass --overwrite"
        )
    return False


def metadata_at(path: Path) -> dict[str, Any] | None:
    """Return what our metadata say of a store, even of one whose arrays are damaged; None where there are none."""
    try:
        found = json.loads((path / "zarr.json").read_bytes())["attributes"]["comir"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and "grid" in found else None


def remove_unfinished_metadata(path: Path) -> None:
    """Unlink what a killed writer left of metadata under a temporary name."""
    for folder in (path, *(level for level in path.iterdir() if level.is_dir())):
        for spare in folder.glob("zarr.*.partial"):
            spare.unlink(missing_ok=True)


def _plain(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the record as it comes back from JSON: paths are text, tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(record or {}), default=str))
    return plain


def _differences(found: dict[str, Any], record: Mapping[str, Any] | None) -> str:
    before, now = found.get("made_from"), _plain(record)
    if not isinstance(before, dict) or not before or not now:
        return "no record of what"
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key}: {before.get(key)}, now {now.get(key)}" for key in changed) or "another version"


def _new_folder(ledger: Ledger) -> Path:
    folder = ledger.folder / f"new-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder
