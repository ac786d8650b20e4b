"""What all settings share: immutable, checked as a whole, and refused with the remedy."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from comir_hpc.errors import ConfigError

_LONGEST = 80  # characters of a wrong value that an error repeats
_MOST = 20  # problems that an error names


@dataclass(frozen=True)
class OnCommandLine:
    """Say what the name and the type of a setting do not say about its option.

    Attributes
    ----------
    names : tuple of str
        Options that replace the one made from the name; the first is shown in examples.
    metavar : str
        What stands for the value in the help.
    panel : str
        Group of the help: Input, Output or Resources. Everything else is Method.
    value : object
        Value that an option without a value stands for.
    words : tuple of str
        Allowed words, where the type does not list them.
    """

    names: tuple[str, ...] = ()
    metavar: str = ""
    panel: str = ""
    value: Any = None
    words: tuple[str, ...] = ()


T = TypeVar("T")
Input = Annotated[T, OnCommandLine(panel="Input")]
Output = Annotated[T, OnCommandLine(panel="Output")]
Resource = Annotated[T, OnCommandLine(panel="Resources")]

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
SizeZYX = tuple[Positive, Positive, Positive]
_Place = Annotated[int, Field(ge=0)]
PlaceZYX = tuple[_Place, _Place, _Place]
LengthZYX = Annotated[tuple[Length, Length, Length], OnCommandLine(metavar="Z Y X")]


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error that names the nearest known one.

    A subclass that gives a setting of its base another default need not repeat the docstring.

    Attributes
    ----------
    volume_fields : tuple of str
        Settings that name volumes, alone or in dictionaries and tuples.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        defer_build=True,  # the help of one verb need not build the settings of all others
    )
    volume_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Take the docstring of a setting that is defined again from the class that defined it first."""
        for name, field in cls.model_fields.items():
            if field.description is None:
                # The nearest base class comes first in the order of resolution.
                known = (
                    base.model_fields.get(name) for base in cls.__mro__[1:] if issubclass(base, Settings)
                )
                field.description = next((f.description for f in known if f and f.description), None)

    def placed_in(self, folder: Path) -> Self:
        """Return settings whose relative paths are relative to `folder`, where the class has such paths."""
        del folder
        return self

    def with_volumes(self, change: Callable[[Path], Path]) -> Self:
        """Return settings with `change` applied to every path that names a volume."""
        changed = {name: _mapped(getattr(self, name), change) for name in self.volume_fields}
        return self.model_copy(update=changed)


AnySettings = TypeVar("AnySettings", bound=Settings)


def fields_in_order(kind: type[Settings]) -> list[tuple[str, FieldInfo]]:
    """Return what must be given first, then the class's own settings, then those of its bases, the nearest first."""

    def depth(name: str) -> int:
        return max(n for n, base in enumerate(kind.__mro__) if name in inspect.get_annotations(base))

    return sorted(kind.model_fields.items(), key=lambda item: (not item[1].is_required(), depth(item[0])))


def _mapped(value: Any, change: Callable[[Path], Path]) -> Any:
    """Apply `change` to all paths in a value of dictionaries and tuples."""
    if isinstance(value, Path):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return tuple(_mapped(item, change) for item in value) if isinstance(value, tuple) else value


def validate(
    kind: type[AnySettings], record: dict[str, Any], *, source: str = "settings", folder: Path | None = None
) -> AnySettings:
    """Make settings of one class from plain data.

    Parameters
    ----------
    kind : type
        Class of the settings.
    record : dict
        Values by key, as YAML gives them.
    source : str
        Where they come from, for the error.
    folder : Path, optional
        What relative paths are relative to.

    Raises
    ------
    ConfigError
        With every problem: the key, what it is, what was expected.
    """
    try:
        settings = kind.model_validate(record)
    except ValidationError as error:
        # A default that is made from other settings is missing where one of those is wrong, which is said itself.
        wrong = [e for e in error.errors(include_url=False) if e["type"] != "default_factory_not_called"]
        problems = [_explain(kind, dict(e)) for e in wrong[:_MOST]]
        more = len(wrong) - len(problems)
        said = "; ".join(problems) + (f"; and {more} more" if more else "")
        raise ConfigError(f"{source}: {said}") from error
    return settings if folder is None else settings.placed_in(folder)


def _explain(kind: type[Settings], error: dict[str, Any]) -> str:
    """One problem in words; a key of a mapping that is no text counts as unknown."""
    place = [str(p) for p in error["loc"]]
    if error["type"] in ("extra_forbidden", "invalid_key"):
        fields = _fields_at(kind, place[:-1])
        near = difflib.get_close_matches(place[-1], fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
        return f"unknown key {'.'.join(place)}; {remedy}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{'.'.join(place)} is missing"
    if error["type"] == "value_error":
        return f"{'.'.join(place)}: {message}" if place else message
    return f"{'.'.join(place)} is {_short(error['input'])}: {message}"


def _short(value: Any) -> str:
    """Text of a value, cut: YAML can hold lists that refer to lists a billion times."""
    text = reprlib.Repr()
    text.maxstring = text.maxother = text.maxlong = _LONGEST
    text.maxlevel = 2
    try:
        return text.repr(value)[: 2 * _LONGEST]
    except ValueError:  # Python refuses to write numbers of more than 4300 digits
        return f"a {type(value).__name__} of many digits"


def _fields_at(kind: type[Settings], place: Sequence[str]) -> list[str]:
    for name in place:
        annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            kind = annotation
    return list(kind.model_fields)
