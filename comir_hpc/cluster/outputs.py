"""An output's life: made once by whichever part comes first, completed once by whichever comes last."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import BlockPlan
from comir_hpc.ledger import Ledger
from comir_hpc.volume import Volume


def open_output(
    path: Path,
    ledger: Ledger,
    make: Callable[[Path], Volume],
    *,
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
                    f"{path} exists and was made from another input, model or parameters, or by another version "
                    f"(fingerprint {found}, this command's is {ledger.fingerprint}); choose another --out, or pass "
                    "--overwrite"
                )
            # By one rename, so that a stop here leaves the old store whole or gone, not in pieces.
            path.replace(_new_folder(ledger) / "replaced")
        ledger.clear()
        spare = _new_folder(ledger) / path.name
        make(spare).update_metadata(fingerprint=ledger.fingerprint)
        spare.replace(path)
        spare.parent.rmdir()
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


def _new_folder(ledger: Ledger) -> Path:
    folder = ledger.folder / f"new-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder
