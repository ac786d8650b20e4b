"""Settings as YAML text: read from a file, changed by `--set a.b=c`, written back resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comir_hpc.config.base import AnySettings, Settings, validate
from comir_hpc.errors import ConfigError

# What PyYAML lets through of text such as 2026-13-45, !!bool x, or ten thousand open brackets.
_NO_YAML = (ValueError, KeyError, AttributeError, TypeError, RecursionError)


def load(
    kind: type[AnySettings],
    path: Path,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> AnySettings:
    """Read settings from a YAML file; relative paths in it are relative to the file.

    Parameters
    ----------
    kind : type
        Class of the settings.
    path : Path
        YAML file.
    overrides : sequence of "a.b=value"
        Applied after the file; values are YAML.
    values : mapping, optional
        Settings by key, applied last.

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, a key is unknown, or a value or combination cannot work.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected a YAML file (examples are in configs/)")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); expected a YAML file") from error
    record = _parsed(text, f"{path} is not YAML", "mend it; examples are in configs/")
    if not isinstance(record, dict):
        raise ConfigError(f"{path} holds {type(record).__name__}, expected a mapping of settings")
    for override in overrides:
        _apply(record, override)
    return validate(kind, {**record, **(values or {})}, source=str(path), folder=path.parent)


def dump(settings: Settings) -> str:
    """Return YAML of the resolved settings; `load` reads it back."""
    import yaml

    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    return text


def _parsed(text: str, problem: str, remedy: str) -> Any:
    """Value of a YAML text.

    Raises
    ------
    ConfigError
        Beginning with `problem`, ending with `remedy`.
    """
    import yaml  # here, since the help of a verb needs none

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise ConfigError(f"{problem} ({error.problem}{line}); {remedy}") from error
    except (yaml.YAMLError, *_NO_YAML) as error:
        raise ConfigError(f"{problem} ({error!r:.200}); {remedy}") from error


def _apply(record: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, e.g. --set optimiser.steps=500")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if record.get(parent) is None:  # missing, or a group without any settings in it
            record[parent] = {}
        record = record[parent]
        if not isinstance(record, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a group of settings")
    record[last] = _parsed(
        value,
        f"--set {override}: the value is not YAML",
        "write numbers and words as they are and lists in brackets, e.g. --set 'sampling.patch=[32, 32, 32]'",
    )
