"""What is in a folder of images: every file is decoded once, and what was found is kept until the file changes.

A file is looked at again when its name, its size or its time of change is new. Files and folders whose names begin with
a dot are left alone, and so are files that do not end like an image; both are counted. Links are followed, except to
what the folder holds under its own name: nothing counts twice.

Not here: which images make a split and what becomes of them (`folder_source.py`).
"""

import functools
import hashlib
import json
import os
import pathlib
import stat
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bitsperdim import cache, metrics
from bitsperdim.decode import Stored, Unreadable, inspect
from bitsperdim.errors import InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SCAN_FORMAT = 2  # raise when the meaning of `Picture` changes
BLOCK = 256  # files looked at between two steps of the progress bar


class Picture(NamedTuple):
    """A file that ends like an image."""

    name: str  # relative to the folder, with '/' on every system
    num_bytes: int
    modified_ns: int
    digest: str  # of the content
    height: int  # upright, as EXIF says; 0 where the file cannot be read
    width: int
    depth: int  # bits a channel: 8 (or fewer), 12 or 16
    problem: str  # why it cannot be read, to follow its name; '' where it can


class Scan(NamedTuple):
    """The pictures of a folder in the order of their names, and how many files were left alone."""

    pictures: tuple[Picture, ...]
    num_hidden: int
    num_others: int
    inner_links: tuple[str, ...]  # links that are not followed, since they point to what is counted already


class _File(NamedTuple):
    name: str
    num_bytes: int
    modified_ns: int


class _Listing(NamedTuple):
    """The files of a folder that end like images, by name; the other fields as in `Scan`."""

    files: list[_File]
    num_hidden: int
    num_others: int
    inner_links: tuple[str, ...]


def scan(folder: pathlib.Path, cache_dir: pathlib.Path, threads: int) -> Scan:
    """Looks at the files of `folder` and below that are new or changed since the last time.

    `InputError` where there is no such folder, or no image in it; an unreadable image is part of the result.
    """
    files, num_hidden, num_others, inner_links = _listing(folder)
    if not files:
        others = f" ({num_others:,} other files)" if num_others else ""
        raise InputError(f"there are no images in {folder}{others}; they end in {', '.join(ENDINGS)}")
    place = cache_dir / f"{cache.entry_name(f'scan of {folder.name}', SCAN_FORMAT, os.path.realpath(folder))}.json"
    known = _load(place)
    fresh = [file for file in files if known.get(file.name, ())[:3] != file]
    known |= {picture.name: picture for picture in _looked_at(folder, fresh, threads)}
    pictures = tuple(known[file.name] for file in files)
    if fresh or len(known) != len(pictures):
        cache.write_bytes(place, json.dumps(pictures).encode())
    return Scan(pictures, num_hidden, num_others, inner_links)


def _listing(folder: pathlib.Path) -> _Listing:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; set data.path (and data.evaluation_path) to a folder of images")
    root = os.path.realpath(folder)
    files, inner_links, num_hidden, num_others, seen = [], [], 0, 0, {root}
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=_raise):
        num_hidden += sum(name.startswith(".") for name in [*subfolders, *names])
        visible = sorted(name for name in subfolders if not name.startswith("."))
        subfolders.clear()
        for name in visible:
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            if real in seen or (os.path.islink(path) and _is_met(real, root)):
                inner_links.append(_relative(path, folder))
            else:
                seen.add(real)
                subfolders.append(name)
        visible = [name for name in names if not name.startswith(".")]
        images = [os.path.join(place, name) for name in visible if name.lower().endswith(ENDINGS)]
        num_others += len(visible) - len(images)
        for path in images:
            if (file := _file(path, folder, root)) is None:
                inner_links.append(_relative(path, folder))
            else:
                files.append(file)
    return _Listing(sorted(files), num_hidden, num_others, tuple(sorted(inner_links)))


def _is_met(real: str, root: str) -> bool:
    """Whether the walk comes to this place by itself. What lies in hidden folders it meets through links only."""
    place = pathlib.PurePath(real)
    return place.is_relative_to(root) and not any(part.startswith(".") for part in place.relative_to(root).parts)


def _relative(path: str, folder: pathlib.Path) -> str:
    return pathlib.PurePath(path).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}); make it readable or remove it") from error


def _file(path: str, folder: pathlib.Path, root: str) -> _File | None:
    """None for a link to an image that is listed under its own name."""
    name = _relative(path, folder)
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            status, real = os.stat(path), os.path.realpath(path)
            if real.lower().endswith(ENDINGS) and _is_met(real, root):
                return None
    except OSError:  # a broken link: reading it will say so
        return _File(name, 0, 0)
    return _File(name, status.st_size, status.st_mtime_ns)


def _load(place: pathlib.Path) -> dict[str, Picture]:
    """What is known of each name; nothing where it was not kept, or cannot be read."""
    try:
        return {values[0]: _picture(values) for values in json.loads(place.read_bytes())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError) as error:
        cache.say_damaged(place, str(error))
        return {}


def _picture(values: list) -> Picture:
    if [type(value) for value in values] != list(typing.get_type_hints(Picture).values()):
        raise ValueError("it is no list of pictures")
    return Picture(*values)


def _looked_at(folder: pathlib.Path, files: list[_File], threads: int) -> Iterator[Picture]:
    if not files:
        return
    progress = metrics.counting(f"looking at {folder} (once)", len(files))
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        for start in range(0, len(files), BLOCK):
            block = files[start : start + BLOCK]
            yield from pool.map(functools.partial(_look_at, folder), block)
            progress(start + len(block))


def _look_at(folder: pathlib.Path, file: _File) -> Picture:
    path = folder / file.name
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            return Picture(*file, "", 0, 0, 0, "is a pipe, a socket or a device and no file")
        content = path.read_bytes()
    except OSError as error:
        return Picture(*file, "", 0, 0, 0, f"cannot be read ({error.strerror})")
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        return Picture(*file, digest, *inspect(content), "")
    except Unreadable as error:
        return Picture(*file, digest, *Stored(0, 0, 0), str(error))
