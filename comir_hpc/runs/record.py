"""A JSON file with a type and a format version: how it is read, how it is refused, how it is written.

A file without a version is one of the time before there was a version; it is read as format 0. A newer minor version
may add keys: they are kept on reading and written back. A format that this version does not know is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from comir_hpc.errors import ComirError
from comir_hpc.host.files import write_text

FORMAT = 1
"""Version of the files that are written, and the newest that is read."""

_MOST_BYTES = 64 * 2**20  # size of a JSON file; the largest of ours has a few hundred KiB
_SHOWN = 60  # characters of a value that an error quotes
_WORDS = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "an object",
    "model_type": "an object",
    "tuple_type": "a list",
    "list_type": "a list",
}


class Record(BaseModel):
    """Content of a file, or a part of it.

    Keys are checked strictly: a number in quotes is text. Keys that are not known are kept.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", protected_namespaces=())

    def as_dict(self) -> dict[str, Any]:
        """Give the JSON content: the keys that were set, known and unknown; None for numbers that are not finite."""
        content: dict[str, Any] = json.loads(self.model_dump_json(exclude_unset=True))
        return content


R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R], refusal: type[ComirError], remedy: str) -> R:
    """Read a JSON file as a record.

    Parameters
    ----------
    path : Path
        Path of the file.
    kind : type
        Class that the file's content has to match.
    refusal : type
        Class of the error that is raised where it does not.
    remedy : str
        Advice on what the user can do about a damaged file; it ends the message.

    Raises
    ------
    ComirError
        If the file cannot be read, is no JSON object, has a newer format, or a key that is missing or of another type;
        of the class `refusal`, in one line.
    """
    text = _read_text(path, refusal, remedy)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path} is damaged ({brief(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise refusal(f"{path} is damaged: it holds {_shown(content)}, expected an object; {remedy}")
    # Before the keys are checked: of a newer format they may mean something else, and the advice is another one.
    _require_known_format(path, content.get("format", 0), refusal, remedy)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise refusal(f"{path}: {_first(error)}; {remedy}") from error


def is_newer(path: Path) -> bool:
    """Say whether a file has a format that this version does not know; False where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    found = content.get("format") if isinstance(content, dict) else None
    return isinstance(found, int) and found > FORMAT


def make_record(kind: type[R], content: dict[str, Any]) -> R:
    """Check the content of a record that is going to be written.

    Parameters
    ----------
    kind : type
        Class that the value has to match.
    content : dict
        JSON-ready; numbers that are not finite become None.

    Raises
    ------
    pydantic.ValidationError
        If a value is of another type: a mistake of the caller.
    """
    # By way of JSON: checked as strictly as a reader will check the file, in which a tuple is a list.
    return kind.model_validate_json(json.dumps({"format": FORMAT, **content}))


def write_record(path: Path, record: Record, *, durable: bool = False) -> None:
    """Write a record whole or not at all, with the present format version in front.

    Raises
    ------
    OSError
        If the file system refuses, e.g. because the disk is full.
    """
    write_text(path, as_json(record), durable=durable)


def as_json(record: Record) -> str:
    """Give the text of the file that `write_record` writes."""
    content = {key: value for key, value in record.as_dict().items() if key != "format"}
    return json.dumps({"format": FORMAT, **content}, indent=2, allow_nan=False) + "\n"


def brief(error: BaseException | str, limit: int = 160) -> str:
    """Give the first line of a message, cut at a number of characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= limit else lines[0][: limit - 3] + "..."


def _read_text(path: Path, refusal: type[ComirError], remedy: str) -> str:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise refusal(
                f"{path} has {size} bytes, expected less than {_MOST_BYTES}: it is not ours; {remedy}"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise refusal(f"{path} is damaged (not text: {error.reason}); {remedy}") from error


def _require_known_format(path: Path, found: object, refusal: type[ComirError], remedy: str) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise refusal(f"{path}: format is {_shown(found)}, expected a whole number; {remedy}")
    if found > FORMAT:
        raise refusal(
            f"{path} was written by a newer comir-hpc (format {found}; this one reads up to {FORMAT}): upgrade"
        )


def _first(error: ValidationError) -> str:
    """Say what is wrong with the first key, and how many others are."""
    problems = error.errors(include_url=False)
    # By place: a union reports one problem for each of its types.
    others = len({problem["loc"] for problem in problems}) - 1
    return _in_words(problems[0]) + (f" (and {others} more)" if others else "")


def _in_words(problem: ErrorDetails) -> str:
    key = brief(".".join(str(part) for part in problem["loc"]), _SHOWN)
    if problem["type"] == "missing":
        return f"{key} is missing"
    expected = _WORDS.get(problem["type"])
    if problem["type"] == "literal_error":
        expected = problem["ctx"]["expected"]
    if expected is None:
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = brief(message[:1].lower() + message[1:])
    return f"{key} is {_shown(problem['input'])}, expected {expected}"


def _shown(value: object) -> str:
    """Quote a value, shortened, with its type in words."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {json.dumps(brief(value, _SHOWN))}"
    return brief(json.dumps(value, default=str), _SHOWN)
