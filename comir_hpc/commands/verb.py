"""A verb of the command line: a function that takes a `Call`, with options made from settings.

The options are made when they are first asked for, so that `comir-hpc --help` loads no settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from comir_hpc.commands.call import Call
from comir_hpc.commands.failure import UsageError
from comir_hpc.commands.terminal import Terminal

if TYPE_CHECKING:
    from comir_hpc.commands.options import Choice
    from comir_hpc.config.base import Settings


@dataclass(frozen=True)
class Interface:
    """What a verb takes from the command line.

    Attributes
    ----------
    settings : tuple of str
        Classes of `comir_hpc.config` whose settings become options.
    optional : tuple of str
        Further classes, none of whose settings must be given.
    positional : tuple of str
        Names of the settings that are given by their place in the command.
    either : tuple of str
        Settings that are given by their place or as options.
    plans : bool
        Whether the verb has a --dry-run.
    """

    settings: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    plans: bool = True

    @cached_property
    def choices(self) -> list[Choice]:
        """All settings that have an option."""
        from comir_hpc.commands.options import merged

        return merged([*_classes(self.settings), *_classes(self.optional)])

    def parameters(self) -> list[inspect.Parameter]:
        """Return everything that typer reads: arguments in their order, then options panel by panel."""
        kinds = _classes(self.settings)
        must = {name for kind in kinds for name, field in kind.model_fields.items() if field.is_required()}
        by_name = {choice.name: choice for choice in self.choices}
        placed = [by_name[name].parameter(positional=True, required=name in must) for name in self.positional]
        options = [
            choice.parameter(
                positional=False, required=choice.name in must and choice.name not in self.either
            )
            for choice in self.choices
            if choice.name not in self.positional
        ]
        earlier = [found for choice in self.choices for found in choice.earlier_parameters()]
        return [*placed, *map(_twin, self.either), *options, *earlier, *_of_every_verb(self.plans)]

    def given(self, values: dict[str, Any]) -> dict[str, Any]:
        """Pick the settings that were given, out of all that the parser returned.

        Raises
        ------
        UsageError
            If settings that can be given by place or as options are not all given, or one is given two values.
        """
        from comir_hpc.commands.options import given

        found = given(values, self.choices)
        placed = {name: values[_place(name)] for name in self.either if values[_place(name)] is not None}
        for name, value in placed.items():
            if found.get(name, value) != value:
                raise UsageError(
                    f"{name.upper()} is {value} by its place, and --{name} says {found[name]}; give one of the two."
                )
        if any(name not in found and name not in placed for name in self.either):
            by_place = " ".join(name.upper() for name in self.either)
            as_options = " ".join(f"--{name} {name.upper()}" for name in self.either)
            raise UsageError(f"expected {by_place}, or {as_options}.")
        return {**found, **placed}


class Verb(TyperCommand):
    """A command whose options are made when they are first asked for."""

    interface: Interface
    run: Callable[[Call], None]
    _made: list[Any] | None = None

    @property
    def params(self) -> list[Any]:
        """Arguments and options of the command, as typer reads them."""
        if self._made is None:
            self._made = _read_by_typer(self.interface.parameters())
        return self._made

    @params.setter
    def params(self, found: list[Any]) -> None:
        """Leave out what typer finds in the signature of `_nothing`: it is empty."""

    def invoke(self, ctx: Any) -> None:
        """Run the verb on what was given."""
        terminal = ctx.find_object(Terminal) or Terminal()
        # Before anything can be refused, so that the log has the refusal, too.
        terminal.listen(quiet=bool(ctx.params["quiet"]), log=ctx.params["log"])
        try:
            given = self.interface.given(ctx.params)
        except UsageError as error:
            error.ctx = ctx
            raise
        places = (given[n] for n in ("run", "out", "folder", "model") if n in given)
        # Of several folders the first stands for all: it is where the traceback of an unexpected error goes.
        terminal.output = next((Path(p[0] if isinstance(p, list) else p) for p in places), None)
        try:
            type(self).run(Call(str(ctx.info_name), given, bool(ctx.params.get("dry_run")), terminal))
        except (BrokenPipeError, EOFError) as error:
            # Typer takes these for a reader of stdout or a user who left. Ours come from files and processes.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def verb(
    app: typer.Typer, *, example: str, **interface: Any
) -> Callable[[Callable[[Call], None]], Callable[[Call], None]]:
    """Make a command of a function: its name is the verb's, its docstring the help.

    Parameters
    ----------
    app : Typer
        Application of typer that the command is added to.
    example : str
        Example of a command, which stands under the help.
    **interface
        Values for the fields of `Interface`, by name.
    """

    def register(function: Callable[[Call], None]) -> Callable[[Call], None]:
        members = {"interface": Interface(**interface), "run": staticmethod(function)}
        app.command(
            function.__name__,
            # typer makes the command itself, and takes nothing for it but a class.
            cls=type("Verb", (Verb,), members),
            help="\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n")),
            epilog=example.replace("[", "\\["),
        )(_nothing)
        return function

    return register


def _nothing() -> None:
    """Stand for a verb where typer looks for a signature."""


def _classes(names: Sequence[str]) -> list[type[Settings]]:
    from comir_hpc import config

    return [getattr(config, name) for name in names]


def _place(name: str) -> str:
    """Return the name of the argument that is the twin of an option."""
    return f"{name}_by_place"


def _twin(name: str) -> inspect.Parameter:
    """Return the argument that is the twin of an option."""
    from comir_hpc.commands.options import parameter

    argument = typer.Argument(metavar=name.upper(), show_default=False, help=f"The same as --{name}.")
    return parameter(_place(name), Annotated[Path | None, argument], required=False)


def _of_every_verb(plans: bool) -> list[inspect.Parameter]:
    """Return the options that belong to the command line and to no setting."""
    from comir_hpc.commands.options import parameter

    plan = typer.Option("--dry-run", help="Print the plan and what it will need; do nothing.")
    quiet = typer.Option("--quiet", "-q", help="Print no progress and no notes, only results and errors.")
    log = typer.Option(
        "--log",
        metavar="FILE",
        help="Append everything that is said to this file, errors with their traceback.",
    )
    found = [
        parameter("quiet", Annotated[bool | None, quiet], required=False),
        parameter("log", Annotated[Path | None, log], required=False),
    ]
    return [parameter("dry_run", Annotated[bool | None, plan], required=False), *found] if plans else found


def _read_by_typer(parameters: list[inspect.Parameter]) -> list[Any]:
    """Return what typer makes of parameters."""

    def function(**_: Any) -> None:
        """Carry a signature."""

    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    # typer reads a signature only as a command of an application, so one is made for it.
    spare = typer.Typer(add_completion=False)
    spare.command()(function)
    made: Any = typer.main.get_command(spare)
    return list(made.params)
