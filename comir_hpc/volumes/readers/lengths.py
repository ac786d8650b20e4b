"""Units of length as image formats name them, and the step from there to a unit that a `Grid` knows.

OME-Zarr takes its names from UDUNITS (``micrometer``), OME-XML has symbols (``µm``), ImageJ has words of its own
(``micron``). One table serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from comir_hpc.space.grid import MM_PER_UNIT

_MM_PER_PREFIXED_METER = {
    ("y", "yocto"): 1e-21, ("z", "zepto"): 1e-18, ("a", "atto"): 1e-15, ("f", "femto"): 1e-12, ("p", "pico"): 1e-9,
    ("n", "nano"): 1e-6, ("µ", "micro"): 1e-3, ("m", "milli"): 1.0, ("c", "centi"): 10.0, ("d", "deci"): 100.0,
    ("", ""): 1e3, ("da", "deca"): 1e4, ("h", "hecto"): 1e5, ("k", "kilo"): 1e6, ("M", "mega"): 1e9,
    ("G", "giga"): 1e12, ("T", "tera"): 1e15, ("P", "peta"): 1e18, ("E", "exa"): 1e21, ("Z", "zetta"): 1e24,
    ("Y", "yotta"): 1e27,
}  # fmt: skip
# Symbols keep their capitals: mm and Mm differ by nine orders of magnitude.
_MM_PER_SYMBOL = {
    **{f"{symbol}m": mm for (symbol, _), mm in _MM_PER_PREFIXED_METER.items()},
    "um": 1e-3, "Å": 1e-7, "in": 25.4, "ft": 304.8, "yd": 914.4, "mi": 1609344.0, "thou": 0.0254,
    "li": 25.4 / 12, "pt": 25.4 / 72, "ua": 1.495978707e14, "ly": 9.4607304725808e18, "pc": 3.0856776e19,
}  # fmt: skip
_MM_PER_WORD = {
    **{f"{word}meter": mm for (_, word), mm in _MM_PER_PREFIXED_METER.items()},
    "micron": 1e-3, "angstrom": 1e-7, "ångström": 1e-7, "inch": 25.4, "inche": 25.4, "foot": 304.8, "feet": 304.8,
    "yard": 914.4, "mile": 1609344.0, "parsec": 3.0856776e19,
}  # fmt: skip


def mm_of(name: object) -> float | None:
    """Return the millimetres in one unit of that name, or None where it is no unit of length that we know.

    Symbols (``µm``, ``Å``), words of UDUNITS (``micrometer``), the British spelling and plurals are known.
    """
    if not isinstance(name, str):
        return None
    # Two characters look like the micro sign and the Angstrom sign; ImageJ writes the first one escaped.
    text = name.strip().replace("μ", "µ").replace("\u212b", "Å")
    text = (
        text.replace("\\u00b5", "µ").replace("\\u00B5", "µ").replace("\\u00C5", "Å").replace("\\u00c5", "Å")
    )
    if text in _MM_PER_SYMBOL:
        return _MM_PER_SYMBOL[text]
    word = text.lower().replace("metre", "meter")
    found = _MM_PER_WORD.get(word)
    return _MM_PER_WORD.get(word.removesuffix("s")) if found is None else found


def grid_unit(name: str) -> str:
    """Return the unit of a `Grid` in which lengths of the known unit `name` are written.

    Its own where a `Grid` has it. Lengths below a nanometre become nanometres, those from a metre on metres; inches
    and the like become millimetres.
    """
    mm = mm_of(name)
    assert mm is not None
    same = [unit for unit, size in MM_PER_UNIT.items() if size == mm]
    if same:
        return same[0]
    return "nanometer" if mm < MM_PER_UNIT["nanometer"] else "meter" if mm >= 1e3 else "millimeter"


def in_one_unit(lengths: Sequence[float], units: Sequence[str], unit: str) -> tuple[float, ...]:
    """Convert lengths, each in a unit of its own, to the `Grid`'s unit `unit`.

    Where nothing is to be converted the numbers stay as they are; others are rounded to 12 digits, so that 500 nm
    are 0.5 um and not 0.49999999999999994.
    """
    converted = []
    for length, name in zip(lengths, units, strict=True):
        mm = mm_of(name)
        assert mm is not None
        ratio = mm / MM_PER_UNIT[unit]
        converted.append(length if ratio == 1 else float(f"{length * ratio:.12g}"))
    return tuple(converted)
