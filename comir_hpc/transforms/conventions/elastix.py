"""Parameter files of elastix (``TransformParameters.0.txt``): transforms of fixed points to moving points, LPS in mm.

A file holds one transform and may name another that is applied before it. `transformix` also takes the grid of its
result from the file, so that one is needed to write it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import Composite
from comir_hpc.transforms.itk import ItkTransform, from_itk, itk_lattice
from comir_hpc.transforms.protocol import PointMap

_NONE = "NoInitialTransform"
_LONGEST_CHAIN = 20
_PARAMETERS = {
    "AffineTransform": 12,
    "EulerTransform": 6,
    "SimilarityTransform": 7,
    "TranslationTransform": 3,
}
_SPLINES = ("BSplineTransform", "RecursiveBSplineTransform")
_FROM_ITK = ("File", "ExternalTransform")

Words = dict[str, list[str]]


def elastix_texts(parts: Sequence[PointMap], grid: Grid, names: Sequence[str]) -> list[str]:
    """Return the parameter files of a transform, one for each part, in the order in which they are applied.

    Parameters
    ----------
    parts : sequence of PointMap
        `Affine` transforms and cubic B-splines of ITK.
    grid : Grid
        Fixed grid, on which transformix makes its result.
    names : sequence of str
        Names of the files: each but the first names the one before.

    Raises
    ------
    RegistrationError
        If a part is of another kind; the message has its number and kind.
    """
    texts = []
    for number, part in enumerate(parts):
        before = names[number - 1] if number else _NONE
        texts.append("\n".join([*_lines_of(part, number, len(parts)), *_common(grid, before)]) + "\n")
    return texts


def read_elastix(path: Path, read_other: Callable[[Path], PointMap]) -> PointMap:
    """Read a parameter file and those that it names.

    Parameters
    ----------
    read_other : callable
        Reads a transform of ITK that a file names.

    Raises
    ------
    RegistrationError
        If a file is missing or damaged, or holds a transform of a kind that is not known here.
    """
    parts: list[PointMap] = []
    here: Path | None = path
    while here is not None:
        if len(parts) == _LONGEST_CHAIN:
            raise RegistrationError(
                f"{path}: its initial transforms go round in a circle, or there are more than 20"
            )
        words = _words(here)
        parts.insert(0, _transform(here, words, read_other))
        here = _before(here, words)
    return parts[0] if len(parts) == 1 else Composite(tuple(parts))


def _lines_of(part: PointMap, number: int, count: int) -> list[str]:
    """Return the lines of one part: its kind and its numbers."""
    if isinstance(part, Affine):
        itk = part.to_sitk()
        return [
            '(Transform "AffineTransform")',
            "(NumberOfParameters 12)",
            f"(TransformParameters {_text(itk.GetParameters())})",
            f"(CenterOfRotationPoint {_text(itk.GetCenter())})",
        ]
    whole = part.itk.Downcast() if isinstance(part, ItkTransform) else None
    if isinstance(whole, sitk.BSplineTransform) and whole.GetOrder() == 3:
        return _spline_lines(whole)
    kind = type(part).__name__ if whole is None else whole.GetName()
    where = f"part {number + 1} of {count} ({kind})" if count > 1 else f"the transform ({kind})"
    raise RegistrationError(
        f"{where} has no form in elastix's parameter files, which hold affine transforms and cubic B-splines; export "
        "it with --to itk"
    )


def _spline_lines(spline: sitk.BSplineTransform) -> list[str]:
    image = spline.GetCoefficientImages()[0]
    parameters = spline.GetParameters()
    return [
        '(Transform "BSplineTransform")',
        f"(NumberOfParameters {len(parameters)})",
        f"(TransformParameters {_text(parameters)})",
        f"(GridSize {' '.join(map(str, image.GetSize()))})",
        "(GridIndex 0 0 0)",
        f"(GridSpacing {_text(image.GetSpacing())})",
        f"(GridOrigin {_text(image.GetOrigin())})",
        f"(GridDirection {_text(_columns(image.GetDirection()))})",
        "(BSplineTransformSplineOrder 3)",
        '(UseCyclicTransform "false")',
    ]


def _common(grid: Grid, before: str) -> list[str]:
    """Return the lines that all files have: what comes before, the fixed grid, how values are found."""
    size, origin, spacing, direction = itk_lattice(grid)
    return [
        # elastix 5.2 calls it InitialTransformParameterFileName, and knows this name, too.
        f'(InitialTransformParametersFileName "{before}")',
        '(HowToCombineTransforms "Compose")',
        "(FixedImageDimension 3)",
        "(MovingImageDimension 3)",
        '(FixedInternalImagePixelType "float")',
        '(MovingInternalImagePixelType "float")',
        f"(Size {' '.join(map(str, size))})",
        "(Index 0 0 0)",
        f"(Spacing {_text(spacing)})",
        f"(Origin {_text(origin)})",
        f"(Direction {_text(_columns(direction))})",
        '(UseDirectionCosines "true")',
        '(ResampleInterpolator "FinalLinearInterpolator")',
        '(Resampler "DefaultResampler")',
        "(DefaultPixelValue 0)",
        '(ResultImageFormat "nii.gz")',
        '(ResultImagePixelType "float")',
    ]


def _columns(direction: Sequence[float]) -> list[float]:
    """Return a direction matrix column by column, as elastix writes it, from ITK's row by row; or the other way."""
    turned: list[float] = np.asarray(direction, dtype=np.float64).reshape(3, 3).T.ravel().tolist()
    return turned


