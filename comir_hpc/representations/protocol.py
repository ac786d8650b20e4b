"""`Representation`: what a method of comparing two volumes has to say about each of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from comir_hpc.config.register import RegisterSettings
from comir_hpc.representations.features import Features, checked, specimen_mask
from comir_hpc.representations.measures import Measure
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.padding import padding_notes
from comir_hpc.volumes.resampled import Resampled
from comir_hpc.volumes.volume import Volume

Role = Literal["fixed", "moving"]
Array = NDArray[np.float32]

BYTES_PER_VOXEL = 40
"""Peak memory of a registration, in bytes for each voxel of a volume, beside what the process holds before. It was
measured for both volumes together, of intensities: 35 bytes at 144^3, 34 at 336^3; a representation adds up to 5."""
_BYTES_PER_CHANNEL = 8


@dataclass(frozen=True, eq=False)
class Representation(ABC):
    """One volume as a method sees it, at any level that the method can use.

    Two representations are compared only if one method made both. Nothing is read or computed before `features`.

    Attributes
    ----------
    volume : Volume
        The original volume, with the intensity statistics of `ingest`. Masks and pictures come from it.
    measure : Measure
        How two of these representations are compared. Every class names its own.
    origin : str
        Where the values come from, in words, for ``--dry-run``.
    noun : str
        What is compared, in the plural, for the reasons of a verdict.
    learned : bool
        Whether a model was trained so that two representations correlate, so that their agreement may be held against
        `reference`.
    one_scale : bool
        Whether a level has the same spacing for both volumes of a pair, and they are comparable only if it is the same.
    pictured : bool
        Whether the first channel is shown in the report beside the intensities.
    checked_described : bool
        Whether an answer is checked on self-similarities of the values, twelve channels, which take memory.
    memory_remedy : str
        End of the sentence that says what to do if `levels` do not fit into memory; empty if there is nothing to add.
    """

    volume: Volume

    measure: ClassVar[Measure]
    origin: ClassVar[str] = "computed here"
    noun: ClassVar[str] = "representations"
    learned: ClassVar[bool] = False
    one_scale: ClassVar[bool] = False
    pictured: ClassVar[bool] = True
    checked_described: ClassVar[bool] = False
    memory_remedy: ClassVar[str] = ""

    @classmethod
    def from_settings(
        cls, volume: Volume, settings: RegisterSettings, role: Role, partner: Volume
    ) -> Representation:
        """Open what this method needs for one volume.

        Parameters
        ----------
        volume : Volume
            The volume that is represented.
        settings : RegisterSettings
            Where models and files are found, and how networks are run.
        role : "fixed" or "moving"
            Which of the two volumes it is.
        partner : Volume
            The other volume. What is chosen for a pair, as the spacing of working grids, follows from both.

        Raises
        ------
        VolumeError, CheckpointError, RegistrationError
            If a file or a model does not fit the volume.
        """
        del settings, role, partner
        return cls(volume)

    # ---- what is compared

    @abstractmethod
    def values(self, level: int, image: Array) -> Array:
        """Make the values to compare.

        Parameters
        ----------
        level : int
            One of `levels`.
        image : (z, y, x) float32
            Normalised intensity of the volume's first channel on that level, with padding as background.

        Returns
        -------
        (c, z, y, x) float32
            The channels, on the grid of `image`.
        """

    def represented(self, image: Array, mask: NDArray[np.bool_], grid: Grid) -> Features | None:
        """Represent another image of the same modality, normalised as this volume is, for a test of the method.

        Parameters
        ----------
        image, mask : (z, y, x)
            Normalised intensity of the first channel, and the specimen.
        grid : Grid
            Their grid, with the spacing of one of the levels.

        Returns
        -------
        Features or None
            None where that cannot be done, which is what a class says that does not know how.
        """
        del image, mask, grid
        return None

    def features(self, level: int) -> tuple[Features, Array]:
        """Make the features to compare, and the intensity (z, y, x) on the same grid, for pictures.

        Values and mask come from the same place of the volume, so that they lie on one grid.

        Raises
        ------
        VolumeError
            If the volume cannot be read.
        RegistrationError
            If the features cannot be registered (`features.checked`).
        """
        place = self.place(level)
        seen = Resampled(self.volume, place)
        image = self.volume.intensity().normalise(seen.read()[0])
        values = self.values(level, image)
        known = seen.known() if seen.padded else None
        mask = specimen_mask(self.volume, place)
        return checked(Features(values, mask, seen.grid, known), self.compared.path), image

    @property
    def num_channels(self) -> int:
        """Number of channels that are compared."""
        return 1

    # ---- at which level

    @property
    def compared(self) -> Volume:
        """Store whose levels are meant; the original volume unless another class says otherwise."""
        return self.volume

    @property
    def levels(self) -> range:
        """Levels of `compared` that can be used, the finest first. The first one is taken that fits into memory."""
        return range(self.compared.num_levels)

    def place(self, level: int) -> int | Grid:
        """Say where the original volume is seen: at one of its own levels, or on another grid along its axes."""
        return level

    def grid(self, level: int) -> Grid:
        """Give the grid of the features."""
        place = self.place(level)
        return place if isinstance(place, Grid) else self.volume.level_grid(place)

    @property
    def spacings_mm(self) -> tuple[float, ...]:
        """Finest spacing of the features' grid in mm, at each of `levels`."""
        return tuple(self.grid(level).finest_mm for level in self.levels)

    @property
    def searched_levels(self) -> tuple[int, ...]:
        """Levels whose features the global search looks at, the coarsest first; both volumes name the same.

        By default there is none: the search looks at the features that are registered, averaged to its own scale.
        """
        return ()

    def predicted_bytes(self, level: int) -> float:
        """Predict the memory that a registration needs for this volume, in bytes."""
        voxels = math.prod(self.grid(level).shape_zyx)
        return float(voxels) * (
            BYTES_PER_VOXEL + _BYTES_PER_CHANNEL * (self.num_channels - (not self.learned))
        )

    def working_bytes(self, level: int) -> float:
        """Predict the memory, in bytes, that `values` needs beside its result while it works."""
        del level
        return 0.0

    # ---- what is said about it

    def identity(self) -> dict[str, Any]:
        """Say what the values depend on beside the volume and the settings, JSON-ready, for the fingerprint.

        A finished registration is recognised by its fingerprint. So these two keys stay, and a class adds others only
        for what no setting says: a digest of weights, a version of an algorithm.
        """
        return {"compared": None, "encoder": None}

    @property
    def reference(self) -> float | None:
        """Agreement that a right registration should come near; None if nothing is known about that."""
        return None

    @property
    def mirror_blind(self) -> bool:
        """Say whether the values of a mirrored volume are the mirrored values; true of all that sees no handedness."""
        return True

    @property
    def expected_deviation(self) -> float | None:
        """Give the standard deviation that the values had in training; None where nothing is known about that."""
        return None

    @property
    def reference_of(self) -> str:
        """What `reference` was measured on, in words."""
        return "the training pair"

    def provenance(self) -> dict[str, Any] | None:
        """Say which model made the values, JSON-ready, with the folder of its run under ``run``; None without one."""
        return None

    def notes(self, level: int) -> list[str]:
        """Say what is assumed about the volume at a level, in sentences."""
        del level
        return padding_notes(self.volume)
