"""Images of a TFDS data set, read without TensorFlow from array_record or TFRecord files.

The folder `data_dir/name[/configuration]/version` describes itself (`dataset_info.json`), so a data set need not be in
the catalogue of TFDS. `tensorflow_datasets` is imported only where the cache has no copy of the split.

Not here: how images are decoded, resized and cached (`decode.py`, `encoded.py`), the framing of TFRecord
(`tfrecord.py`), and making the files, which mostly needs TensorFlow (`prepare.py`).
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from bitsperdim import cache, decode, encoded, prepare, tfrecord
from bitsperdim.decode import Preparation
from bitsperdim.encoded import Encoded, Storage
from bitsperdim.errors import InputError
from bitsperdim.sources import Source

NAME = re.compile(r"(\w+(?:/[\w.-]+)?)(?::(\d+\.\d+\.\d+))?")  # data set with its configuration; version
VERSION = re.compile(r"\d+\.\d+\.\d+")
FORMATS = ("array_record", "tfrecord")
INDEX_FORMAT = 2  # raise when the meaning of an index of shards changes


class Folder(NamedTuple):
    """One prepared version of a data set."""

    path: epath.Path
    title: str  # 'celeb_a_hq/64:2.0.0'
    info: dict  # of dataset_info.json
    digest: str  # of the text of dataset_info.json


def open_tfds(
    name: str, split: str, data_dir: str, preparation: Preparation, storage: Storage, download: bool = False
) -> Source:
    """A split (or sub-split such as 'train[:90%]') of `name`, which may carry a configuration and a version.

    Height and width 0 of `preparation` take the images as they are stored, channels 0 those that the data set declares.
    Values of `binarized_mnist` are 0 and 1 (2 levels), those of all others 0..255. `InputError` names what is missing
    or unreadable.
    """
    folder = find(name, data_dir, download)
    _check_format(folder)
    _check_split_exists(folder, split)
    levels = _levels(parse_name(folder.title)[0])
    title = f"{folder.title} {split}"
    # Rotation is not applied: TFDS and TensorFlow do not, and published figures are on pixels as they are stored.
    preparation = preparation._replace(upright=False)
    key = cache.entry_name(title, decode.FORMAT, folder.digest, preparation)
    open_encoded = lambda: _open_encoded(folder, split, levels, preparation, storage)
    return encoded.open_source(title, levels, key, open_encoded, storage)


def described(name: str, data_dir: str) -> tuple[tuple[int, int, int], int, int]:
    """Shape (0 where images differ, or nobody says), levels and classes of a data set.

    From its folder in `data_dir`, or else from TFDS's own description, without any image. `InputError` where there is
    neither.
    """
    import tensorflow_datasets as tfds

    dataset, _ = parse_name(name)
    try:
        _, features = _open_builder(find(name, data_dir))
    except InputError as error:
        try:
            features: Any = tfds.builder(dataset).info.features
        except Exception:  # TFDS raises anything
            raise error from None
    num_classes = getattr(features["label"], "num_classes", 0) if "label" in features else 0
    height, width, channels = (size or 0 for size in features["image"].shape)
    return (height, width, channels), _levels(dataset), num_classes or 0


def _levels(dataset: str) -> int:
    return 2 if dataset == "binarized_mnist" else 256


def find(name: str, data_dir: str, download: bool = False) -> Folder:
    """The folder of `name` in `data_dir`; the newest version where `name` gives none.

    With `download`, a data set that is not there is prepared, where that works without TensorFlow or it is installed.
    """
    dataset, wanted = parse_name(name)
    root = epath.Path(data_dir).expanduser()
    unversioned = root / dataset
    versions = _versions(unversioned)
    if not versions:
        _fetch(name, root, download)
        versions = _versions(unversioned)
    version = wanted or versions[-1]
    if version not in versions:
        raise InputError(f"version {version} of '{dataset}' is not in {root}; present: {', '.join(versions)}")
    path = unversioned / version
    info, digest = _described(path / "dataset_info.json")
    return Folder(path, f"{dataset}:{version}", info, digest)


def _described(file: epath.Path) -> tuple[dict, str]:
    """The content of dataset_info.json, of which the splits are checked, and its digest."""
    try:
        content = file.read_bytes()
        info = json.loads(content)
        _check_splits(info)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); prepare the data set again") from error
    return info, hashlib.sha256(content).hexdigest()


def _check_splits(info: Any) -> None:
    if not isinstance(info, dict) or not isinstance(info.get("splits"), list):
        raise ValueError("it has no list of splits")
    for split in info["splits"]:
        if not isinstance(split, dict) or not isinstance(split.get("name"), str):
            raise ValueError("one of its splits has no name")
        lengths = split.get("shardLengths", [])
        if not isinstance(lengths, list) or not all(str(length).isdecimal() for length in lengths):
            raise ValueError(f"the shardLengths of its split '{split['name']}' are no numbers")


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


def _fetch(name: str, root: epath.Path, download: bool) -> None:
    """Prepares a data set of which `root` holds no version, or says why not."""
    dataset, _ = parse_name(name)
    base, _, configuration = dataset.partition("/")
    _check_above(root, base, dataset)
    configurations = [path.name for path in _subfolders(root / base) if _versions(path)]
    if configurations and not (configuration and download):
        lacks = f" and no '{configuration}'" if configuration else ""
        raise InputError(
            f"data set '{base}' in {root} has the configurations {', '.join(configurations)}{lacks}; "
            f"set data.name='{base}/{configurations[0]}'"
        )
    if configuration and (versions := _versions(root / base)):
        instead = f"{base}:{configuration}" if configuration in versions else base
        raise InputError(
            f"data set '{base}' in {root} has no configurations, so no '{configuration}'; set data.name='{instead}'"
        )
    present = [f"{base}/{name}" for name in configurations]
    present = present or [path.name for path in _subfolders(root) if path.name != "downloads"]
    missing = f"data set '{dataset}' is not in {root} " + (f"(there: {', '.join(present)}) " if present else "")
    command = f'  pip install "bitsperdim[prepare]" && python -m bitsperdim.prepare {name} --data_dir={root}'
    if not download:
        raise InputError(f"{missing}and data.download=False forbids to fetch it:\n{command}")
    try:
        prepare.fetch(name, root)
    except prepare.WrongName as error:
        raise InputError(f"{missing}and {error}; set another data.name") from error
    except prepare.Unprepared as error:
        raise InputError(f"{missing}and {error}:\n{command}") from error


def _check_above(root: epath.Path, base: str, dataset: str) -> None:
    """`InputError` where `root` is no folder of data sets, but a file or the data set itself."""
    if root.exists() and not root.is_dir():
        raise InputError(f"data.data_dir {root} is a file; set it to the folder that holds the data sets")
    for place in (root, *root.parents):
        if place.name == base and _versions(place.parent / dataset):
            raise InputError(
                f"data.data_dir {root} is the data set '{dataset}' itself; give the folder above, {place.parent}"
            )


def _subfolders(folder: epath.Path) -> list[epath.Path]:
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _file_format(folder: Folder) -> str:
    return folder.info.get("fileFormat", "tfrecord")  # folders older than the key hold TFRecord


def _check_format(folder: Folder) -> None:
    if _file_format(folder) not in FORMATS:
        raise InputError(
            f"{folder.path} holds {_file_format(folder)} files and only {' and '.join(FORMATS)} can be read; "
            "prepare a copy elsewhere:\n"
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


def _open_encoded(folder: Folder, split: str, levels: int, preparation: Preparation, storage: Storage) -> Encoded:
    """The records of a split, of which only image and label are parsed, and the image is not yet decoded."""
    import tensorflow_datasets as tfds  # seconds to import; a cached split does without

    title = f"{folder.title} {split}"
    builder, features = _open_builder(folder)
    preparation = preparation._replace(channels=_channels(folder, features, preparation.channels))
    if levels != 256:
        _check_not_resized(folder, features["image"].shape, preparation)
    num_classes = getattr(features["label"], "num_classes", 0) if "label" in features else 0
    parts, size = _parts(folder, builder, split)
    read = _open_records(folder, builder, split, parts, storage)
    parsed: Any = tfds.features.FeaturesDict({name: features[name] for name in ("image", "label") if name in features})
    decoders = {"image": tfds.decode.SkipDecoding()}

    def fetch(index: int) -> tuple[bytes, int]:
        try:
            example = parsed.deserialize_example_np(read(index), decoders=decoders)
            return example["image"], int(example["label"]) if num_classes else 0
        except InputError:  # names the record already
            raise
        except Exception as error:  # parsers raise anything; whatever it was, the record must be named
            raise InputError(
                f"record {index} of {title} cannot be read ({error}); prepare the data set again"
            ) from error

    describe = lambda index: f"record {index} of {title}"
    return Encoded(title, size, levels, num_classes, preparation, fetch, describe, "prepare the data set again")


def _open_builder(folder: Folder) -> tuple[Any, Any]:
    """TFDS's view of the folder, and its features. `InputError` names a description that cannot be understood."""
    import tensorflow_datasets as tfds

    file = folder.path / "features.json"
    try:
        if not json.loads(file.read_bytes()):
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is missing or damaged ({error}); prepare the data set again") from error
    try:
        builder: Any = tfds.builder_from_directory(folder.path)
        features = builder.info.features
        if not isinstance(features, tfds.features.FeaturesDict):
            raise ValueError("its features have no names")
    except Exception as error:  # TFDS raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"{file} or dataset_info.json beside it is damaged ({reason}); prepare the data set again"
        ) from error
    return builder, features


