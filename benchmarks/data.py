"""What reading images costs: both formats of TFDS, JPEG files by one and two threads, memory.

    python -m benchmarks data --name=cifar10:3.0.2 --data_dir=FOLDER

`index` opens the records of a split, without an index and then with it; `records` reads them all in random order;
`decode` fills an empty cache. These three take the same records as array_record and as TFRecord (a temporary copy).
`jpeg` decodes random crops of 256 pixels from files of 500 x 375 (like those of ImageNet) and of 2,000 x 1,500 pixels.
`ahead` reads such batches ahead of a loop that takes no time, by `data.prefetch` and by grain's MapDataset, each with
two threads that decode and two batches ahead; the crops are the same.
`memory` is what the process holds while 2,000 batches are decoded, and while 2,000 come from the cache (aim: steady).
"""

import argparse
import json
import pathlib
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks.record import Record
from bitsperdim import cache, data, encoded, sharding, tfds_source, tfrecord
from bitsperdim.decode import Preparation, decode
from bitsperdim.sharding import MeshConfig

ABOUT = ("format", "index", "height", "source")  # what tells cases from others
RECORD = Record("data")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="cifar10", help="TFDS data set")
    parser.add_argument("--data_dir", default="", help="of TFDS; default: its usual folder")
    parser.add_argument("--split", default="test", help="of the data set")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        values = {"name": arguments.name, "data_dir": arguments.data_dir, "evaluation_split": arguments.split}
        formats(data.DataConfig("tfds", **values), root)
        for height, width in ((375, 500), (1500, 2000)):
            folder = write_photographs(root / f"{height}", height, width, count=40)
            jpeg(folder, root)
            ahead(folder, root)
        memory(write_photographs(root / "small", 90, 120, count=200), root)
    RECORD.end()


def formats(config: data.DataConfig, root: pathlib.Path) -> None:
    """The same split as array_record and as TFRecord."""
    found = tfds_source.find(config.name, config.data_dir)
    builder = tfds.builder_from_directory(found.path)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    split = config.evaluation_split
    start = time.perf_counter()
    records = builder.as_data_source(split, deserialize_method=raw)
    records[0]
    say("index", format="array_record", milliseconds=1e3 * (time.perf_counter() - start), records=len(records))
    read_all("array_record", records.__getitem__, len(records))
    copy = root / "tfrecord" / pathlib.Path(found.title.replace(":", "/"))
    write_copy(pathlib.Path(found.path), copy, split, records)
    parts = tfds.builder_from_directory(copy).info.splits[split].file_instructions
    for case in ("none yet", "kept"):
        start = time.perf_counter()
        read = tfrecord.open_records(parts, root / "index", encoded.num_threads(0))
        read(0)
        milliseconds = 1e3 * (time.perf_counter() - start)
        say("index", format="tfrecord", index=case, milliseconds=milliseconds, records=len(records))
    read_all("tfrecord", read, len(records))
    for name, folder in (("array_record", config.data_dir), ("tfrecord", str(root / "tfrecord"))):
        start = time.perf_counter()
        values = {"data_dir": folder, "cache_dir": str(root / name), "evaluation_split": split}
        source = data.open_source(data.DataConfig("tfds", name=config.name, **values), "evaluation")
        say("decode", format=name, images_per_second=source.size / (time.perf_counter() - start))


def read_all(name: str, read, size: int) -> None:
    start = time.perf_counter()
    for index in data.train_indices(size, 0, 0, size).tolist():
        read(index)
    say("records", format=name, records_per_second=size / (time.perf_counter() - start))


