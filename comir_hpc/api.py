"""The verbs for Python: paths, arrays or SimpleITK images in, typed results out.

A volume may be given as the path of any file that `ingest` reads or of a store, as an `Image` (an array and where its
voxels lie), as an image of SimpleITK, or as the result of another verb. A transform may be given as a path, as the
result of `register`, or as an object. Keywords are the settings of the command line's verb, checked in the same way;
``help(register)`` lists them all.

`folder` is where stores of such volumes go, and the result if no other place is given for it. Without `folder` they go
beside the output, as on the command line; without either into a temporary folder that is removed with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from comir_hpc.config.adapt import AdaptSettings
from comir_hpc.config.evaluate import CompareSettings, EvaluateSettings
from comir_hpc.config.files import load
from comir_hpc.config.infer import InferSettings
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.config.refine import RefineSettings
from comir_hpc.config.register import RegisterPairSettings
from comir_hpc.config.train import TrainSettings
from comir_hpc.config.warp import WarpSettings
from comir_hpc.errors import ConfigError
from comir_hpc.host.progress import Progress
from comir_hpc.recipes.documented import documented
from comir_hpc.recipes.in_memory import Image, as_image, in_memory, keyword_errors, tell, workplace

if TYPE_CHECKING:
    from comir_hpc.evaluate import Table
    from comir_hpc.infer import InferResult
    from comir_hpc.ingest import IngestResult
    from comir_hpc.recipes.adapt import AdaptResult
    from comir_hpc.recipes.diagnosis import RunDiagnosis
    from comir_hpc.register import RegisterResult
    from comir_hpc.register.blockwise import RefineResult
    from comir_hpc.train import TrainResult
    from comir_hpc.warp import WarpResult

__all__ = [
    "Image",
    "adapt",
    "diagnose",
    "evaluate",
    "infer",
    "ingest",
    "read",
    "refine",
    "register",
    "report",
    "train",
    "warp",
]

PathLike = str | Path
VolumeLike = Any
"""Path of a store or of any file that `ingest` reads, `Image`, SimpleITK image, or result of a verb."""
TransformLike = Any
"""Path of a transform, result of `register`, transform of `comir_hpc.transforms` or of SimpleITK."""
FolderLike = Any
"""Folder that `register` or `train` wrote, or what they returned."""

_OF_AN_ARRAY = ("kind", "chunk", "shard", "non_finite", "foreground_above", "padding", "overwrite")


@documented(IngestSettings)
def ingest(
    source: VolumeLike, out: PathLike, *, progress: Progress | None = None, **settings: Any
) -> IngestResult:
    """Turn a file of any format, or an image in memory, into a chunked OME-Zarr volume with a pyramid."""
    with workplace("ingest", None, Path(out).parent, progress) as place:
        from comir_hpc.ingest import ingest as ingest_file
        from comir_hpc.ingest import ingest_array

        if not in_memory(source):
            chosen = place.settings(IngestSettings, settings, source=source, out=out)
            return ingest_file(chosen, progress=progress)
        image = as_image(source)
        given = {"kind": image.kind, **settings}
        chosen = place.settings(IngestSettings, given, source=image.name, out=out)
        if others := [name for name in given if name not in _OF_AN_ARRAY]:
            raise ConfigError(
                f"ingest(): {', '.join(others)} mean nothing for an image in memory; leave them out"
            )
        # As the settings have checked and converted them.
        given = {name: getattr(chosen, name) for name in given}
        return ingest_array(image.array, image.grid, chosen.out, name=image.name, progress=progress, **given)


def read(volume: VolumeLike, *, level: int = 0) -> Image:
    """Read a volume into memory: a store or what a verb returned, at any level of its pyramid, or a file.

    Parameters
    ----------
    volume : path or result
        Store, file of any format that `ingest` reads, or result of `ingest`, `infer` or `warp`.
    level : int
        Level of the pyramid; 0 is the finest.
    """
    with workplace("read", None, None, None) as place:
        from comir_hpc.volumes.volume import Volume

        store = place.store(volume)
        opened = Volume.open(store)
        if not 0 <= level < opened.num_levels:
            raise ConfigError(f"{store} has levels 0 to {opened.num_levels - 1}; there is no level {level}")
        values = opened.read(level=level)
        kind: Literal["image", "labels"] = "labels" if opened.metadata["kind"] == "labels" else "image"
        one = values[0] if len(values) == 1 else values
        return Image.on_grid(one, opened.level_grid(level), kind, store.name.split(".")[0])


@documented(TrainSettings)
def train(
    config: PathLike | None = None,
    *,
    run: PathLike | None = None,
    overrides: Sequence[str] = (),
    folder: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> TrainResult:
    """Train one encoder a modality on aligned pairs, so that their outputs look alike.

    Groups of settings are dictionaries: ``optimiser={"steps": 500}``. docs/training.md says more.
    """
    with workplace("train", folder, Path(run) / "volumes" if run else None, progress) as place:
        from comir_hpc.train import train as run_training

        def from_file(record: dict[str, Any]) -> TrainSettings:
            return load(TrainSettings, Path(config or ""), overrides, record)

        if overrides and config is None:
            raise ConfigError(
                "train(): overrides change the settings of a file; give config, or the settings as keywords"
            )
        chosen = place.settings(TrainSettings, settings, from_file if config else None)
        return place.kept_for(run_training(chosen, Path(run or place.folder / "run"), progress=progress))


@documented(InferSettings)
def infer(
    zarr: VolumeLike,
    model: FolderLike,
    modality: str,
    *,
    out: PathLike | None = None,
    folder: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> InferResult:
    """Encode a volume of any size window by window; ``read(result)`` gives the representation."""
    with workplace("infer", folder, Path(out).parent if out else None, progress) as place:
        from comir_hpc.infer import infer as encode

        target = out or place.folder / f"{modality}_representation.zarr"
        chosen = place.settings(
            InferSettings, settings, zarr=zarr, model=model, modality=modality, out=target
        )
        return place.kept_for(encode(chosen, progress=progress))


@documented(RegisterPairSettings)
def register(
    fixed: VolumeLike,
    moving: VolumeLike,
    *,
    out: PathLike | None = None,
    folder: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> RegisterResult:
    """Find the transform from fixed to moving, with a verdict and a report.

    Without `model` the general model is used, which was trained for any contrast. A poor answer is no error: look at
    ``result.verdict``. With FAIL nothing is written to `warped`.
    """
    with workplace("register", folder, Path(out) if out else None, progress) as place:
        from comir_hpc.recipes.pair import register_pair, require_usable

        target = out or place.folder / "registration"
        volumes = {"fixed": fixed, "moving": moving}
        chosen = place.settings(RegisterPairSettings, settings, check=require_usable, **volumes, out=target)
        done = register_pair(chosen, progress=progress)
        if chosen.warped is not None and done.warped is None:
            tell(f"the verdict is {done.result.verdict}, so {chosen.warped} was not written")
        return place.kept_for(done.result)


@documented(RefineSettings)
def refine(
    result: FolderLike,
    *,
    out: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> RefineResult:
    """Bend what a registration leaves over, block by block, into a displacement field for volumes of any size.

    Give the field to ``warp(..., transform=done.path)``.
    """
    with workplace("refine", None, Path(out).parent if out else None, progress) as place:
        from comir_hpc.recipes.refine import refine as run

        given = settings if out is None else {**settings, "out": out}
        chosen = place.settings(RefineSettings, given, result=result)
        return place.kept_for(run(chosen, progress=progress).result)


@documented(AdaptSettings)
def adapt(
    fixed: VolumeLike,
    moving: VolumeLike,
    *,
    run: PathLike,
    folder: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> AdaptResult:
    """Train encoders for one pair that nobody has aligned, and register it with them.

    Give `run` to ``register(..., model=run)`` for other specimens of the same two modalities. No alignment that can be
    learned from is no error: look at ``result.verdict``.
    """
    with workplace("adapt", folder, Path(run) / "volumes", progress) as place:
        from comir_hpc.recipes.adapt import adapt as specialise

        chosen = place.settings(AdaptSettings, settings, fixed=fixed, moving=moving, run=run)
        return place.kept_for(specialise(chosen, progress=progress))


@overload
def warp(
    zarr: Image, transform: TransformLike, like: VolumeLike, *, out: None = None, **settings: Any
) -> Image: ...
@overload
def warp(
    zarr: VolumeLike = None, transform: TransformLike = None, like: VolumeLike = None, **settings: Any
) -> Any: ...
@documented(WarpSettings)
def warp(
    zarr: VolumeLike = None,
    transform: TransformLike = None,
    like: VolumeLike = None,
    *,
    out: PathLike | None = None,
    folder: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> WarpResult | Image | Any:
    """Apply a transform: the moving volume onto the fixed grid, or the points of a file either way.

    An image in memory comes back as one of its kind when `out` is not given, and a slice with one voxel along z.
    Everything else comes back as a `WarpResult`.
    """
    with workplace("warp", folder, Path(out).parent if out else None, progress) as place:
        from comir_hpc.warp import warp as resample

        target = out or place.folder / ("points.csv" if "points" in settings else "warped.zarr")
        volumes = {"zarr": zarr, "transform": transform, "like": like}
        if out is not None or not in_memory(zarr):
            chosen = place.settings(WarpSettings, settings, **volumes, out=target)
            return place.kept_for(resample(chosen, progress=progress))
        # The store in between goes as soon as the image is read.
        with workplace("warp", None, None, progress) as scratch:
            chosen = place.settings(WarpSettings, settings, **volumes, out=scratch.folder / "warped.zarr")
            result = resample(chosen, progress=progress)
            image = read(result)
        for note in result.notes:
            tell(note)
        return image if isinstance(zarr, Image) else image.to_sitk()


@documented(CompareSettings)
def evaluate(
    result: FolderLike | Sequence[FolderLike],
    truth: TransformLike | None = None,
    *,
    points: PathLike | None = None,
    out: PathLike | None = None,
    **settings: Any,
) -> Table:
    """Compare one or several results of `register` with what is known, side by side."""
    with workplace("evaluate", None, None, None) as place:
        from comir_hpc.evaluate import compare

        several = result if isinstance(result, list | tuple) else (result,)
        chosen = place.settings(
            CompareSettings, settings, result=several, truth=truth, points=points, out=out
        )
        return compare(chosen)


@documented(EvaluateSettings)
def diagnose(
    model: FolderLike, *, folder: PathLike | None = None, progress: Progress | None = None, **settings: Any
) -> RunDiagnosis:
    """Measure what the encoders of a run can do, and where the registration of its aligned pair ends."""
    out = settings.get("out")
    with workplace("diagnose", folder, Path(out) if out else None, progress) as place:
        from comir_hpc.recipes.diagnosis import diagnose_run

        chosen = place.settings(EvaluateSettings, settings, model=model)
        return place.kept_for(diagnose_run(chosen, progress=progress))


def report(result: FolderLike) -> Path:
    """Write report.html, one self-contained page, for a registration or a training run, and return its path.

    Parameters
    ----------
    result : path or result
        Folder that `register` or `train` wrote, or what they returned.
    """
    from comir_hpc.report import report as write_report

    with keyword_errors():
        folder = next((p for p in (getattr(result, n, None) for n in ("folder", "run")) if p), result)
        return write_report(Path(folder))
