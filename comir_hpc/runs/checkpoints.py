"""Checkpoints on disk: whole or not there at all.

A checkpoint is a folder ``step-00000100`` with one torch file and its checksum. It is written under another name,
flushed to the disk and renamed, so that a crash leaves the one before. What is damaged later is found by the checksum
and passed over.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from comir_hpc.errors import CheckpointError
from comir_hpc.host.files import flush, write_bytes, write_text
from comir_hpc.runs.record import brief

_STATE, _MANIFEST = "state.pt", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
# What torch's reader raises on damaged files: its archive, its pickle and the objects in that fail in many ways.
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    pickle.UnpicklingError,
    struct.error,
)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies, below the folder of all of them."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints below a folder, newest first, damaged ones included."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def write_checkpoint(path: Path, record: dict[str, Any]) -> None:
    """Write a checkpoint so that it is complete or absent, whatever happens meanwhile.

    Parameters
    ----------
    path : Path
        Path of the checkpoint, from `checkpoint_path`; a checkpoint that exists there is replaced.
    record : dict
        Tensors and plain data, readable without executing code.

    Raises
    ------
    CheckpointError
        If it cannot be written (a full disk); earlier checkpoints are untouched.
    """
    import torch  # here, since reports read no tensors and should not wait for it

    spare = path.with_name(f".{path.name}.part")
    try:
        if spare.exists():
            shutil.rmtree(spare)
        spare.mkdir(parents=True)
        torch.save(record, spare / _STATE)
        manifest = {
            "file": _STATE,
            "bytes": (spare / _STATE).stat().st_size,
            "sha256": _digest(spare / _STATE),
        }
        flush(spare / _STATE)
        write_text(spare / _MANIFEST, json.dumps(manifest) + "\n", durable=True)
        flush(spare)
        if path.exists():
            shutil.rmtree(path)
        spare.replace(path)
        # A rename is on the disk only when the folder that holds the name is.
        flush(path.parent)
    # torch reports a full disk while it writes its archive as a RuntimeError.
    except (OSError, RuntimeError) as error:
        shutil.rmtree(spare, ignore_errors=True)
        raise CheckpointError(
            f"{path} cannot be written ({_refusal(path, error)}); {_free(path)} free there. {_kept(path.parent)}; make "
            "room and run the same command again: it resumes from there"
        ) from error


def _refusal(path: Path, error: Exception) -> str:
    """Say why a file cannot be written; torch reports a full disk by a line of its source code."""
    # What torch says is no reason that a person understands, so the disk is asked.
    full = isinstance(error, RuntimeError) and shutil.disk_usage(_place(path)).free < 2**20
    return "no space left on the disk" if full else brief(error)


def _kept(folder: Path) -> str:
    kept = [p.name for p in list_checkpoints(folder)]
    more = f" and {len(kept) - 1} before it" if len(kept) > 1 else ""
    return f"Intact: {kept[0]}{more}" if kept else "There is no earlier checkpoint"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after its checksum agreed; tensors on the CPU.

    Raises
    ------
    CheckpointError
        If it is missing, incomplete or damaged.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        file = path / manifest["file"]
        # The size first: it finds most torn files without reading them.
        if file.stat().st_size != manifest["bytes"] or _digest(file) != manifest["sha256"]:
            raise CheckpointError(f"{path} is damaged: {file.name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({type(error).__name__}: {brief(error)})"
        ) from error
    record = read_tensors(file)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is damaged: {file.name} holds no record of a training")
    return record


def read_tensors(path: Path) -> Any:
    """Read a file of torch as data, on the CPU; no code in it is run.

    Raises
    ------
    CheckpointError
        If it is damaged, or holds anything but tensors and plain data. The message is ours: torch's own advises to
        read such a file in a way that runs the code in it.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds something else than tensors and plain data; it was not opened any further, "
            "because such a file can run code"
        ) from error
    except _DAMAGED as error:
        raise CheckpointError(f"{path} is damaged ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """Return the first sentence of what torch says, without its source lines and its advice."""
    line = brief(error).split(". ")[0].split(" (Triggered ")[0]
    # The advice to load without `weights_only` would run code of the file.
    return type(error).__name__ if "weights_only" in line else line


def read_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """Read the newest intact checkpoint.

    Returns
    -------
    (record, path, notes), or None when there is no checkpoint at all
        `notes` says, one line each, what was passed over.

    Raises
    ------
    CheckpointError
        If there are checkpoints and all are damaged.
    """
    notes: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return read_checkpoint(path), path, notes
        except CheckpointError as error:
            notes.append(f"{error}; the one before it is used")
    if notes:
        raise CheckpointError(
            f"all {len(notes)} checkpoints in {folder} are damaged; delete that folder to start again"
        )
    return None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted writes left."""
    for path in list_checkpoints(folder)[keep:]:
        shutil.rmtree(path)
    for path in folder.glob(".step-*.part"):
        shutil.rmtree(path)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it has either its old content or all of the new one.

    Raises
    ------
    CheckpointError
        If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content, durable=True)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """Say in one line that a file of a run cannot be written, with the free space there."""
    return CheckpointError(
        f"{path} cannot be written ({_refusal(path, error)}); {_free(path)} free there. Make room and run the same "
        "command again"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free(path: Path) -> str:
    return f"{shutil.disk_usage(_place(path)).free / 2**20:.0f} MiB"


def _place(path: Path) -> Path:
    """Give the nearest folder that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