def write_copy(origin: pathlib.Path, folder: pathlib.Path, split: str, records) -> None:
    """One split as one TFRecord shard, with the description that TFDS writes."""
    folder.mkdir(parents=True)
    for path in (origin / "features.json", *origin.glob("*.labels.txt")):
        shutil.copy(path, folder)
    info = json.loads((origin / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    (about,) = [entry for entry in info["splits"] if entry["name"] == split]
    info["splits"] = [about | {"shardLengths": [str(len(records))]}]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with open(folder / f"{info['name']}-{split}.tfrecord-00000-of-00001", "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            checksums = [struct.pack("<I", tfrecord.masked_crc32c(part)) for part in (length, record)]
            file.write(length + checksums[0] + record + checksums[1])


def write_photographs(folder: pathlib.Path, height: int, width: int, count: int) -> pathlib.Path:
    """JPEG files with detail at every scale, about as many bytes a pixel as photographs have."""
    folder.mkdir()
    generator = np.random.Generator(np.random.Philox(0))
    for index in range(count):
        image = np.zeros((height, width, 3))
        for scale in (2, 8, 32):
            coarse = generator.integers(0, 256, (height // scale + 1, width // scale + 1, 3), np.uint8)
            image += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 3
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{index:04}.jpg", quality=85)
    return folder


def open_folder(folder: pathlib.Path, root: pathlib.Path, size: int, crop: str, threads: int = 0) -> data.Source:
    values = {"train_crop": crop, "decode_threads": threads, "cache_dir": str(root / "cache"), "cache_limit_gib": 0.0}
    values |= {"evaluation_fraction": 1e-9}  # all of them are for training
    return data.open_source(data.DataConfig("folder", path=str(folder), image_size=size, **values), "train")


def jpeg(folder: pathlib.Path, root: pathlib.Path, batch_size: int = 32, repeats: int = 5) -> None:
    """The median of several passes, one and two threads in turn."""
    seconds = {1: [], 2: []}
    for step in range(repeats):
        for threads, times in seconds.items():
            source = open_folder(folder, root, 256, "random", threads)
            start = time.perf_counter()
            source.read_drawn(np.arange(batch_size) % source.size, data.train_draws(0, step * batch_size, batch_size))
            times.append(time.perf_counter() - start)
    rates = {threads: batch_size / float(np.median(times)) for threads, times in seconds.items()}
    figures = {f"images_per_second_{threads}": rate for threads, rate in rates.items()}
    say("jpeg", height=int(folder.name), **figures, ratio=rates[2] / rates[1])


def ahead(folder: pathlib.Path, root: pathlib.Path, batch_size: int = 32, steps: int = 10, repeats: int = 5) -> None:
    """The median of several passes, ours and grain's in turn."""
    paths, source = sorted(folder.iterdir()), open_folder(folder, root, 256, "random", threads=2)
    draws = data.train_draws(0, 0, steps * batch_size)
    preparation = Preparation(height=256, width=256, channels=3)

    def ours() -> Iterator[np.ndarray]:
        def make(step: int) -> np.ndarray:
            positions = np.arange(step * batch_size, (step + 1) * batch_size)
            return source.read_drawn(positions % len(paths), draws[positions])["image"]

        return data.prefetch(make, 0, steps, depth=2)

    def of_grain() -> Iterator[np.ndarray]:
        load = lambda index: decode(paths[index % len(paths)].read_bytes(), preparation, int(draws[index]))
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch_size)
        return iter(grain.MapDataset.range(len(draws)).map(load).to_iter_dataset(options).batch(batch_size))

    assert all(np.array_equal(a, b) for a, b in zip(ours(), of_grain(), strict=True))
    seconds = {"prefetch": [], "grain": []}
    for _ in range(repeats):
        for (_, times), read in zip(seconds.items(), (ours, of_grain), strict=True):
            start = time.perf_counter()
            for _ in read():
                pass
            times.append(time.perf_counter() - start)
    rates = {name: len(draws) / float(np.median(times)) for name, times in seconds.items()}
    figures = {f"images_per_second_{name}": rate for name, rate in rates.items()}
    say("ahead", height=int(folder.name), **figures, ratio=rates["prefetch"] / rates["grain"])


def memory(folder: pathlib.Path, root: pathlib.Path, steps: int = 2000, batch_size: int = 16) -> None:
    over_batch = sharding.over_batch(sharding.make_mesh(MeshConfig()))
    for case, crop in (("decoded", "random"), ("cached", "centre")):
        source = open_folder(folder, root, 64, crop)
        make = lambda step, source=source: data.train_batch(source, 0, step, batch_size, over_batch)
        held = []
        start = time.perf_counter()
        for step, batch in enumerate(data.prefetch(make, 0, steps), 1):
            jax.block_until_ready(batch)
            if step % (steps // 5) == 0:
                held.append(round(resident_mib(), 1))
        rate = steps * batch_size / (time.perf_counter() - start)
        say("memory", source=case, resident_mib=held, images_per_second=rate)
    say("cache", mib=sum(entry.num_bytes for entry in cache.entries(root / "cache")) / 2**20)


def resident_mib() -> float:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def say(case: str, **figures) -> None:
    of = {name: figures.pop(name) for name in ABOUT if name in figures}
    RECORD.say(case, of, **figures)
