"""Random access to the records of TFRecord shards, without TensorFlow.

A shard is a row of records: length (8 bytes, little-endian), masked CRC-32C of the length (4), data, masked CRC-32C
of the data (4). The lengths are walked once and checked; the checksums of the data are not, since plain Python takes
longer for them than decoding the image does, and PNG has its own.

Not here: which records make a split (TFDS's `file_instructions`), and what is in a record (`tfds_source.py`).
"""

import os
import pathlib
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from etils import epath
from jaxtyping import Int64

from bitsperdim import cache
from bitsperdim.errors import InputError

HEADER, FOOTER = 12, 4  # bytes around the data of a record


class Part(Protocol):
    """Some consecutive records of a shard: what TFDS calls a FileInstruction."""

    filename: os.PathLike | str
    skip: int
    take: int
    examples_in_shard: int


def open_records(parts: Sequence[Part], index_dir: pathlib.Path, threads: int) -> Callable[[int], bytes]:
    """The records of `parts`, one after another, by number. May be called from several threads.

    The index of each shard is kept in `index_dir`. `InputError` names a shard that is missing, truncated or damaged.
    """
    with ThreadPoolExecutor(threads) as pool:
        whole = list(pool.map(lambda part: _cached_boundaries(part, index_dir), parts))
    taken = [found[part.skip : part.skip + part.take + 1] for part, found in zip(parts, whole, strict=True)]
    begins = np.concatenate([found[:-1] for found in taken])
    ends = np.concatenate([found[1:] for found in taken])
    shards = np.repeat(np.arange(len(parts)), [part.take for part in parts])

    def read(number: int) -> bytes:
        begin, end = int(begins[number]), int(ends[number])
        with epath.Path(parts[shards[number]].filename).open("rb") as file:
            file.seek(begin + HEADER)
            return file.read(end - begin - HEADER - FOOTER)

    return read


def boundaries(path: epath.Path) -> Int64[np.ndarray, " n+1"]:
    """Where every record begins, and where the last one ends. `InputError` where the shard is not whole."""
    size = _size(path)
    found, position = [0], 0
    with path.open("rb") as file:
        while position < size:
            header = file.read(HEADER)
            if len(header) < HEADER:
                raise _truncated(path, size, position + HEADER + FOOTER)
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                raise InputError(
                    f"{path} is damaged at byte {position:,} (the checksum of a record's length); "
                    "prepare the data set again"
                )
            position += HEADER + length + FOOTER
            if position > size:
                raise _truncated(path, size, position)
            found.append(position)
            file.seek(length + FOOTER, os.SEEK_CUR)
    return np.array(found, np.int64)


def masked_crc32c(content: bytes) -> int:
    """The checksum of TFRecord: CRC-32C, rotated by 15 bits, plus a constant. A microsecond for a length."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli, reversed
    return byte


_CRC_TABLE = tuple(_crc_of_byte(byte) for byte in range(256))


def _cached_boundaries(part: Part, index_dir: pathlib.Path) -> Int64[np.ndarray, " n+1"]:
    shard = epath.Path(part.filename)
    place = index_dir / f"{shard.name}.boundaries"
    found = _load(place)
    if found is None or found[-1:] != _size(shard):
        found = boundaries(shard)
        cache.write_bytes(place, found.astype("<i8").tobytes())
    if len(found) != part.examples_in_shard + 1:
        raise InputError(
            f"{shard} holds {len(found) - 1:,} records where dataset_info.json says {part.examples_in_shard:,}; "
            "prepare the data set again"
        )
    return found


def _load(place: pathlib.Path) -> Int64[np.ndarray, " n+1"] | None:
    """A kept index; None where there is none that can be read, and it is made again."""
    try:
        return np.frombuffer(place.read_bytes(), "<i8")
    except (OSError, ValueError):
        return None


def _size(path: epath.Path) -> int:
    try:
        return path.stat().length
    except OSError as error:
        raise InputError(f"the shard {path} is missing; prepare the data set again") from error


def _truncated(path: epath.Path, size: int, needed: int) -> InputError:
    return InputError(f"{path} is truncated (read {size:,} of at least {needed:,} bytes); prepare the data set again")
