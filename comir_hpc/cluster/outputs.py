"""An output's life: made once by whichever part comes first, completed once by whichever comes last."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import BlockPlan
from comir_hpc.ledger import Ledger
from comir_hpc.volume import Volume


def open_output(
    path: Path,
    ledger: Ledger,
    make: Callable[[Path], Volume],
    *,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    parts: int = 1,
) -> Volume:
    """Open the output that an earlier or parallel run of the same command made, or make it.

    The store appears under its name by one rename, with the ledger's fingerprint in its metadata, so parts that
    start at the same moment agree on one store and nobody meets half of one.

    Parameters
    ----------
    make : callable
        Creates the (incomplete) volume at the path that it is given and returns it.
    record : mapping, optional
        What the fingerprint was made of; kept in the metadata as ``made_from``, so that a refusal can name
        what differs.
    overwrite : bool
        Replace a store of another fingerprint. One of the same fingerprint is gone on with.
    parts : int
        How many runs may do this at once.

    Raises
    ------
    VolumeError
        If something else is at `path`: a result of other inputs, model or parameters (unless `overwrite`), or no
        volume of ours (never replaced).
    """
    with ledger.exclusive(needed=parts > 1):
        if path.exists():
            found = _fingerprint_of(path)
            if found == ledger.fingerprint:
                return Volume.open(path, writable=True)
            if not overwrite:
                raise VolumeError(
                    f"{path} exists and was made from something else ({_differences(path, record)}); "
                    "choose another name, or pass --overwrite"
                )
            # By one rename, so that a stop here leaves the old store whole or gone, not in pieces.
            path.replace(_new_folder(ledger) / "replaced")
        ledger.clear()
        folder = _new_folder(ledger)
        spare = folder / path.name
        try:
            make(spare).update_metadata(fingerprint=ledger.fingerprint, made_from=_plain(record))
            spare.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Volume.open(path, writable=True)


def complete_output(
    volume: Volume,
    plan: BlockPlan,
    ledger: Ledger,
    finish: Callable[[], None],
    *,
    parts: int = 1,
) -> int:
    """Call `finish` once, in whichever run finds every block done; return how many blocks are still missing.

    `finish` builds the pyramid and ends with `Volume.finish`. A run that is killed inside it leaves the volume
    incomplete, and the next run of any part does it again.
    """
    missing = len(plan) - len(ledger.done())
    if missing:
        return missing
    with ledger.exclusive(needed=parts > 1):
        if not Volume.open(volume.path, allow_incomplete=True).complete:
            finish()
    return 0


def _fingerprint_of(path: Path) -> str:
    found = Volume.open(path, allow_incomplete=True).metadata.get("fingerprint", "none")
    return str(found)


def _plain(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record as it comes back from JSON: paths are text, tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(record or {}), default=str))
    return plain


def _differences(path: Path, record: Mapping[str, Any] | None) -> str:
    before = Volume.open(path, allow_incomplete=True).metadata.get("made_from")
    now = _plain(record)
    if not before or not now:
        return "no record of what"
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key}: {before.get(key)}, now {now.get(key)}" for key in changed) or "another version"


def _new_folder(ledger: Ledger) -> Path:
    folder = ledger.folder / f"new-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder
