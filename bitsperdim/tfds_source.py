"""Images of a TFDS data set, read without TensorFlow from array_record files and decoded once into a cache.

The folder `data_dir/name[/configuration]/version` describes itself (`dataset_info.json`), so a data set need not be in
the catalogue of TFDS. `tensorflow_datasets` is imported only where the cache has no copy of the split.

Not here: TFRecord files, resizing, and images of unequal sizes.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8

from bitsperdim import cache
from bitsperdim.errors import InputError
from bitsperdim.sources import Source

NAME = re.compile(r"(\w+(?:/[\w.-]+)?)(?::(\d+\.\d+\.\d+))?")  # data set with its configuration; version
VERSION = re.compile(r"\d+\.\d+\.\d+")
CHUNK = 500  # records decoded between two lines of progress
CACHE_FORMAT = 1  # raise when the meaning of the cached arrays changes


class Folder(NamedTuple):
    """One prepared version of a data set."""

    path: epath.Path
    title: str  # 'celeb_a_hq/64:2.0.0'
    info: dict  # of dataset_info.json
    digest: str  # of the text of dataset_info.json


def open_tfds(name: str, split: str, data_dir: str, image_size: int, cache_dir: str) -> Source:
    """A split (or sub-split such as 'train[:90%]') of `name`, which may carry a configuration and a version.

    `image_size` 0 takes the images as they are stored. Values of `binarized_mnist` are 0 and 1 (2 levels), those of
    all others 0..255. `InputError` names what is missing or unreadable.
    """
    folder = find(name, data_dir)
    _check_format(folder)
    _check_split_exists(folder, split)
    levels = 2 if folder.title.startswith("binarized_mnist:") else 256
    title = f"{folder.title} {split}"
    place = pathlib.Path(cache_dir).expanduser() / _cache_name(folder, split)
    cached = cache.load(place)
    if cached is None:
        _decode(folder, split, image_size, levels, place)
        cached = cache.load(place)
        assert cached is not None  # it was renamed into place just now
    height, width, channels = cached.images.shape[1:]
    _check_size(title, height, width, image_size)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        examples = {"image": cached.images[indices]}
        if cached.labels is not None:
            examples["label"] = cached.labels[indices]
        return examples

    return Source(title, len(cached.images), (height, width, channels), levels, cached.num_classes, read)


def find(name: str, data_dir: str) -> Folder:
    """The folder of `name` in `data_dir`; the newest version where `name` gives none."""
    dataset, wanted = parse_name(name)
    root = epath.Path(data_dir).expanduser()
    unversioned = root / dataset
    versions = _versions(unversioned)
    if not versions:
        raise _missing(dataset, root, unversioned)
    version = wanted or versions[-1]
    if version not in versions:
        raise InputError(f"version {version} of '{dataset}' is not in {root}; present: {', '.join(versions)}")
    path = unversioned / version
    text = (path / "dataset_info.json").read_text()
    try:
        info = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path / 'dataset_info.json'} is damaged ({error}); prepare the data set again") from error
    return Folder(path, f"{dataset}:{version}", info, hashlib.sha256(text.encode()).hexdigest())


def parse_name(name: str) -> tuple[str, str]:
    """'celeb_a_hq/64:2.0.0' -> ('celeb_a_hq/64', '2.0.0'); the version is '' where there is none. `ValueError`."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name must look like 'cifar10', 'celeb_a_hq/64' or 'cifar10:3.0.2', not '{name}'")
    return match[1], match[2] or ""


def _versions(folder: epath.Path) -> list[str]:
    """The prepared versions in a folder, oldest first."""
    names = [path.parent.name for path in folder.glob("*/dataset_info.json")] if folder.exists() else []
    versions = [name for name in names if VERSION.fullmatch(name)]
    return sorted(versions, key=lambda version: [int(number) for number in version.split(".")])


def _missing(dataset: str, root: epath.Path, folder: epath.Path) -> InputError:
    """What to say when `folder` holds no prepared version."""
    configurations = [path.name for path in _subfolders(folder) if _versions(path)]
    if configurations:
        return InputError(
            f"data set '{dataset}' in {root} has the configurations {', '.join(configurations)}; "
            f"set data.name='{dataset}/{configurations[0]}'"
        )
    present = [path.name for path in _subfolders(root)]
    there = f"(there: {', '.join(present)}) " if present else ""
    return InputError(
        f"data set '{dataset}' is not in {root} {there}and preparing it needs TensorFlow:\n"
        f'  pip install "bitsperdim[prepare]" && python -m bitsperdim.prepare {dataset} --data_dir={root}'
    )


