"""DICOM: the slices of one series as a volume, from a folder or from one file, read frame by frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.dicom.header import Frame, read_frames
from comir_hpc.volumes.readers.dicom.layout import RUNS, Pixels
from comir_hpc.volumes.readers.dicom.order import stacked
from comir_hpc.volumes.readers.dicom.pixels import INVERTED, FrameReader, is_plain, values_of
from comir_hpc.volumes.readers.source import Source, reading, storable

__all__ = ["dicom_file", "dicom_images", "dicom_series", "is_dicom"]

Series = dict[str, list[Frame]]
_SUFFIXES = (".dcm", ".dicom", ".ima")


def is_dicom(path: Path) -> bool:
    """Say whether a file has DICOM's mark, or a suffix that promises it."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    with reading(path, "file"), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def dicom_file(path: Path) -> Source:
    """Open one DICOM file: all frames of a multi-frame image, or one slice.

    Raises
    ------
    VolumeError
        If it holds no image, or its frames are no single stack.
    """
    frames = read_frames(path)
    if not frames:
        raise VolumeError(
            f"{path} is a DICOM file without an image (a report, or a list of files); name an image"
        )
    notes = ("one slice; name its folder to read the whole series",) if len(frames) == 1 else ()
    return _source(path, frames, notes)


def dicom_images(files: Sequence[Path]) -> Series:
    """Find the series among files that are DICOM: series UID -> its frames. Files without an image are left out.

    Raises
    ------
    VolumeError
        If a file is damaged.
    """
    series: Series = {}
    for file in files:
        for frame in read_frames(file):
            series.setdefault(frame.series, []).append(frame)
    return series


def dicom_series(path: Path, series: Series, dataset: str | None = None, notes: Sequence[str] = ()) -> Source:
    """Open one series of a DICOM folder.

    Parameters
    ----------
    series : dict
        One series, as `dicom_images` found it.
    dataset : str, optional
        Series UID, where the folder holds several. The longer names that GDCM makes of it are taken, too.
    notes : sequence of str
        Further sentences that the user should see.

    Raises
    ------
    VolumeError
        If there are several series, or the chosen one is no single even stack.
    """
    uid = _chosen(path, series, dataset)
    frames, others = series[uid], len(series) - 1
    if notes or others:
        what = ", ".join(filter(None, [frames[0].title, f"{len(frames)} slices"]))
        notes = (f"the DICOM series {uid} is read ({what})", *notes)
    if others:
        notes = (*notes, f"left out: {others} other DICOM series")
    return _source(path, frames, notes)


def _chosen(path: Path, series: Series, dataset: str | None) -> str:
    if dataset is None and len(series) == 1:
        return next(iter(series))
    if dataset is not None and (fitting := [uid for uid in series if uid and dataset.startswith(uid)]):
        # One UID may begin another one: the longest that fits is meant.
        return max(fitting, key=len)
    named = []
    for uid, frames in sorted(series.items()):
        files = len({f.pixels.file for f in frames})
        named.append(f"{uid} ({', '.join(filter(None, [frames[0].title, f'{files} files']))})")
    asked = f"--dataset {dataset} is none of them; " if dataset else ""
    more = "; ..." if len(named) > 8 else ""
    raise VolumeError(
        f"{path} holds {len(series)} DICOM series; {asked}name one with --dataset UID: {'; '.join(named[:8])}{more}"
    )


def _source(path: Path, frames: Sequence[Frame], notes: Sequence[str]) -> Source:
    stack = stacked(path, frames)
    frames, first = stack.frames, stack.frames[0]
    dtype, channels = values_of(frames)
    rows, columns, _ = first.pixels.shape
    if first.pixels.photometric == INVERTED and first.pixels.kind != "f":
        notes = (*notes, "MONOCHROME1 (small values are bright): its values are turned round, as ITK does")
    packed = [
        f.pixels for f in frames if f.pixels.frames > 1 and not (is_plain(f.pixels) or f.pixels.coder == RUNS)
    ]
    # Of a packed file with several frames, all are unpacked at once; the library and we hold them for a moment.
    unpacked = max((_unpacked_bytes(p, channels) for p in packed), default=0)
    plain = all(is_plain(f.pixels) for f in frames)
    name = path.resolve().name
    said = dict.fromkeys([*notes, *_frame_notes(frames), *stack.notes])
    return Source(
        path=path, kind="multi-frame DICOM" if first.pixels.frames > 1 else "DICOM",
        shape=(channels, len(frames), rows, columns), dtype=storable(dtype, path),
        read_box=FrameReader(frames, dtype, channels).read,
        files=tuple(dict.fromkeys(f.pixels.file for f in frames)),
        spacing_zyx=stack.spacing_zyx, unit="millimeter", origin_xyz=stack.origin_xyz, direction=stack.direction,
        load_bytes=unpacked, atom_zyx=(1, 1, 1) if plain else (1, rows, columns), says=stack.says,
        notes=tuple(f"{name}: {note}" for note in said),
    )  # fmt: skip


def _frame_notes(frames: Sequence[Frame]) -> Iterator[str]:
    """Yield the notes on the frames; what is not true of all names the first that it is true of."""
    told: dict[str, list[Frame]] = {}
    for frame in frames:
        for note in frame.notes:
            told.setdefault(note, []).append(frame)
    for note, those in told.items():
        others = f" and {len(those) - 1} others" if len(those) > 1 else ""
        yield note if len(those) == len(frames) else f"{those[0].name}{others}: {note}"


def _unpacked_bytes(pixels: Pixels, channels: int) -> int:
    frame = pixels.frame_bytes * max(1, channels // pixels.shape[2])
    return 2 * (pixels.frames * frame + pixels.file.stat().st_size)
