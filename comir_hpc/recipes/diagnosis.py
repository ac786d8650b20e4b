"""`comir-hpc evaluate --model`: measure the encoders of a run, register its aligned pair, put both into its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comir_hpc.config.evaluate import EvaluateSettings
from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.host.progress import Progress
from comir_hpc.runs.tracking import send_diagnostics

if TYPE_CHECKING:
    from comir_hpc.evaluate import Diagnosis, Subject


@dataclass(frozen=True)
class RunDiagnosis:
    """What was measured, and where it is.

    Only volumes of the run's own pair go into its report: figures of another specimen would be read as the run's.

    Attributes
    ----------
    diagnosis : Diagnosis
        Figures that were measured.
    report : Path or None
        Page of the run; None if other volumes than the run's own were measured.
    notes : tuple of str
        Sentences about what could not be sent to MLflow, and why.
    """

    diagnosis: Diagnosis
    report: Path | None
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """Show the figures in a notebook."""
        from comir_hpc.runs.html import table

        rows = {"figures": self.diagnosis.folder, "report": self.report, "notes": "; ".join(self.notes)}
        return table("Encoders", {"summary": self.diagnosis.summary, **rows})


def diagnose_run(settings: EvaluateSettings, *, progress: Progress | None = None) -> RunDiagnosis:
    """Measure what the encoders of a run can do, and where the registration of its aligned pair ends.

    Parameters
    ----------
    settings : EvaluateSettings
        The run, its checkpoint, the volumes and the sizes of the measurement.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.

    Raises
    ------
    CheckpointError, ConfigError, VolumeError
        For the same reasons as `open_subject` and `diagnose`.
    """
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.evaluate import diagnose, open_subject
    from comir_hpc.report import report

    subject = open_subject(settings)
    aligned, missing = register_aligned(subject, settings)
    found = diagnose(settings, subject, aligned=aligned, bias_missing=missing, progress=progress)
    if not subject.own:
        return RunDiagnosis(found, None)
    page = report(subject.run)
    note = send_diagnostics(subject.run)
    return RunDiagnosis(found, page, (note,) if note else ())


def register_aligned(subject: Subject, settings: EvaluateSettings) -> tuple[Path | None, str]:
    """Register the first two modalities from the identity, which is the answer.

    Returns
    -------
    folder : Path or None
        Folder of the registration; None if it led nowhere.
    why : str
        Reason why the registration led nowhere; empty where it did not fail.
    """
    from comir_hpc.register import register

    first, second = list(subject.volumes)[:2]
    out = subject.out / "aligned"
    try:
        register(
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
