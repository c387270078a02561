"""Where examples come from: the `Source` record, and the sources that need neither a network nor TFDS.

Not here: TFDS data sets (`tfds_source.py`), folders of images (`folder_source.py`), the choice between sources and the
batches made from them (`data.py`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, UInt32

from bitsperdim.errors import InputError

T = TypeVar("T")
# Columns of each photograph that are held out: an edge and a side of the pavilion, a half of the flower, sky and trees.
PHOTO_EVALUATION_STRIPS = ((96, 176), (320, 400))
PHOTO_STRIDES = {"train": 4, "evaluation": 8}
DIGITS_EVALUATION_SIZE = 360
TOSSES = 2**64 - 2  # beside an example's word in the key of its binarisation


class Source(NamedTuple):
    """A finite, ordered set of examples that can be read by index."""

    name: str  # for messages and records: 'cifar10:3.0.2 train[:90%]'
    size: int  # number of examples
    shape: tuple[int, int, int]  # height, width, channels
    levels: int  # values are the integers 0 .. levels - 1
    num_classes: int  # 0 where there are no labels
    read: Callable[[np.ndarray], dict[str, np.ndarray]]  # indices -> {'image': uint8 NHWC, 'label': int32 if any}; pure
    # (indices, uint64 words) -> as `read`, each image cropped or binarised as its random word says; None: as `read`.
    read_drawn: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]] | None = None
    fingerprint: str = ""  # of the stored images, where they may change between two starts of a run: a folder
    class_names: tuple[str, ...] = ()  # by label, where they are known


def reduce_bits(source: Source, bits: int) -> Source:
    """The same images on 2**bits levels: x -> floor(x / 2**(8 - bits)). `InputError` unless `source` has 256 levels."""
    if source.levels != 256:
        raise InputError(
            f"{source.name} has {source.levels} levels and bits reduces from 256 only; leave data.bits at 8, not {bits}"
        )

    def reduced(examples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return examples | {"image": examples["image"] >> (8 - bits)}

    read, drawn = source.read, source.read_drawn
    return source._replace(
        name=f"{source.name}, {bits} bits",
        levels=2**bits,
        read=lambda indices: reduced(read(indices)),
        read_drawn=drawn and (lambda indices, draws: reduced(drawn(indices, draws))),
    )


def binarize(source: Source, how: str) -> Source:
    """The same images on 2 levels. `InputError` where there are no more already.

    'threshold': 1 where a value lies above the middle of its levels (of 256: above 127).
    'dynamic': 1 with probability x / (L - 1), each value by itself (Salakhutdinov & Murray 2008). A training batch
    draws from the words of `read_drawn`, anew in every epoch; `read`, and so every evaluation, draws once for all, from
    the index alone.
    """
    if source.levels == 2:
        raise InputError(f"{source.name} has 2 levels already; leave data.binarize at ''")
    top, read, drawn = source.levels - 1, source.read, source.read_drawn

    def above_middle(examples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return examples | {"image": (examples["image"] > top // 2).astype(np.uint8)}

    def tossed(examples: dict[str, np.ndarray], words: np.ndarray) -> dict[str, np.ndarray]:
        # Whole numbers: P = floor(2**32 x / (L - 1)) / 2**32, which is exactly 0 and 1 at the ends.
        chances = (examples["image"].astype(np.uint64) << 32) // np.uint64(top)
        return examples | {"image": (_noise(words, chances.shape[1:]) < chances).astype(np.uint8)}

    source = source._replace(name=f"{source.name}, {how} binarisation", levels=2)
    if how == "threshold":
        crops = drawn and (lambda indices, draws: above_middle(drawn(indices, draws)))
        return source._replace(read=lambda indices: above_middle(read(indices)), read_drawn=crops)
    return source._replace(
        read=lambda indices: tossed(read(indices), np.asarray(indices)),
        read_drawn=lambda indices, draws: tossed(drawn(indices, draws) if drawn else read(indices), draws),
    )


def _noise(words: np.ndarray, shape: tuple[int, ...]) -> UInt32[np.ndarray, "n ..."]:
    """Uniform 32-bit numbers of `shape` for each word, which decides them alone."""
    # An example has a stream of its own, so that it does not depend on the batch or the host that reads it.
    count = -(-math.prod(shape) // 2)
    streams = [np.random.Philox(key=np.array([word, TOSSES], np.uint64)).random_raw(count) for word in words.tolist()]
    halves = np.stack(streams).astype("<u8").view("<u4")
    return halves[:, : math.prod(shape)].reshape(-1, *shape)


def digits(split: str) -> Source:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 x 1, on 17 levels, with labels.

    They keep the order of the UCI test set, so writers stay together; the last 360 are the evaluation split.
    """
    from sklearn.datasets import load_digits  # a second to import, and most runs need none of it

    pixels, classes = load_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = classes.astype(np.int32)
    boundary = len(images) - DIGITS_EVALUATION_SIZE
    rows = _one_of("digits", split, {"train": slice(boundary), "evaluation": slice(boundary, None)})
    images, labels = images[rows], labels[rows]

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": images[indices], "label": labels[indices]}

    return Source(f"digits {split}", len(images), (8, 8, 1), levels=17, num_classes=10, read=read)


