"""Images of a folder and the folders in it, as sources for training and evaluation.

A hash of each image's relative name chooses the split 'test', where one is asked, and the evaluation split, where that
has no folder of its own: adding images never moves another one from one split to the other. Where labels are asked, an
image's class is the folder of the first level that it lies in.

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
SPLITS = ("train", "evaluation", "test")
SHOWN = 3  # of what is harmless and may be much, so many are named


class Folder(NamedTuple):
    """Which files are images of which split."""

    path: str
    evaluation_path: str = ""  # '': evaluation_fraction of the images in `path`
    evaluation_fraction: float = 0.1
    test_fraction: float = 0.0  # of the images in `path`
    labels: bool = False
    skip_unreadable: bool = False


def open_folder(folder: Folder, split: str, preparation: Preparation, storage: Storage) -> Source:
    """The split 'train', 'evaluation' or, where it has a share, 'test'.

    Height and width 0 of `preparation`: as stored, all alike. Every file is read and checked at the first opening.
    `InputError` names all files that cannot be taken.
    """
    if split not in SPLITS:
        raise InputError(f"source 'folder' has the splits {', '.join(SPLITS)}, not '{split}'")
    if split == "test" and not folder.test_fraction:
        raise InputError("source 'folder' has no split 'test' where data.test_fraction is 0; set it, to 0.1 say")
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
    if root == path:
        pictures = _of_split(folder, pictures, split)
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
            reason = f"was there and cannot be read now ({error.strerror})"
            raise InputError(f"{shown(path)} {reason}; start again") from error

    describe = lambda index: shown(root / pictures[index].name)
    encode = Encoded(title, len(pictures), LEVELS, len(classes), preparation, fetch, describe, "start again")
    key = cache.entry_name(f"{root.name} {split}", decode.FORMAT, fingerprint, preparation)
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
    bad = [f"{shown(root / picture.name)} {picture.problem}" for picture in scan.pictures if picture.problem]
    if bad and not skip_unreadable:
        remedy = f"remove {'it' if len(bad) == 1 else 'them'} or set data.skip_unreadable=true"
        raise _refusal(f"of {root} cannot be read", bad, remedy)
    good = [picture for picture in scan.pictures if not picture.problem]
    ignored = f"{scan.num_hidden:,} hidden and {scan.num_others:,} other files ignored"
    lines = [f"{root}: {len(good):,} images; {ignored}", *(f"  left out: {line}" for line in bad)]
    if scan.inner_links:
        named = ", ".join(shown(name) for name in scan.inner_links[:SHOWN])
        more = ", ..." if len(scan.inner_links) > SHOWN else ""
        lines.append(f"  {len(scan.inner_links):,} links to what counts under its own name ignored ({named}{more})")
    _say_once("\n".join(lines))
    if not good:
        raise InputError(f"none of the {len(bad):,} images in {root} can be read")
    return good


@functools.cache  # a run opens a split several times
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _refusal(what: str, lines: list[str], remedy: str) -> InputError:
    """One line for one file; for several a head with the remedy, and a line for each."""
    if len(lines) == 1:
        return InputError(f"{lines[0]}; {remedy}")
    return InputError("\n  ".join([f"{len(lines):,} files {what}; {remedy}:", *lines]))


def shown(name: str | pathlib.Path) -> str:
    """A name for a message of one line: it may hold anything, line breaks too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def _of_split(folder: Folder, pictures: list[Picture], split: str) -> list[Picture]:
    """Of the pictures in `path`."""
    evaluation = 0.0 if folder.evaluation_path else folder.evaluation_fraction
    chosen = [picture for picture in pictures if split_of(picture.name, evaluation, folder.test_fraction) == split]
    if not chosen:
        remedy = f"data.evaluation_fraction={evaluation} or set data.evaluation_path"
        if split == "test" or folder.evaluation_path:
            remedy = f"data.test_fraction={folder.test_fraction}"
        raise InputError(
            f"none of the {len(pictures):,} images in {folder.path} is in the split {split}; change {remedy}"
        )
    return chosen


def split_of(name: str, evaluation_fraction: float, test_fraction: float = 0.0) -> str:
    """The same on every machine; 'evaluation' and 'test' for about these shares of all names."""
    # File systems of macOS may decompose accents; the same file then has another spelling.
    spelled = unicodedata.normalize("NFC", name).encode(errors="surrogateescape")
    place = int.from_bytes(hashlib.blake2b(spelled, digest_size=8).digest(), "little")
    if place < evaluation_fraction * 2**64:
        return "evaluation"
    # From the other end, so that neither share moves the images of the other.
    return "test" if place >= (1 - test_fraction) * 2**64 else "train"


def _classes(path: pathlib.Path, pictures: list[Picture]) -> tuple[str, ...]:
    """The names of the folders that hold the training images, sorted: a label is a place in this list."""
    loose = [picture.name for picture in pictures if "/" not in picture.name]
    if loose:
        raise InputError(
            f"{shown(path / loose[0])} has no label, since it lies in no sub-folder ({len(loose):,} such images); "
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
            f"{shown(root / picture.name)} is of no class of the training images ({shown(', '.join(classes[:10]))}); "
            "remove it or set data.labels=false"
        )
    return classes.index(name)


def _check_fit(root: pathlib.Path, pictures: list[Picture], preparation: Preparation) -> None:
    """`InputError` with every image that the preparation refuses."""
    bad, remedies = [], {}  # as a dictionary in the order in which they are met
    for picture in pictures:
        try:
            decode.check_depth(picture.depth, preparation)
            decode.check_size(picture.height, picture.width, preparation)
        except Unfit as error:
            bad.append(f"{shown(root / picture.name)} {error.problem}")
            remedies[error.remedy] = None
    if bad:
        raise _refusal(f"of {root} do not fit", bad, "; ".join(remedies))


def _fingerprint(pictures: list[Picture], classes: tuple[str, ...]) -> str:
    """Of the names and contents, so that a copy of the folder elsewhere has the same."""
    listed = json.dumps([[(picture.name, picture.digest) for picture in pictures], classes])
    return hashlib.sha256(listed.encode()).hexdigest()
