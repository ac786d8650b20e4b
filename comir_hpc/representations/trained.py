"""What representations of trained encoders have in common, whoever runs the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from comir_hpc.representations.measures import CORRELATION, Measure
from comir_hpc.representations.protocol import Representation
from comir_hpc.runs.model import Model

_MIRROR_BLIND_GROUPS = ("O", "D4", "C4")


@dataclass(frozen=True, eq=False)
class Trained(Representation):
    """Channels of an encoder that `train` made, so that two of them correlate.

    Attributes
    ----------
    run : Path or None
        Folder of the training run; None if it was not named.
    model : Model or None
        The ``model.json`` in that folder.
    """

    run: Path | None
    model: Model | None

    measure: ClassVar[Measure] = CORRELATION
    learned: ClassVar[bool] = True

    @property
    def reference(self) -> float | None:
        """Agreement of the model on its aligned training pair, or on made-up ones; None without a model."""
        return None if self.model is None else self.model.reference.expected_agreement

    @property
    def mirror_blind(self) -> bool:
        """Say whether the encoder's kernels are alike in all directions, mirrored ones included.

        ``kernels: symmetric`` shares one weight among the taps that the group exchanges. For these groups a mirror
        exchanges no others; the half turns of the smaller ones leave the corners of a kernel in two sets.
        """
        network = {} if self.model is None else self.model.network.as_dict()
        alike = network.get("name") == "unet" and network.get("kernels") == "symmetric"
        return alike and self.model is not None and self.model.group in _MIRROR_BLIND_GROUPS

    @property
    def expected_deviation(self) -> float | None:
        """Mean deviation of the maps of the training's patches, over all modalities; None without a model."""
        known = [] if self.model is None else self.model.reference.deviation.values()
        found = [value for value in known if value]
        return sum(found) / len(found) if found else None

    @property
    def reference_of(self) -> str:
        """What `reference` was measured on: the training pair, or the made-up pairs of a general model."""
        made_up = self.model is not None and self.model.scale_free
        return "made-up pairs, as the general model was trained on" if made_up else super().reference_of

    def provenance(self) -> dict[str, Any] | None:
        """Say which model it was, for the result of a registration; None without a model."""
        if self.run is None or self.model is None:
            return None
        return self.model.provenance(self.run)
