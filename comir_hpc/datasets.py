"""The embedded example pair, and phantoms with a known answer."""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.errors import ConfigError
from comir_hpc.geometry import Triple

EMBEDDED = ("t1w", "t2w")


def embedded_volume(modality: str) -> Path:
    """Path of the embedded brain template of one modality: NIfTI, uint8, 2 mm, (98, 114, 98) region of MNI152.

    The two modalities, ``t1w`` and ``t2w``, lie on one grid (MNI152NLin2009cAsym, see LICENSE-ICBM.txt beside them).

    Raises
    ------
    ConfigError
        If there is no such modality.
    """
    if modality not in EMBEDDED:
        raise ConfigError(f"no embedded volume {modality!r}; there are {', '.join(EMBEDDED)}")
    return Path(str(files("comir_hpc") / "data" / f"{modality}.nii.gz"))


def embedded_landmarks() -> dict[str, NDArray[np.float64]]:
    """The 32 anatomical fiducials of the embedded pair: name -> world LPS (x, y, z) in mm."""
    text = (files("comir_hpc") / "data" / "landmarks.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {row["name"]: np.array([float(row[a]) for a in "xyz"]) for row in rows}


def phantom_pair(
    shape_zyx: Triple, *, seed: int = 0, num_structures: int = 24
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two modalities of one generated specimen, aligned: smooth random blobs in an ellipsoid, no symmetry.

    Every structure has an intensity in each modality that says nothing about its intensity in the other, so
    only structure connects the two.

    Returns
    -------
    two arrays (z, y, x), float32, background 0, specimen between 40 and 255
    """
    rng = np.random.default_rng(seed)
    shape = np.asarray(shape_zyx)
    coordinates = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
    centred = (coordinates - ((shape - 1) / 2)[:, None, None, None]) / (shape / 2)[:, None, None, None]
    inside = (centred**2).sum(axis=0) < 0.85**2
    labels = np.zeros(shape_zyx, dtype=np.int64)
    for structure in range(1, num_structures + 1):
        centre, radius = rng.uniform(-0.6, 0.6, size=3), rng.uniform(0.1, 0.35, size=3)
        distance = (((centred - centre[:, None, None, None]) / radius[:, None, None, None]) ** 2).sum(axis=0)
        labels[inside & (distance < 1)] = structure
    volumes: list[NDArray[Any]] = []
    for _ in range(2):
        intensity = rng.uniform(40, 255, size=num_structures + 1)
        volumes.append(
            ndimage.gaussian_filter(np.where(inside, intensity[labels], 0).astype(np.float32), 0.7)
        )
    return volumes[0], volumes[1]
