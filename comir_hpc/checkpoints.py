"""Checkpoints on disk: whole or not there at all.

A checkpoint is a folder ``step-00000100`` with one torch file and its checksum. It is written under another name,
flushed to the disk and renamed, so that a crash leaves the one before; what is damaged later is found by the
checksum and passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from comir_hpc.errors import CheckpointError

_STATE, _MANIFEST = "state.pt", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


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
        From `checkpoint_path`; replaced if it exists.
    record : dict
        Tensors and plain data, readable without executing code.

    Raises
    ------
    CheckpointError
        If it cannot be written (a full disk); earlier checkpoints are untouched.
    """
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
        (spare / _MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        for one in (spare / _STATE, spare / _MANIFEST, spare):
            _flush(one)
        if path.exists():
            shutil.rmtree(path)
        spare.replace(path)
        _flush(path.parent)
    # torch reports a full disk while it writes its archive as a RuntimeError.
    except (OSError, RuntimeError) as error:
        shutil.rmtree(spare, ignore_errors=True)
        kept = [p.name for p in list_checkpoints(path.parent)]
        raise CheckpointError(
            f"{path} cannot be written ({error}); {_free(path)} free there. "
            f"{'Intact: ' + ', '.join(kept) if kept else 'There is no earlier checkpoint'}; make room and run the "
            "same command again: it resumes from there"
        ) from error


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
        if file.stat().st_size != manifest["bytes"] or _digest(file) != manifest["sha256"]:
            raise CheckpointError(f"{path} is damaged: {file.name} is not what was written")
        record: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({type(error).__name__}: {error})") from error
    return record


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
    spare = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        spare.write_bytes(content)
        _flush(spare)
        spare.replace(path)
    except OSError as error:
        spare.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}); {_free(path)} free there. Make room and run the same command again"
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(path: Path) -> str:
    place = next(p for p in (path, *path.parents) if p.exists())
    return f"{shutil.disk_usage(place).free / 2**20:.0f} MiB"
