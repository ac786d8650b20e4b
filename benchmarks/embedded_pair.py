"""Make the embedded example pair from the MNI152NLin2009cAsym templates (T1w, T2w, 32 landmarks).

    pip download --no-deps autoafids==0.1.4    # holds the templates; unpack it
    python benchmarks/embedded_pair.py FOLDER_WITH_TEMPLATES comir_hpc/data

Each template is averaged over 2 x 2 x 2 voxels (1 mm -> 2 mm) and scaled to 8 bits by one factor.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def halve(image: sitk.Image) -> sitk.Image:
    """Mean over 2 x 2 x 2 voxels, dropping an odd last voxel, as uint8 with the brightest 0.01 % saturated."""
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    z, y, x = (n // 2 for n in values.shape)
    mean = values[: 2 * z, : 2 * y, : 2 * x].reshape(z, 2, y, 2, x, 2).mean(axis=(1, 3, 5))
    scaled = np.clip(np.rint(mean * (255 / np.percentile(mean, 99.99))), 0, 255).astype(np.uint8)
    result = sitk.GetImageFromArray(scaled)
    result.SetSpacing([2 * s for s in image.GetSpacing()])
    result.SetOrigin(image.TransformContinuousIndexToPhysicalPoint((0.5, 0.5, 0.5)))
    result.SetDirection(image.GetDirection())
    return result


def landmarks(path: Path) -> list[tuple[str, float, float, float]]:
    """Landmarks of a Slicer .fcsv (RAS) as (name, x, y, z) in LPS mm."""
    rows = csv.reader(
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    )
    return [(row[12], -float(row[1]), -float(row[2]), float(row[3])) for row in rows]


def main(source: Path, target: Path) -> None:
    """Write t1w.nii.gz, t2w.nii.gz and landmarks.csv."""
    for name in ("T1w", "T2w"):
        sitk.WriteImage(
            halve(sitk.ReadImage(str(source / f"{name}.nii.gz"))),
            str(target / f"{name.lower()}.nii.gz"),
            True,
        )
    with (target / "landmarks.csv").open("w", newline="", encoding="utf-8") as file:
        file.write("# anatomical fiducials of MNI152NLin2009cAsym, world LPS, mm\n")
        writer = csv.writer(file)
        writer.writerow(["name", "x", "y", "z"])
        writer.writerows(
            [(n, *(round(v, 3) for v in xyz)) for n, *xyz in landmarks(source / "afids_groundtruth.fcsv")]
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
