"""Decoded images of one split in a folder that is mapped into memory: a million 32 x 32 images a second on one core.

A folder holds `images.npy` (uint8 NHWC), `labels.npy` (int32, where there are labels) and `info.json`. It is written
under a temporary name beside its place and renamed when complete, so it is whole or absent: of two writers the first to
finish wins, and a killed writer leaves only a hidden folder that is never read.

Not here: what is decoded, and the name under which it is kept (`tfds_source.py`).
"""

import json
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
from jaxtyping import Int, UInt8

from bitsperdim.errors import InputError


class Images(NamedTuple):
    """The images of one split, in the order of its records."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"] | None
    num_classes: int  # 0 where there are no labels


class Chunk(NamedTuple):
    """A few consecutive examples on their way into the cache."""

    images: UInt8[np.ndarray, "k h w c"]
    labels: Int[np.ndarray, " k"]  # zeros where there are no labels


def load(folder: pathlib.Path) -> Images | None:
    """The cache in `folder`, mapped read-only; None where there is none; `InputError` where it is damaged."""
    if not (folder / "info.json").exists():
        return None
    try:
        num_classes = json.loads((folder / "info.json").read_text())["num_classes"]
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if num_classes else None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the cache {folder} is damaged ({error}); remove the folder and start again") from error
    return Images(images, labels, num_classes)


def write(folder: pathlib.Path, title: str, size: int, num_classes: int, chunks: Iterable[Chunk]) -> None:
    """Writes the `size` examples of `chunks` to `folder`, with progress on stderr under the name `title`.

    Nothing is left behind on an error or Ctrl-C. `InputError` where the folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        labels = _write_images(temporary / "images.npy", size, _with_progress(chunks, title, size))
        if num_classes:
            np.save(temporary / "labels.npy", labels)
        info = {"source": title, "size": size, "num_classes": num_classes}
        (temporary / "info.json").write_text(json.dumps(info, indent=2) + "\n")
        _rename_or_yield(temporary, folder)
    except OSError as error:
        raise InputError(
            f"cannot write the cache of decoded images {folder} ({error.strerror}); "
            "set data.cache_dir or BITSPERDIM_CACHE to a folder with space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_images(path: pathlib.Path, size: int, chunks: Iterable[Chunk]) -> Int[np.ndarray, " n"]:
    """Streams the images into one .npy file; returns all labels."""
    labels = []
    # Plain writes, not a writable memory map: on a full disk they raise, where the map would end in SIGBUS.
    with open(path, "wb") as file:
        for chunk in chunks:
            if not labels:
                _write_header(file, (size, *chunk.images.shape[1:]))
            file.write(np.ascontiguousarray(chunk.images, np.uint8).data)
            labels.append(chunk.labels)
        file.flush()
        os.fsync(file.fileno())
    return np.concatenate(labels).astype(np.int32)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _rename_or_yield(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames, unless another process was first; its folder is then as good as ours."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "info.json").exists():
            raise


def _with_progress(chunks: Iterable[Chunk], title: str, size: int) -> Iterator[Chunk]:
    done = 0
    for chunk in chunks:
        yield chunk
        before, done = done, done + len(chunk.images)
        _report(sys.stderr, title, before, done, size)


def _report(stream: TextIO, title: str, before: int, done: int, size: int) -> None:
    """One line that is overwritten on a terminal; elsewhere (a log) a line for each quarter."""
    line = f"decoding {title} (once): {done:,} of {size:,}"
    if stream.isatty():
        print(f"\r{line}", end="\n" if done == size else "", file=stream, flush=True)
    elif before * 4 // size != done * 4 // size:
        print(line, file=stream, flush=True)
