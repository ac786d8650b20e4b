"""What a reader of the page copies: commands and code that run where they are pasted, from any folder."""

from __future__ import annotations

import shlex
from pathlib import Path

from comir_hpc.report.wording import Snippet
from comir_hpc.runs.result import Result


def make_snippets(folder: Path, result: Result) -> list[Snippet]:
    """Give the ways to apply a transform; all paths are absolute.

    Parameters
    ----------
    folder : Path
        Absolute, of the registration; it has a transform.
    """
    fixed, moving = (_place(folder, result, role) for role in ("fixed", "moving"))
    tfm, record = str(folder / result.transform_file), str(folder / "transform.json")
    point = _point(result)
    warp = [
        "comir-hpc",
        "warp",
        "--zarr",
        moving,
        "--transform",
        tfm,
        "--like",
        fixed,
        "--out",
        "warped.zarr",
    ]
    points = ["comir-hpc", "warp", "--points", "points.csv", "--transform", tfm, "--out", "moved.csv"]
    found = [
        Snippet("The moving volume on the fixed grid", shlex.join(warp)),
        Snippet(
            "Points of the fixed volume, in the moving one (LPS, mm)",
            f"printf 'x,y,z\\n{point}\\n' > points.csv\n{shlex.join(points)}",
        ),
        Snippet(
            "SimpleITK",
            "import SimpleITK as sitk\n"
            "from comir_hpc.transforms import itk_image\n"
            "from comir_hpc.volumes.volume import Volume\n\n\n"
            "def image(path):  # or sitk.ReadImage of the original file: it lies in the same world\n"
            "    volume = Volume.open(path)\n"
            "    return itk_image(volume.read()[0], volume.grid)\n\n\n"
            f"fixed, moving = image({fixed!r}), image({moving!r})\n"
            f"transform = sitk.ReadTransform({tfm!r})\n"
            "aligned = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0)",
        ),
    ]
    if result.bends:  # what bends is no matrix
        return found
    return [
        *found,
        Snippet(
            "NumPy",
            "import json\nimport numpy as np\n\n"
            f"fixed_points = np.array([[{point.replace(',', ', ')}]])  # (N, 3), LPS, mm\n"
            f"matrix = np.array(json.load(open({record!r}))['matrix_lps_mm'])\n"
            "moving_points = fixed_points @ matrix[:3, :3].T + matrix[:3, 3]",
        ),
    ]


def _place(folder: Path, result: Result, role: str) -> str:
    """Give the absolute path of a volume.

    Results of format 0 have the path as it was typed, which counts from a folder that is not known any more; and
    folders are moved. So a path is looked for from here, beside the result and in the folders above it, then its name.
    """
    record = result.inputs.get(role)
    if record is None:
        return role
    named, around = Path(record.path), (folder, *folder.parents)
    tried = [start / named for start in (Path.cwd(), *around)] + [start / named.name for start in around]
    return str(next((place for place in tried if place.exists()), named).absolute())


def _point(result: Result) -> str:
    """Give one point to try: the middle of the fixed volume."""
    fixed = result.inputs.get("fixed")
    grid = None if fixed is None else fixed.space
    return "0,0,0" if grid is None else ",".join(f"{value:.3f}" for value in grid.centre_mm)
