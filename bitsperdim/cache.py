"""Decoded images of one split in a folder that is mapped into memory: a million 32 x 32 images a second on one core.

A folder holds `images.npy` (uint8 NHWC), `labels.npy` (int32, where there are labels) and `info.json`. It is written
under a temporary name beside its place and renamed when complete, so it is whole or absent: of two writers the first to
finish wins, and a killed writer leaves only a hidden folder that is never read. What was damaged since is made again.

The cache lies in `data.cache_dir`, else in $BITSPERDIM_CACHE, else in ~/.cache/bitsperdim. Beside the decoded splits
(height x width x channels bytes an image; CIFAR-10: 146 MiB) it holds small indices of TFRecord shards and of folders,
and the programs that the scripts have compiled (`xla`). Everything in it can be made again, so it may be cleared at any
time when no run reads it:

    python -m bitsperdim.cache            lists what is kept, with sizes
    python -m bitsperdim.cache --clear    removes it

Not here: what is decoded, and the name under which it is kept (`tfds_source.py`, `folder_source.py`).
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
from jaxtyping import Int, UInt8

from bitsperdim import atomic
from bitsperdim.errors import InputError

# What `entry_name` makes, the temporary names of a killed writer, and compiled programs; nothing else is ever removed.
ENTRY = re.compile(r"xla|\.?[\w.-]*-[0-9a-f]{12}(\.json)?(-[0-9a-f]{8})?")


class Images(NamedTuple):
    """The images of one split, in the order of its records."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"] | None
    num_classes: int  # 0 where there are no labels


class Chunk(NamedTuple):
    """A few consecutive examples on their way into the cache."""

    images: UInt8[np.ndarray, "k h w c"]
    labels: Int[np.ndarray, " k"]  # zeros where there are no labels


def location(cache_dir: str) -> pathlib.Path:
    """The folder of the cache: `cache_dir`, or the default where that is ''."""
    return pathlib.Path(cache_dir or os.environ.get("BITSPERDIM_CACHE") or "~/.cache/bitsperdim").expanduser()


def entry_name(title: str, *key: object) -> str:
    """A name that is readable, and different for every `title` and `key` (of values that JSON can write)."""
    readable = re.sub(r"[^\w.]+", "-", title, flags=re.ASCII).strip("-.")
    digest = hashlib.sha256(json.dumps([title, *key]).encode()).hexdigest()
    return f"{readable[:100] or 'images'}-{digest[:12]}"


def load(folder: pathlib.Path) -> Images | None:
    """The cache in `folder`, mapped read-only; None where there is none, or a damaged one, which is removed."""
    if not os.path.lexists(folder):
        return None
    try:
        return _load(folder)
    except PermissionError as error:
        raise InputError(
            f"the cache {folder} cannot be read ({error.strerror}); make it readable or move it"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        say_damaged(folder, str(error) or type(error).__name__)
    aside = _temporary(folder)
    try:
        folder.rename(aside)  # in one step, so that nobody reads half of it
        _remove(aside)
    except FileNotFoundError:  # another process was first
        pass
    except OSError as error:
        raise _unwritable(folder, error) from error
    return None


def _load(folder: pathlib.Path) -> Images:
    info = json.loads((folder / "info.json").read_bytes())
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != info["size"]:
        raise ValueError(f"images.npy holds {images.dtype} {images.shape}")
    labels = np.load(folder / "labels.npy", allow_pickle=False) if info["num_classes"] else None
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels.npy holds {labels.dtype} {labels.shape}")
    return Images(images, labels, info["num_classes"])


def say_damaged(path: pathlib.Path, reason: str) -> None:
    """One line on stderr, for what can be made again."""
    print(f"{path} in the cache is damaged ({reason}) and made again", file=sys.stderr, flush=True)


def write(folder: pathlib.Path, title: str, size: int, num_classes: int, chunks: Iterable[Chunk]) -> None:
    """Writes the `size` examples of `chunks` to `folder`, with progress on stderr under the name `title`.

    Nothing is left behind on an error or Ctrl-C. `InputError` where the folder cannot be written.
    """
    temporary = _temporary(folder)
    try:
        temporary.mkdir(parents=True)
        labels = _write_images(temporary / "images.npy", size, _with_progress(chunks, title, size))
        if num_classes:
            with open(temporary / "labels.npy", "wb") as file:
                np.save(file, labels, allow_pickle=False)
                atomic.flush(file)
        info = {"source": title, "size": size, "num_classes": num_classes}
        with open(temporary / "info.json", "wb") as file:
            file.write(json.dumps(info, indent=2).encode() + b"\n")
            atomic.flush(file)
        _rename_or_yield(temporary, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Makes `content` the content of the file `path`, at once. `InputError` where it cannot be written."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            atomic.flush(file)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """Beside `path`, and different for every writer."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def _unwritable(path: pathlib.Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write the cache {path} ({error.strerror}); "
        "set data.cache_dir or BITSPERDIM_CACHE to a folder that can be written and has space"
    )


def _write_images(path: pathlib.Path, size: int, chunks: Iterable[Chunk]) -> Int[np.ndarray, " n"]:
    """Streams the images into one .npy file; returns all labels."""
    labels = []
    # Plain writes, not a writable memory map: on a full disk they raise, where the map would end in SIGBUS.
    with open(path, "wb") as file:
        for chunk in chunks:
            if not labels:
                write_header(file, np.dtype(np.uint8), (size, *chunk.images.shape[1:]))
            file.write(np.ascontiguousarray(chunk.images, np.uint8).data)
            labels.append(chunk.labels)
        atomic.flush(file)
    return np.concatenate(labels).astype(np.int32)


def write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The head of an .npy file, after which the values may be written a few at a time."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
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


class Entry(NamedTuple):
    """One thing in the cache."""

    path: pathlib.Path
    num_bytes: int


def entries(folder: pathlib.Path) -> list[Entry]:
    """What the cache in `folder` holds, by name, remains of killed writers included."""
    if not folder.is_dir():
        return []
    paths = sorted(path for path in folder.iterdir() if ENTRY.fullmatch(path.name))
    return [Entry(path, sum(file.stat().st_size for file in _files(path))) for path in paths]


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def clear(folder: pathlib.Path) -> None:
    """Removes the entries of the cache in `folder`, and nothing else that lies there."""
    for entry in entries(folder):
        _remove(entry.path)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def main() -> int:
    """Lists the cache and, where asked, clears it."""
    parser = argparse.ArgumentParser(prog="python -m bitsperdim.cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache_dir", default="", help="default: $BITSPERDIM_CACHE or ~/.cache/bitsperdim")
    parser.add_argument("--clear", action="store_true", help="remove what is listed")
    arguments = parser.parse_args()
    folder = location(arguments.cache_dir)
    found = entries(folder)
    for entry in found:
        print(f"{entry.num_bytes / 2**20:10,.1f} MiB  {entry.path.name}")
    print(f"{sum(entry.num_bytes for entry in found) / 2**20:10,.1f} MiB  in {folder}")
    if arguments.clear:
        clear(folder)
        print("removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
