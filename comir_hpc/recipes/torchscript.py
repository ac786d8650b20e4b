"""An encoder as a TorchScript file, for tools that compare the features of a network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from comir_hpc.errors import CheckpointError
from comir_hpc.host.files import written_whole
from comir_hpc.representations.encoding import load_encoder

if TYPE_CHECKING:
    from comir_hpc.networks import Network

_SIDE = 32  # voxels along each side of the patch that is traced
_CLOSE = 1e-4  # of the largest value: how near the file has to come to the encoder, at another size


class FeatureExtractor(nn.Module):
    """An encoder with the inputs and outputs that IMPACT (elastix, ITK) expects of a TorchScript model.

    Parameters
    ----------
    network : nn.Module
        Encoder of (1, c, z, y, x) normalised values.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, nb_layers: Tensor, stats: Tensor, direction: Tensor) -> list[Tensor]:
        """Return one map of features.

        Parameters
        ----------
        x : (1, c, z, y, x)
            Values of a patch.
        nb_layers : integer
            Number of maps that are wanted; there is one.
        stats : (4,) or empty
            Minimum, maximum, mean and standard deviation of the image. With them, the mean is taken off and the result
            divided by the standard deviation. Without them, the values have to be normalised already.
        direction : tensor
            Not used: the encoder was trained in all directions.

        Returns
        -------
        List of one (1, l, z, y, x).
        """
        if stats.numel() == 4:
            x = (x - stats[2]) / stats[3]
        return [self.network(x)]


def write_encoder(run: Path, modality: str | None, out: Path) -> tuple[str, tuple[str, ...]]:
    """Write the encoder of a run as TorchScript.

    Returns
    -------
    What it holds, and notes for the user.

    Raises
    ------
    CheckpointError
        If it cannot be loaded or written, or the file does not give what the encoder gives.
    """
    encoder = load_encoder(run, modality, device="cpu", precision="fp32")
    network = encoder.network
    with torch.inference_mode(False), torch.no_grad():
        _save(_scripted(network, encoder.in_channels, run), run, out)
    stride, channels = max(network.total_stride_zyx), f"{encoder.in_channels} to {encoder.latent_channels}"
    spacing = " x ".join(f"{s:.3g}" for s in encoder.spacing_mm)
    return (
        f"TorchScript of the encoder of {encoder.modality} (channels: {channels})",
        (
            f"{out.name}: for voxels of {spacing} mm (z, y, x) and patches whose sides are multiples of {stride}; "
            "forward takes (image, number of layers, statistics, direction), as IMPACT gives them",
        ),
    )


def _scripted(network: Network, in_channels: int, run: Path) -> torch.jit.ScriptModule:
    """Trace an encoder on a patch, and hold the result against it on a patch of another size."""
    flat = network.receptive_halo_zyx[0] == 0
    small, other = (
        torch.randn(1, in_channels, *(1 if flat else n, n, n), generator=torch.Generator().manual_seed(n))
        for n in (_SIDE, 2 * _SIDE)
    )
    for weight in network.parameters():
        weight.requires_grad_(False)
    with warnings.catch_warnings():
        # What it warns of is compared below: the same file at another size.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(network, small, check_trace=False)  # type: ignore[no-untyped-call]
        script: torch.jit.ScriptModule = torch.jit.script(FeatureExtractor(traced))
        expected = network(other)
        nothing = torch.zeros(0)
        found = script(other, torch.tensor(1), nothing, nothing)[0]
    # The shapes of a trace may be those of its patch.
    apart = (
        float((found - expected).abs().max() / expected.abs().max()) if found.shape == expected.shape else 1.0
    )
    if not apart < _CLOSE:
        raise CheckpointError(
            f"{run}: this network depends on the size of its input in a way that TorchScript cannot keep; use it "
            "through comir-hpc infer"
        )
    return script


def _save(script: torch.jit.ScriptModule, run: Path, out: Path) -> None:
    try:
        with written_whole(out) as spare:
            script.save(str(spare))
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror}); make room or get access"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{run}: TorchScript cannot keep this network ({str(error).splitlines()[0][:100]}); use it through "
            "comir-hpc infer"
        ) from error
