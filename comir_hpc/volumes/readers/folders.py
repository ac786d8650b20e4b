"""Find the one volume in a folder: a DICOM series, numbered slices, tiles, or a single file.

The rule: what was read is named, and so is what was left out. Two volumes in one folder are refused by name. Hidden
files and folders (a .zarr store among them) never count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.dicom import dicom_images, dicom_series, is_dicom
from comir_hpc.volumes.readers.numbering import left_out_note, listed, numbered_files, series_among
from comir_hpc.volumes.readers.picture_folder import picture_folder
from comir_hpc.volumes.readers.source import Source, reading
from comir_hpc.volumes.readers.stack import tiles
from comir_hpc.volumes.readers.tiff import SUFFIXES as TIFF_SUFFIXES
from comir_hpc.volumes.readers.tiff import tiff_folder

_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_OWN_FOLDER = "put one of them in a folder of its own (links will do), or name its file"


def folder(
    path: Path,
    dataset: str | None,
    *,
    opened: Callable[[Path, str | None], Source],
    suffix_of: Callable[[Path], str | None],
    formats: str,
) -> Source:
    """Open the volume in a folder that is no zarr store.

    Parameters
    ----------
    opened : callable
        Function that opens one file and returns its source.
    suffix_of : callable
        Suffix of a file whose format is known by its name, or None.
    formats : str
        Formats that can be opened, in words, for errors.

    Raises
    ------
    VolumeError
        If there is no volume, or more than one.
    """
    with reading(path, "folder"):
        # Hidden files are those of file managers (.DS_Store, ._slice.tif), never slices.
        files = sorted(f for f in path.iterdir() if not f.name.startswith(".") and f.is_file())
    kinds = _kinds(files, suffix_of)
    images = {f for of_kind in kinds.values() for f in of_kind}
    # DICOM files mostly have no suffix: each file whose name says nothing is opened and asked.
    marked = [f for f in files if f not in images and suffix_of(f) is None and is_dicom(f)]
    if marked and (series := dicom_images(marked)):
        _refuse_rivals(path, {"DICOM": marked, **{k: f for k, f in kinds.items() if series_among(f)}})
        shown = {f.pixels.file for frames in series.values() for f in frames}
        strangers = [f for f in files if f not in shown]
        return dicom_series(path, series, dataset, left_out_note(strangers))
    if not kinds:
        _refuse_empty(path, formats)
    kind = _main_kind(path, kinds)
    chosen = kinds[kind]
    strangers = [f for f in files if f not in chosen]
    return _of_kind(path, kind, chosen, strangers, dataset, opened)


def _of_kind(
    path: Path,
    kind: str,
    files: Sequence[Path],
    strangers: Sequence[Path],
    dataset: str | None,
    opened: Callable[[Path, str | None], Source],
) -> Source:
    # One picture is a series of one slice. Any other file may be a whole volume.
    if len(files) == 1 and kind not in _PICTURES.values():
        return _single(path, opened(files[0], dataset), strangers)
    if kind == "TIFF" or kind in _PICTURES.values():
        found = numbered_files(path, files)
        found = replace(found, left_out=(*found.left_out, *strangers))
        # None: every TIFF holds several pages, so these are tiles and not slices.
        slices = picture_folder(path, found) if kind != "TIFF" else tiff_folder(path, found)
        if slices is not None:
            if dataset is not None:
                raise VolumeError(f"{path} holds one volume: leave --dataset {dataset} out")
            return slices
    return tiles(path, files, lambda file: opened(file, dataset), strangers)


def _kinds(files: Sequence[Path], suffix_of: Callable[[Path], str | None]) -> dict[str, list[Path]]:
    """Group image files by their format."""
    kinds: dict[str, list[Path]] = {}
    names = {f.name.lower() for f in files}
    for file in files:
        suffix = suffix_of(file)
        if suffix is None or _header_of(file, suffix) in names:
            continue
        kinds.setdefault("TIFF" if suffix in TIFF_SUFFIXES else _PICTURES.get(suffix, suffix), []).append(
            file
        )
    return kinds


def _header_of(file: Path, suffix: str) -> str:
    """Return the name of the header whose voxels a file holds, or an empty text.

    Such a pair is one volume (Analyze, NIfTI).
    """
    name = file.name.lower()
    return name.removesuffix(suffix) + suffix.replace("img", "hdr") if suffix.startswith(".img") else ""


def _main_kind(path: Path, kinds: dict[str, list[Path]]) -> str:
    """Return the format that the volume has: that of the series; else the only one, pictures apart."""
    rivals = {kind: files for kind, files in kinds.items() if series_among(files)}
    if len(rivals) == 1:
        return next(iter(rivals))
    _refuse_rivals(path, rivals)
    # Pictures beside volumes are taken for previews.
    volumes = [kind for kind in kinds if kind not in _PICTURES.values()] or list(kinds)
    if len(volumes) == 1:
        return volumes[0]
    named = listed([f for kind in volumes for f in kinds[kind]])
    raise VolumeError(
        f"{path} holds {named}: neither slices of one series nor tiles of one format; {_OWN_FOLDER}"
    )


def _refuse_rivals(path: Path, rivals: dict[str, list[Path]]) -> None:
    if len(rivals) > 1:
        named = "; ".join(f"{kind}: {listed(files)}" for kind, files in rivals.items())
        raise VolumeError(f"{path} holds {len(rivals)} volumes ({named}); {_OWN_FOLDER}")


def _refuse_empty(path: Path, formats: str) -> None:
    folders = sorted(f.name for f in path.iterdir() if f.is_dir())[:8]
    inside = f"; its folders are {', '.join(folders)}" if folders else ""
    raise VolumeError(
        f"{path} holds neither DICOM nor TIFF slices nor tiles of one format, and is no zarr store{inside}; "
        f"expected {formats}"
    )


def _single(path: Path, source: Source, strangers: Sequence[Path]) -> Source:
    beside = {f.resolve() for f in source.files}
    notes: tuple[str, ...] = (f"{source.path.name} is read, the only volume in it",)
    notes += left_out_note([f for f in strangers if f.resolve() not in beside])
    name = path.resolve().name
    return replace(source, path=path, notes=(*source.notes, *(f"{name}: {note}" for note in notes)))
