"""From a source of examples to batches on the devices, as a pure function of (seed, step).

There is no iterator state: a resumed run asks for batch(step) and gets what the unbroken run got, and each host reads
only the rows of its own devices. Images cross to the device as uint8.

Not here: the sources themselves (`sources.py`, `tfds_source.py`, `folder_source.py`), noise and scaling
(`dequantize.py`), and what is done to images on the device (`augment.py`).
"""

import dataclasses
import functools
import math
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int, UInt64

from bitsperdim import cache, decode, encoded, sources
from bitsperdim.config import at_least, one_of
from bitsperdim.decode import Preparation
from bitsperdim.encoded import Storage
from bitsperdim.errors import InputError
from bitsperdim.folder_source import Folder, open_folder
from bitsperdim.sources import Source
from bitsperdim.tfds_source import open_tfds, parse_name

T = TypeVar("T")
STORED = ("tfds", "folder")  # sources of images of any size
SOURCES = ("photos", "digits", "synthetic", *STORED)
# What becomes of such images. The other sources would not heed these keys.
PREPARATION = (
    *("image_height", "image_width", "channels", "crop_box"),
    *("resize", "resampling", "train_crop", "upscale", "reduce_16_bit"),
)
DRAWS = 2**64 - 1  # beside the seed in the key of random words; permutations have their epoch there


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images a run sees, and how they are brought to one size.

    The keys `synthetic_*` describe the source 'synthetic' and nothing else; `path` to `skip_unreadable` the source
    'folder'; `image_height` to `cache_limit_gib` the sources 'folder' and 'tfds'.
    """

    source: str  # 'photos' | 'digits' | 'synthetic' | 'tfds' | 'folder'
    name: str = ""  # TFDS: 'cifar10', 'celeb_a_hq/64', 'cifar10:3.0.2'
    data_dir: str = ""  # '' -> $TFDS_DATA_DIR or ~/tensorflow_datasets
    download: bool = True  # fetch a TFDS data set that is missing, where that works without TensorFlow
    train_split: str = "train"  # TFDS: sub-splits such as 'train[:90%]' work
    evaluation_split: str = "test"
    path: str = ""  # folder of images
    evaluation_path: str = ""  # '': a part of `path`, chosen by the names of the files
    evaluation_fraction: float = 0.1  # of the images in `path`, where there is no evaluation_path
    test_fraction: float = 0.0  # of the images in `path`, kept from both: open_source(config, 'test')
    skip_unreadable: bool = False  # leave out broken files, and list them
    labels: bool = False  # folder: classes from sub-folders; others: refuse a data set without labels
    image_size: int = 0  # edge of the image; 0 (as stored, all alike) is for digits, TFDS and folders
    image_height: int = 0  # both instead of image_size, where the image is not square
    image_width: int = 0
    channels: int = 0  # 1 (grey) | 3 (colour); 0: what a TFDS data set declares, 3 for a folder
    crop_box: tuple[int, ...] = ()  # (left, top, right, bottom) in stored pixels, cut out before resizing
    resize: str = "cover"  # 'cover': shrink until the image just covers the target | 'none': crop pixels as stored
    resampling: str = "lanczos"  # | 'area': means of pixel blocks
    train_crop: str = "centre"  # | 'random': another window in every epoch; evaluation is always at the centre
    upscale: bool = False  # enlarge images that are smaller than the target, which are refused otherwise
    reduce_16_bit: bool = False  # keep the upper 8 of 12 or 16 bits a channel, which are refused otherwise
    decode_threads: int = 0  # 0: one for each core, at most 16
    cache_limit_gib: float = 2.0  # splits of images beyond 64x64x3 are kept decoded up to this size; inf: all
    bits: int = 8  # fewer than 8 reduces the 256 levels to 2**bits
    binarize: str = ""  # to 2 levels: 'threshold' (above the middle) | 'dynamic' (drawn for each example and epoch)
    cache_dir: str = ""  # '' -> $BITSPERDIM_CACHE or ~/.cache/bitsperdim
    synthetic_size: int = 4096  # number of examples
    synthetic_channels: int = 3
    synthetic_levels: int = 256
    synthetic_classes: int = 0  # 0: no labels

    def __post_init__(self) -> None:
        one_of(self, source=SOURCES, binarize=("", "threshold", "dynamic"))
        for key in ("evaluation_fraction", "test_fraction", "cache_limit_gib"):
            if math.isnan(getattr(self, key)):
                raise ValueError(f"{key} must be a number, not nan")
        if self.source == "tfds":
            parse_name(self.name)
        if self.source == "folder":
            _check_folder(self)
        if self.source != "folder":
            _check_not_given(self, ["test_fraction"])
        if self.source not in STORED:
            sized = ("image_height", "image_width") if self.source == "synthetic" else ()  # noise has any shape
            _check_not_given(self, [key for key in PREPARATION if key not in sized])
        _check_target(self)
        _check_preparation(self)
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 1..8, not {self.bits}")
        if self.binarize and self.bits < 8:
            raise ValueError(f"bits must be 8 where binarize is '{self.binarize}', not {self.bits}")
        if not 2 <= self.synthetic_levels <= 256:
            raise ValueError(f"synthetic_levels must lie in 2..256, not {self.synthetic_levels}")
        at_least(self, 1, "synthetic_size", "synthetic_channels")
        at_least(self, 0, "synthetic_classes")


def _check_folder(config: DataConfig) -> None:
    if not config.path:
        raise ValueError("path must name a folder of images for the source 'folder', not ''")
    if not 0 < config.evaluation_fraction < 1:
        raise ValueError(f"evaluation_fraction must lie between 0 and 1, not {config.evaluation_fraction}")
    most = 1.0 if config.evaluation_path else 1.0 - config.evaluation_fraction
    if not 0 <= config.test_fraction < most:
        raise ValueError(f"test_fraction must be at least 0 and below {most:g}, not {config.test_fraction}")


def _check_not_given(config: DataConfig, keys: Iterable[str]) -> None:
    for key in keys:
        value, default = getattr(config, key), getattr(DataConfig, key)
        if value != default:
            raise ValueError(f"{key} must be {default!r} where the source is '{config.source}', not {value!r}")


def _check_target(config: DataConfig) -> None:
    """The size of the images."""
    if config.image_size < 0:
        raise ValueError(f"image_size must be 0 (as stored) or an edge in pixels, not {config.image_size}")
    if config.source in ("photos", "synthetic") and config.image_size == config.image_height == 0:
        raise ValueError(f"image_size must be given for the source '{config.source}', not 0")
    if config.source == "digits" and config.image_size not in (0, 8):
        raise ValueError(f"image_size must be 0 or 8 for the source 'digits', not {config.image_size}")
    for key, other in (("image_height", config.image_width), ("image_width", config.image_height)):
        value = getattr(config, key)
        if value < 0 or (value == 0 and other > 0):
            raise ValueError(f"{key} must be given in pixels together with the other edge, not {value}")
        if value and config.image_size:
            raise ValueError(f"{key} must be 0 where image_size is {config.image_size}, not {value}")


def _check_preparation(config: DataConfig) -> None:
    """How images are brought to the target."""
    if config.channels not in (0, 1, 3):
        raise ValueError(f"channels must be 0 (as declared), 1 or 3, not {config.channels}")
    box = config.crop_box
    if box and (len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3])):
        raise ValueError(f"crop_box must be (left, top, right, bottom) or (), not {box}")
    one_of(config, resize=("cover", "none"), resampling=decode.RESAMPLING, train_crop=("centre", "random"))
    if config.train_crop == "random" and not (config.image_size or config.image_height):
        raise ValueError("train_crop must be 'centre' where no image_size is given, not 'random'")
    at_least(config, 0, "decode_threads", "cache_limit_gib")


def open_source(config: DataConfig, split: str) -> Source:
    """The split 'train' or 'evaluation' of the configured source; of a folder also 'test', of TFDS any by its own name.

    `InputError` names what is missing or cannot be taken; the first opening of a split of small images decodes it into
    the cache.
    """
    source = _open_at_full_depth(config, split)
    if config.labels and not source.num_classes:
        raise InputError(f"{source.name} has no labels; set data.labels=false")
    if config.binarize:
        return sources.binarize(source, config.binarize)
    return source if config.bits == 8 else sources.reduce_bits(source, config.bits)


def _open_at_full_depth(config: DataConfig, split: str) -> Source:
    if config.source == "photos":
        return sources.photos(config.image_size, split)
    if config.source == "digits":
        return sources.digits(split)
    if config.source == "synthetic":
        shape = (*edges(config), config.synthetic_channels)
        size, levels, num_classes = config.synthetic_size, config.synthetic_levels, config.synthetic_classes
        return sources.synthetic(split, size, shape, levels, num_classes)
    preparation, storage = _preparation(config), _storage(config, split)
    if config.source == "folder":
        preparation = preparation._replace(channels=config.channels or 3)
        folder = Folder(
            config.path,
            config.evaluation_path,
            config.evaluation_fraction,
            config.test_fraction,
            config.labels,
            config.skip_unreadable,
        )
        return open_folder(folder, split, preparation, storage)
    split = {"train": config.train_split, "evaluation": config.evaluation_split}.get(split, split)
    return open_tfds(config.name, split, tfds_dir(config), preparation, storage, config.download)


def edges(config: DataConfig) -> tuple[int, int]:
    """Height and width that images are brought to; 0 where they stay as they are stored."""
    return config.image_height or config.image_size, config.image_width or config.image_size


def tfds_dir(config: DataConfig) -> str:
    return config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def _preparation(config: DataConfig) -> Preparation:
    height, width = edges(config)
    return Preparation(
        height=height,
        width=width,
        channels=config.channels,
        resize=config.resize,
        resampling=config.resampling,
        upscale=config.upscale,
        reduce_16_bit=config.reduce_16_bit,
        box=config.crop_box,
    )


def _storage(config: DataConfig, split: str) -> Storage:
    return Storage(
        folder=cache.location(config.cache_dir),
        limit_bytes=config.cache_limit_gib * 2**30,
        threads=encoded.num_threads(config.decode_threads),
        random_crops=config.train_crop == "random" and split == "train",
    )


def train_indices(size: int, seed: int, start: int, count: int) -> Int[np.ndarray, " count"]:
    """Examples at the positions start .. start + count - 1 of the endless training stream.

    Every epoch is its own permutation of all `size` examples. Nothing is dropped: batches run on across the ends of
    epochs.
    """
    epochs, offsets = np.divmod(np.arange(start, start + count), size)
    indices = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(size, seed, int(epoch))[offsets[here]]
    return indices


@functools.lru_cache(maxsize=2)  # the epoch under way, and the next where a batch crosses into it
def _permutation(size: int, seed: int, epoch: int) -> Int[np.ndarray, " size"]:
    # NumPy promises the raw stream of Philox to stay as it is; it makes no such promise for Generator.permutation.
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    permutation = np.argsort(raw, kind="stable")
    permutation.setflags(write=False)
    return permutation


def train_draws(seed: int, start: int, count: int) -> UInt64[np.ndarray, " count"]:
    """Random words at the positions start .. start + count - 1 of the training stream, for crops and binarisation."""
    words = np.random.Philox(key=np.array([seed, DRAWS], np.uint64), counter=start // 4)  # four words to a count
    return words.random_raw(start % 4 + count)[start % 4 :]


def train_batch(source: Source, seed: int, step: int, batch_size: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Batch `step` of a run: the fields of the source, and `position`, the index (int32) within the global batch.

    A function of (seed, step) alone, whatever the devices and hosts. `sharding` lays out the leading axis;
    `InputError` where it does not divide `batch_size`.
    """
    _check_divisible(batch_size, sharding)
    indices = train_indices(source.size, seed, step * batch_size, batch_size)

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        if source.read_drawn is None:
            examples = source.read(indices[rows])
        else:
            examples = source.read_drawn(indices[rows], train_draws(seed, step * batch_size, batch_size)[rows])
        return examples | {"position": rows.astype(np.int32)}

    return _global_batch(read, batch_size, sharding)


