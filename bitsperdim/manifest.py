"""The manifest of a checkpoint: which files belong to it, their sha256, and what they hold.

It is written last, in one atomic step, so its presence is the commit: a folder without one is a save that never ended.
It is checked before the data are used, because Orbax restores flipped bits without noticing.
Not here: which checkpoints are kept, and the reading and writing of arrays (`checkpoint.py`).
"""

import dataclasses
import hashlib
import json

from etils import epath

from bitsperdim import atomic

FILE = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`data` is the folder of the array files beside the manifest; paths in `files` start there."""

    step: int
    data: str
    metrics: dict[str, float]
    arrays: dict[str, str]  # 'params/encoder/kernel' -> 'float32[3,3,16,32]'
    files: dict[str, tuple[int, str]]  # path -> bytes, sha256 in hexadecimal


class Damaged(Exception):
    """A checkpoint is not what was written; the text names the file and what is wrong with it."""


def hash_files(data: epath.Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file under `data`. Each is first brought to the disk, which Orbax does not wait for."""
    return {str(path.relative_to(data)): hash_file(path, flush=True) for path in _files(data)}


def write(folder: epath.Path, manifest: Manifest) -> None:
    """Commits the checkpoint in `folder`; an older manifest is replaced at once."""
    content = dataclasses.asdict(manifest)
    text = json.dumps({"sha256": _digest(content), **content}, indent=1)
    atomic.write_bytes(folder / FILE, text.encode())


def read(folder: epath.Path) -> Manifest:
    """Raises Damaged where the manifest cannot be read or fails its own checksum, FileNotFoundError without one."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text())
        digest = content.pop("sha256")
        content["files"] = {name: (size, checksum) for name, (size, checksum) in content["files"].items()}
        manifest = Manifest(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} is not a manifest ({error})") from error
    if digest != _digest(content):
        raise Damaged(f"{path} has changed since it was written")
    return manifest


def verify(folder: epath.Path) -> Manifest:
    """The manifest of the checkpoint in `folder`, once every file agrees with it. Raises Damaged where one does not."""
    manifest = read(folder)
    for name, expected in manifest.files.items():
        path = folder / manifest.data / name
        try:
            found = hash_file(path)
        except OSError as error:
            raise Damaged(f"{path} cannot be read ({error.strerror or error})") from error
        if found[0] != expected[0]:
            raise Damaged(f"{path} has {found[0]:,} of {expected[0]:,} bytes")
        if found[1] != expected[1]:
            raise Damaged(f"{path} has changed since it was written")
    return manifest


def _files(folder: epath.Path) -> list[epath.Path]:
    nested = ([path] if path.is_file() else _files(path) for path in sorted(folder.iterdir()))
    return [path for paths in nested for path in paths]


def hash_file(path: epath.Path, flush: bool = False) -> tuple[int, str]:
    """Size and sha256 of a file; with `flush` once it is on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType]
        size = file.tell()
        if flush:
            atomic.flush(file)
    return size, digest.hexdigest()


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