def _channels(folder: Folder, features: Any, asked: int) -> int:
    """`asked`, or where it is 0 the declared number; `InputError` where the data set has no 8- or 16-bit 'image'."""
    if "image" not in features:
        raise InputError(f"{folder.title} has no feature 'image'; its features: {', '.join(sorted(features))}")
    image = features["image"]
    if not hasattr(image, "encoding_format") or image.np_dtype == np.float32:
        raise InputError(f"the feature 'image' of {folder.title} holds no compressed images of integers ({image})")
    declared = image.shape[-1]
    if not asked and declared not in (1, 3):
        raise InputError(
            f"images of {folder.title} are declared with {declared or 'an unknown number of'} channels; "
            "set data.channels to 1 or 3"
        )
    return asked or declared


def _check_not_resized(folder: Folder, stored: tuple[int | None, ...], preparation: Preparation) -> None:
    target = (preparation.height, preparation.width)
    if target not in ((0, 0), stored[:2]):
        raise InputError(
            f"images of {folder.title} hold only 0 and 1 and cannot be resized to {target[0]}x{target[1]}; "
            "set data.image_size=0"
        )


def _parts(folder: Folder, builder: Any, split: str) -> tuple[list[Any], int]:
    """The FileInstructions of TFDS (file, skip, take) that make a split, and its size."""
    try:
        parts = builder.info.splits[split].file_instructions
    except ValueError as error:
        raise InputError(f"split '{split}' of {folder.title}: {str(error).splitlines()[0]}") from error
    size = sum(part.take for part in parts)
    if size == 0:
        raise InputError(f"split '{split}' of {folder.title} is empty; choose another range")
    return parts, size


def _open_records(
    folder: Folder, builder: Any, split: str, parts: list[Any], storage: Storage
) -> Callable[[int], bytes]:
    """The serialized records of a split, by index."""
    if _file_format(folder) == "tfrecord":
        index_dir = storage.folder / cache.entry_name(f"{folder.title} index", INDEX_FORMAT, folder.digest)
        return tfrecord.open_records(parts, index_dir, storage.threads)
    import tensorflow_datasets as tfds

    for path in dict.fromkeys(epath.Path(part.filename) for part in parts):
        if path.is_dir() or not path.exists():
            raise InputError(f"the shard {path} is missing; prepare the data set again")
    try:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(split, deserialize_method=raw).__getitem__
    except Exception as error:  # a missing or damaged shard is met here or at the first record
        raise InputError(f"the shards of {folder.title} {split} in {folder.path} cannot be read ({error})") from error
