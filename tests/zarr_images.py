"""OME-Zarr images for tests, written by zarr with metadata of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from comir_hpc.volumes.readers import open_source

SHAPE = (6, 20, 24)
ARRAY = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)


def space(*names: str, unit: str | None = "micrometer") -> list[dict[str, Any]]:
    return [{"name": n, "type": "space", **({"unit": unit} if unit else {})} for n in names]


def scale(*values: float) -> dict[str, Any]:
    return {"type": "scale", "scale": list(values)}


def shift(*values: float) -> dict[str, Any]:
    return {"type": "translation", "translation": list(values)}


def write(
    path: Path,
    array: np.ndarray,
    axes: Any,
    steps: list[dict[str, Any]] | None = None,
    *,
    version: str = "0.4",
    further: dict[str, Any] | None = None,
    group: str = "",
) -> Path:
    """An image of one level, in zarr v2 up to version 0.4 and v3 from 0.5 on."""
    form = 3 if version >= "0.5" else 2
    root = zarr.open_group(store=str(path), mode="a", zarr_format=form)
    node = root.require_group(group) if group else root
    node.create_array("0", data=array, chunks=array.shape)
    dataset = {"path": "0", **({"coordinateTransformations": steps} if steps else {})}
    image = {"version": version, "datasets": [dataset], **({"axes": axes} if axes else {}), **(further or {})}
    entries = {"multiscales": [image]}
    node.attrs.update({"ome": {"version": version, **entries}} if form == 3 else entries)
    return path


def reads(path: Path, array: np.ndarray, dataset: str | None = None) -> None:
    found = open_source(path, dataset).read()
    np.testing.assert_array_equal(found, array[None] if array.ndim == 3 else array)
