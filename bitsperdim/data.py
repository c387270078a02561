"""From a source of examples to batches on the devices, as a pure function of (seed, step).

There is no iterator state: a resumed run asks for batch(step) and gets what the unbroken run got, and each host reads
only the rows of its own devices. Images cross to the device as uint8.

Not here: the sources themselves (`sources.py`, `tfds_source.py`), noise and scaling (`dequantize.py`), and what is done
to images on the device (`augment.py`).
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int

from bitsperdim import sources
from bitsperdim.errors import InputError
from bitsperdim.sources import Source
from bitsperdim.tfds_source import open_tfds, parse_name

T = TypeVar("T")
SOURCES = ("photos", "digits", "synthetic", "tfds")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images a run sees. The keys `synthetic_*` describe the source 'synthetic' and nothing else."""

    source: str  # 'photos' | 'digits' | 'synthetic' | 'tfds'
    name: str = ""  # TFDS: 'cifar10', 'celeb_a_hq/64', 'cifar10:3.0.2'
    data_dir: str = ""  # '' -> $TFDS_DATA_DIR or ~/tensorflow_datasets
    train_split: str = "train"  # TFDS: sub-splits such as 'train[:90%]' work
    evaluation_split: str = "test"
    image_size: int = 0  # photos, synthetic: edge of the image; else 0 (as stored) or the stored size
    bits: int = 8  # fewer than 8 reduces the 256 levels to 2**bits
    cache_dir: str = ""  # '' -> $BITSPERDIM_CACHE or ~/.cache/bitsperdim
    synthetic_size: int = 4096  # number of examples
    synthetic_channels: int = 3
    synthetic_levels: int = 256
    synthetic_classes: int = 0  # 0: no labels

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, not '{self.source}'")
        if self.source == "tfds":
            parse_name(self.name)
        if self.image_size < 0:
            raise ValueError(f"image_size must be 0 (as stored) or an edge in pixels, not {self.image_size}")
        if self.source in ("photos", "synthetic") and self.image_size == 0:
            raise ValueError(f"image_size must be given for the source '{self.source}', not 0")
        if self.source == "digits" and self.image_size not in (0, 8):
            raise ValueError(f"image_size must be 0 or 8 for the source 'digits', not {self.image_size}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 1..8, not {self.bits}")
        if not 2 <= self.synthetic_levels <= 256:
            raise ValueError(f"synthetic_levels must lie in 2..256, not {self.synthetic_levels}")
        for key, least in (("synthetic_size", 1), ("synthetic_channels", 1), ("synthetic_classes", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, not {getattr(self, key)}")


def open_source(config: DataConfig, split: str) -> Source:
    """The split 'train' or 'evaluation' of the configured source, or, for TFDS, any split by its own name.

    `InputError` names what is missing; the first opening of a TFDS split decodes it into the cache.
    """
    source = _open_at_full_depth(config, split)
    return source if config.bits == 8 else sources.reduce_bits(source, config.bits)


def _open_at_full_depth(config: DataConfig, split: str) -> Source:
    if config.source == "photos":
        return sources.photos(config.image_size, split)
    if config.source == "digits":
        return sources.digits(split)
    if config.source == "synthetic":
        shape = (config.image_size, config.image_size, config.synthetic_channels)
        size, levels, num_classes = config.synthetic_size, config.synthetic_levels, config.synthetic_classes
        return sources.synthetic(split, size, shape, levels, num_classes)
    split = {"train": config.train_split, "evaluation": config.evaluation_split}.get(split, split)
    data_dir = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    cache_dir = config.cache_dir or os.environ.get("BITSPERDIM_CACHE") or "~/.cache/bitsperdim"
    return open_tfds(config.name, split, data_dir, config.image_size, cache_dir)


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


def train_batch(source: Source, seed: int, step: int, batch_size: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Batch `step` of a run: the fields of the source, and `position`, the index (int32) within the global batch.

    A function of (seed, step) alone, whatever the devices and hosts. `sharding` lays out the leading axis;
    `InputError` where it does not divide `batch_size`.
    """
    _check_divisible(batch_size, sharding)
    indices = train_indices(source.size, seed, step * batch_size, batch_size)

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        return source.read(indices[rows]) | {"position": rows.astype(np.int32)}

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

    An exception of `make` is raised where its result would have come. Closing the generator drops what is not yet begun
    and waits for the one call under way, so no thread outlives it.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        ahead = collections.deque(executor.submit(make, step) for step in range(start, min(start + depth, stop)))
        for step in range(start + depth, stop + depth):
            result = ahead.popleft().result()
            if step < stop:
                ahead.append(executor.submit(make, step))
            yield result
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
