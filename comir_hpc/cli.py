"""The command line: parse, call one verb, print one line.

Nothing heavy is imported before a command runs: `comir-hpc --help` answers at once. An option that is not given
is not passed on, so every default lives in one place, `config.py`; the defaults named in the help texts are held
against it by a test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comir_hpc import __version__
from comir_hpc.errors import ComirError, ConfigError, StopRequested

if TYPE_CHECKING:
    from comir_hpc.config import EvaluateSettings, Settings
    from comir_hpc.evaluate import Subject

EXIT_REFUSED, EXIT_STOPPED = 1, 85

app = typer.Typer(
    name="comir-hpc",
    help="Put two 3D volumes of different modality on top of each other: train encoders that make them look "
    "alike, register what they see, apply the transform to the originals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it will need; do nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result made from other inputs.")]
Triple = Annotated[
    tuple[float, float, float] | None,
    typer.Option("--spacing", metavar="Z Y X", help="Voxel spacing; needed where the file has none."),
]
Part = Annotated[str | None, typer.Option(metavar="I/N", help="Do part I of N (job arrays).")]
Workers = Annotated[int | None, typer.Option(help="Processes. (default: 1)")]
Cluster = Annotated[
    str | None, typer.Option(metavar="WHERE", help="Where workers run: dask://HOST:PORT, or slurm.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check what is done already, and redo what is damaged.")
]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"comir-hpc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold the options that belong to no verb."""


# ---------------------------------------------------------------------- the verbs


