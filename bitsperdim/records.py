"""Arrays of examples in TFDS form, mapped into memory: TFRecord shards whose records all have one size.

    FOLDER/NAME-SPLIT.tfrecord-00000-of-00004    shards, in the order of the split
    FOLDER/dataset_info.json, features.json      what `tfds.builder_from_directory` takes to know the folder

A record is a tf.train.Example; each of its fields is the bytes of an array of fixed shape, little-endian, which TFDS
calls a `Tensor` with encoding='bytes'. So a value stands at the same place of every record, and a shard is an array of
structures, read at the speed of a copy without being parsed.

Not here: records of any size (`tfrecord.py`), and which model made the arrays (`extracted.py`).
"""

import functools
import json
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from bitsperdim import atomic
from bitsperdim.crc32c import masked_crc32c
from bitsperdim.tfrecord import FOOTER, HEADER

# What is lost when a writer is killed, and what it holds in memory, is less than a shard.
SHARD_BYTES, SHARD_BATCHES = 2**26, 64
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

Fields = Mapping[str, np.dtype]  # by name; an array's is its type and shape in one: np.dtype((np.uint16, (32, 32)))


def lengths(size: int, batch_size: int, fields: Fields) -> list[int]:
    """Examples in each shard of a split: whole batches but in the last, so that a writer can go on between two."""
    most = min(SHARD_BATCHES, SHARD_BYTES // (batch_size * _layout(_key(fields))[1].itemsize))
    each = batch_size * max(1, most)
    return [min(each, size - start) for start in range(0, size, each)]


def shard_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def shard(rows: Mapping[str, np.ndarray], fields: Fields) -> bytes:
    """The file of these examples; arrays [n, ...] by name."""
    empty, dtype = _layout(_key(fields))
    content = bytearray(empty * len(next(iter(rows.values()))))
    records = np.frombuffer(content, dtype)
    for name in fields:
        records[name] = rows[name]
    for end in range(dtype.itemsize, len(content) + 1, dtype.itemsize):
        data = bytes(content[end - dtype.itemsize + HEADER : end - FOOTER])
        content[end - FOOTER : end] = struct.pack("<I", masked_crc32c(data))
    return bytes(content)


class Column:
    """One field of a split as an array [n, ...] that can be indexed by an array of numbers; the shards stay mapped."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(part) for part in shards])
        self.shape = (int(self._ends[-1]), *shards[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        if len(self._shards) == 1:
            return self._shards[0][indices]
        owners = np.searchsorted(self._ends, indices, side="right")
        values = np.empty((len(indices), *self.shape[1:]), self._shards[0].dtype)
        for owner in np.unique(owners):
            rows, part = owners == owner, self._shards[owner]
            values[rows] = part[indices[rows] - (self._ends[owner] - len(part))]
        return values


def columns(paths: Sequence[epath.Path], fields: Fields) -> dict[str, Column]:
    """The fields of local shards that are known to be whole."""
    dtype = _layout(_key(fields))[1]
    shards = [np.memmap(path, dtype, mode="r") for path in paths]
    return {name: Column([part[name] for part in shards]) for name in fields}


def describe(folder: epath.Path, name: str, text: str, fields: Fields, splits: Mapping[str, Sequence[int]]) -> None:
    """Writes what makes a data set of the shards, whose lengths by split are `splits`."""
    num_bytes = sum(dtype.itemsize for dtype in fields.values())
    described = [
        {
            "filepathTemplate": TEMPLATE,
            "name": split,
            "numBytes": str(num_bytes * sum(counts)),
            "shardLengths": [str(count) for count in counts],
        }
        for split, counts in splits.items()
    ]
    info = {"name": name, "version": "1.0.0", "description": text, "fileFormat": "tfrecord", "splits": described}
    core = "tensorflow_datasets.core.features"
    features = {
        field: {
            "pythonClassName": f"{core}.tensor_feature.Tensor",
            "tensor": {
                "dtype": dtype.base.name,
                "encoding": "bytes",
                "shape": {"dimensions": [str(edge) for edge in dtype.shape]} if dtype.shape else {},
            },
        }
        for field, dtype in sorted(fields.items())
    }
    whole = {"pythonClassName": f"{core}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    for file, values in (("features.json", whole), ("dataset_info.json", info)):
        atomic.write_bytes(folder / file, (json.dumps(values, indent=2) + "\n").encode())


def _key(fields: Fields) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    return tuple((name, dtype.base.name, dtype.shape) for name, dtype in sorted(fields.items()))


@functools.cache
def _layout(key: tuple[tuple[str, str, tuple[int, ...]], ...]) -> tuple[bytes, np.dtype]:
    """A record of zeros with its frame, without the last checksum, and the places of its fields.

    In the notation of protocol buffers: Example {1: Features {1: entry {1: name, 2: Feature {1: BytesList {1: value}}}
    for each field}}; every member here is a tag, a length and that many bytes.
    """
    dtypes = [np.dtype((np.dtype(kind).newbyteorder("<"), shape)) for _, kind, shape in key]
    features, ends = b"", []
    for (name, _, _), dtype in zip(key, dtypes, strict=True):
        feature = _member(1, _member(1, bytes(dtype.itemsize)))
        features += _member(1, _member(1, name.encode()) + _member(2, feature))
        ends.append(len(features))
    example = _member(1, features)
    length = struct.pack("<Q", len(example))
    record = length + struct.pack("<I", masked_crc32c(length)) + example + bytes(FOOTER)
    begin = HEADER + len(example) - len(features)
    offsets = [begin + end - dtype.itemsize for end, dtype in zip(ends, dtypes, strict=True)]
    names = [name for name, _, _ in key]
    return record, np.dtype({"names": names, "formats": dtypes, "offsets": offsets, "itemsize": len(record)})


def _member(number: int, content: bytes) -> bytes:
    """A length-delimited member of a message: tag, length as a varint, content."""
    length, varint = len(content), bytearray()
    while length > 127:
        varint.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *varint, length]) + content
