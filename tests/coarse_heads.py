"""The embedded brain pair with larger voxels: a real pair for tests of whole chains, at an eighth of the work."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk

from comir_hpc.data.embedded import embedded_volume

VOXEL_MM = 4.0


def write_heads(folder: Path) -> dict[str, Path]:
    """Write T1w and T2w with voxels of 3 mm as files of the embedded ones' names; the paths by modality."""
    return {name: _coarser(embedded_volume(name), folder) for name in ("t1w", "t2w")}


def _coarser(source: Path, folder: Path) -> Path:
    # Smoothed first: structures finer than the new voxels would come back as others (aliasing).
    image = sitk.SmoothingRecursiveGaussian(sitk.Cast(sitk.ReadImage(str(source)), sitk.sitkFloat32), 1.0)
    size = [round(n * s / VOXEL_MM) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    grid = (sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [VOXEL_MM] * 3, image.GetDirection())
    sitk.WriteImage(sitk.Cast(sitk.Resample(image, size, *grid), sitk.sitkUInt8), str(folder / source.name))
    return folder / source.name