@app.command(epilog="Example:  comir-hpc demo --out demo --seed 3")
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for everything it writes. (default: demo)")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the displacement, bias and noise. (default: 0)")
    ] = None,
    train_seed: Annotated[int | None, typer.Option(help="Of the training. (default: 0)")] = None,
    model: Annotated[Path | None, typer.Option(help="Use this trained run instead of training.")] = None,
    displacement: Annotated[
        str | None,
        typer.Option(help="so3: turned anywhere and shifted; none: the aligned pair. (default: so3)"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run the main job on the embedded brain pair: displace, ingest, train, infer, register, warp, report."""
    from comir_hpc.config import DemoSettings

    settings = _settings(
        DemoSettings, out=out, seed=seed, train_seed=train_seed, model=model, displacement=displacement
    )
    from comir_hpc.demo import demo as run
    from comir_hpc.demo import plan_demo

    if dry_run:
        return _print_plan(plan_demo(settings))
    with _progress() as progress:
        result = run(settings, progress=progress)
    typer.echo(result.summary)
    typer.echo(f"report: {result.report}")
    return _refuse_if_failed(result.verdict, result.reasons)


@app.command(epilog="Example:  comir-hpc ingest scan.tif scan.zarr --spacing 2 1 1 --unit um")
def ingest(
    source: Annotated[
        Path,
        typer.Argument(
            help="NIfTI, NRRD, MHA, TIFF, OME-TIFF, HDF5, npy or zarr file, a DICOM folder, or one slice as PNG."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="OME-Zarr store to write.", metavar="OUT.zarr")],
    spacing: Triple = None,
    unit: Annotated[str | None, typer.Option(help="Unit of --spacing: nm, um, mm, cm or m.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Which of several: array in HDF5 or zarr, number of a TIFF series, UID in DICOM."),
    ] = None,
    labels: Annotated[bool, typer.Option("--labels", help="A segmentation: averaged nowhere.")] = False,
    chunk: Annotated[
        int | None, typer.Option(help="Voxels a side of the unit of reading. (default: 64)")
    ] = None,
    shard: Annotated[int | None, typer.Option(help="Voxels a side of one file. (default: 256)")] = None,
    non_finite: Annotated[
        float | None, typer.Option(help="Value for NaN and infinite voxels, refused otherwise.")
    ] = None,
    foreground_above: Annotated[
        float | None,
        typer.Option(help="Value above which a voxel is specimen; found from the histogram otherwise."),
    ] = None,
    padding: Annotated[
        str | None,
        typer.Option(
            help="Value that fills the border and was never measured, or none. (default: recognised)"
        ),
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(help="Memory that may be used, GiB; otherwise what is free.")
    ] = None,
    part: Part = None,
    verify: Verify = False,
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Turn a file of any common format into a chunked OME-Zarr volume with a pyramid."""
    from comir_hpc.config import IngestSettings

    settings = _settings(
        IngestSettings,
        source=source,
        out=out,
        spacing=spacing,
        unit=unit,
        dataset=dataset,
        kind="labels" if labels else None,
        chunk=chunk,
        shard=shard,
        non_finite=non_finite,
        foreground_above=foreground_above,
        padding=padding,
        max_memory=max_memory,
        part=_part(part),
        verify=verify or None,
        workers=workers,
        overwrite=overwrite or None,
    )
    from comir_hpc.ingest import ingest as run
    from comir_hpc.ingest import plan_ingest

    if dry_run:
        return _print_plan(plan_ingest(settings))
    with _progress() as progress:
        result = run(settings, progress=progress)
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)
    return typer.echo(result.summary)


@app.command(epilog="Example:  comir-hpc train configs/brain.yaml --run runs/brain --set optimiser.steps=500")
def train(
    config: Annotated[Path, typer.Argument(help="Settings of the training.", metavar="CONFIG.yaml")],
    run: Annotated[
        Path, typer.Option("--run", help="Folder of the run; continued if it holds a checkpoint.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train one encoder a modality on aligned pairs, so that their outputs look alike."""
    from comir_hpc.config import TrainSettings, load

    settings = load(TrainSettings, config, overrides or ())
    from comir_hpc.launch import read_launch
    from comir_hpc.train import plan_training
    from comir_hpc.train import train as run_training

    if dry_run:
        return _print_plan(plan_training(settings))
    with _progress() as progress:
        result = run_training(settings, run, progress=progress)
    if read_launch(os.environ).rank == 0:
        typer.echo(result.summary)
    return None


@app.command(
    epilog="Example:  comir-hpc infer --zarr t1w.zarr --model runs/brain --modality t1w --out t1w_comir.zarr"
)
def infer(
    zarr: Annotated[Path, typer.Option(help="Volume of one modality.")],
    model: Annotated[Path, typer.Option(help="Run folder that train wrote.")],
    modality: Annotated[str, typer.Option(help="Which encoder of the run.")],
    out: Annotated[Path, typer.Option(help="OME-Zarr store to write.")],
    window: Annotated[
        int | None, typer.Option(help="Voxels a side of the sliding window. (default: 64)")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Share that neighbouring windows share. (default: 0.25)")
    ] = None,
    blend: Annotated[
        str | None,
        typer.Option(help="Of overlapping windows: gaussian, hann or exact. (default: gaussian)"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows evaluated together on a GPU. (default: 1)")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16: of the arithmetic. (default: auto)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. (default: auto)")] = None,
    symmetrise: Annotated[
        str | None, typer.Option(help="Average over a group: D2, D4, O; C2, C4 for slices. (default: none)")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Stored type: float32, float16, int16 or int8. (default: float32)")
    ] = None,
    core: Annotated[
        int | None, typer.Option(help="Voxels a side of a block of work, a multiple of the shard.")
    ] = None,
    part: Part = None,
    workers: Workers = None,
    cluster: Cluster = None,
    verify: Verify = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Encode a volume of any size window by window, from zarr to zarr."""
    from comir_hpc.config import InferSettings

    settings = _settings(
        InferSettings,
        zarr=_as_zarr(zarr, out.parent, dry_run),
        model=model,
        modality=modality,
        out=out,
        window=window,
        overlap=overlap,
        blend=blend,
        batch=batch,
        precision=precision,
        device=device,
        symmetrise=symmetrise,
        dtype=dtype,
        core=core,
        part=_part(part),
        workers=workers,
        cluster=cluster,
        verify=verify or None,
        overwrite=overwrite or None,
    )
    from comir_hpc.infer import infer as run
    from comir_hpc.infer import plan_infer

    if dry_run:
        return _print_plan(plan_infer(settings))
    with _progress() as progress:
        result = run(settings, progress=progress)
    return typer.echo(result.summary)


@app.command(
    epilog="Example:  comir-hpc register --fixed t1w.zarr --moving t2w.zarr --model runs/brain "
    "--fixed-modality t1w --moving-modality t2w --out result"
)
def register(
    fixed: Annotated[Path, typer.Option(help="Volume whose space the result lives in.")],
    moving: Annotated[Path, typer.Option(help="Volume to be aligned with it.")],
    out: Annotated[Path, typer.Option(help="Folder for transform, result and report.")],
    model: Annotated[Path | None, typer.Option(help="Run folder that train wrote.")] = None,
    fixed_modality: Annotated[str | None, typer.Option(help="Encoder of the fixed volume.")] = None,
    moving_modality: Annotated[str | None, typer.Option(help="Encoder of the moving volume.")] = None,
    fixed_representation: Annotated[
        Path | None, typer.Option(help="Made by infer; otherwise computed.")
    ] = None,
    moving_representation: Annotated[
        Path | None, typer.Option(help="Made by infer; otherwise computed.")
    ] = None,
    representation: Annotated[
        str | None, typer.Option(help="comir, or intensity (mutual information). (default: comir)")
    ] = None,
    initial: Annotated[
        str | None, typer.Option(help="identity, moments or global (all of SO(3)). (default: global)")
    ] = None,
    transform: Annotated[str | None, typer.Option(help="rigid or affine. (default: rigid)")] = None,
    rotations: Annotated[
        int | None, typer.Option(help="Rotations of the global search. (default: 4000)")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Answers of it that are refined. (default: 8)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the metric's sampling. (default: 0)")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Find the transform from fixed to moving, with a verdict: PASS, WARN or FAIL (exit code 1)."""
    from comir_hpc.config import RegisterSettings

    settings = _settings(
        RegisterSettings,
        fixed=_as_zarr(fixed, out, dry_run, "fixed"),
        moving=_as_zarr(moving, out, dry_run, "moving"),
        out=out,
        model=model,
        fixed_modality=fixed_modality,
        moving_modality=moving_modality,
        fixed_representation=fixed_representation,
        moving_representation=moving_representation,
        representation=representation,
        initial=initial,
        transform=transform,
        rotations=rotations,
        candidates=candidates,
        seed=seed,
        overwrite=overwrite or None,
    )
    from comir_hpc.register import plan_register
    from comir_hpc.register import register as run
    from comir_hpc.report import report as write_report

    if dry_run:
        return _print_plan(plan_register(settings))
    with _progress() as progress:
        result = run(settings, progress=progress)
    typer.echo(result.summary)
    typer.echo(f"report: {write_report(out)}")
    return _refuse_if_failed(result.verdict, result.reasons)


@app.command(
    epilog="Examples:  comir-hpc warp --zarr t2w.zarr --transform result/transform.tfm --like t1w.zarr --out w.zarr"
    "   |   comir-hpc warp --points p.csv --transform result/transform.tfm --out q.csv"
)
def warp(
    transform: Annotated[
        Path, typer.Option(help="transform.tfm of register: fixed points to moving points.")
    ],
    out: Annotated[Path, typer.Option(help="OME-Zarr store, or CSV for points.")],
    zarr: Annotated[Path | None, typer.Option(help="Moving volume.")] = None,
    like: Annotated[Path | None, typer.Option(help="Volume whose grid the result gets.")] = None,
    points: Annotated[Path | None, typer.Option(help="CSV with columns x, y, z: world LPS in mm.")] = None,
    direction: Annotated[
        str | None,
        typer.Option(help="Of points: fixed-to-moving or moving-to-fixed. (default: fixed-to-moving)"),
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="auto, linear, nearest or cubic. (default: auto)")
    ] = None,
    part: Part = None,
    workers: Workers = None,
    cluster: Cluster = None,
    verify: Verify = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Apply a transform: the moving volume onto the fixed grid, or points either way."""
    from comir_hpc.config import WarpSettings

    settings = _settings(
        WarpSettings,
        transform=transform,
        zarr=None if zarr is None else _as_zarr(zarr, out.parent, dry_run),
        like=None if like is None else _as_zarr(like, out.parent, dry_run),
        points=points,
        direction=direction,
        out=out,
        interpolation=interpolation,
        part=_part(part),
        workers=workers,
        cluster=cluster,
        verify=verify or None,
        overwrite=overwrite or None,
    )
    from comir_hpc.warp import plan_warp
    from comir_hpc.warp import warp as run

    if dry_run:
        return _print_plan(plan_warp(settings))
    with _progress() as progress:
        result = run(settings, progress=progress)
    return typer.echo(result.summary)


@app.command(
    epilog="Examples:  comir-hpc evaluate --result result --truth truth.json --points landmarks.csv"
    "   |   comir-hpc evaluate --model runs/brain --checkpoint 300"
)
def evaluate(
    result: Annotated[
        list[Path] | None, typer.Option(help="Folder that register wrote; repeat to compare methods.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="The true transform, fixed to moving (.tfm or .json).")
    ] = None,
    points: Annotated[
        Path | None, typer.Option(help="CSV of fixed points; points of the specimen otherwise.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Run folder that train wrote: measure its encoders instead.")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Step of one of its checkpoints; the finished model otherwise.")
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=PATH",
            help="Aligned volume to measure on, once a modality; the run's first pair otherwise.",
        ),
    ] = None,
    cubes: Annotated[int | None, typer.Option(help="Cubes of specimen that are turned. (default: 2)")] = None,
    side: Annotated[int | None, typer.Option(help="Voxels a side of such a cube. (default: 64)")] = None,
    angle_step: Annotated[
        float | None, typer.Option(help="Degrees from one angle of the curve to the next. (default: 15.0)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. (default: auto)")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16: of the arithmetic. (default: fp32)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV of the table; with --model a folder. (default there: RUN/diagnostics/step-N)"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Hold results against a known transform, side by side; or, with --model, measure what encoders can do.

    With --model: equivariance over the rotations of the grid and over all angles, agreement, retrieval, effective
    rank, and where the registration of the aligned pair ends. Writes diagnostics.json and diagnostics.png, adds both
    to the run's report, and sends them to its MLflow run.
    """
    if model is None:
        only: dict[str, Any] = {
            "--checkpoint": checkpoint,
            "--volume": volume,
            "--cubes": cubes,
            "--side": side,
        }
        only |= {"--angle-step": angle_step, "--device": device, "--precision": precision}
        _require_given("--result and --truth, or --model", {"--result": result, "--truth": truth})
        _refuse_given("without --model", only)
        return _evaluate_results(result or [], truth, points, out, dry_run)
    _refuse_given("with --model", {"--result": result, "--truth": truth, "--points": points})
    from comir_hpc.config import EvaluateSettings

    return _evaluate_model(
        _settings(
            EvaluateSettings,
            model=model,
            checkpoint=checkpoint,
            volumes=_named_paths(volume),
            out=out,
            cubes=cubes,
            side=side,
            angle_step=angle_step,
            precision=precision,
            device=device,
        ),
        dry_run,
    )


def _evaluate_results(
    results: list[Path], truth: Path | None, points: Path | None, out: Path | None, dry_run: bool
) -> None:
    from comir_hpc.evaluate import evaluate as run

    assert truth is not None
    if dry_run:
        return _print_plan(
            {
                "results": ", ".join(map(str, results)),
                "truth": str(truth),
                "points": str(points or "of the specimen"),
                "out": str(out or "printed"),
            }
        )
    return typer.echo(run(results, truth, points=points, out=out).text)


def _evaluate_model(settings: EvaluateSettings, dry_run: bool) -> None:
    from comir_hpc.evaluate import diagnose, open_subject, plan_diagnosis
    from comir_hpc.report import report as write_report
    from comir_hpc.tracking import send_diagnostics

    if dry_run:
        return _print_plan(plan_diagnosis(settings))
    subject = open_subject(settings)
    with _progress() as progress:
        aligned, missing = _register_aligned(subject, settings)
        found = diagnose(settings, subject, aligned=aligned, bias_missing=missing, progress=progress)
    typer.echo(found.summary)
    typer.echo(f"figures: {found.folder}")
    if subject.own:
        typer.echo(f"report: {write_report(subject.run)}")
        note = send_diagnostics(subject.run)
        if note:
            typer.echo(f"note: {note}", err=True)
    return None


def _register_aligned(subject: Subject, settings: EvaluateSettings) -> tuple[Path | None, str]:
    """Register the first two modalities from the identity, which is the answer; where it went, or why it did not."""
    from comir_hpc.config import RegisterSettings
    from comir_hpc.errors import RegistrationError
    from comir_hpc.register import register as run

    first, second = list(subject.volumes)[:2]
    out = subject.out / "aligned"
    try:
        run(
            RegisterSettings(
                fixed=subject.volumes[first].path,
                moving=subject.volumes[second].path,
                out=out,
                model=subject.model,
                fixed_modality=first,
                moving_modality=second,
                initial="identity",
                precision=settings.precision,
                device=settings.device,
                overwrite=True,
            )
        )
    except RegistrationError as error:
        return None, str(error)
    return out, ""


@app.command(epilog="Example:  comir-hpc report result")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that register or train wrote.", metavar="DIR")],
) -> None:
    """Write report.html, one self-contained page, from the folder of a registration or a training run."""
    from comir_hpc.report import report as run

    typer.echo(f"report: {run(folder)}")


@app.command(epilog="Example:  comir-hpc sync run --mlflow http://tracking.example.org:5000")
def sync(
    folder: Annotated[Path, typer.Argument(help="Folder that train wrote.", metavar="RUN")],
    mlflow: Annotated[str | None, typer.Option(help="Tracking URI; the run's own setting otherwise.")] = None,
) -> None:
    """Send to MLflow what it does not have of a training run: after its server was away, or to another one."""
    from comir_hpc.tracking import sync as run

    sent = run(folder, mlflow)
    typer.echo(f"{sent.points} points and {sent.files} files of run {sent.run_id} sent to {sent.uri}")


@app.command(epilog="Example:  comir-hpc doctor --folder /scratch")
def doctor(
    folder: Annotated[Path, typer.Option(help="Folder whose file system is tried.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what works on this node, with numbers."""
    from comir_hpc.doctor import doctor as run

    checks = run(folder)
    typer.echo(checks.json() if as_json else checks.text())
    if checks.failed:
        raise typer.Exit(EXIT_REFUSED)


# ---------------------------------------------------------------------- what they share


def _settings(kind: type[Settings], /, **given: Any) -> Any:
    from comir_hpc.config import validate

    record = {name: value for name, value in given.items() if value is not None}
    return validate(kind, record, source=f"comir-hpc {kind.__name__.removesuffix('Settings').lower()}")


def _require_given(wanted: str, options: dict[str, Any]) -> None:
    missing = [name for name, value in options.items() if not value]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing: give {wanted}")


def _refuse_given(where: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None and value != []]
    if given:
        raise ConfigError(f"{', '.join(given)} mean nothing {where}; leave them out")


def _named_paths(texts: list[str] | None) -> dict[str, Path] | None:
    if not texts:
        return None
    pairs = [text.partition("=") for text in texts]
    for name, separator, path in pairs:
        if not (name and separator and path):
            raise ConfigError(
                f"--volume {name}{separator}{path}: expected MODALITY=PATH, e.g. --volume t1w=a.zarr"
            )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"--volume names a modality twice: {', '.join(name for name, _, _ in pairs)}")
    return {name: Path(path) for name, _, path in pairs}


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, separator, parts = text.partition("/")
    if not separator or not (number.isdigit() and parts.isdigit()):
        raise ConfigError(f"--part {text}: expected I/N, e.g. --part 3/16")
    return int(number), int(parts)


def _as_zarr(path: Path, folder: Path, dry_run: bool, name: str | None = None) -> Path:
    """A volume in any format as a store: files are ingested once, beside the result."""
    if path.suffix == ".zarr":
        return path
    if dry_run:
        raise ConfigError(f"{path} is not a .zarr: run `comir-hpc ingest {path} OUT.zarr` to plan with it")
    from comir_hpc.config import IngestSettings
    from comir_hpc.ingest import ingest as run

    store = folder / f"{name or path.name.split('.')[0]}.zarr"
    typer.echo(f"ingesting {path} -> {store}", err=True)
    run(IngestSettings(source=path, out=store))
    return store


def _print_plan(plan: dict[str, Any]) -> None:
    width = max(map(len, plan), default=0)
    for key, value in plan.items():
        typer.echo(
            f"{key.replace('_', ' '):<{width}}  {value if isinstance(value, str) else json.dumps(value)}"
        )


def _refuse_if_failed(verdict: str, reasons: list[str]) -> None:
    if verdict == "FAIL":
        raise ComirError("registration FAILED: " + "; ".join(reasons))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callable `progress(what, done, total)`: a bar on a terminal, a line every tenth in a batch log."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        from rich.progress import Progress

        with Progress(console=console, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield show
    else:
        tenths: dict[str, int] = {}

        def line(what: str, done: int, total: int) -> None:
            tenth = 10 * done // max(total, 1)
            if tenth > tenths.get(what, -1):
                tenths[what] = tenth
                print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)  # noqa: T201

        yield line


def main() -> None:
    """Entry point: an error that we know is one red line, a bug keeps its traceback."""
    # Verbs that can save first listen for themselves; before and after that, nothing is lost by ending at once.
    signal.signal(signal.SIGUSR2, lambda number, frame: os._exit(EXIT_STOPPED))
    try:
        app(standalone_mode=True)
    except StopRequested as stop:
        typer.secho(str(stop), fg=typer.colors.YELLOW, err=True)
        sys.exit(EXIT_STOPPED)
    except ComirError as error:
        typer.secho(" ".join(str(error).split()), fg=typer.colors.RED, err=True)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command continues", fg=typer.colors.YELLOW, err=True)
        sys.exit(130)
