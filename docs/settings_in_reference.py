"""Extension of griffe: `comir_hpc.api` and the settings are documented from the running code.

The signatures and docstrings of the functions are made from the settings when the module is imported, so a page made
from the source alone would not have them. A class of settings becomes one table.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from comir_hpc.recipes.documented import settings_doc

_MODULE = "comir_hpc.api"
_SETTINGS = "comir_hpc.config."


class FromRunningCode(griffe.Extension):
    """Replace what was read from the source by what Python knows."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Give one function its settings."""
        if func.parent is None or func.parent.path != _MODULE or func.docstring is None:
            return
        running = griffe.dynamic_import(func.path)
        func.docstring.value = inspect.getdoc(running) or ""
        func.parameters = griffe.Parameters(*map(_parameter, inspect.signature(running).parameters.values()))

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give one class of settings its table."""
        if cls.path.startswith(_SETTINGS) and cls.name.endswith("Settings") and cls.docstring is not None:
            cls.docstring.value = settings_doc(griffe.dynamic_import(cls.path))


def _parameter(found: inspect.Parameter) -> griffe.Parameter:
    named = found.annotation is not found.empty
    annotation = inspect.formatannotation(found.annotation).strip("'") if named else None
    default = None if found.default is found.empty else repr(found.default)
    kind = griffe.ParameterKind(found.kind.description)
    return griffe.Parameter(found.name, annotation=annotation, kind=kind, default=default)
