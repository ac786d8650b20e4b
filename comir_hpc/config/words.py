"""Words that settings allow: each list stands here once, and the modules that act on the words import it.

This module imports nothing of ours, so that `comir-hpc --help` may read it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""Arithmetic of networks; auto is bf16 where the device multiplies it fast, fp32 otherwise."""
Device = Literal["auto", "cpu", "cuda"]
"""Where networks run; auto is a GPU when there is one."""
EngineName = Literal["torch", "deepspeed"]
"""What carries out the steps of a training."""

GroupName = Literal["auto", "trivial", "D2", "D4", "O", "C2", "C4"]
"""Groups of exact rotations of a voxel grid; auto picks from the spacing."""
Symmetry = Literal["none", "D2", "D4", "O", "C2", "C4"]
"""Groups over whose rotations a representation can be averaged."""

SHARED = "any"
"""Name of an encoder that serves all modalities."""
NetworkName = Literal["unet", "denseunet", "gunet"]
Norm = Literal["batch", "channel"]
Kernels = Literal["symmetric", "free"]
Padding = Literal["zeros", "replicate", "reflect"]
Configuration = Literal["three-level", "six-level"]
"""The networks published with CoMIR."""

Critic = Literal["mse", "cosine", "correlation", "tanimoto"]
"""How two representations are compared by the loss."""
Bound = Literal["infonce", "jsd", "nwj"]
"""Lower bounds of the mutual information."""

SourceKind = Literal["image", "labels"]
"""What an ingested volume holds."""
StoredType = Literal["float16", "float32", "int8", "int16"]
"""Types that a representation is stored in."""
Blend = Literal["gaussian", "hann", "exact"]
"""How overlapping windows are put together."""


@dataclass(frozen=True)
class Offered:
    """A representation that a registration can compare.

    Attributes
    ----------
    place : str
        Where its class is, as ``module:name``. It is imported when a registration asks for it.
    trained : bool
        Whether it is made by the encoders of a run: then a model and both modalities are needed, or stored
        representations.
    """

    place: str
    trained: bool = False


REPRESENTATIONS: dict[str, Offered] = {
    "comir": Offered("comir_hpc.representations.learned:Learned", trained=True),
    "gradient": Offered("comir_hpc.representations.gradient:Gradient"),
    "intensity": Offered("comir_hpc.representations.intensity:Intensity"),
    "mind": Offered("comir_hpc.representations.mind:Mind"),
}
"""What a registration compares, by the word for it (`comir_hpc.representations` says how to add one)."""
Initial = Literal["identity", "moments", "global", "features"]
"""Where a registration starts."""
TransformKind = Literal["rigid", "affine", "bspline", "field"]
"""What a registration finds."""
BENDING: tuple[TransformKind, ...] = ("bspline", "field")
"""Kinds of transform that bend space after an affine one."""
Checks = Literal["full", "quick"]
"""How thoroughly the answer of a registration is checked."""
Fallback = Literal["auto", "none"]
"""Whether other representations are compared where the general model finds no answer that holds."""
FALLBACKS = ("mind", "intensity")
"""Representations that are compared then, in this order: they need no training."""
LastStep = Literal["auto", "none"]
"""Whether the answer of a registration is refined once more, on the intensities."""
Require = Literal["warn", "pass"]
"""Poorest verdict of a registration that ends with exit code 0."""

TransformForm = Literal["itk", "ants", "elastix", "fsl", "lta", "matrix-ras", "matrix-lps", "ngff"]
"""Forms in which tools keep a transform."""
Direction = Literal["fixed-to-moving", "moving-to-fixed"]
"""Which way points are carried."""
Interpolation = Literal["linear", "nearest", "cubic"]
"""How values between voxels are found."""

Displacement = Literal["so3", "none"]
"""How the demo moves its second volume."""

DATA_SETS = ("embedded", "embedded_1mm", "avg152", "templates", "t1_epi", "concrete")
"""Sets of volumes with a known answer (`comir_hpc.data.registry`)."""
FAMILIES = (
    "embedded", "embedded_1mm", "avg152_t2", "avg152_pd", "template_epi", "template_pet", "t1_epi", "concrete",
)  # fmt: skip
"""Pairs of a benchmark, made of these sets (`comir_hpc.data.families`)."""
LEVELS = ("none", "small", "medium", "large", "any")
"""How far a benchmark displaces the moving volume: not at all, or up to 10, 30, 90 and 180 degrees."""
DEGRADATIONS = ("none", "noise", "bias", "thick", "cropped", "padded")
"""How a benchmark spoils the moving volume (`comir_hpc.data.degradations`)."""
PEERS = ("elastix", "ants", "ants-multistart", "greedy", "greedy-search", "simpleitk")
"""Other registration programs that a benchmark runs as they ship (`comir_hpc.recipes.benchmark.peers`)."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like a given one."""
    return max(known, key=lambda one: difflib.SequenceMatcher(None, word.lower(), one.lower()).ratio())