def _subfolders(folder: epath.Path) -> list[epath.Path]:
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_format(folder: Folder) -> None:
    stored = folder.info.get("fileFormat", "tfrecord")  # folders older than the key hold TFRecord
    if stored != "array_record":
        raise InputError(
            f"{folder.path} holds {stored} files and only array_record can be read yet; prepare a copy elsewhere:\n"
            f'  pip install "bitsperdim[prepare]" && '
            f"python -m bitsperdim.prepare {folder.title.split(':')[0]} --data_dir=FOLDER"
        )


def _check_split_exists(folder: Folder, split: str) -> None:
    """Checks the names in `split` ('train', 'train[:90%]', 'train+test'); TFDS checks the brackets when it decodes."""
    sizes = {entry["name"]: sum(map(int, entry.get("shardLengths", []))) for entry in folder.info["splits"]}
    for part in split.split("+"):
        name = part.split("[")[0].strip()
        if name not in sizes:
            present = ", ".join(f"{known} ({size:,})" for known, size in sizes.items())
            raise InputError(f"{folder.title} in {folder.path} has no split '{name}'; present: {present}")


def _check_size(title: str, height: int, width: int, image_size: int) -> None:
    if image_size and (height, width) != (image_size, image_size):
        raise InputError(
            f"the images of {title} are {height}x{width} and data.image_size is {image_size}; "
            "images are not resized yet: set data.image_size=0"
        )


def _cache_name(folder: Folder, split: str) -> str:
    """Readable, and different for every split of every edition of a data set."""
    key = json.dumps([CACHE_FORMAT, folder.title, split, folder.digest])
    readable = re.sub(r"[^\w.]+", "-", f"{folder.title} {split}").strip("-")
    return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _decode(folder: Folder, split: str, image_size: int, levels: int, place: pathlib.Path) -> None:
    """Decodes one split into the cache at `place`."""
    import tensorflow_datasets as tfds  # seconds to import; a cached split does without

    title = f"{folder.title} {split}"
    builder: Any = tfds.builder_from_directory(folder.path)
    num_classes = _num_classes(folder, builder.info.features)
    try:
        size = builder.info.splits[split].num_examples
    except ValueError as error:
        raise InputError(f"split '{split}' of {folder.title}: {str(error).splitlines()[0]}") from error
    if size == 0:
        raise InputError(f"split '{split}' of {folder.title} is empty; choose another range")
    records = builder.as_data_source(split)
    chunks = _decoded_chunks(records, size, num_classes > 0, title, image_size, levels)
    cache.write(place, title, size, num_classes, chunks)


def _num_classes(folder: Folder, features: Any) -> int:
    """Of the feature 'label', 0 where there is none; `InputError` where there is no feature 'image'."""
    if "image" not in features:
        raise InputError(f"{folder.title} has no feature 'image'; its features: {', '.join(features)}")
    return getattr(features["label"], "num_classes", 0) if "label" in features else 0


def _decoded_chunks(
    records: Any, size: int, has_labels: bool, title: str, image_size: int, levels: int
) -> Iterator[cache.Chunk]:
    (first,) = _read_chunk(records, range(1), title)
    shape = first["image"].shape
    _check_size(title, shape[0], shape[1], image_size)
    for start in range(0, size, CHUNK):
        examples = _read_chunk(records, range(start, min(start + CHUNK, size)), title)
        for index, example in enumerate(examples, start):
            _check_image(example["image"], shape, f"record {index} of {title}", levels)
        images = np.stack([example["image"] for example in examples])
        labels = np.array([example["label"] if has_labels else 0 for example in examples], np.int32)
        yield cache.Chunk(images, labels)


def _read_chunk(records: Any, indices: range, title: str) -> list[dict]:
    # Decoders raise anything; whatever it was, the record is unreadable and must be named.
    try:
        return records.__getitems__(list(indices))
    except Exception as error:
        if len(indices) == 1:
            raise InputError(
                f"record {indices[0]} of {title} cannot be decoded ({error}); prepare the data set again"
            ) from error
        return [example for index in indices for example in _read_chunk(records, range(index, index + 1), title)]


def _check_image(image: UInt8[np.ndarray, "h w c"], shape: tuple[int, ...], record: str, levels: int) -> None:
    if image.shape != shape:
        raise InputError(
            f"{record} is {'x'.join(map(str, image.shape))} where those before it are {'x'.join(map(str, shape))}; "
            "only data sets with images of one size can be read yet"
        )
    if image.max() >= levels:
        raise InputError(f"{record} holds the value {image.max()} where values must be below {levels}")
