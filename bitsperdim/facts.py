"""What the images of a run turned out to be, kept in the run, so that sampling needs no data set.

Not here: facts that one family alone needs (`vqvae2/facts.py`), or derives from these (`arm_forecast/facts.py`).
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from bitsperdim import data
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run


class Facts(NamedTuple):
    """Shape (height, width, channels) and levels of the images."""

    shape: tuple[int, int, int]
    levels: int


@functools.lru_cache(maxsize=8)
def of_run(run: Run) -> Facts:
    """From the folder of the run's first stage, or from the data set where that has not begun."""
    path = run.folder(run.stages()[0].name) / "data.json"
    if path.exists():
        values = run_lib.read_json(path, {"shape": [int, int, int], "levels": int})
        return Facts(tuple(values["shape"]), values["levels"])
    source = data.open_source(run.config.data, "train")
    return Facts(source.shape, source.levels)


def check_images(images: np.ndarray, about: Facts) -> UInt8[np.ndarray, "n h w c"]:
    """The images as an array. Raises InputError where they are not such as the run was trained on."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != tuple(about.shape) or images.max(initial=0) >= about.levels:
        raise InputError(
            f"images must be uint8 {['n', *about.shape]} with levels below {about.levels}, "
            f"not {images.dtype} {list(images.shape)} up to {images.max(initial=0)}"
        )
    return images
