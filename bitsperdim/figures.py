"""Figures of a trained run on held-out images, as far as families have them in common: which images, how they are laid
out, and a path between two of them.

A figure is a function (key, number of images, progress, options of its own) -> a picture and a record of it.
Not here: the figures of one family (`FAMILY/figures.py`), pictures while a run trains (`Stage.pictures`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Key, UInt8

from bitsperdim import data, images, seen
from bitsperdim.model import Loaded
from bitsperdim.run import Run

Figure = tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]
STEPS = 9  # of an interpolation, its ends included


def interpolation(
    run: Run,
    loaded: Loaded,
    key: Key,
    n: int,
    progress: Any,
    shown: Callable[[np.ndarray], np.ndarray] = lambda images: images,
) -> Figure:
    """From one image to another by `loaded.interpolate`; `shown` is what a model sees of an image."""
    one, other = held_out_pairs(run, n)
    assert loaded.interpolate is not None
    shares = np.linspace(0.0, 1.0, STEPS)
    between = [loaded.interpolate(one, other, share) for share in shares]
    heads = ["A", *(f"{share:.0%}" for share in shares), "B"]
    return side_by_side([shown(one), *between, shown(other)], heads, loaded.levels), {"shares": shares.tolist()}


def held_out(run: Run, n: int) -> UInt8[np.ndarray, "n h w c"]:
    """So many held-out images, spread over the split; again from its beginning where it has fewer."""
    source = data.open_source(run.config.data, "evaluation")
    seen.check_sources(run, run.stages()[0], {"evaluation": source})
    return source.read(np.linspace(0, source.size, n, endpoint=False).astype(np.int64))["image"]


def held_out_pairs(run: Run, n: int) -> tuple[UInt8[np.ndarray, "n h w c"], UInt8[np.ndarray, "n h w c"]]:
    both = held_out(run, 2 * n)
    return both[::2], both[1::2]


def side_by_side(columns: Sequence[np.ndarray], heads: Sequence[str], levels: int) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each image, with a heading over each column."""
    tiles = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
    return images.labelled(images.grid(tiles, columns=len(columns), levels=levels), columns=heads)
