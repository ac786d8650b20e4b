"""The command line: each verb reads its settings, calls one stage, prints its result.

Nothing heavy is imported before a verb runs: `comir-hpc --help` answers at once.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from comir_hpc import __version__
from comir_hpc.commands.call import Call, refuse_failed
from comir_hpc.commands.elsewhere import add_tools
from comir_hpc.commands.failure import EXIT_REFUSED, EXIT_USAGE
from comir_hpc.commands.measuring import add_measuring_verbs
from comir_hpc.commands.verb import verb
from comir_hpc.errors import ConfigError

app = typer.Typer(
    name="comir-hpc",
    help="Put two 3D volumes of different modality on top of each other: train encoders that make them look "
    "alike, register what they see, apply the transform to the originals.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"comir-hpc {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold the options that belong to no verb."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help() or "", nl=False)  # typer's own help is printed, and returned empty
        raise typer.Exit(EXIT_USAGE)


@verb(app, settings=("DemoSettings",), example="Example:  comir-hpc demo --out demo --seed 3")
def demo(call: Call) -> None:
    """Run the main job on the embedded brain pair: register it as it comes, then train encoders for it and register.

    The pair's T2w is displaced first, so that the answer is known.
    """
    from comir_hpc.config.demo import DemoSettings

    settings = call.settings(DemoSettings)
    from comir_hpc.recipes.demo import demo as run
    from comir_hpc.recipes.demo import plan_demo

    result = call.run(partial(run, tell=call.say), plan_demo, settings)
    call.say(result.summary, f"report: {result.report}")
    refuse_failed(result.verdict, result.reasons)


@verb(
    app,
    settings=("IngestSettings",),
    positional=("source", "out"),
    example="Example:  comir-hpc ingest scan.tif scan.zarr --spacing 2 1 1 --unit um",
)
def ingest(call: Call) -> None:
    """Turn a file of any common format into a chunked OME-Zarr volume with a pyramid."""
    from comir_hpc.config.ingest import IngestSettings

    settings = call.settings(IngestSettings)
    from comir_hpc.ingest import ingest as run
    from comir_hpc.ingest import plan_ingest

    result = call.run(run, plan_ingest, settings)
    call.note(*result.notes)
    call.say(result.summary)


@verb(
    app,
    settings=("RunSettings",),
    optional=("TrainSettings",),
    positional=("config",),
    example="Example:  comir-hpc train configs/brain.yaml --run runs/brain --set optimiser.steps=500",
)
def train(call: Call) -> None:
    """Train one encoder a modality on aligned pairs, so that their outputs look alike.

    The settings stand in a YAML file. --set changes any of them, by the names that docs/training.md and the
    config.yaml of a run have.
    """
    from comir_hpc.config.base import validate
    from comir_hpc.config.files import load
    from comir_hpc.config.train import RunSettings, TrainSettings

    files = {name: value for name, value in call.given.items() if name in RunSettings.model_fields}
    place = validate(RunSettings, files, source="comir-hpc train")
    values = {name: value for name, value in call.given.items() if name not in files}
    settings = load(TrainSettings, place.config, place.overrides, values)
    from comir_hpc.host.launch import read_launch
    from comir_hpc.train import plan_training
    from comir_hpc.train import train as run_training

    launch = read_launch(os.environ)
    settings = call.with_stores(settings, place.run / "volumes", processes=launch.world_size)
    result = call.run(partial(run_training, run=place.run), plan_training, settings)
    # Every rank runs this command, and one of them speaks.
    if launch.rank == 0:
        call.say(result.summary)


@verb(
    app,
    settings=("InferSettings",),
    example="Example:  comir-hpc infer --zarr t1w.zarr --model runs/brain --modality t1w --out t1w_comir.zarr",
)
def infer(call: Call) -> None:
    """Encode a volume of any size window by window, from zarr to zarr."""
    from comir_hpc.config.infer import InferSettings

    settings = call.settings(InferSettings)
    settings = call.with_stores(settings, settings.out.parent, processes=settings.part[1])
    from comir_hpc.infer import infer as run
    from comir_hpc.infer import plan_infer

    result = call.run(run, plan_infer, settings)
    call.note(*result.notes)
    call.say(result.summary)


@verb(
    app,
    settings=("AdaptSettings",),
    either=("fixed", "moving"),
    example="Example:  comir-hpc adapt t1.nii.gz epi.nii.gz --run runs/t1_epi",
)
def adapt(call: Call) -> None:
    """Train encoders for one pair that nobody has aligned, and register it with them; exit code 1 for FAIL.

    Several methods search for the alignment. Encoders are trained on each different answer, and voxels that were held
    out decide. `comir-hpc register --model RUN` then serves other specimens of the same two modalities.
    """
    from comir_hpc.config.adapt import AdaptSettings

    settings = call.settings(AdaptSettings)
    settings = call.with_stores(settings, settings.run / "volumes")
    from comir_hpc.recipes.adapt import adapt as run
    from comir_hpc.recipes.adapt import plan_adapt

    result = call.run(run, plan_adapt, settings)
    call.say(result.summary)
    if result.registration is not None:
        call.say(f"registration: {result.registration}")
    refuse_failed(result.verdict, list(result.reasons))


@verb(
    app,
    settings=("RegisterPairSettings",),
    either=("fixed", "moving"),
    example="Examples:  comir-hpc register fixed.nii.gz moving.nii.gz --warped moving_on_fixed.nii.gz"
    "   |   comir-hpc register --fixed t1w.zarr --moving t2w.zarr --model runs/brain --fixed-modality t1w "
    "--moving-modality t2w --out result",
)
def register(call: Call) -> None:
    """Find the transform from fixed to moving, with a verdict: PASS, WARN or FAIL (exit code 1).

    Without --model the general model is used, which was trained for any contrast. Without --out the result goes into
    the folder FIXED-MOVING, named after the two files.
    """
    from comir_hpc.config.register import RegisterPairSettings

    asked = call.settings(RegisterPairSettings)
    call.terminal.output = asked.out
    from comir_hpc.recipes.pair import next_command, plan_pair, register_pair, require_usable

    require_usable(asked)
    settings = call.with_stores(asked, asked.out)
    # Said when the files are known to be there: an error stands alone.
    if asked.uses_general_model:
        call.note("no --model is given: the general model is used")
    if "out" not in call.given:
        call.note(f"no --out is given: the result goes into {asked.out}")
    done = call.run(register_pair, plan_pair, settings)
    call.note(*done.notes)
    call.say(done.result.summary)
    if done.result.verdict == "WARN" and asked.require == "warn":
        call.say(f"why: {'; '.join(done.result.reasons)}")
    if done.report is not None:
        call.say(f"report: {done.report}")
    if done.warped is not None:
        call.say(f"warped: {done.warped}")
    elif command := next_command(asked, settings, done.result):
        call.say(f"next: {command}")
    refuse_failed(done.result.verdict, done.result.reasons, unwritten=asked.warped, require=asked.require)


@verb(
    app,
    settings=("WarpSettings",),
    example="Examples:  comir-hpc warp --zarr t2w.zarr --transform result/transform.tfm --like t1w.zarr --out w.zarr"
    "   |   comir-hpc warp --points p.csv --transform result/transform.tfm --out q.csv",
)
def warp(call: Call) -> None:
    """Apply a transform: the moving volume onto the fixed grid, or points either way."""
    from comir_hpc.config.warp import WarpSettings

    settings = call.settings(WarpSettings)
    if settings.zarr is not None and settings.like is not None:  # otherwise it is points, or refused
        settings = call.with_stores(settings, settings.out.parent, processes=settings.part[1])
    from comir_hpc.warp import plan_warp
    from comir_hpc.warp import warp as run

    result = call.run(run, plan_warp, settings)
    call.note(*result.notes)
    call.say(result.summary)


@verb(
    app,
    optional=("CompareSettings", "EvaluateSettings"),
    example="Examples:  comir-hpc evaluate --result result --truth truth.json --points landmarks.csv"
    "   |   comir-hpc evaluate --model runs/brain --checkpoint 300",
)
def evaluate(call: Call) -> None:
    """Compare results with what is known, side by side; or, with --model, measure what encoders can do.

    What is known can be a transform (--truth), corresponding points (--points and --moving-points), labels of both
    volumes (Dice and surface distance), or the registration in the opposite direction (--back).

    With --model: equivariance over the rotations of the grid and over all angles, agreement, retrieval, effective
    rank, and where the registration of the aligned pair ends. Writes diagnostics.json and diagnostics.png, adds both
    to the run's report, and sends them to its MLflow run.
    """
    from comir_hpc.config.evaluate import CompareSettings, EvaluateSettings

    if "model" in call.given:
        call.refuse_others(EvaluateSettings, "with --model")
        return _diagnose(call)
    if "result" not in call.given:
        raise ConfigError("--result missing: give --result and --truth, or --model")
    call.refuse_others(CompareSettings, "without --model")
    settings = call.settings(CompareSettings)
    from comir_hpc.evaluate import compare

    settings = call.with_stores(settings, settings.result[0])
    if call.dry_run:
        return call.plan(
            {
                "results": ", ".join(map(str, settings.result)),
                "truth": str(settings.truth or settings.moving_points or "none"),
                "points": str(settings.points or "of the specimen"),
                "out": str(settings.out or "printed"),
            }
        )
    table = compare(settings)
    call.note(*table.notes)
    return call.say(table.text)


def _diagnose(call: Call) -> None:
    """Measure the encoders of a run."""
    from comir_hpc.config.evaluate import EvaluateSettings

    settings = call.settings(EvaluateSettings)
    settings = call.with_stores(settings, settings.out or Path())
    from comir_hpc.evaluate import plan_diagnosis
    from comir_hpc.recipes.diagnosis import diagnose_run

    found = call.run(diagnose_run, plan_diagnosis, settings)
    call.say(found.diagnosis.summary, f"figures: {found.diagnosis.folder}")
    if found.report is not None:
        call.say(f"report: {found.report}")
    call.note(*found.notes)


add_measuring_verbs(app)


@verb(
    app,
    settings=("ReportSettings",),
    positional=("folder",),
    plans=False,
    example="Examples:  comir-hpc report result   |   comir-hpc report results/*",
)
def report(call: Call) -> None:
    """Write report.html, one self-contained page, from the folder of a registration or a training run.

    From several folders of registrations, cohort.html is written beside them: a table, the worst first.
    """
    from comir_hpc.config.pages import ReportSettings

    settings = call.settings(ReportSettings)
    from comir_hpc.report import cohort
    from comir_hpc.report import report as run

    folders = settings.folder
    call.say(f"report: {run(folders[0]) if len(folders) == 1 else cohort(folders)}")


@verb(
    app,
    settings=("DoctorSettings",),
    plans=False,
    example="Example:  comir-hpc doctor --folder /scratch",
)
def doctor(call: Call) -> None:
    """Say what works on this node, with numbers."""
    from comir_hpc.config.pages import DoctorSettings

    settings = call.settings(DoctorSettings)
    from comir_hpc.commands.doctor import doctor as run

    checks = run(settings.folder)
    call.say(checks.json() if settings.as_json else checks.text())
    if checks.failed:
        raise typer.Exit(EXIT_REFUSED)


add_tools(app)
