"""Words that settings allow: each list stands here once, and the modules that act on the words import it.

This module imports nothing of ours, so that `comir-hpc --help` may read it.
"""

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
    "intensity": Offered("comir_hpc.representations.intensity:Intensity"),
    "mind": Offered("comir_hpc.representations.mind:Mind"),
}
"""What a registration compares, by the word for it (`comir_hpc.representations` says how to add one)."""
Initial = Literal["identity", "moments", "global"]
"""Where a registration starts."""
TransformKind = Literal["rigid", "affine", "bspline", "field"]
"""What a registration finds."""
BENDING: tuple[TransformKind, ...] = ("bspline", "field")
"""Kinds of transform that bend space after an affine one."""

Direction = Literal["fixed-to-moving", "moving-to-fixed"]
"""Which way points are carried."""
Interpolation = Literal["linear", "nearest", "cubic"]
"""How values between voxels are found."""

Displacement = Literal["so3", "none"]
"""How the demo moves its second volume."""
