"""The training images that lie nearest to a sample: whether a model made it, or remembered it.

Source: Razavi et al. 2019 (VQ-VAE-2), supplement, section C: in pixel space, and in the space of a network's features.
Not here: any such network. Its features are given as a function, images uint8 [n, h, w, c] -> numbers [n, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from bitsperdim import data, flag_values, images
from bitsperdim.errors import InputError

Features = Callable[[np.ndarray], Any]
MOST_VALUES, MOST_IMAGES = 2**23, 1024  # of images compared at once: 64 MiB as float64


class Neighbours(NamedTuple):
    """The nearest first; of equal distances the earlier image."""

    distance: Float[np.ndarray, "n k"]  # Euclidean, in levels or in units of the features
    index: Int[np.ndarray, "n k"]  # in the source
    images: UInt8[np.ndarray, "n k h w c"]


def nearest(
    samples: UInt8[np.ndarray, "n h w c"],
    source: data.Source,
    k: int,
    features: Features | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Neighbours:
    """The k images of `source` with the least |f(sample) - f(image)|, f the identity or `features`, over all of it.

    Exact in pixel space: the squared distance |a|^2 + |b|^2 - 2 a.b is a sum of integers below 2^53, which float64
    holds. Images are those that the source reads for an evaluation: cropped at the centre, not mirrored. Raises
    InputError where the source has fewer than k images, others than the samples', or the features do not fit.
    """
    check_count(k, source)
    if samples.shape[1:] != source.shape:
        raise InputError(f"samples are {samples.shape[1:]}, images of {source.name} are {source.shape}")
    wanted = _as_points(samples, features)
    count = max(1, min(MOST_IMAGES, MOST_VALUES // samples[0].size))
    read = lambda part: source.read(np.arange(part * count, min((part + 1) * count, source.size)))["image"]
    squared, index = np.empty((len(samples), 0)), np.empty((len(samples), 0), np.int64)
    for part, batch in enumerate(data.prefetch(read, 0, -(-source.size // count))):
        points, start = _as_points(batch, features), part * count
        if points.shape[1] != wanted.shape[1]:
            raise InputError(
                f"the function of --features must return as many numbers for every image, not "
                f"{wanted.shape[1]} and {points.shape[1]}"
            )
        here = (wanted**2).sum(1)[:, None] + (points**2).sum(1)[None] - 2.0 * wanted @ points.T
        squared = np.concatenate([squared, here], axis=1)
        index = np.concatenate([index, np.broadcast_to(start + np.arange(len(batch)), here.shape)], axis=1)
        order = np.argsort(squared, axis=1, kind="stable")[:, :k]
        squared, index = np.take_along_axis(squared, order, 1), np.take_along_axis(index, order, 1)
        progress(start + len(batch))
    found = source.read(index.ravel())["image"].reshape(*index.shape, *source.shape)
    # Of equal features that are no integers the difference may come out below zero.
    return Neighbours(np.sqrt(np.maximum(squared, 0.0)), index, found)


def check_count(k: int, source: data.Source) -> None:
    """Raises InputError where there are no k images."""
    if not 1 <= k <= source.size:
        raise InputError(f"--nearest must lie in 1..{source.size}, the images of {source.name}, not {k}")


def picture(samples: UInt8[np.ndarray, "n h w c"], found: Neighbours, levels: int = 256) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each sample: the sample, then its neighbours, the nearest first."""
    rows = np.concatenate([samples[:, None], found.images], axis=1)
    grid = images.grid(rows.reshape(-1, *samples.shape[1:]), columns=rows.shape[1], levels=levels)
    places = ["sample", "nearest", *(f"no. {place}" for place in range(2, rows.shape[1]))]
    return images.labelled(grid, columns=places)


def _as_points(batch: UInt8[np.ndarray, "m h w c"], features: Features | None) -> Float[np.ndarray, "m d"]:
    if features is None:
        return batch.reshape(len(batch), -1).astype(np.float64)
    values = flag_values.call("features", features, batch)
    if values.ndim < 2 or len(values) != len(batch):
        raise InputError(
            f"the function of --features must return a row of numbers an image, [{len(batch)}, ...], not {values.shape}"
        )
    return values.reshape(len(batch), -1)
