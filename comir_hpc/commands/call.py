"""What the user asked of a verb, and what verbs do with it: settings, stores, plans, results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from comir_hpc.commands.progress import progress_on
from comir_hpc.commands.terminal import Terminal
from comir_hpc.errors import ComirError, ConfigError
from comir_hpc.host.progress import Progress

if TYPE_CHECKING:
    from comir_hpc.config.base import AnySettings, Settings

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """What the user asked of a verb.

    `given` holds what the user typed, and no default. Defaults stand in the settings alone.

    Attributes
    ----------
    verb : str
        Name of the verb.
    given : dict
        Values of the settings that were given, by the setting's name.
    dry_run : bool
        Whether the user only wants the plan.
    terminal : Terminal
        Terminal that messages are written to.
    """

    verb: str
    given: dict[str, Any]
    dry_run: bool
    terminal: Terminal

    def settings(self, kind: type[AnySettings]) -> AnySettings:
        """Make settings of one class from what was given.

        Raises
        ------
        ConfigError
            If a setting is missing or cannot work, or one was given that the class does not have.
        """
        from comir_hpc.config.base import validate

        return validate(kind, self.given, source=f"comir-hpc {self.verb}")

    def with_stores(self, settings: AnySettings, folder: Path, *, processes: int = 1) -> AnySettings:
        """Return settings whose volumes are stores: other files are ingested into `folder` first.

        A dry run plans that, and ends if nothing more can be planned without the stores. The parameters are those of
        `comir_hpc.recipes.stores.with_stores`.
        """
        from comir_hpc.recipes.stores import plan_stores, with_stores

        if not self.dry_run:
            with self.progress() as progress:
                return with_stores(
                    settings, folder, processes=processes, progress=progress, tell=self.terminal.note
                )
        found = plan_stores(settings, folder)
        for plan in found.plans:
            self.plan(plan)
        if found.settings is None:
            self.say(
                f"{self.verb} itself can be planned when these files are stores; "
                "ingest them first, or leave --dry-run out"
            )
            raise typer.Exit
        return found.settings

    def run(
        self,
        stage: Callable[..., Result],
        plan: Callable[[AnySettings], Mapping[str, Any]],
        settings: AnySettings,
    ) -> Result:
        """Carry out a stage with its progress shown. A dry run prints the plan instead, and ends the command.

        Parameters
        ----------
        stage : callable
            Called as ``stage(settings, progress=progress)``.
        plan : callable
            Function that predicts from the settings what the stage would do and need.
        settings : Settings
            Checked settings of the verb.
        """
        if self.dry_run:
            self.plan(plan(settings))
            raise typer.Exit
        with self.progress() as progress:
            return stage(settings, progress=progress)

    def progress(self) -> AbstractContextManager[Progress]:
        """Show how far the work is."""
        return progress_on(self.terminal)

    def say(self, *texts: str) -> None:
        """Print results."""
        for text in texts:
            self.terminal.result(text)

    def note(self, *notes: str) -> None:
        """Tell what was open and how it was taken."""
        for note in notes:
            self.terminal.note(note)

    def plan(self, plan: Mapping[str, Any]) -> None:
        """Print what would be done and needed, a line each."""
        # Aligned columns: plans are read by people. Programs read the store's metadata or result.json.
        width = max(map(len, plan), default=0)
        for key, value in plan.items():
            text = value if isinstance(value, str) else json.dumps(value)
            self.say(f"{key.replace('_', ' '):<{width}}  {text}")

    def refuse_others(self, kind: type[Settings], where: str) -> None:
        """Refuse options that mean nothing in this use of a verb.

        Raises
        ------
        ConfigError
            Naming those that the class does not have.
        """
        from comir_hpc.commands.options import choices

        known = {choice.name for choice in choices(kind)}
        others = [f"--{name.replace('_', '-')}" for name in self.given if name not in known]
        if others:
            raise ConfigError(f"{', '.join(others)} mean nothing {where}; leave them out")


def refuse_failed(
    verdict: str, reasons: list[str], *, unwritten: Path | None = None, require: str = "warn"
) -> None:
    """End a registration that failed with exit code 1.

    Parameters
    ----------
    unwritten : Path, optional
        Output that was asked for, and is not made of a wrong answer.
    require : str
        Poorest verdict that is no failure, ``warn`` or ``pass``.

    Raises
    ------
    ComirError
        If the verdict is FAIL, or WARN where PASS is required; the message has the reasons.
    """
    outcome = "" if unwritten is None else f", so {unwritten} was not written"
    if verdict == "FAIL":
        raise ComirError(f"registration FAILED{outcome}: {'; '.join(reasons)}")
    if require == "pass" and verdict != "PASS":
        raise ComirError(
            f"the verdict is {verdict} and --require pass asks for PASS{outcome}: {'; '.join(reasons)}"
        )