def _text(numbers: Sequence[float]) -> str:
    return " ".join(repr(float(number)) for number in numbers)


def _words(path: Path) -> Words:
    """Read a parameter file: the values of each key, as text."""
    if not path.is_file():
        raise RegistrationError(
            f"{path} does not exist, which another parameter file of elastix names; put it there"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    words: Words = {}
    for line in text.splitlines():
        bare = line.partition("//")[0].strip()
        if bare.startswith("(") and bare.endswith(")"):
            try:
                key, *values = shlex.split(bare[1:-1])
            except ValueError as error:
                raise RegistrationError(
                    f"{path}: the line {bare[:60]!r} is damaged ({error}); copy it again"
                ) from error
            words[key] = values
    return words


def _numbers(path: Path, words: Words, key: str, count: int | None = None) -> list[float]:
    try:
        numbers = [float(word) for word in words.get(key, [])]
    except ValueError as error:
        raise RegistrationError(
            f"{path}: {key} holds no numbers ({str(error)[:60]}); expected numbers in text"
        ) from error
    if not numbers or (count is not None and len(numbers) != count) or not np.isfinite(numbers).all():
        wanted = "numbers" if count is None else f"{count} finite numbers"
        raise RegistrationError(
            f"{path}: {key} holds {len(numbers)} numbers; expected {wanted}: copy it again"
        )
    return numbers


def _before(path: Path, words: Words) -> Path | None:
    """Find the file that is applied before this one; a relative name counts from the file's own folder, too."""
    keys = ("InitialTransformParameterFileName", "InitialTransformParametersFileName")
    name = next((words[key][0] for key in keys if words.get(key)), _NONE)
    if name == _NONE:
        return None
    if words.get("HowToCombineTransforms", ["Compose"]) != ["Compose"]:
        raise RegistrationError(
            f"{path} adds its initial transform instead of composing it (HowToCombineTransforms); run elastix with "
            '(HowToCombineTransforms "Compose")'
        )
    # Results are moved from where elastix wrote them, with the absolute path in the file: the name beside it counts.
    beside = path.parent / Path(name).name
    return beside if beside.is_file() and beside != path else path.parent / name


def _transform(path: Path, words: Words, read_other: Callable[[Path], PointMap]) -> PointMap:
    kind = words.get("Transform", [""])[0]
    if words.get("UseDirectionCosines", ["true"]) == ["false"]:
        raise RegistrationError(
            f'{path} ignores where the volumes point to (UseDirectionCosines "false"), so its points are in no world; '
            'run elastix with (UseDirectionCosines "true")'
        )
    if kind in _FROM_ITK and words.get("TransformFileName"):
        return read_other(path.parent / words["TransformFileName"][0])
    if kind in _SPLINES:
        return ItkTransform(_spline(path, words))
    if kind not in _PARAMETERS:
        known = ", ".join((*_PARAMETERS, *_SPLINES))
        raise RegistrationError(
            f"{path} holds a {re.sub(r'[^ -~]', '?', kind)[:40] or 'nothing'} of elastix, of which {known} are read; "
            'run elastix with (WriteITKCompositeTransform "true") and give the .h5 that it writes'
        )
    parameters = _numbers(path, words, "TransformParameters", _PARAMETERS[kind])
    if kind == "TranslationTransform":
        return from_itk(sitk.TranslationTransform(3, parameters))
    centre = _numbers(path, words, "CenterOfRotationPoint", 3)
    linear = {
        "AffineTransform": lambda: sitk.AffineTransform(3),
        "EulerTransform": sitk.Euler3DTransform,
        "SimilarityTransform": sitk.Similarity3DTransform,
    }[kind]()
    linear.SetCenter(centre)
    if kind == "EulerTransform":
        # Before the parameters are set: the same three angles mean another rotation in the other order.
        linear.SetComputeZYX(words.get("ComputeZYX", ["false"]) == ["true"])
    linear.SetParameters(parameters)
    return from_itk(linear)


def _spline(path: Path, words: Words) -> sitk.BSplineTransform:
    order = words.get("BSplineTransformSplineOrder", ["3"])
    if words.get("UseCyclicTransform", ["false"]) == ["true"]:
        raise RegistrationError(
            f"{path} is a cyclic B-spline of elastix, which nothing else has; run elastix without"
        )
    if order not in (["1"], ["2"], ["3"]):
        raise RegistrationError(f"{path} is a B-spline of order {' '.join(order)[:20]}; expected 1, 2 or 3")
    size = [int(number) for number in _numbers(path, words, "GridSize", 3)]
    spacing, origin = (_numbers(path, words, key, 3) for key in ("GridSpacing", "GridOrigin"))
    direction = (
        _numbers(path, words, "GridDirection", 9) if "GridDirection" in words else np.eye(3).ravel().tolist()
    )
    first = _numbers(path, words, "GridIndex", 3) if "GridIndex" in words else [0.0, 0.0, 0.0]
    parameters = _numbers(path, words, "TransformParameters", 3 * int(np.prod(size)))
    turned = np.asarray(_columns(direction)).reshape(3, 3)
    # elastix counts the lattice from an index of its own, ITK's from zero.
    origin = (np.asarray(origin) + turned @ (np.asarray(first) * spacing)).tolist()
    images = []
    for values in np.asarray(parameters).reshape(3, *size[::-1]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(values))
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection(turned.ravel().tolist())
        images.append(image)
    return sitk.BSplineTransform(images, int(order[0]))
