"""Whole files or none: a reader, or a run that starts again after a crash, never meets a half-written file.

Not here: files that only grow (`metrics.py`) and the many files of a checkpoint (`manifest.py`).
"""

import os
from typing import IO

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store ('gs://...'), which cannot append to a file or map it into memory."""
    return "://" in os.fspath(path)


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Makes `content` the content of `path`, at once, and waits until it is on the disk.

    The bytes go to a sibling named `.tmp`, which then takes the place of `path`. In an object store renaming is a copy,
    but the write of one object is atomic by itself, so the detour does no harm.
    """
    temporary = path.parent / f"{path.name}.tmp"
    with temporary.open("wb") as file:
        file.write(content)
        flush(file)
    temporary.replace(path)


def flush(file: IO[bytes]) -> None:
    """Waits until an open file is on the disk, where a power failure cannot take it. Object stores do so on closing."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (AttributeError, OSError):  # not a local file
        return
    os.fsync(descriptor)
