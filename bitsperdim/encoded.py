"""From compressed images that can be read by index to a `Source`, the same way for TFDS records and files of a folder.

Splits of small images, and splits that are small as a whole, are decoded once into the cache (`cache.py`); all others,
and those that are cropped at random, are decoded by threads whenever they are read. Pillow lets go of the interpreter
while it decodes and resamples, so threads suffice.

Not here: how one image is decoded (`decode.py`), and reading ahead of the step (`data.prefetch`).
"""

import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from bitsperdim import cache
from bitsperdim.decode import Preparation, Unfit, Unreadable, decode
from bitsperdim.errors import InputError
from bitsperdim.sources import Source

Shape = tuple[int, int, int]  # height, width, channels
SMALL = 64 * 64 * 3  # bytes of an image that is always kept decoded
CHUNK_IMAGES, CHUNK_BYTES = 500, 2**26  # decoded between two lines of progress, whichever is less
TASK = 8  # images that a thread decodes in one go


class Encoded(NamedTuple):
    """The compressed images of one split, and what becomes of them."""

    title: str  # 'kodak:1.0.0 test'
    size: int
    levels: int
    num_classes: int  # 0 where there are no labels
    preparation: Preparation
    fetch: Callable[[int], tuple[bytes, int]]  # index -> content of the file, label (0 without classes); thread-safe
    describe: Callable[[int], str]  # index -> what messages call it: 'record 3 of kodak:1.0.0 test'
    remedy: str  # of an unreadable image: 'prepare the data set again'


class Storage(NamedTuple):
    """Where decoded splits are kept, up to which size, and what is decoded at each reading instead."""

    folder: pathlib.Path
    limit_bytes: float  # may be infinite
    threads: int
    random_crops: bool = False  # a training split whose crops differ from epoch to epoch: never kept


def num_threads(asked: int) -> int:
    """`asked`, or where it is 0 one for each core that this process may use, but not more than 16."""
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def open_source(title: str, levels: int, key: str, open_encoded: Callable[[], Encoded], storage: Storage) -> Source:
    """The split `title` as a source. The cache finds it by `key`, which names the content and its preparation.

    `open_encoded` is called only where the cache has no copy. `InputError` names an image that cannot be taken; of a
    split that is not kept, images other than the first are met when they are read.
    """
    place = storage.folder / key
    cached = None if storage.random_crops else cache.load(place)
    if cached is None:
        encoded = open_encoded()
        shape, num_bytes = _first(encoded)
        if storage.random_crops or (num_bytes > SMALL and num_bytes * encoded.size > storage.limit_bytes):
            return _decoded_at_each_reading(encoded, shape, storage)
        chunks = _chunks(encoded, shape, storage.threads)
        cache.write(place, title, encoded.size, encoded.num_classes, chunks)
        cached = cache.load(place)
        assert cached is not None  # it was renamed into place just now
    return _from_cache(title, levels, cached)


def _from_cache(title: str, levels: int, cached: cache.Images) -> Source:
    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        examples = {"image": cached.images[indices]}
        if cached.labels is not None:
            examples["label"] = cached.labels[indices]
        return examples

    size, height, width, channels = cached.images.shape
    return Source(title, size, (height, width, channels), levels, cached.num_classes, read)


def _decoded_at_each_reading(encoded: Encoded, shape: Shape, storage: Storage) -> Source:
    def read(indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        words = itertools.repeat(None) if draws is None else draws.tolist()
        # A pool of its own costs a reading less than a millisecond, and leaves no threads behind.
        with ThreadPoolExecutor(storage.threads, thread_name_prefix="decode") as pool:
            chunk = _decode_all(encoded, shape, np.asarray(indices).tolist(), words, pool)
        return {"image": chunk.images} | ({"label": chunk.labels} if encoded.num_classes else {})

    crops = read if storage.random_crops else None
    source = Source(encoded.title, encoded.size, shape, encoded.levels, encoded.num_classes, read)
    return source._replace(read_drawn=crops)


def _chunks(encoded: Encoded, shape: Shape, threads: int) -> Iterator[cache.Chunk]:
    step = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // math.prod(shape)))
    # Threads that decode tiny images spend their time waiting for Python's lock.
    with ThreadPoolExecutor(1 if math.prod(shape) <= SMALL else threads, thread_name_prefix="decode") as pool:
        for start in range(0, encoded.size, step):
            indices = range(start, min(start + step, encoded.size))
            yield _decode_all(encoded, shape, indices, itertools.repeat(None), pool)


def _decode_all(
    encoded: Encoded, shape: Shape, indices: Iterable[int], draws: Iterable[int | None], pool: ThreadPoolExecutor
) -> cache.Chunk:
    """The first image that cannot be taken, in the order of `indices`, is the one that is named."""
    pairs = list(zip(indices, draws, strict=False))
    # Several images a task: handing a tiny one to a thread takes longer than decoding it.
    tasks = [pairs[start : start + TASK] for start in range(0, len(pairs), TASK)]
    decode_task = lambda task: [_decode_one(encoded, shape, index, draw) for index, draw in task]
    images, labels = zip(*itertools.chain.from_iterable(pool.map(decode_task, tasks)), strict=True)
    return cache.Chunk(np.stack(images), np.array(labels, np.int32))


def _first(encoded: Encoded) -> tuple[Shape, int]:
    """Shape and bytes of every image, from the first one and the preparation."""
    image, _ = _decode_one(encoded, None, 0, None)
    height, width, channels = image.shape
    return (height, width, channels), image.nbytes


def _decode_one(
    encoded: Encoded, shape: Shape | None, index: int, draw: int | None
) -> tuple[UInt8[np.ndarray, "h w c"], int]:
    name = encoded.describe(index)
    content, label = encoded.fetch(index)
    try:
        image = decode(content, encoded.preparation, draw)
    except Unreadable as error:
        raise InputError(f"{name} {error}; {encoded.remedy}") from error
    except Unfit as error:
        raise InputError(f"{name} {error}") from error
    if shape is not None and image.shape != shape:
        raise InputError(
            f"{name} is {_by(image.shape)} where those before it are {_by(shape)}; "
            "set data.image_size (or image_height and image_width) to resize them"
        )
    if encoded.levels < 256 and image.max() >= encoded.levels:
        raise InputError(f"{name} holds the value {image.max()} where values must be below {encoded.levels}")
    return image, label


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