def evaluation_batches(source: Source, batch_size: int, sharding: NamedSharding) -> Iterator[dict[str, jax.Array]]:
    """Every example exactly once, in order: the fields of the source, `mask` and `position`.

    `position` (int32) is the index within the split. The last batch is filled up with copies of the last example, where
    `mask` is False and `position` goes on counting.
    """
    _check_divisible(batch_size, sharding)
    for start in range(0, source.size, batch_size):
        yield _global_batch(functools.partial(_read_masked, source, start), batch_size, sharding)


def _read_masked(source: Source, start: int, rows: Int[np.ndarray, " r"]) -> dict[str, np.ndarray]:
    position = start + rows
    examples = source.read(np.minimum(position, source.size - 1))
    return examples | {"mask": position < source.size, "position": position.astype(np.int32)}


def _check_divisible(batch_size: int, sharding: NamedSharding) -> None:
    # The number of shards of the leading axis divides the number of devices, so this shape always splits.
    num_shards = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    if batch_size < 1 or batch_size % num_shards:
        raise InputError(
            f"batch_size {batch_size} cannot be divided over {num_shards} devices; use a multiple of {num_shards}"
        )


def _global_batch(
    read: Callable[[np.ndarray], dict[str, np.ndarray]], batch_size: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] of which `read(rows)` gives the rows that this host's devices hold, each once."""
    if sharding.is_fully_addressable:
        return jax.device_put(read(np.arange(batch_size)), sharding)  # one call, not one a field
    return _from_this_host(read, batch_size, sharding)


