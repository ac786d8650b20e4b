"""Inputs that real people met, through the command line, held against what is right.

    python benchmarks/reliability/cases.py CASES --out benchmarks/reliability/cases.csv

CASES is a folder of small files, each made after a public bug report of another tool. A row says what was typed, what
is right, what happens now, and whether that is right: of a volume that is read, its shape, spacing, origin, direction
and some voxels are compared with what is written here, or with a reference reader; of a refusal, that it is one line
that says why. Ends with 1 if a row is wrong. `--register` adds the registrations, which take minutes.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
import tifffile
import zarr

from comir_hpc.volumes.volume import Volume

EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
FLIPPED = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))
Row = tuple[str, str, str, bool]


@dataclass(frozen=True)
class Bench:
    """The cases, copied to where they may be written, and a folder for outputs."""

    cases: Path
    out: Path

    def typed(self, line: str) -> tuple[int, str]:
        """Exit code and words of one command."""
        words = [str(self.out.parent / w) if w.startswith(("c/", "o/")) else w for w in line.split()]
        done = subprocess.run(
            [sys.executable, "-m", "comir_hpc", *words], capture_output=True, text=True, check=False
        )
        text = (done.stdout + done.stderr).replace(f"{self.out.parent}/", "")
        return done.returncode, text


@dataclass(frozen=True)
class Read:
    """A row whose input is to be read: where it lies, and its voxels."""

    line: str
    right: str
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    direction: tuple[tuple[float, ...], ...] = EYE
    says: str = ""
    voxels: Callable[[Path], np.ndarray] | None = None
    unit: str = "millimeter"

    def row(self, bench: Bench) -> Row:
        """What happened, and whether it is right."""
        code, text = bench.typed(self.line)
        if code:
            return self.line, self.right, _short(text), False
        volume = Volume.open(bench.out.parent / self.line.split()[2])
        grid, values = volume.grid, volume.read()
        now = f"{values.shape} {values.dtype} {grid} origin {_numbers(grid.origin_xyz)}"
        right = np.allclose(grid.spacing_zyx, self.spacing) and grid.unit == self.unit
        right &= np.allclose(grid.origin_xyz, self.origin, atol=0.02)
        right &= np.allclose(grid.direction, self.direction, atol=1e-3)
        if self.voxels is not None:
            truth = self.voxels(bench.cases)
            truth = truth[None] if truth.ndim == 3 else truth
            right &= truth.shape == values.shape and np.allclose(truth, values, rtol=1e-6)
            now += ", every voxel compared"
        if self.says:
            right &= self.says in " ".join(text.split())
            now += f", note: {self.says}"
        return self.line, self.right, now, bool(right)


@dataclass(frozen=True)
class Refused:
    """A row whose input is to be refused in one line that has some words."""

    line: str
    right: str
    words: tuple[str, ...]

    def row(self, bench: Bench) -> Row:
        """What happened, and whether it is right."""
        code, text = bench.typed(self.line)
        short = _short(text)
        right = code == 1 and "Traceback" not in text and all(w in " ".join(text.split()) for w in self.words)
        return self.line, self.right, f"refused: {short}" if code else "done", right and len(short) < 600


def _short(text: str) -> str:
    return " ".join(" ".join(text.split())[-590:].split())


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:g}" for v in values)


# ---------------------------------------------------------------------- reference readers


def _slices(name: str) -> Callable[[Path], np.ndarray]:
    """Slices of a folder by pydicom, from the lowest to the highest, each times its slope."""

    def voxels(cases: Path) -> np.ndarray:
        files = [pydicom.dcmread(f) for f in sorted((cases / name).glob("*.dcm"))]
        files.sort(key=lambda f: (f.get("ImagePositionPatient") or (0, 0, f.InstanceNumber))[2])
        planes = [
            f.pixel_array * float(f.get("RescaleSlope", 1)) + float(f.get("RescaleIntercept", 0))
            for f in files
        ]
        return np.stack(planes).astype(np.float32)

    return voxels


def _frames(name: str) -> Callable[[Path], np.ndarray]:
    """Frames of an enhanced file by pydicom, from the lowest to the highest."""

    def voxels(cases: Path) -> np.ndarray:
        file = pydicom.dcmread(cases / name)
        groups = file.PerFrameFunctionalGroupsSequence
        heights = [float(g.PlanePositionSequence[0].ImagePositionPatient[2]) for g in groups]
        return file.pixel_array[np.argsort(heights)]

    return voxels


def _nifti(name: str) -> Callable[[Path], np.ndarray]:
    return lambda cases: np.asarray(nibabel.load(cases / name).dataobj).transpose(2, 1, 0)


def _tiff(name: str) -> Callable[[Path], np.ndarray]:
    return lambda cases: tifffile.imread(cases / name, is_ome=False, key=range(6))


def _zarr(name: str) -> Callable[[Path], np.ndarray]:
    def voxels(cases: Path) -> np.ndarray:
        array = np.asarray(zarr.open(str(cases / name), mode="r"))
        return array.reshape(-1, *array.shape[-3:])

    return voxels


def _mono(cases: Path) -> np.ndarray:
    return 65535 - _slices("mono1")(cases)


def _scaled_mean(cases: Path) -> np.ndarray:
    """Level 1 of the brain: means over 2 x 2 x 2."""
    values = np.asarray(nibabel.load(cases / "rf.nii.gz").dataobj).transpose(2, 1, 0).astype(float)
    z, y, x = (n // 2 for n in values.shape)
    return np.rint(values.reshape(z, 2, y, 2, x, 2).mean((1, 3, 5)))


def _hdf5(name: str, order: str) -> Callable[[Path], np.ndarray]:
    import h5py

    def voxels(cases: Path) -> np.ndarray:
        with h5py.File(cases / name) as file:
            found: list[np.ndarray] = []
            file.visititems(lambda _, node: found.append(node[()]) if hasattr(node, "dtype") else None)
        array = found[0] if "t" not in order else found[0][0]
        return array.transpose([order.replace("t", "").index(a) for a in "czyx" if a in order])

    return voxels


UM = "--spacing 2 1 1 --unit um"
ENHANCED = ((3.0, 1.5, 1.0), (5.0, 6.0, 7.0))
INPUTS: tuple[Read | Refused, ...] = (
    Read("ingest c/ok.nii o/o.zarr", "read", (2, 2, 2), (10, 11, -12), FLIPPED, voxels=_nifti("ok.nii")),
    Refused("ingest o/o.zarr o/o.zarr --overwrite", "refused before anything is touched", ("is the input",)),
    Read("ingest c/rf.nii.gz o/l.zarr", "read", (2, 2, 2), (95.5, 131.5, -77.5), FLIPPED, voxels=_nifti("rf.nii.gz")),
    Read("ingest o/l.zarr o/l1.zarr --dataset 1", "the grid of level 1", (4, 4, 4), (94.5, 130.5, -76.5), FLIPPED),
    Read("ingest o/l.zarr/1 o/l1b.zarr", "the grid of level 1", (4, 4, 4), (94.5, 130.5, -76.5), FLIPPED),
    Read("ingest c/enh/a.dcm o/enhf.zarr", "read", *ENHANCED, voxels=_frames("enh/a.dcm")),
    Read("ingest c/enh o/enh.zarr", "read", *ENHANCED, voxels=_frames("enh/a.dcm")),
    Read("ingest c/enh_rev o/rev.zarr", "the same world", *ENHANCED, voxels=_frames("enh_rev/a.dcm")),
    Read("ingest c/enh_inter o/inter.zarr", "sorted by position", *ENHANCED, voxels=_frames("enh_inter/a.dcm")),
    Read("ingest c/enh_iso1 o/iso.zarr", "1 x 1 x 1 mm", (1, 1, 1), (5, 6, 7), voxels=_frames("enh_iso1/a.dcm")),
    Read("ingest c/pet o/pet.zarr", "slice times its own slope", (3, 1.5, 1), voxels=_slices("pet")),
    Read("ingest c/suv o/suv.zarr", "slice times its own slope", (3, 1.5, 1), voxels=_slices("suv")),
    Refused("ingest c/dyn o/dyn.zarr", "several time points", ("2 time points",)),
    Read("ingest c/noipp o/noipp.zarr --spacing 3 1.5 1 --unit mm", "in the order of InstanceNumber, with a note",
         (3, 1.5, 1), says="in the order of InstanceNumber", voxels=_slices("noipp")),
    Read("ingest c/mono1 o/mono1.zarr", "as ITK, with a note", (3, 1.5, 1), says="MONOCHROME1", voxels=_mono),
    Read("ingest c/dcmstray o/stray.zarr", "the series", *ENHANCED, says="left out: preview.tif",
         voxels=_slices("dcmstray")),
    Read("ingest c/neg.mhd o/neg.zarr", "spacing 3, direction z -1", (3, 2, 1), (-5, 6, 7), (*EYE[:2], (0, 0, -1)),
         says="turned round", voxels=lambda cases: sitk.GetArrayFromImage(sitk.ReadImage(str(cases / "neg.mhd")))),
    Read("ingest c/pix1.nii o/pix1.zarr", ".5 x .5 x 2 with a note", (2, 0.5, 0.5), (5, 6, -7), FLIPPED,
         says="pixdim", voxels=_nifti("pix1.nii")),
    Read("ingest c/shear_q.nii o/shear.zarr", "qform, and the note says qform", (2, 2, 2), (0, 0, 0), FLIPPED,
         says="the qform is used", voxels=_nifti("shear_q.nii")),
    Read("ingest c/sh0.0005.nii o/sh.zarr", "nearest orthonormal, note with the displacement", (2, 2, 2),
         (10, 11, -12), FLIPPED, says="voxels", voxels=_nifti("sh0.0005.nii")),
    Read("ingest c/n2.nii o/n2.zarr", "read", (2, 2, 2), (10, 11, -12), FLIPPED, voxels=_nifti("n2.nii")),
    Read("ingest c/neg.nii o/negn.zarr", "2 x 2 x 2, y direction +1", (2, 2, 2), (10, -20, -12),
         ((-1, 0, 0), (0, 1, 0), (0, 0, 1)), voxels=_nifti("neg.nii")),
    Read("ingest c/unitjunk.nii o/uj.zarr", "mm with a note", (2, 2, 2), (10, 11, -12), FLIPPED, says="millimetres",
         voxels=_nifti("unitjunk.nii")),
    Read("ingest c/ijz.tif o/ijz.zarr", "25 x 16.5 x 16.5 nm", (25, 16.5, 16.5), unit="nanometer",
         voxels=_tiff("ijz.tif")),
    Read(f"ingest c/ilx.h5 o/ilx.zarr {UM}", "6 x 20 x 24 (z, y, x)", (2, 1, 1), unit="micrometer",
         voxels=_hdf5("ilx.h5", "xyz")),
    Read(f"ingest c/il.h5 o/il.zarr {UM}", "z 6, c 2", (2, 1, 1), unit="micrometer", voxels=_hdf5("il.h5", "tzyxc")),
    Read(f"ingest c/bad.ome.tif o/bad.zarr {UM}", "the pixels", (2, 1, 1), unit="micrometer", says="XML",
         voxels=_tiff("bad.ome.tif")),
    Refused("ingest c/bad.ome.tif o/bad2.zarr", "one line", ("no voxel spacing",)),
    Read("ingest c/comma.ome.tif o/comma.zarr --spacing 2.25 .5 .5 --unit um", "read with the given spacing",
         (2.25, 0.5, 0.5), unit="micrometer", voxels=_tiff("comma.ome.tif")),
    Read("ingest c/mix.zarr o/mix.zarr", "2 x .5 x .5 um", (2, 0.5, 0.5), unit="micrometer",
         voxels=_zarr("mix.zarr/0")),
    Read(f"ingest c/o2.zarr o/o2.zarr {UM}", "t, c, z, y, x by the old standard", (2, 1, 1), unit="micrometer",
         voxels=_zarr("o2.zarr/0")),
    Read(f"ingest c/o3.zarr o/o3.zarr {UM}", "t, c, z, y, x by the old standard", (2, 1, 1), unit="micrometer",
         voxels=_zarr("o3.zarr/0")),
    Read("ingest c/angstrom.zarr o/angstrom.zarr", "13.48 angstrom = 1.348 nm", (1.348,) * 3, unit="nanometer",
         voxels=_zarr("mix.zarr/0")),
    Read("ingest c/b2r.zarr o/b2r.zarr", "image 0", (2, 0.5, 0.5), unit="micrometer", voxels=_zarr("b2r.zarr/0/0")),
    Refused("ingest c/anat o/anat.zarr", "refused: both lie at one place", ("T1w", "T2w", "one place")),
    Read("ingest c/slabs o/slabs.zarr", "put where their origins say", (2, 1, 1), says="where their origins say"),
    Refused(f"ingest c/chan o/chan.zarr {UM}", "refused: two channels", ("channels",)),
    Refused(f"ingest c/gap o/gap.zarr {UM}", "refused: slice 003 is missing", ("img_003.tif missing",)),
    Read(f"ingest c/proj o/proj.zarr {UM}", "the slices, the projection left out by name", (2, 1, 1),
         unit="micrometer", says="left out: MAX_rec.tif, rec_spr.tif"),
    Refused("ingest c/here c/here/stack.zarr --spacing 1 1 1 --unit um", "refused at once", ("lies inside the input",)),
    Refused("warp --zarr c/ok.nii --like c/ok.nii --transform c/fsl.mat --out o/fsl.zarr", "refused by what it is",
            ("a matrix in text", "--from", "fsl")),
    Refused("warp --zarr c/ok.nii --like c/ok.nii --transform c/a.lta --out o/lta.zarr", "refused by what it is",
            ("LTA file without a matrix",)),
    Refused("warp --zarr c/ok.nii --like c/ok.nii --transform c/elastix.txt --out o/elx.zarr", "refused by what it is",
            ("elastix",)),
    Read("ingest c/m.mgz o/mgz.zarr", "read", (2, 2, 2), (10, 11, -12), FLIPPED, voxels=_nifti("ok.nii")),
    Read("ingest c/pair.img o/pair.zarr", "read", (2, 2, 2), (10, 11, -12), FLIPPED, voxels=_nifti("ok.nii")),
    Read("ingest c/CAPITAL.MHA o/capital.zarr", "read", (2, 2, 2), (10, 11, -12), FLIPPED, voxels=_nifti("ok.nii")),
    Read(f"ingest c/png o/png.zarr {UM}", "read", (2, 1, 1), unit="micrometer"),
)  # fmt: skip


def prepare(cases: Path) -> None:
    """Make the inputs that the table names and the folder does not hold."""
    shutil.copytree(cases / "mix.zarr", cases / "angstrom.zarr")
    entry = json.loads((cases / "angstrom.zarr" / ".zattrs").read_bytes())
    image = entry["multiscales"][0]
    image["axes"] = [{"name": a, "type": "space", "unit": "angstrom"} for a in "zyx"]
    image["datasets"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [13.48] * 3}]
    image.pop("coordinateTransformations", None)
    (cases / "angstrom.zarr" / ".zattrs").write_text(json.dumps(entry), encoding="utf-8")
    image = nibabel.load(cases / "ok.nii")
    values = np.asarray(image.dataobj)
    nibabel.save(nibabel.MGHImage(values, image.affine), cases / "m.mgz")
    nibabel.save(nibabel.Nifti1Pair(values, image.affine), cases / "pair.img")
    sitk.WriteImage(sitk.ReadImage(str(cases / "ok.nii")), str(cases / "capital.mha"))
    (cases / "capital.mha").rename(cases / "CAPITAL.MHA")
    (cases / "png").mkdir()
    for n in range(5):
        plane = sitk.GetImageFromArray(np.full((6, 7), n, np.uint8))
        sitk.WriteImage(plane, str(cases / "png" / f"s{n}.png"))
    (cases / "a.lta").write_text(
        "type      = 1\nnxforms   = 1\nmean      = 0.0 0.0 0.0\nsigma = 1.0\n1 4 4\n", "utf-8"
    )
    (cases / "elastix.txt").write_text('(Transform "EulerTransform")\n(NumberOfParameters 6)\n', "utf-8")


# ---------------------------------------------------------------------- what is written


def points(bench: Bench) -> Iterator[Row]:
    """Tables of points, carried by a shift of 10, 20, 30 mm."""
    for name, right, truth in (
        ("ml.csv", "2 points", [[11, 22, 33], [14, 25, 36]]),
        ("hash.csv", "3 points", [[11, 22, 33], [14, 25, 36], [17, 28, 39]]),
        ("ras.csv", "(9, 18, 33)", [[9, 18, 33]]),
        ("F.fcsv", "(9, 18, 33)", [[9, 18, 33]]),
    ):
        line = f"warp --points c/{name} --transform c/t.tfm --out o/{Path(name).stem}.csv"
        code, text = bench.typed(line)
        found: list[list[float]] = []
        if not code:
            with (bench.out / f"{Path(name).stem}.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(line for line in file if not line.startswith("# ")))
            found = [[float(v) for v in row[:3]] for row in rows[1:]]
        yield line, right, str(found) if not code else _short(text), found == truth


def formats(bench: Bench) -> Iterator[Row]:
    """`warp --out` in other formats: the file as SimpleITK or tifffile reads it."""
    truth = sitk.ReadImage(str(bench.cases / "ok.nii"))
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        line = f"warp --zarr c/ok.nii --like c/ok.nii --transform c/id.tfm --out o/w{suffix}"
        code, text = bench.typed(line)
        same, now = False, _short(text)
        if not code:
            found = sitk.ReadImage(str(bench.out / f"w{suffix}"))
            same = all(np.allclose(getattr(found, f"Get{k}")(), getattr(truth, f"Get{k}")(), atol=1e-5)
                       for k in ("Size", "Spacing", "Origin", "Direction"))  # fmt: skip
            same &= np.array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(truth))
            now = f"{found.GetSize()} {found.GetPixelIDTypeAsString()}, every voxel compared"
        yield line, "that format", now, same
    float_like = sitk.Cast(truth, sitk.sitkFloat32)
    sitk.WriteImage(float_like, str(bench.cases / "float.nii"))
    line = "warp --zarr c/float.nii --like c/float.nii --transform c/id.tfm --out o/w.tif"
    code, text = bench.typed(line)
    same = not code and np.array_equal(
        tifffile.imread(bench.out / "w.tif"), sitk.GetArrayFromImage(float_like)
    )
    yield line, "that format", _short(text), bool(same)


def same_names(bench: Bench) -> Iterator[Row]:
    """Two inputs of one name in different folders; labels beyond 2^53."""
    for session in ("ses-1", "ses-2"):
        (bench.cases / session).mkdir()
    shutil.copy(bench.cases / "ok.nii", bench.cases / "ses-1" / "T1w.nii")
    shutil.copy(bench.cases / "neg.nii", bench.cases / "ses-2" / "T1w.nii")
    line = "warp --zarr c/ses-1/T1w.nii --like c/ses-2/T1w.nii --transform c/id.tfm --out o/ses.zarr"
    code, text = bench.typed(line)
    grid = None if code else Volume.open(bench.out / "ses.zarr").grid
    yield line, "works", _short(text), grid is not None and np.allclose(grid.origin_xyz, (10, -20, -12))
    ids = np.full((5, 6, 7), 2**53 + 1, np.uint64)
    ids[2:] = 2**63 + 3
    image = sitk.GetImageFromArray(ids)
    sitk.WriteImage(image, str(bench.cases / "ids.nrrd"))
    code, text = bench.typed("ingest c/ids.nrrd o/ids.zarr --labels")
    line = "warp --zarr o/ids.zarr --like o/ids.zarr --transform c/id.tfm --out o/ids_w.zarr"
    if not code:
        code, text = bench.typed(line)
    found = [] if code else np.unique(Volume.open(bench.out / "ids_w.zarr").read()).tolist()
    yield line, "ids exact", str(found) if found else _short(text), found == [2**53 + 1, 2**63 + 3]


# ---------------------------------------------------------------------- registrations


def registrations(bench: Bench) -> Iterator[Row]:
    """T1w against T2w with padding, thick slices and a piece cut out: largest error of the brain's corners, mm."""
    moving = sitk.ReadImage(str(bench.cases / "rm.nii.gz"))
    cube = sitk.RegionOfInterest(moving, [40] * 3, [(n - 40) // 2 for n in moving.GetSize()])
    sitk.WriteImage(cube, str(bench.cases / "cube.nii.gz"))
    for name, right, largest in (
        ("pad.nii.gz", "within 1 mm", 1.0),
        ("pad2.nii.gz", "within 1 mm", 1.0),
        ("padhi.nii.gz", "within 1 mm", 1.0),
        ("aniso.nii.gz", "registered", 2.0),
        ("cube.nii.gz", "TRE below 2 mm, or an honest FAIL", 2.0),
    ):
        folder = f"o/r_{name.split('.')[0]}"
        line = f"register --fixed c/rf.nii.gz --moving c/{name} --representation intensity --out {folder}"
        code, _ = bench.typed(line)
        result = bench.out.parent / folder / "result.json"
        if not result.is_file():
            yield line, right, f"exit {code}, no result", False
            continue
        said = json.loads(result.read_bytes())
        failed, matrix = said["verdict"] == "FAIL", said["matrix_lps_mm"]
        error = float("nan") if matrix is None else _error_mm(np.asarray(matrix), bench.cases)
        ok = error <= largest or (failed and "FAIL" in right)
        yield line, right, f"{error:.2f} mm, {said['verdict']}", ok and (failed == (code == 1))


def _error_mm(matrix: np.ndarray, cases: Path) -> float:
    """Mean distance between what is found and the truth, over voxels of the brain."""
    truth = sitk.ReadTransform(str(cases / "rm_truth.tfm"))
    image = sitk.ReadImage(str(cases / "rf.nii.gz"))
    values = sitk.GetArrayFromImage(image)
    where = np.argwhere(values > np.percentile(values, 75))[::997]
    points = [image.TransformIndexToPhysicalPoint([int(v) for v in index[::-1]]) for index in where]
    found = np.asarray(points) @ matrix[:3, :3].T + matrix[:3, 3]
    return float(np.linalg.norm(found - [truth.TransformPoint(p) for p in points], axis=1).mean())


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--register", action="store_true", help="the registrations, too")
    given = parser.parse_args()
    wrong = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        given.out.open("w", newline="", encoding="utf-8") as file,
    ):
        bench = Bench(Path(folder) / "c", Path(folder) / "o")
        shutil.copytree(given.cases, bench.cases)
        for path in (bench.cases, *bench.cases.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        bench.out.mkdir()
        prepare(bench.cases)
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["input", "right", "what happens now", "yes/no"])
        parts = [(row.row(bench) for row in INPUTS), points(bench), formats(bench), same_names(bench)]
        for part in [*parts, registrations(bench)] if given.register else parts:
            for line, right, now, yes in part:
                table.writerow([line, right, now, "yes" if yes else "no"])
                print("yes" if yes else "NO ", line, "|", now[:300], flush=True)
                wrong += not yes
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
