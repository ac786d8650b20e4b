"""`comir-hpc doctor`: what works on this node, tried out rather than looked up, with the numbers.

Each check is a function that returns lines; one that raises is a FAIL with what it said. Nothing is left behind
in the folder that is tested, and nothing is changed anywhere. `node` looks at the machine, `compute` at what it
computes, `check` holds the lines.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from comir_hpc.commands.doctor import compute, node
from comir_hpc.commands.doctor.check import Check, Checks

__all__ = ["Check", "Checks", "doctor"]


def doctor(folder: Path = Path()) -> Checks:
    """Examine this node; takes about half a minute.

    Parameters
    ----------
    folder : Path
        Folder whose file system is tried; the current folder when not given.
    """
    examinations: dict[str, Callable[[], list[Check]]] = {
        "versions": node.versions,
        "processor": node.processor,
        "memory": node.memory,
        "open files": node.open_files,
        "GPU": node.gpu,
        "conv3d": compute.conv3d,
        "all-reduce": compute.all_reduce,
        "disk space": lambda: node.disk_space(folder),
        "disk speed": lambda: node.disk_speed(folder),
        "zarr": lambda: node.sharded_volume(folder),
        "SLURM": node.slurm,
        "Apptainer": node.apptainer,
    }
    return Checks(tuple(row for name, examine in examinations.items() for row in safely(name, examine)))


def safely(name: str, examine: Callable[[], list[Check]]) -> list[Check]:
    """Run one check; what it raises becomes a FAIL with what it said."""
    # What a broken node raises is not known beforehand; ValueError and RuntimeError include ours and torch's.
    try:
        return examine()
    except (OSError, RuntimeError, ValueError, ImportError, EOFError, subprocess.SubprocessError) as error:
        first = (str(error).splitlines() or [""])[0]
        return [Check(name, "FAIL", f"{type(error).__name__}: {first}"[:200])]
