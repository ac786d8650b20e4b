"""Result folders as `register` and `train` leave them, made from a phantom: for tests of what reads such folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from PIL import Image

from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import angle_deg, rotation_by, so3_grid
from comir_hpc.transforms import Transform, save_transform

GRID = Grid((60, 108, 90), (3.0, 2.0, 2.0), (-89.0, -107.0, -70.0))


def phantom(grid: Grid, turned: Transform, contrast: tuple[float, float, float, float]) -> np.ndarray:
    """A head-like thing (z, y, x): shell, matter with folds, two ventricles, one lesion; `turned` moves it."""
    index = np.moveaxis(np.indices(grid.shape_zyx), 0, -1).reshape(-1, 3)
    x, y, z = (turned.apply(grid.world_mm(index)) - grid.centre_mm).T
    folds = 4 * np.sin(x / 5) * np.cos(y / 6) * np.cos(z / 5)
    outer = np.sqrt((x / 72) ** 2 + (y / 92) ** 2 + (z / 76) ** 2)
    inner = np.sqrt((x / 62) ** 2 + (y / 82) ** 2 + (z / 66) ** 2) + folds / 90
    ventricle = np.minimum(
        np.hypot(np.hypot((x - 12) / 8, (y + 5) / 26), (z - 8) / 12),
        np.hypot(np.hypot((x + 12) / 8, (y + 5) / 26), (z - 8) / 12),
    )
    lesion = np.sqrt((x - 34) ** 2 + (y - 38) ** 2 + (z - 12) ** 2) / 9
    shell, matter, fluid, spot = contrast
    values = np.where(outer < 1, shell, 0.0)
    values = np.where(inner < 1, matter * (1 + 0.25 * np.sin(inner * 20)), values)
    values = np.where(ventricle < 1, fluid, values)
    values = np.where(lesion < 1, spot, values)
    return scipy.ndimage.gaussian_filter(values.reshape(grid.shape_zyx), 0.6).astype(np.float32)


def write_panels(folder: Path, true: Transform, found: Transform, *, representations: bool = True) -> None:
    rng = np.random.default_rng(0)
    fixed = phantom(GRID, Transform.identity(), (0.5, 0.9, 0.15, 1.1))
    inverted = (0.9, 0.35, 1.0, 0.6)
    # Seen through the initial, then the found transform, the specimen is off by what is left of the true one.
    before = phantom(GRID, true.inverse(), inverted) + rng.normal(0, 0.03, GRID.shape_zyx)
    after = phantom(GRID, true.inverse().compose(found), inverted) + rng.normal(0, 0.03, GRID.shape_zyx)
    volumes = {"fixed": fixed, "before": before, "after": after}
    if representations:
        for name, values in list(volumes.items()):
            edges = scipy.ndimage.gaussian_gradient_magnitude(values, 1.2)
            volumes[f"{name}_representation"] = edges / np.percentile(edges, 99)
    cuts = {"axial": (0, (2.0, 2.0)), "coronal": (1, (3.0, 2.0)), "sagittal": (2, (3.0, 2.0))}
    panels: dict[str, Any] = {}
    for plane, (axis, spacing) in cuts.items():
        for name, values in volumes.items():
            panels[f"{plane}_{name}"] = values.take(GRID.shape_zyx[axis] // 2, axis).astype(np.float32)
        panels[f"{plane}_spacing_mm"] = np.asarray(spacing)
    np.savez_compressed(folder / "panels.npz", **panels)


def write_search(folder: Path, found: Transform, count: int = 4000) -> None:
    rng = np.random.default_rng(1)
    rotations = so3_grid(count)
    decoy = found.rotation_xyz @ rotation_by("z", 180.0)
    angles = angle_deg(np.swapaxes(rotations, -1, -2) @ found.rotation_xyz)
    scores = 0.12 + 0.5 * np.exp(-((angles / 24) ** 2)) + rng.normal(0, 0.02, count)
    scores += 0.2 * np.exp(-((angle_deg(np.swapaxes(rotations, -1, -2) @ decoy) / 26) ** 2))
    scores[:5] = -np.inf
    np.savez_compressed(folder / "search.npz", rotations=rotations, scores=scores, angles_deg=angles)


def write_run(folder: Path, *, steps: int = 250, pictures: int = 2) -> Path:
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(2)
    lines = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        lines.append(
            {
                "step": step,
                "time": 1.7e9 + 0.8 * step,
                "loss": math.log(23) * math.exp(-2.2 * done) + 0.1 * rng.random(),
                "retrieval": 1 - 0.9 * math.exp(-3 * done),
                "agreement": 0.85 * (1 - math.exp(-4 * done)),
                "learning_rate": 2e-3 * 0.5 * (1 + math.cos(math.pi * done)),
                "bound": math.log(23) * (1 - math.exp(-2.2 * done)),
                "ceiling": math.log(23),
                "gradient_norm": None if step == 30 else 1 / step,
                "patches_per_s": 31 + rng.random(),
            }
        )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (folder / "config.yaml").write_text(
        "modalities:\n- t1w\n- t2w\nloss:\n  bound: infonce\n  subcrops: 1\n  displacement_negatives: 0\n"
        f"sampling:\n  pairs_per_step: 12\noptimiser:\n  steps: {steps}\n"
    )
    reference = {
        "agreement": 0.84,
        "agreement_p5": 0.71,
        "mismatched": 0.06,
        "mismatched_p95": 0.31,
        "shifted": {"1": 0.7, "2": 0.48, "4": 0.2, "8": 0.08},
        "equivariance": {"t1w": {"mean": 0.018, "max": 0.027}, "t2w": {"mean": 0.021, "max": 0.033}},
        "effective_rank": {"t1w": 1.0, "t2w": 1.0},
    }
    model: dict[str, Any] = {
        "version": "0.1.0",
        "modalities": ["t1w", "t2w"],
        "network": {"name": "unet", "latent_channels": 1},
        "options": {"widths": [16, 32, 64, 64], "convs_per_level": [1, 2], "spacing_zyx": [2, 2, 2]},
        "in_channels": {"t1w": 1, "t2w": 1},
        "latent_channels": 1,
        "spacing_mm": [2, 2, 2],
        "group": "O",
        "step": steps,
        "loss": 0.1,
    }
    model["reference"] = reference
    (folder / "model.json").write_text(json.dumps(model), encoding="utf-8")
    for number in range(pictures):
        noise = rng.integers(0, 255, (240, 640), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"step-{(number + 1) * 100:08d}.png")
    return folder


def write_result_folder(root: Path, verdict: str = "PASS") -> Path:
    """A complete folder of `register` in `root`, with its training run beside it."""
    folder = root / "registration"
    folder.mkdir(parents=True)
    true = Transform.rigid(rotation_by((1.0, 2.0, -1.0), 117.0), (12.0, -7.0, 5.0), GRID.centre_mm)
    slip = Transform.rigid(
        rotation_by("y", 0.4 if verdict == "PASS" else 14.0), (0.3, 0.2, -0.4), GRID.centre_mm
    )
    found = true.compose(slip).about(GRID.centre_mm)
    save_transform(found, folder)
    write_panels(folder, true, found)
    write_search(folder, found)
    run = write_run(root / "run")
    agreement = {"PASS": 0.71, "WARN": 0.33, "FAIL": 0.19}[verdict]
    candidates = [
        {
            "rank": rank + 1,
            "rotation_deg": other.rotation_deg,
            "coarse_score": [0.62, 0.33, 0.31, 0.22][rank],
            "refined_score": [agreement, 0.18, 0.17, 0.12][rank],
            "matrix_lps_mm": other.matrix_mm.tolist(),
        }
        for rank, other in enumerate(
            found.compose(Transform.rigid(rotation_by("z", angle), (0, 0, 0), GRID.centre_mm))
            for angle in (0.0, 180.0, 166.0, 75.0)
        )
    ]
    reasons = {
        "PASS": ["The representations agree to 0.71 after alignment (PASS from 0.40)."],
        "WARN": ["The representations agree to 0.33 after alignment (PASS from 0.40)."],
        "FAIL": [
            "The representations agree to 0.19 only (WARN from 0.25).",
            "The next distinct answer is as good: margin 0.02.",
        ],
    }
    error = slip.distance_mm(Transform.identity(), GRID.corners_mm() * 0.6)
    result = {
        "verdict": verdict,
        "reasons": reasons[verdict],
        "metric": {"name": "correlation of the representations", "value": agreement},
        "margin": 0.02 if verdict == "FAIL" else 0.35,
        "agreement": agreement,
        "matrix_lps_mm": found.matrix_mm.tolist(),
        "rotation_deg": found.rotation_deg,
        "translation_mm": found.translation_mm.tolist(),
        "candidates": candidates,
        "timings_s": {"read": 0.8, "encode": 11.2, "global_search": 14.9, "refine": 31.0, "write": 0.6},
        "peak_memory_mib": 1430.0,
        "versions": {"comir-hpc": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "SimpleITK": "2.5.7"},
        "inputs": {
            role: {"path": f"/data/{role}.zarr", "fingerprint": fingerprint * 8, "grid": GRID.as_dict()}
            for role, fingerprint in (("fixed", "1f3a9c0d"), ("moving", "77e2b4a1"))
        },
        "settings": {"representation": "comir", "initial": "global", "transform": "rigid", "rotations": 4000},
        "model": {"run": str(run), "step": 250, "modalities": ["t1w", "t2w"]},
        "run": str(run),
        "direction": "maps a point of the fixed volume to the corresponding point of the moving volume "
        "(ITK's resampling direction); world points are LPS (x, y, z) in mm",
        "truth": {
            "matrix_lps_mm": true.matrix_mm.tolist(),
            "tre_mm": float(error.mean()),
            "tre_voxels": float(error.mean() / 2),
            "tre_median_mm": float(np.median(error)),
            "tre_p95_mm": float(np.percentile(error, 95)),
            "rotation_error_deg": 0.4 if verdict == "PASS" else 14.0,
        },
        "baseline": {"name": "mutual information, same global search", "tre_mm": 1.9, "tre_voxels": 0.95},
        "notes": ["The demo trains and tests on one specimen: a demonstration, not a benchmark."],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return folder
