"""Verbs that take a result to where it is used: to other tools, and to the eye."""

from __future__ import annotations

import typer

from comir_hpc.commands.call import Call
from comir_hpc.commands.verb import verb


def add_tools(app: typer.Typer) -> None:
    """Add the verbs to an application of typer."""
    verb(
        app,
        settings=("ExportSettings",),
        positional=("transform",),
        example="Examples:  comir-hpc export result --to elastix   |   comir-hpc export flirt.mat --from fsl --fixed "
        "f.nii.gz --moving m.nii.gz --to itk --out transform.tfm   |   comir-hpc export runs/brain --to torchscript",
    )(export)


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