def photos(image_size: int, split: str) -> Source:
    """Square crops of the two photographs of scikit-learn (427 x 640), on a grid of 4 (train) or 8 pixels (evaluation).

    Evaluation crops come from two vertical strips of each photograph, train crops from the rest. A gap of one crop
    width lies between them, so that no pixel is shared and the nearest neighbours are not near. `InputError` where a
    crop does not fit into the strips.
    """
    from sklearn.datasets import load_sample_images

    widest = min(end - begin for begin, end in PHOTO_EVALUATION_STRIPS)
    if not 1 <= image_size <= widest:
        raise InputError(f"data.image_size of photos must lie in 1..{widest}, not {image_size}")
    photographs = np.stack(load_sample_images().images)
    corners = photo_corners(photographs.shape, image_size, split)
    windows = np.lib.stride_tricks.sliding_window_view(photographs, (image_size, image_size), axis=(1, 2))

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        photo, top, left = corners[indices].T
        return {"image": np.ascontiguousarray(np.moveaxis(windows[photo, top, left], 1, -1))}

    shape = (image_size, image_size, photographs.shape[-1])
    return Source(f"photos {split}", len(corners), shape, levels=256, num_classes=0, read=read)


def photo_corners(shape: tuple[int, ...], image_size: int, split: str) -> Int[np.ndarray, "n 3"]:
    """(photograph, top, left) of every crop of a split, for photographs of shape [number, height, width, channels]."""
    number, height, width = shape[:3]
    areas = _one_of(
        "photos", split, {"train": _between_strips(width, image_size), "evaluation": PHOTO_EVALUATION_STRIPS}
    )
    stride = PHOTO_STRIDES[split]
    tops = np.arange(0, height - image_size + 1, stride)
    lefts = np.concatenate([np.arange(begin, end - image_size + 1, stride) for begin, end in areas])
    return np.stack(np.meshgrid(np.arange(number), tops, lefts, indexing="ij"), axis=-1).reshape(-1, 3)


def _between_strips(width: int, gap: int) -> tuple[tuple[int, int], ...]:
    """The columns outside the evaluation strips, `gap` pixels away from them."""
    begins = [0, *(end + gap for _, end in PHOTO_EVALUATION_STRIPS)]
    ends = [*(begin - gap for begin, _ in PHOTO_EVALUATION_STRIPS), width]
    return tuple(zip(begins, ends, strict=True))


def synthetic(split: str, size: int, shape: tuple[int, int, int], levels: int, num_classes: int) -> Source:
    """Noise at the speed of a copy, for throughput tests: nothing can be learned from it.

    Example i is a window of one table of random values at offset i mod 2**16, with label i mod num_classes, so images
    repeat beyond 65,536 examples. The two splits have different tables.
    """
    key = _one_of("synthetic", split, {"train": 0, "evaluation": 1})
    num_values = int(np.prod(shape))
    num_offsets = min(size, 2**16)
    words = np.random.Philox(key=key).random_raw(-(-(num_offsets + num_values) // 8))
    # Little-endian bytes on every machine.
    table = (words.astype("<u8").view(np.uint8) % np.uint16(levels)).astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(table, num_values)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        examples: dict[str, np.ndarray] = {"image": windows[indices % num_offsets].reshape(-1, *shape)}
        if num_classes:
            examples["label"] = (indices % num_classes).astype(np.int32)
        return examples

    return Source(f"synthetic {split}", size, shape, levels, num_classes, read)


def _one_of(source: str, split: str, choices: dict[str, T]) -> T:
    if split not in choices:
        raise InputError(f"source '{source}' has the splits {' and '.join(choices)}, not '{split}'")
    return choices[split]
