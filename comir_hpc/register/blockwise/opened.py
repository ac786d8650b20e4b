"""What `refine` is given, opened and checked before a voxel is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from comir_hpc.config.refine import RefineSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.host.places import require_apart
from comir_hpc.register.blockwise.coarse import Coarse
from comir_hpc.register.blockwise.layout import Layout
from comir_hpc.register.blockwise.sides import Side
from comir_hpc.register.blockwise.solve import MOST_LEVELS, Solver
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.loading import load_encoder
from comir_hpc.representations.working import WorkingGrids
from comir_hpc.runs.model import Model, general_model, read_model
from comir_hpc.runs.result import Result, read_result
from comir_hpc.space.grid import Vector
from comir_hpc.volumes.region import Region
from comir_hpc.volumes.volume import Volume

_PLACES = 2000  # of the specimen that are looked at, to see whether any lies inside the moving volume
_SMOOTH_VOX = 12  # smoothness length in voxels of the grid, where none is given
_METHOD = 1  # raised when blocks get other solutions: those of an earlier version do not count as done
Role = Literal["fixed", "moving"]
_ROLES: tuple[Role, Role] = ("fixed", "moving")


@dataclass(frozen=True, eq=False)
class Opened:
    """Volumes, coarse solution and layout.

    Attributes
    ----------
    settings : RefineSettings
        The settings.
    result : Result
        The registration that is refined.
    fixed, moving : Side
        Both volumes.
    coarse : Coarse
        What the registration found.
    layout : Layout
        Blocks of the fixed volume.
    """

    settings: RefineSettings
    result: Result
    fixed: Side
    moving: Side
    coarse: Coarse
    layout: Layout

    @classmethod
    def from_settings(cls, settings: RefineSettings) -> Opened:
        """Open what the settings name.

        Raises
        ------
        RegistrationError
            If the registration has failed, the stores are not those that it registered, or a length does not fit.
        VolumeError, CheckpointError
            If a volume or a model cannot be used.
        ConfigError
            If the output is one of the inputs.
        """
        result = _trusted(settings.result)
        volumes: dict[Role, Volume] = {role: _volume(settings, result, role) for role in _ROLES}
        fixed, moving = volumes["fixed"], volumes["moving"]
        require_apart(settings.out, fixed.path, moving.path)
        if fixed.grid.planar:
            raise RegistrationError(f"{fixed.path} is a single slice; blocks are cut from volumes only")
        model, encoders = _encoders(settings, result, volumes)
        spacings = _spacings(settings, model, (fixed, moving))
        inner = model is not None and model.scale_free
        sides = {
            role: Side(volume, encoders[role], spacings, inner=inner) for role, volume in volumes.items()
        }
        layout = _layout(settings, sides["fixed"])
        return cls(
            settings, result, sides["fixed"], sides["moving"],
            Coarse.of_result(settings.result, result, fixed.grid), layout,
        )  # fmt: skip

    @property
    def solver(self) -> Solver:
        """What finds the solution of a block."""
        return Solver(self.fixed, self.moving, self.coarse, self.layout, seed=self.settings.seed)

    @property
    def compared(self) -> str:
        """What is compared, in words."""
        return "intensities" if self.fixed.encoder is None else "representations"

    @cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Fingerprints of both volumes when they were first asked for."""
        return self.fixed.volume.fingerprint(), self.moving.volume.fingerprint()

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that the field depends on, JSON-ready; how the work is split is not among it."""
        layout, regions = self.layout, [side.volume.region for side in (self.fixed, self.moving)]
        return {
            "method": _METHOD,
            "fixed": self.fingerprints[0],
            "moving": self.fingerprints[1],
            "masks": [None if one is None else one.fingerprint for one in regions],
            "transform": self.coarse.digest,
            "encoders": [
                None if side.encoder is None else side.encoder.identity()
                for side in (self.fixed, self.moving)
            ],
            "grids": [side.grid(0).as_dict() for side in (self.fixed, self.moving)],
            "lattice": layout.lattice.as_dict(),
            "smoothness_mm": layout.smoothness_mm,
            "core_zyx": list(layout.plan.core_zyx),
            "seed": self.settings.seed,
        }

    def require_content(self) -> None:
        """Refuse a pair of which no block can show anything.

        Raises
        ------
        RegistrationError
            If no place of the fixed specimen comes to lie inside the moving volume.
        """
        points = self.coarse.moved_mm(self.fixed.specimen_points_mm(_PLACES))
        index = self.moving.volume.grid.index_zyx(points)
        inside = (index >= -0.5) & (index <= np.asarray(self.moving.volume.grid.shape_zyx) - 0.5)
        if not inside.all(axis=-1).any():
            raise RegistrationError(
                f"no block has content: the transform of {self.settings.result} sends the whole specimen of "
                f"{self.fixed.volume.path} outside of {self.moving.volume.path}; register the two again"
            )


def _trusted(folder: Path) -> Result:
    """Read a result that can be built on."""
    result = read_result(folder)
    if result.verdict == "FAIL" or result.transform is None:
        reason = result.reasons[0] if result.reasons else "no transform was found"
        raise RegistrationError(
            f"{folder} is a registration that failed ({reason}); nothing is refined on top of it: see its report, and "
            "register again"
        )
    return result


def _volume(settings: RefineSettings, result: Result, role: Role) -> Volume:
    """Open one of the two stores, if it is the one that was registered."""
    known = result.inputs.get(role)
    named = settings.fixed if role == "fixed" else settings.moving
    if known is None:
        raise RegistrationError(
            f"{settings.result} does not say which {role} volume it registered; register again"
        )
    volume = Volume.open(named or Path(known.path))
    volume.intensity()  # refuses a volume without statistics before anything is done
    found = volume.fingerprint()
    if known.fingerprint is not None and found != known.fingerprint:
        raise RegistrationError(
            f"{volume.path} is not the {role} volume of {settings.result}, or has changed since (fingerprint {found}, "
            f"expected {known.fingerprint}); give the store that was registered with --{role}, or register again"
        )
    mask = (known.model_extra or {}).get("mask")
    if isinstance(mask, str):
        volume.region = Region.open(Path(mask))
    return volume


def _encoders(
    settings: RefineSettings, result: Result, volumes: dict[Role, Volume]
) -> tuple[Model | None, dict[Role, Encoder | None]]:
    """Load what encodes the volumes; nothing where their intensities are compared."""
    chosen = settings.representation or result.settings.get("representation", "comir")
    if chosen == "intensity":
        return None, dict.fromkeys(volumes)
    if chosen != "comir":
        raise RegistrationError(
            f"{settings.result} compared {chosen}, which blocks cannot; give --representation comir or intensity"
        )
    run = settings.model or _run_of(result) or general_model()
    model = read_model(run)
    encoders: dict[Role, Encoder | None] = {}
    for role, volume in volumes.items():
        own = settings.fixed_modality if role == "fixed" else settings.moving_modality
        said = own or (None if settings.model else result.settings.get(f"{role}_modality"))
        encoder = load_encoder(
            run,
            said or (role if role in model.modalities else None),
            device=settings.device,
            precision=settings.precision,
            symmetrise=settings.symmetrise,
        )
        encoder.require_fitting(volume)
        encoders[role] = encoder
    return model, encoders


def _run_of(result: Result) -> Path | None:
    named = result.run_folder
    return (
        Path(named)
        if named and result.settings.get("model") and (Path(named) / "model.json").is_file()
        else None
    )


def _spacings(
    settings: RefineSettings, model: Model | None, volumes: tuple[Volume, Volume]
) -> tuple[Vector, ...]:
    """Choose the working grids, the finest first, each twice as coarse as the one before."""
    data = max(volume.grid.finest_mm for volume in volumes)
    finest: Vector = (data, data, data)
    if settings.spacing is not None:
        finest = (settings.spacing,) * 3
        if settings.spacing < 0.25 * data:
            raise RegistrationError(
                f"--spacing {settings.spacing:g} is more than four times finer than the voxels of the coarser volume "
                f"({data:.4g} mm), which hold no such structure; give {data:.4g} or more"
            )
    elif model is not None and not model.scale_free:
        finest = WorkingGrids.for_model(model, volumes).spacings_zyx[0]
    z, y, x = finest
    return tuple((z * f, y * f, x * f) for f in (2**n for n in range(MOST_LEVELS)))


def _layout(settings: RefineSettings, fixed: Side) -> Layout:
    """Cut the fixed volume into blocks.

    Raises
    ------
    RegistrationError
        If the smoothness length is shorter than a voxel or longer than half of the volume, or a block is shorter than
        that length.
    """
    grid = fixed.grid(0)
    length = settings.smoothness_mm or min(_SMOOTH_VOX * grid.finest_mm, min(grid.extent_mm) / 2)
    if not grid.finest_mm <= length <= min(grid.extent_mm) / 2:
        raise RegistrationError(
            f"--smoothness-mm {length:g} is not between one voxel of the comparison ({grid.finest_mm:.3g} mm) and half "
            f"of the volume ({min(grid.extent_mm) / 2:.3g} mm); leave it out for 12 voxels"
        )
    if settings.block * grid.finest_mm < length:
        raise RegistrationError(
            f"--block {settings.block} is {settings.block * grid.finest_mm:.3g} mm, shorter than the smoothness length "
            f"of {length:.3g} mm, so that no block could hold what moves as one; give --block "
            f"{math.ceil(length / grid.finest_mm)} or more, or a shorter --smoothness-mm"
        )
    return Layout(grid, length, settings.block)
