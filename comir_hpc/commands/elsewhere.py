"""Verbs that go on from a result: refine it, and take it to other tools, to the eye, to a tracking server."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path

import typer

from comir_hpc.commands.call import Call
from comir_hpc.commands.verb import verb


def add_tools(app: typer.Typer) -> None:
    """Add the verbs to an application of typer."""
    verb(
        app,
        settings=("RefineSettings",),
        positional=("result",),
        example="Examples:  comir-hpc refine result --out field.zarr   |   comir-hpc refine result --out field.zarr "
        "--part 3/16",
    )(refine)
    verb(
        app,
        settings=("ExportSettings",),
        positional=("transform",),
        example="Examples:  comir-hpc export result --to elastix   |   comir-hpc export flirt.mat --from fsl --fixed "
        "f.nii.gz --moving m.nii.gz --to itk --out transform.tfm   |   comir-hpc export runs/brain --to torchscript",
    )(export)
    verb(
        app,
        settings=("ViewSettings",),
        positional=("shown",),
        example="Examples:  comir-hpc view result   |   comir-hpc view fixed.nii.gz moving_on_fixed.nii.gz",
    )(view)
    verb(
        app,
        settings=("SyncSettings",),
        positional=("folder",),
        plans=False,
        example="Example:  comir-hpc sync run --mlflow http://tracking.example.org:5000",
    )(sync)


def refine(call: Call) -> None:
    """Bend what a registration leaves over, block by block, into a displacement field for volumes of any size.

    Each block is judged on voxels that were held out; one that does not improve keeps the answer of the registration,
    and is counted. `warp --transform` and `export` take the field.
    """
    from comir_hpc.config.refine import RefineSettings

    settings = call.settings(RefineSettings)
    call.terminal.output = settings.out
    from comir_hpc.recipes.refine import plan_refine
    from comir_hpc.recipes.refine import refine as run

    done = call.run(run, plan_refine, settings)
    call.note(*done.result.notes)
    call.say(done.result.summary)
    if done.report is not None:
        call.say(f"report: {done.report}")


def export(call: Call) -> None:
    """Write a transform in the form of another tool: ITK, ANTs, elastix, FSL, FreeSurfer, OME-NGFF, a plain matrix.

    With --from it reads such a form, so that it also converts between them. With --to torchscript it writes the encoder
    of a run, for tools that compare features.
    """
    from comir_hpc.config.export import ExportSettings

    settings = call.settings(ExportSettings)
    from comir_hpc.recipes.export import export as run
    from comir_hpc.recipes.export import plan_export

    result = call.run(lambda chosen, progress: run(chosen), plan_export, settings)
    call.note(*result.notes)
    call.say(result.summary)


def view(call: Call) -> None:
    """Show a result, or volumes, in the browser: overlay, blink, checkerboard, and what lies under the cross-hair.

    It writes one page that needs no other file and no network, and opens it where there is a display.
    """
    from comir_hpc.config.view import ViewSettings

    settings = call.settings(ViewSettings)
    from comir_hpc.recipes.view import plan_view
    from comir_hpc.recipes.view import view as run

    result = call.run(run, plan_view, settings)
    call.note(*result.notes)
    call.say(f"page: {result.path}")
    if settings.open_page and not _opened(result.path):
        call.note("there is no display here: open the page in a browser")


def sync(call: Call) -> None:
    """Send to MLflow what it does not have of a training run: after its server was away, or to another one."""
    from comir_hpc.config.pages import SyncSettings

    settings = call.settings(SyncSettings)
    from comir_hpc.runs.tracking import sync as run

    sent = run(settings.folder, settings.mlflow)
    call.say(f"{sent.points} points and {sent.files} files of run {sent.run_id} sent to {sent.uri}")


def _opened(page: Path) -> bool:
    """Open a page in a browser with windows; return whether there is one. A browser in the terminal would block it."""
    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        return False
    return webbrowser.open(page.absolute().as_uri())
