"""Random access to the records of TFRecord shards, without TensorFlow.

A shard is a row of records: length (8 bytes, little-endian), masked CRC-32C of the length (4), data, masked CRC-32C
of the data (4). The lengths are walked once and checked; the data of a record are checked the first time they are read.

Not here: which records make a split (TFDS's `file_instructions`), and what is in a record (`tfds_source.py`).
"""

import os
import pathlib
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Protocol

import numpy as np
from etils import epath
from jaxtyping import Int64

from bitsperdim import cache
from bitsperdim.crc32c import masked_crc32c
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
    numbers = np.concatenate([part.skip + np.arange(part.take) for part in parts])
    is_checked = np.zeros(len(shards), bool)

    def read(number: int) -> bytes:
        begin, end = int(begins[number]), int(ends[number])
        path = epath.Path(parts[shards[number]].filename)
        with _opened(path) as file:
            file.seek(begin + HEADER)
            content = file.read(end - begin - HEADER)
        data, checksum = content[:-FOOTER], int.from_bytes(content[-FOOTER:], "little")
        if not is_checked[number] and masked_crc32c(data) != checksum:
            raise InputError(
                f"record {numbers[number]} of {path} is damaged (the checksum of its data); prepare the data set again"
            )
        is_checked[number] = True
        return data

    return read


def boundaries(path: epath.Path) -> Int64[np.ndarray, " n+1"]:
    """Where every record begins, and where the last one ends. `InputError` where the shard is not whole."""
    size = _size(path)
    found, position = [0], 0
    with _opened(path) as file:
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


def _cached_boundaries(part: Part, index_dir: pathlib.Path) -> Int64[np.ndarray, " n+1"]:
    shard = epath.Path(part.filename)
    place = index_dir / f"{shard.name}.boundaries"
    found = _load(place)
    if found is None or found[-1] != _size(shard) or len(found) != part.examples_in_shard + 1:
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
        found = np.frombuffer(place.read_bytes(), "<i8")
        if len(found) and found[0] == 0 and (np.diff(found) >= HEADER + FOOTER).all():
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    cache.say_damaged(place, "it is no list of places in a shard")
    return None


def _opened(path: epath.Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"the shard {path} cannot be read ({error.strerror}); prepare the data set again") from error


def _size(path: epath.Path) -> int:
    try:
        return path.stat().length
    except OSError as error:
        raise InputError(f"the shard {path} is missing; prepare the data set again") from error


def _truncated(path: epath.Path, size: int, needed: int) -> InputError:
    return InputError(f"{path} is truncated (read {size:,} of at least {needed:,} bytes); prepare the data set again")
