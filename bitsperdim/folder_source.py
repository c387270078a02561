"""Images of a folder and the folders in it, as sources for training and evaluation.

Without a folder of its own, the evaluation split is chosen by a hash of each image's relative name: adding images never
moves another one from one split to the other. Where labels are asked, an image's class is the folder of the first level
that it lies in.

Not here: finding and checking the files (`folder_scan.py`), decoding them (`decode.py`), cache and threads
(`encoded.py`).
"""

import functools
import hashlib
import json
import pathlib
import sys
import unicodedata
from typing import NamedTuple

from bitsperdim import cache, decode, encoded, folder_scan
from bitsperdim.decode import Preparation, Unfit
from bitsperdim.encoded import Encoded, Storage
from bitsperdim.errors import InputError
from bitsperdim.folder_scan import Picture, Scan
from bitsperdim.sources import Source

LEVELS = 256
REMEDY = "remove it or set data.skip_unreadable=true"


class Folder(NamedTuple):
    """Which files are images of which split."""

    path: str
    evaluation_path: str = ""  # '': evaluation_fraction of the images in `path`
    evaluation_fraction: float = 0.1
    labels: bool = False
    skip_unreadable: bool = False


def open_folder(folder: Folder, split: str, preparation: Preparation, storage: Storage) -> Source:
    """The split 'train' or 'evaluation'. Height and width 0 of `preparation`: as stored, all alike.

    Every file is read and checked at the first opening. `InputError` names all files that cannot be taken.
    """
    if split not in ("train", "evaluation"):
        raise InputError(f"source 'folder' has the splits train and evaluation, not '{split}'")
    path = pathlib.Path(folder.path).expanduser()
    own = pathlib.Path(folder.evaluation_path).expanduser() if folder.evaluation_path else None
    if own is not None:
        _check_apart(path, own)
    root = own if own is not None and split == "evaluation" else path
    pictures = _readable(root, folder_scan.scan(root, storage.folder, storage.threads), folder.skip_unreadable)
    classes: tuple[str, ...] = ()
    if folder.labels:
        train = pictures if root == path else folder_scan.scan(path, storage.folder, storage.threads).pictures
        classes = _classes(path, [picture for picture in train if not picture.problem])
    if own is None:
        pictures = _of_split(path, pictures, split, folder.evaluation_fraction)
    _check_fit(root, pictures, preparation)
    return _source(root, pictures, classes, split, preparation, storage)


def _source(
    root: pathlib.Path,
    pictures: list[Picture],
    classes: tuple[str, ...],
    split: str,
    preparation: Preparation,
    storage: Storage,
) -> Source:
    labels = [_label(root, picture, classes) for picture in pictures]
    fingerprint = _fingerprint(pictures, classes)
    title = f"{root} {split}"

    def fetch(index: int) -> tuple[bytes, int]:
        path = root / pictures[index].name
        try:
            return path.read_bytes(), labels[index]
        except OSError as error:
            raise InputError(f"{path} was there and cannot be read now ({error.strerror}); start again") from error

    describe = lambda index: str(root / pictures[index].name)
    encode = Encoded(title, len(pictures), LEVELS, len(classes), preparation, fetch, describe, "start again")
    key = cache.entry_name(f"{root.name} {split}", fingerprint, preparation)
    source = encoded.open_source(title, LEVELS, key, lambda: encode, storage)
    return source._replace(fingerprint=fingerprint, class_names=classes)


def _check_apart(path: pathlib.Path, own: pathlib.Path) -> None:
    inner, outer = own.resolve(), path.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise InputError(
            f"data.evaluation_path {own} and data.path {path} hold the same files; "
            "set data.evaluation_path to a folder apart, or to '' for a split by evaluation_fraction"
        )


def _readable(root: pathlib.Path, scan: Scan, skip_unreadable: bool) -> list[Picture]:
    """The pictures that can be read. The others are named: in an `InputError`, or on stderr where they are skipped."""
    bad = [f"{root / picture.name} {picture.problem}" for picture in scan.pictures if picture.problem]
    if bad and not skip_unreadable:
        raise _refusal(f"of {root} cannot be read; remove them or set data.skip_unreadable=true", bad, f"; {REMEDY}")
    good = [picture for picture in scan.pictures if not picture.problem]
    ignored = f"{scan.num_hidden:,} hidden and {scan.num_others:,} other files ignored"
    _say_once(f"{root}: {len(good):,} images; {ignored}" + "".join(f"\n  left out: {line}" for line in bad))
    if not good:
        raise InputError(f"none of the {len(bad):,} images in {root} can be read")
    return good


@functools.cache  # a run opens a split several times
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _refusal(what: str, lines: list[str], remedy: str = "") -> InputError:
    """One line for one file; for several a head and a line for each."""
    if len(lines) == 1:
        return InputError(lines[0] + remedy)
    return InputError("\n  ".join([f"{len(lines):,} files {what}:", *lines]))


def _of_split(path: pathlib.Path, pictures: list[Picture], split: str, fraction: float) -> list[Picture]:
    chosen = [picture for picture in pictures if is_for_evaluation(picture.name, fraction) == (split == "evaluation")]
    if not chosen:
        raise InputError(
            f"none of the {len(pictures):,} images in {path} is in the split {split}; "
            f"change data.evaluation_fraction={fraction} or set data.evaluation_path"
        )
    return chosen


def is_for_evaluation(name: str, fraction: float) -> bool:
    """The same on every machine, for about `fraction` of all names."""
    # File systems of macOS may decompose accents; the same file then has another spelling.
    spelled = unicodedata.normalize("NFC", name).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(spelled, digest_size=8).digest(), "little") < fraction * 2**64


def _classes(path: pathlib.Path, pictures: list[Picture]) -> tuple[str, ...]:
    """The names of the folders that hold the training images, sorted: a label is a place in this list."""
    loose = [picture.name for picture in pictures if "/" not in picture.name]
    if loose:
        raise InputError(
            f"{path / loose[0]} has no label, since it lies in no sub-folder ({len(loose):,} such images); "
            "move them or set data.labels=false"
        )
    return tuple(sorted({picture.name.split("/")[0] for picture in pictures}))


def _label(root: pathlib.Path, picture: Picture, classes: tuple[str, ...]) -> int:
    """0 where there are no classes."""
    if not classes:
        return 0
    name = picture.name.split("/")[0]
    if name not in classes:
        raise InputError(
            f"{root / picture.name} is of no class of the training images ({', '.join(classes[:10])}); "
            "remove it or set data.labels=false"
        )
    return classes.index(name)


def _check_fit(root: pathlib.Path, pictures: list[Picture], preparation: Preparation) -> None:
    """`InputError` with every image that the preparation refuses."""
    bad = []
    for picture in pictures:
        try:
            decode.check_depth(picture.is_16_bit, preparation)
            decode.check_size(picture.height, picture.width, preparation)
        except Unfit as error:
            bad.append(f"{root / picture.name} {error}")
    if bad:
        raise _refusal(f"of {root} do not fit", bad)


def _fingerprint(pictures: list[Picture], classes: tuple[str, ...]) -> str:
    """Of the names and contents, so that a copy of the folder elsewhere has the same."""
    listed = json.dumps([[(picture.name, picture.digest) for picture in pictures], classes])
    return hashlib.sha256(listed.encode()).hexdigest()
