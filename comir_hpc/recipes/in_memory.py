"""What a Python user has in memory, made into what the settings of a verb name: stores and files.

`Image` is a volume in memory. `workplace` lends a verb a folder: images become stores there, transforms become files,
results stand for what they wrote. Nothing heavy is loaded before it is needed, since `comir_hpc.api` imports this.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from comir_hpc.config.base import AnySettings, validate
from comir_hpc.errors import ComirError, ConfigError, RegistrationError, VolumeError
from comir_hpc.host.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import SimpleITK as sitk
    from numpy.typing import NDArray

    from comir_hpc.space.grid import Grid

AnyResult = TypeVar("AnyResult")

_log = logging.getLogger("comir_hpc")
_OPTION = re.compile(r"`[^`]*`|(?<![\w-])--([a-z][a-z-]*)")
_KEYWORDS = {
    "labels": 'kind="labels"',
    "volume": "volumes",
}  # options whose names differ from those of their settings
_TRANSFORMS = ("transform", "truth")  # settings that name a file of a transform
_MOST_COLOURS = 4  # channels that a last axis of colours has at most: red, green, blue, opacity


@dataclass(frozen=True, eq=False)
class Image:
    """A volume in memory: voxels, and where they lie.

    Parameters
    ----------
    array : array
        Voxels (z, y, x), or (c, z, y, x) of several channels, or (y, x) of a single slice.
    spacing_zyx : sequence of float
        Distance between voxel centres along z, y, x, in `unit`. Of a single slice y and x are enough: its thickness is
        then 1, and nothing is computed with it.
    unit : str
        Unit of `spacing_zyx` and `origin_xyz`: nm, um, mm, cm or m.
    origin_xyz : three float
        World position (LPS) of the centre of the first voxel, in `unit`.
    direction : 3 x 3 float
        Column j is the world direction in which index axis j of (x, y, z) grows, as in ITK.
    kind : {"image", "labels"}
        Kind of the values: those of labels are never averaged.
    name : str
        Name of the volume in messages and in the names of stores.

    Raises
    ------
    VolumeError, ConfigError
        If the array is no volume, or a number or the unit cannot be right.
    """

    array: NDArray[Any]
    spacing_zyx: Sequence[float]
    unit: str = "mm"
    origin_xyz: Sequence[float] = (0.0, 0.0, 0.0)
    direction: Sequence[Sequence[float]] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    kind: Literal["image", "labels"] = "image"
    name: str = "array"

    def __post_init__(self) -> None:
        import numpy as np

        array = np.asarray(self.array)
        if array.ndim == 2:
            array = array[None]
        _require_volume(array, self.name)
        spacing = _numbers(self.spacing_zyx, "spacing_zyx", self.name)
        if len(spacing) == 2 and array.shape[-3] == 1:
            spacing = (1.0, *spacing)
        origin = _numbers(self.origin_xyz, "origin_xyz", self.name)
        direction = _numbers(self.direction, "direction", self.name)
        if (len(spacing), len(origin), len(direction)) != (3, 3, 9):
            raise VolumeError(
                f"{self.name}: spacing_zyx has {len(spacing)} numbers, origin_xyz {len(origin)}, direction "
                f"{len(direction)}; expected 3, 3 and 3 x 3"
            )
        object.__setattr__(self, "origin_xyz", origin)
        object.__setattr__(self, "direction", (direction[:3], direction[3:6], direction[6:]))
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "spacing_zyx", spacing)
        with keyword_errors():
            _ = self.grid

    @cached_property
    def grid(self) -> Grid:
        """Grid of the image: where its voxels lie."""
        from comir_hpc.space.grid import Grid

        place: tuple[Any, Any, Any] = self.spacing_zyx, self.origin_xyz, self.direction
        return Grid(self.array.shape[-3:], *place, self.unit)

    @classmethod
    def from_sitk(cls, image: sitk.Image) -> Image:
        """Make an image of one of SimpleITK, whose world is LPS in mm; one of two dimensions becomes a slice."""
        import SimpleITK as sitk

        from comir_hpc.transforms.itk import array_and_grid

        array, grid = array_and_grid(sitk.JoinSeries(image) if image.GetDimension() == 2 else image)
        return cls.on_grid(array, grid, name="image")

    @classmethod
    def on_grid(
        cls, array: NDArray[Any], grid: Grid, kind: Literal["image", "labels"] = "image", name: str = "array"
    ) -> Image:
        """Make an image of voxels and their grid."""
        return cls(array, grid.spacing_zyx, grid.unit, grid.origin_xyz, grid.direction, kind, name)

    def to_sitk(self) -> sitk.Image:
        """Return a SimpleITK image of the same place, in mm."""
        from comir_hpc.transforms.itk import itk_image

        return itk_image(self.array, self.grid)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        import numpy as np

        return np.array(self.array, dtype) if copy else np.asarray(self.array, dtype)

    def _repr_html_(self) -> str:
        """Show size and middle slices in a notebook."""
        from comir_hpc.runs.html import table
        from comir_hpc.runs.volume_html import slices_html

        rows = {"grid": self.grid, "values": self.array.dtype, "kind": self.kind}
        return table(self.name, rows) + slices_html(self.array, self.grid)


class Workplace:
    """Where the stores, files and results of one call go.

    The verbs read and write files only, so volumes in memory become stores here.

    Parameters
    ----------
    verb : str
        Name of the verb, for errors.
    folder : Path
        Folder in which stores and files are written.
    temporary : bool
        Whether the folder goes when nobody needs it any more.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.
    """

    def __init__(self, verb: str, folder: Path, temporary: bool, progress: Progress | None) -> None:
        self.verb, self.folder, self.temporary, self.progress = verb, folder, temporary, progress
        self._images: dict[Path, Image] = {}

    def settings(
        self,
        kind: type[AnySettings],
        settings: dict[str, Any],
        make: Callable[[dict[str, Any]], AnySettings] | None = None,
        check: Callable[[AnySettings], None] | None = None,
        **named: Any,
    ) -> AnySettings:
        """Return the settings of a verb, with stores and files for what is in memory.

        All settings are checked before the first image is written.

        Parameters
        ----------
        kind : type
            Class of the verb's settings.
        settings, named : dict
            Settings by name; of `named`, None is one that is not given.
        make : callable, optional
            Makes settings of a record; `validate` when not given.
        check : callable, optional
            Refuses settings that cannot end well.
        """
        given = {**{name: value for name, value in named.items() if value is not None}, **settings}
        record = {name: self._located(value, name) for name, value in given.items()}
        found = make(record) if make else validate(kind, record, source=f"{self.verb}()")
        if check is not None:
            check(found)
        from comir_hpc.recipes.stores import with_stores

        self._write_images()
        return with_stores(found, self.folder, progress=self.progress, tell=tell)

    def store(self, volume: Any) -> Path:
        """Return the store of one volume, which is made where it is none."""
        from comir_hpc.recipes.stores import as_store

        path = Path(self._located(volume))
        self._write_images()
        return as_store(path, self.folder, progress=self.progress, tell=tell)

    def kept_for(self, result: AnyResult) -> AnyResult:
        """Keep a temporary folder as long as a result that needs it, and return the result."""
        if self.temporary:
            weakref.finalize(result, shutil.rmtree, self.folder, ignore_errors=True)
            self.temporary = False
        return result

    def _located(self, value: Any, name: str = "") -> Any:
        """Return paths for what is in memory, in dictionaries and lists too, and everything else as it is."""
        if name in _TRANSFORMS and (file := self._transform_file(value)) is not None:
            return file
        if in_memory(value):
            return self._store(as_image(value))
        if isinstance(value, dict):
            return {key: self._located(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(self._located(item) for item in value)
        if hasattr(value, "dtype") and hasattr(value, "tolist"):
            return _plain(value)
        paths = (getattr(value, at, None) for at in ("path", "folder", "run"))  # where results keep it
        return next((path for path in paths if isinstance(path, Path)), value)

    def _store(self, image: Image) -> Path:
        from comir_hpc.recipes.stores import store_of_array

        store = store_of_array(image.array, image.grid, self.folder, name=image.name, kind=image.kind)
        self._images[store] = image
        return store

    def _write_images(self) -> None:
        from comir_hpc.recipes.stores import array_as_store

        for store, image in self._images.items():
            array_as_store(image.array, image.grid, store, kind=image.kind, progress=self.progress, tell=tell)

    def _transform_file(self, value: Any) -> Path | None:
        """Return the file of a transform in memory or of a registration; None if the value is neither."""
        if hasattr(value, "result") and hasattr(value, "folder"):
            if value.transform is None:
                raise RegistrationError(f"{value.folder} holds no transform: the registration found none")
            return Path(value.folder) / str(value.result.transform_file)
        form = value.to_sitk() if hasattr(value, "to_sitk") else value
        if not _is_sitk(form, "Transform"):
            return None
        import SimpleITK as sitk

        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = ".tfm" if form.IsLinear() else ".h5"  # text of a field is three times as large
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=suffix, delete=False) as spare:
            sitk.WriteTransform(form, spare.name)
        # Named by its content: the same transform, given again, is the same file and gives the same fingerprint.
        content = hashlib.sha256(Path(spare.name).read_bytes()).hexdigest()
        return Path(spare.name).rename(self.folder / f"transform-{content[:8]}{suffix}")


@contextmanager
def workplace(
    verb: str, folder: str | Path | None, beside: Path | None, progress: Progress | None
) -> Iterator[Workplace]:
    """Lend a folder to one call: `folder`, or `beside` the output, or a temporary one that goes with the result.

    Errors name settings instead of options.
    """
    with keyword_errors():
        chosen = beside if folder is None else Path(folder)
        made = Path(tempfile.mkdtemp(prefix="comir-hpc-")) if chosen is None else chosen
        place = Workplace(verb, made.absolute(), chosen is None, progress)
        try:
            yield place
        finally:
            if place.temporary:
                shutil.rmtree(place.folder, ignore_errors=True)


@contextmanager
def keyword_errors() -> Iterator[None]:
    """Turn the options that an error names (``--fixed-modality``) into keywords; commands in backticks stay."""
    try:
        yield
    except ComirError as error:

        def keyword(found: re.Match[str]) -> str:
            return _KEYWORDS.get(found[1], found[1].replace("-", "_")) if found[1] else found[0]

        error.args = tuple(_OPTION.sub(keyword, a) if isinstance(a, str) else a for a in error.args)
        raise


def _require_volume(array: NDArray[Any], name: str) -> None:
    if array.ndim not in (3, 4) or array.size == 0:
        raise VolumeError(
            f"{name}: an array of shape {array.shape}; expected (z, y, x), (c, z, y, x), or (y, x) of a slice"
        )
    if array.ndim == 4 and array.shape[3] <= _MOST_COLOURS < array.shape[0]:
        raise VolumeError(
            f"{name}: an array of shape {array.shape} seems to have its channels last; expected (c, z, y, x): "
            "np.moveaxis(array, -1, 0)"
        )


def _numbers(values: Any, what: str, name: str) -> tuple[float, ...]:
    import numpy as np

    try:
        return tuple(np.asarray(values, dtype=np.float64).ravel().tolist())
    except (TypeError, ValueError) as error:
        raise VolumeError(f"{name}: {what} is {values!r:.80}; expected numbers") from error


def tell(note: str) -> None:
    """Show the user what was assumed of an input; a notebook shows what is logged as a warning."""
    _log.warning("%s", note)


def in_memory(value: Any) -> bool:
    """Return whether a value is a volume in memory: an `Image`, or one of SimpleITK."""
    return isinstance(value, Image) or _is_sitk(value, "Image")


def as_image(value: Image | sitk.Image) -> Image:
    """Return an `Image` as it is, and one of SimpleITK as an `Image`."""
    return value if isinstance(value, Image) else Image.from_sitk(value)


def _is_sitk(value: Any, kind: str) -> bool:
    """Return whether a value is of a class of SimpleITK, which is not loaded to find out."""
    return any(
        base.__module__.startswith("SimpleITK") and base.__name__ == kind for base in type(value).__mro__
    )


def _plain(value: NDArray[Any] | np.generic) -> Any:
    """Return numbers of numpy as those of Python; an array that could be a volume is refused."""
    if getattr(value, "ndim", 0) < 2:
        return value.tolist()
    raise ConfigError(
        f"an array of shape {value.shape} does not say how large its voxels are; give Image(array, spacing_zyx=(z, y, "
        "x)). Points are carried by the transform itself: transform.apply(points)"
    )
