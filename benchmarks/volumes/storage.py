r"""Write and read one volume of 2 GiB through several libraries, side by side: sharded, compressed, the same codec.

    python -m venv peers && peers/bin/pip install "ngff-zarr[dask-image]" ome-zarr tensorstore zarrs
    python benchmarks/volumes/storage.py compare --work WORK --peers peers/bin/python \
        --out benchmarks/volumes/storage.csv --figure benchmarks/volumes/storage.png

Every measurement is a process of its own, and the contenders take turns: A B C, A B C, ... What counts is the call that
writes (or reads) the array from (into) memory: chunks of 64, shards of 256 a side, blosc zstd-3 with bitshuffle, only
level 0. Nobody flushes to the disk, and what is read is in the page cache. `seconds` are of the wall, `cpu_seconds`
of all threads together: on a machine shared with others the second is the steadier of the two. `correct` says whether
what is read back equals what was written. Libraries are imported, and have written and read a little, beforehand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import Kept, measured_apart, verbs_of, write_rows

CHUNK, SHARD = (64,) * 3, (256,) * 3
Write, Read = Callable[[Path, np.ndarray], None], Callable[[Path], np.ndarray]


# ---------------------------------------------------------------------- the contenders


def _blosc() -> Any:
    from zarr.codecs import BloscCodec

    return BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")


def _shards(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    steps = [range(0, n, s) for n, s in zip(shape, SHARD, strict=True)]
    return [
        tuple(slice(a, min(a + s, n)) for a, s, n in zip((z, y, x), SHARD, shape, strict=True))
        for z in steps[0]
        for y in steps[1]
        for x in steps[2]
    ]


def _volume_write(path: Path, values: np.ndarray) -> None:
    from comir_hpc.space.grid import Grid
    from comir_hpc.volumes.volume import Volume

    volume = Volume.create(path, Grid(values.shape, (1.0, 1.0, 1.0)), values.dtype, chunk=CHUNK, shard=SHARD)
    volume.write(volume.grid.box, values[None])
    volume.finish()


def _volume_read(path: Path) -> np.ndarray:
    from comir_hpc.volumes.volume import Volume

    return Volume.open(path).read()[0]


def _volume_blocks_write(path: Path, values: np.ndarray) -> None:
    from comir_hpc.space.grid import Grid
    from comir_hpc.space.plan import plan_blocks
    from comir_hpc.volumes.volume import Volume

    volume = Volume.create(path, Grid(values.shape, (1.0, 1.0, 1.0)), values.dtype, chunk=CHUNK, shard=SHARD)
    for block in plan_blocks(values.shape, volume.shard_zyx):
        volume.write(block.write, values[None][(slice(None), *block.write.slices)])
    volume.finish()


def _volume_blocks_read(path: Path) -> np.ndarray:
    from comir_hpc.space.plan import plan_blocks
    from comir_hpc.volumes.volume import Volume

    volume = Volume.open(path)
    out = np.empty(volume.grid.shape_zyx, volume.dtype)
    for block in plan_blocks(out.shape, volume.shard_zyx):
        out[block.write.slices] = volume.read(block.write)[0]
    return out


def _tensorstore_made(path: Path, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Any:
    import tensorstore

    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
    context = tensorstore.Context({"file_io_sync": False})  # as all the others: nobody flushes
    if shape is None:
        return tensorstore.open(spec, open=True, context=context).result()
    compression = {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "typesize": dtype.itemsize}
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}]
    inner.append({"name": "blosc", "configuration": compression})
    sharded = {"name": "sharding_indexed", "configuration": {"chunk_shape": CHUNK, "codecs": inner}}
    spec["metadata"] = {
        "shape": shape,
        "data_type": str(dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": SHARD}},
        "codecs": [sharded],
    }
    return tensorstore.open(spec, create=True, context=context).result()


def _tensorstore_write(path: Path, values: np.ndarray) -> None:
    _tensorstore_made(path, values.shape, values.dtype).write(values).result()


def _tensorstore_read(path: Path) -> np.ndarray:
    return np.asarray(_tensorstore_made(path).read().result())


def _tensorstore_blocks_write(path: Path, values: np.ndarray) -> None:
    store = _tensorstore_made(path, values.shape, values.dtype)
    for place in _shards(values.shape):
        store[place].write(values[place]).result()


def _tensorstore_blocks_read(path: Path) -> np.ndarray:
    store = _tensorstore_made(path)
    out = np.empty(store.shape, store.dtype.numpy_dtype)
    for place in _shards(out.shape):
        out[place] = store[place].read().result()
    return out


def _zarr_made(path: Path, values: np.ndarray) -> Any:
    import zarr

    return zarr.create_array(
        str(path), shape=values.shape, dtype=values.dtype, chunks=CHUNK, shards=SHARD, compressors=_blosc()
    )


def _zarr_write(path: Path, values: np.ndarray) -> None:
    _zarr_made(path, values)[...] = values


def _zarr_read(path: Path) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_array(str(path), mode="r")[...])


def _with_zarrs() -> None:
    import zarr
    import zarrs  # noqa: F401

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def _zarrs_write(path: Path, values: np.ndarray) -> None:
    _with_zarrs()
    _zarr_write(path, values)


def _zarrs_read(path: Path) -> np.ndarray:
    _with_zarrs()
    return _zarr_read(path)


def _dask_write(path: Path, values: np.ndarray) -> None:
    import dask.array

    # Dask's chunks are whole shards here; smaller ones write wrong data without a word (dask 12583).
    dask.array.from_array(values, chunks=SHARD).to_zarr(_zarr_made(path, values))


def _dask_read(path: Path) -> np.ndarray:
    import dask.array

    return np.asarray(dask.array.from_zarr(str(path)).compute())


def _ngff_zarr_write(path: Path, values: np.ndarray) -> None:
    import ngff_zarr

    image = ngff_zarr.to_ngff_image(values, dims=("z", "y", "x"))
    scales = ngff_zarr.to_multiscales(image, scale_factors=[], chunks=CHUNK[0])
    ngff_zarr.to_ome_zarr(
        str(path), scales, version="0.5", chunks_per_shard=SHARD[0] // CHUNK[0], compressors=_blosc()
    )


def _ngff_zarr_read(path: Path) -> np.ndarray:
    import ngff_zarr

    return np.asarray(ngff_zarr.from_ngff_zarr(str(path)).images[0].data.compute())


def _ome_zarr_write(path: Path, values: np.ndarray) -> None:
    import zarr
    from ome_zarr.writer import write_image

    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    options = {"chunks": CHUNK, "shards": SHARD, "compressors": [_blosc()]}
    write_image(values, group, scale_factors=[], axes="zyx", storage_options=options)


def _ome_zarr_read(path: Path) -> np.ndarray:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    return np.asarray(next(iter(Reader(parse_url(str(path)))())).data[0].compute())


CONTENDERS: dict[str, tuple[Write, Read]] = {
    "comir-hpc": (_volume_write, _volume_read),
    "tensorstore": (_tensorstore_write, _tensorstore_read),
    "comir-hpc, by shards": (_volume_blocks_write, _volume_blocks_read),
    "tensorstore, by shards": (_tensorstore_blocks_write, _tensorstore_blocks_read),
    "zarrs": (_zarrs_write, _zarrs_read),
    "zarr-python": (_zarr_write, _zarr_read),
    "dask.to_zarr": (_dask_write, _dask_read),
    "ngff-zarr": (_ngff_zarr_write, _ngff_zarr_read),
    "ome-zarr-py": (_ome_zarr_write, _ome_zarr_read),
}


NEAREST = tuple(name for name in CONTENDERS if name.startswith(("comir-hpc", "tensorstore")))


# ---------------------------------------------------------------------- measuring


def measure(name: str, data: Path, store: Path) -> dict[str, Any]:
    """Write and read once in this process."""
    values = np.load(data)
    write, read = CONTENDERS[name]
    spare = store.with_name("first.zarr")
    shutil.rmtree(spare, ignore_errors=True)
    write(spare, values[:64, :64, :64])
    read(spare)
    shutil.rmtree(spare)
    row: dict[str, Any] = {"name": name}
    wall, cpu = time.perf_counter(), time.process_time()
    write(store, values)
    row["write_seconds"], row["write_cpu_seconds"] = time.perf_counter() - wall, time.process_time() - cpu
    files = [f.stat().st_size for f in store.rglob("*") if f.is_file()]
    row["files"], row["ratio"] = len(files), values.nbytes / sum(files)
    wall, cpu = time.perf_counter(), time.process_time()
    found = read(store)
    row["read_seconds"], row["read_cpu_seconds"] = time.perf_counter() - wall, time.process_time() - cpu
    row["correct"] = bool(np.array_equal(found, values))
    row["mib"] = values.nbytes / 2**20
    return row


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Take turns, `repeats` times."""
    given.work.mkdir(parents=True, exist_ok=True)
    data = given.work / "values.npy"
    if not data.exists():
        from brains import brains

        np.save(data, brains(tuple(given.shape)))
    kept = Kept(given.work / "rows.jsonl")
    done_before = {(row["repeat"], row["name"]) for row in kept.rows}
    for repeat in range(given.repeats):
        for name in given.names or CONTENDERS:
            if (repeat, name) in done_before or (repeat >= given.peer_repeats and name not in NEAREST):
                continue
            python = sys.executable if name.startswith("comir-hpc") else str(given.peers)
            store = given.work / "store.zarr"
            shutil.rmtree(store, ignore_errors=True)
            command = [python, __file__, "one", name, str(data), str(store)]
            kept.add({"repeat": repeat, **measured_apart(command)})
            shutil.rmtree(store, ignore_errors=True)
    return kept.rows


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a contender: medians, throughput, and throughput over tensorstore's of the same turn."""
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        line: dict[str, Any] = {"name": name, "repeats": len(own), "mib": round(own[0]["mib"])}
        peer = "tensorstore, by shards" if name.endswith("by shards") else "tensorstore"
        for what in ("write", "read"):
            for unit in ("seconds", "cpu_seconds"):
                key = f"{what}_{unit}"
                line[key] = round(statistics.median(row[key] for row in own), 2)
                ratios = [
                    other[key] / row[key]
                    for row in own
                    for other in rows
                    if other["name"] == peer and other["repeat"] == row["repeat"]
                ]
                line[f"{what}_{'cpu_' if 'cpu' in unit else ''}speed_over_tensorstore"] = round(
                    statistics.median(ratios), 3
                )
            line[f"{what}_mib_per_cpu_second"] = round(line["mib"] / line[f"{what}_cpu_seconds"])
        line |= {"compression": round(own[0]["ratio"], 3), "files": own[0]["files"]}
        line["correct"] = all(row["correct"] for row in own)
        table.append(line)
    return table


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Bars of throughput for each core second."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    names = [line["name"] for line in table]
    place = np.arange(len(names))
    for k, what in enumerate(("write", "read")):
        axes.barh(
            place + 0.2 - 0.4 * k, [line[f"{what}_mib_per_cpu_second"] for line in table], 0.38, label=what
        )
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.set_xlabel("MiB for each second of processor time (uncompressed)")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Parse, measure, write table and figure."""
    parser, verbs = verbs_of(__doc__)
    one = verbs.add_parser("one")
    one.add_argument("name", choices=CONTENDERS)
    one.add_argument("data", type=Path)
    one.add_argument("store", type=Path)
    many = verbs.add_parser("compare")
    many.add_argument("--work", type=Path, required=True)
    many.add_argument("--peers", type=Path, required=True, help="python that has the peers")
    many.add_argument("--shape", type=int, nargs=3, default=[1024, 1024, 1024])
    many.add_argument("--repeats", type=int, default=3)
    many.add_argument("--peer-repeats", type=int, default=3, help="turns of all but tensorstore and us")
    many.add_argument("--names", nargs="+", choices=CONTENDERS)
    many.add_argument("--out", type=Path, required=True)
    many.add_argument("--figure", type=Path)
    given = parser.parse_args()
    if given.verb == "one":
        print(json.dumps(measure(given.name, given.data, given.store)))
        return
    table = medians(compare(given))
    write_rows(given.out, table)
    if given.figure:
        draw(table, given.figure)


if __name__ == "__main__":
    main()