def _from_this_host(
    read: Callable[[np.ndarray], dict[str, np.ndarray]], batch_size: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """This host's part of the global arrays."""
    everywhere = sharding.devices_indices_map((batch_size,))
    slices = {device: index[0] for device, index in everywhere.items() if device in sharding.addressable_devices}
    held = np.zeros(batch_size, bool)
    for rows in slices.values():
        held[rows] = True
    (local,) = np.nonzero(held)
    bounds = [rows.indices(batch_size)[:2] for rows in slices.values()]
    shards = [slice(*np.searchsorted(local, bound)) for bound in bounds]

    def place(values: np.ndarray) -> jax.Array:
        # `make_array_from_callback` would be shorter, but counts as an implicit transfer under `jax.transfer_guard`.
        pieces = jax.device_put([values[shard] for shard in shards], list(slices))
        return jax.make_array_from_single_device_arrays((batch_size, *values.shape[1:]), sharding, pieces)

    return {name: place(values) for name, values in read(local).items()}


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Generator[T, None, None]:
    """make(start), ..., make(stop - 1) in order, up to `depth` of them made ahead in one background thread.

    An exception of `make` is raised where its result would have come. Closing the generator waits for the call under
    way, so no thread outlives it.
    """
    # Two queues of the C library: an executor's futures take a tenth of a millisecond a step.
    results: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        for step in range(start, stop):
            room.get()
            if closed.is_set():
                return
            try:
                results.put((make(step), None))
            except BaseException as error:
                results.put((None, error))
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(depth):
            room.put(None)
        for _ in range(start, stop):
            result, error = results.get()
            if error is not None:
                raise error
            room.put(None)
            yield result  # pyright: ignore[reportReturnType]
    finally:
        closed.set()
        room.put(None)
        thread.join()
