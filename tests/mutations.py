"""Seeded changes of bytes, of text and of JSON, for files that are nearly right."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

_VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 0.5, -2.5, 1e-30, 1e30, float("nan"), float("inf"), 255, 65536, 2**31 - 1, 2**40, -(2**31), None,
    True, "", "x", "0", "-3", "nan", "1e999", "2,5", "../..", "z", "µm", "furlong", "second", [], [1], [1, 2, 3], {},
    {"a": 1}, "y" * 3000,
)  # fmt: skip
_WORDS = (
    "0", "1", "-1", "7", "1e400", "nan", "inf", "2,5", "x", "", "3", "uint8", "mm", "nm", "XYCZT", "XYZTC", "furlong",
    "99999999999", "0x10", "٣", "\u00b5m", "true",
)  # fmt: skip


def broken(content: bytes, rng: random.Random, header: int = 600) -> tuple[bytes, str]:
    """Bytes with a few changed, lost or added, most of them in the header, or cut off."""
    kind, end = rng.random(), max(1, min(header, len(content)))
    if kind < 0.5:
        places = [rng.randrange(end) for _ in range(rng.choice([1, 1, 2, 4, 8]))]
        changed = bytearray(content)
        for place in places:
            changed[place] = rng.choice([0, 1, 255, 127, 128, 10, 32, rng.randrange(256)])
        return bytes(changed), f"bytes {places} changed"
    at = rng.randrange(len(content)) if kind < 0.75 else rng.randrange(end)
    if kind < 0.85:
        return content[:at], f"cut off at byte {at}"
    if kind < 0.93:
        return content[:at] + content[at + rng.randrange(1, 9) :], f"bytes lost at {at}"
    return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:], f"bytes added at {at}"


def reworded(text: str, rng: random.Random) -> tuple[str, str]:
    """Text with some numbers or words replaced, or a piece lost."""
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = list(re.finditer(r"-?\d[\d.]*|[A-Za-zµ]+", text))
        if not found:
            break
        match, word = rng.choice(found), rng.choice(_WORDS)
        if rng.random() < 0.12:
            start, stop = match.start(), min(len(text), match.start() + rng.randrange(1, 40))
            done.append(f"lost {text[start:stop]!r}")
            text = text[:start] + text[stop:]
        else:
            done.append(f"{text[max(0, match.start() - 18) : match.end()]!r} -> {word}")
            text = text[: match.start()] + word + text[match.end() :]
    return text, "; ".join(done)


def changed_json(entry: Any, rng: random.Random) -> tuple[Any, str]:
    """JSON with one to three of its entries replaced, lost, doubled or renamed."""
    entry, done = copy.deepcopy(entry), []
    for _ in range(rng.choice([1, 1, 2, 3])):
        holders = list(_holders(entry, ""))
        if not holders:
            break
        where, holder, key = rng.choice(holders)
        kind, value = rng.random(), rng.choice(_VALUES)
        if kind < 0.6:
            holder[key] = _near(holder[key], rng) if rng.random() < 0.5 else value
            done.append(f"{where} = {str(holder[key])[:40]}")
        elif kind < 0.8:
            del holder[key]
            done.append(f"{where} lost")
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
            done.append(f"{where} doubled")
        else:
            holder[str(value)[:20]] = holder.pop(key)
            done.append(f"{where} renamed {str(value)[:20]}")
    return entry, "; ".join(done)


def _near(value: Any, rng: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice(
            [value + 1, value - 1, -value, value * 1000, value / 1000, 0, value + 0.5, str(value)]
        )
    if isinstance(value, list):
        return rng.choice([value[::-1], value[:-1], [*value, 1], value + value])
    if isinstance(value, str):
        return rng.choice(
            [value.upper(), value + "s", value[:-1], value[::-1], "z", "t", "c", "scale", "space"]
        )
    return value


def _holders(entry: Any, where: str) -> Any:
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in items:
        yield f"{where}/{key}", entry, key
        yield from _holders(value, f"{where}/{key}")
