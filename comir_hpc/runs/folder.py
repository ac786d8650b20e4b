"""Whether a folder can take what a verb is going to write: asked before the work, not after it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from comir_hpc.errors import ComirError
from comir_hpc.host.memory import in_words


def require_room(folder: Path, num_bytes: int, refusal: type[ComirError]) -> None:
    """Try whether files can be written to a folder, and whether there is space for them.

    The folder is made and a small file written to it. Both are removed again, so that a verb that is refused later
    leaves nothing.

    Parameters
    ----------
    folder : Path
        Folder that will be written to. It may be missing, with its parents.
    num_bytes : int
        Number of bytes that will be written.
    refusal : type
        Class of the error that is raised where the folder is refused.

    Raises
    ------
    ComirError
        If the folder cannot be made or written to, or the disk has less space; of the class `refusal`.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise refusal(
            f"{folder} cannot be written to ({error.strerror or error}); choose another folder, or make room there"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        for place in missing:
            with suppress(OSError):  # another process uses it by now
                place.rmdir()
    if free < num_bytes:
        raise refusal(
            f"{folder} has {in_words(free)} of free disk space, {in_words(num_bytes)} are needed; make room there, or "
            "choose another folder"
        )
