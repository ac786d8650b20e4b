"""Functions whose signature and docstring name every setting of a verb: made from the settings, written nowhere twice.

`help(register)` and the tab completion of notebooks show what `comir_hpc.config` says of a setting.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from comir_hpc.config.base import Settings, fields_in_order

Function = TypeVar("Function", bound=Callable[..., Any])

_TEXTS = {
    "folder": "Where stores of volumes go that are none; see above.",
    "progress": "Called as ``progress(what, done, total)``.",
    "config": "YAML file of settings; those that are given here count more. All are keywords when not given.",
    "run": "Folder of the run; the training goes on if it holds a checkpoint. In `folder` when not given.",
    "overrides": "Settings of the file that are changed, e.g. ``optimiser.steps=500``.",
}


def documented(kind: type[Settings]) -> Callable[[Function], Function]:
    """Make signature and docstring of a verb name every setting, with its type, default and text."""

    def wrap(function: Function) -> Function:
        # In place of **settings, every setting stands by its name.
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {p.name for p in own}
        more = [p for p in _parameters(kind) if p.name not in named]
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*own, *more], return_annotation=inspect.signature(function).return_annotation
        )
        function.__doc__ = f"{inspect.getdoc(function)}\n\n{_section([*own, *more], kind)}"
        return function

    return wrap


def settings_doc(kind: type[Settings]) -> str:
    """Return the docstring of a class of settings with a section on every setting."""
    return f"{inspect.getdoc(kind)}\n\n{_section(_parameters(kind), kind)}"


def _section(parameters: Sequence[inspect.Parameter], kind: type[Settings]) -> str:
    lines = ["Parameters", "----------"]
    for parameter in parameters:
        lines += _described(parameter, kind)
    return "\n".join(lines)


def _parameters(kind: type[Settings]) -> list[inspect.Parameter]:
    """Return every setting as a keyword."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=_bare(field.annotation),
        )
        for name, field in fields_in_order(kind)
    ]


def _default(field: FieldInfo) -> Any:
    """Return the default of a setting; a group of settings has a default for each."""
    if field.is_required():
        return inspect.Parameter.empty
    return {} if field.default_factory else field.default


def _described(parameter: inspect.Parameter, kind: type[Settings]) -> list[str]:
    field = kind.model_fields.get(parameter.name)
    text = _TEXTS.get(parameter.name, "") if field is None else field.description
    if field is not None and text is None:
        offered = (
            field.annotation,
            *get_args(field.annotation),
        )  # a group that may be left out is one of two
        group = next(one for one in offered if isinstance(one, type) and issubclass(one, Settings))
        text = f"{group.__doc__} A dictionary of {', '.join(group.model_fields)}."
    made = field is not None and (field.is_required() or field.default_factory is not None)
    if parameter.name == "out" and made and parameter.default is None:
        text = f"{text} In `folder` when not given."
    default = "" if parameter.default is parameter.empty else f", default {parameter.default!r}"
    said = inspect.formatannotation(parameter.annotation).strip("'").replace("pathlib.", "")
    return [f"{parameter.name} : {said}{default}", f"    {' '.join((text or '').split())}"]


def _bare(annotation: Any) -> Any:
    """Return a type without what it says to pydantic and to the command line."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bare(inner[0])
    if origin in (Union, types.UnionType):
        return reduce(or_, map(_bare, inner))
    return types.GenericAlias(origin, tuple(map(_bare, inner))) if origin in (tuple, dict) else annotation
