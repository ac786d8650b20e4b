"""Options made from settings: name, type, default and help text come from the field and its docstring.

Nothing is written twice. What `comir_hpc.config` says of a setting is what `--help` shows. An option that is not given
is not passed on, so that the default stays where it is defined.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from comir_hpc.commands.failure import UsageError
from comir_hpc.config.base import OnCommandLine, Settings, fields_in_order

PANELS = ("Input", "Method", "Output", "Resources")
_SIMPLE = (bool, int, float, str, Path)


@dataclass(frozen=True)
class Choice:
    """A setting as an option.

    It is what a setting and an option have in common: a field of a class on one side, a parameter of a function on
    the other.

    Attributes
    ----------
    name : str
        Name of the setting, and of the value that the parser returns.
    type : object
        Type of the option's value, as typer is told it.
    words : tuple of str
        Allowed words; empty where anything is allowed.
    text : str
        Help text, with the default value in it.
    required : bool
        Whether the setting has no default.
    spelling : OnCommandLine
        Names of the option, word for its value, and group in the help.
    """

    name: str
    type: Any
    words: tuple[str, ...]
    text: str
    required: bool
    spelling: OnCommandLine

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the options that give the setting."""
        return self.spelling.names or (option_name(self.name),)

    @property
    def panel(self) -> str:
        """Heading of the help under which the option stands."""
        return self.spelling.panel or "Method"

    @property
    def earlier(self) -> dict[str, str]:
        """Earlier names of the option, which still work, and the parameters that take them."""
        return {f"{self.name}_{number}": name for number, name in enumerate(self.names[1:])}

    def earlier_parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the parameters for the earlier names, which the help does not show."""
        for name, option in self.earlier.items():
            yield parameter(
                name, Annotated[self.type | None, typer.Option(option, hidden=True)], required=False
            )

    def parameter(self, *, positional: bool, required: bool) -> inspect.Parameter:
        """Return the setting as a parameter of a function that typer reads."""
        metavar = self.spelling.metavar or ("|".join(self.words) or None)
        kind = self.type if required else self.type | None
        found: Any
        if positional:
            found = typer.Argument(help=self.text, metavar=metavar or self.name.upper(), show_default=False)
        else:
            found = typer.Option(
                _flag(self),
                help=self.text,
                metavar=None if self.type is bool else metavar,
                rich_help_panel=self.panel,
                autocompletion=_completion(self.words) if self.words else None,
                show_default=False,
            )
        return parameter(self.name, Annotated[kind, found], required=required)


def choices(kind: type[Settings]) -> Iterator[Choice]:
    """Give every setting of a class that one option can hold; groups of settings have none."""
    for name, field in fields_in_order(kind):
        spelling = _spelling(field)
        found = _option_type(field.annotation, spelling)
        if found is not None:
            words = spelling.words or (_words(field.annotation) if spelling.value is None else ())
            text = _help(kind, field, spelling)
            yield Choice(name, found, words, text, field.is_required(), spelling)


def merged(kinds: Sequence[type[Settings]]) -> list[Choice]:
    """Merge the settings of several classes in the order of the panels; one that two classes have gets both texts."""
    found: dict[str, Choice] = {}
    for kind in kinds:
        for choice in choices(kind):
            before = found.get(choice.name)
            if before is not None and before.text != choice.text:
                choice = replace(choice, text=f"{before.text} {choice.text}")
            found[choice.name] = choice
    # Sorting is stable: within a panel the order of the settings stays.
    return sorted(found.values(), key=lambda choice: PANELS.index(choice.panel))


def given(values: Mapping[str, Any], found: Sequence[Choice]) -> dict[str, Any]:
    """Pick the settings that were given, out of all that the parser returned.

    Raises
    ------
    UsageError
        If a setting is given by two names.
    """
    settings = {}
    for choice in found:
        names = {choice.name: choice.names[0], **choice.earlier}
        said = {
            # What may be repeated and was not given is an empty list and not None.
            option: values[name]
            for name, option in names.items()
            if values.get(name) not in (None, [], ())
        }
        if len(said) > 1:
            raise UsageError(f"{' and '.join(said)} are names of one option; give it once.")
        for value in said.values():
            settings[choice.name] = value if choice.spelling.value is None else choice.spelling.value
    return settings


def option_name(name: str) -> str:
    """Return the option of a setting: `fixed_modality` is `--fixed-modality`."""
    return "--" + name.replace("_", "-")


def parameter(name: str, annotation: Any, *, required: bool) -> inspect.Parameter:
    """Make a parameter of a function that typer reads; one that is not given is None."""
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# ---------------------------------------------------------------------- what a field says


def _spelling(field: FieldInfo) -> OnCommandLine:
    """Collect what is said of the option, at the field and inside its type; the last word counts."""
    said = [item for item in (*_inside(field.annotation), *field.metadata) if isinstance(item, OnCommandLine)]
    return reduce(_over, said, OnCommandLine())


def _over(before: OnCommandLine, after: OnCommandLine) -> OnCommandLine:
    """Lay one marker over another: what the second leaves open stays."""
    said = {
        f.name: getattr(after, f.name) for f in fields(after) if getattr(after, f.name) not in ("", (), None)
    }
    return replace(before, **said)


def _inside(annotation: Any) -> Iterator[Any]:
    """Yield the markers within a type such as `Annotated[int, marker] | None`."""
    if get_origin(annotation) is Annotated:
        inner, *markers = get_args(annotation)
        yield from _inside(inner)
        yield from markers
    elif _is_union(annotation):
        for item in get_args(annotation):
            yield from _inside(item)


def _bare(annotation: Any) -> Any:
    """Return the type without markers and without None; a union of several stays one."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if _is_union(annotation):
        kept = [item for item in get_args(annotation) if item is not type(None)]
        return _bare(kept[0]) if len(kept) == 1 else annotation
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _option_type(annotation: Any, spelling: OnCommandLine) -> Any:
    """Return the type that typer is told, or None if one option cannot hold the setting."""
    kind = _bare(annotation)
    origin, inner = get_origin(kind), get_args(kind)
    # A flag that stands for a value: --labels is kind=labels.
    if spelling.value is not None:
        return bool
    if kind in _SIMPLE:
        return kind
    if origin is Literal:
        return str
    if origin is dict and spelling.metavar:
        return list[str]
    if _is_union(kind) and spelling.metavar:
        return str  # a number or a word: the setting finds out which
    if origin is not tuple:
        return None
    item = _bare(inner[0])
    if item not in _SIMPLE:
        return None
    if inner[-1] is Ellipsis:
        return types.GenericAlias(list, (item,))
    # A pair such as I/N is written as one word, which a validator of the setting takes apart.
    return str if "/" in spelling.metavar else types.GenericAlias(tuple, (item,) * len(inner))


def _words(annotation: Any) -> tuple[str, ...]:
    kind = _bare(annotation)
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def _help(kind: type[Settings], field: FieldInfo, spelling: OnCommandLine) -> str:
    """Make the help: the docstring with settings named as options, and the default."""
    names = {name: (_spelling(f).names or (option_name(name),))[0] for name, f in kind.model_fields.items()}
    text = " ".join((field.description or "").split())
    text = re.sub(r"`([^`]+)`", lambda found: names.get(found[1], found[1]), text)
    default = None if field.default_factory else field.default  # the docstring says what is made from others
    if isinstance(default, bool):
        # To leave a flag out is its default; only one that is on by default needs a word.
        default = "on" if default else None
    if (
        spelling.value is None
        and not field.is_required()
        and default not in (None, (), {})
        and "/" not in spelling.metavar
    ):
        text += f" (default: {default})"
    return text.replace("[", "\\[")  # rich takes what stands in brackets for a style


def _flag(choice: Choice) -> str:
    """Return the declaration of the option; one that is on by default has a twin that turns it off."""
    name = choice.names[0]
    return (
        f"{name}/--no-{name[2:]}" if choice.type is bool and choice.text.endswith("(default: on)") else name
    )


def _completion(words: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete
