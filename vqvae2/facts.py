"""What the data of a run turned out to be: measured once, kept in the run, so that sampling needs no data set."""

import dataclasses
import functools
import math

import numpy as np

from bitsperdim import data
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run

VARIANCE_IMAGES = 4096
MOST_IMAGES, MOST_PIXELS = 64, 2**22  # read, encoded or decoded at once: 64 images of 256 pixels, 4 of 1024


@dataclasses.dataclass(frozen=True)
class Facts:
    """Shape (height, width, channels), levels and classes of the images, and their variance in the range [-1, 1)."""

    shape: tuple[int, int, int]
    levels: int
    num_classes: int
    variance: float

    def grids(self, strides: tuple[int, ...], names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """Height and width of every level's codes, by name (top first); strides run from the image upwards."""
        height, width, _ = self.shape
        factor, grids = 1, {}
        for stride, name in zip(strides, reversed(names), strict=True):
            factor *= stride
            grids[name] = (height // factor, width // factor)
        return {name: grids[name] for name in names}


def at_once(shape: tuple[int, int, int]) -> int:
    """How many images of this shape (height, width, channels) are handled at once, so that they fit into memory."""
    return max(1, min(MOST_IMAGES, MOST_PIXELS // (shape[0] * shape[1])))


@functools.lru_cache(maxsize=8)  # every stage asks for them, and measuring decodes thousands of images
def of_run(run: Run) -> Facts:
    """From the autoencoder's folder, or measured from the training images where it has none yet."""
    path = run.folder("autoencoder") / "data.json"
    if path.exists():
        kinds = {"shape": [int, int, int], "levels": int, "num_classes": int, "variance": int | float}
        values = run_lib.read_json(path, kinds)
        height, width, channels = values["shape"]
        return Facts((height, width, channels), values["levels"], values["num_classes"], values["variance"])
    return measure(data.open_source(run.config.data, "train"), run.config.autoencoder.model.strides)


def measure(source: data.Source, strides: tuple[int, ...]) -> Facts:
    """The variance is that of all pixels of at most 4,096 images spread over the training split.

    Raises InputError where the strides do not divide the images, or every pixel has the same value.
    """
    height, width, _ = source.shape
    factor = math.prod(strides)
    if height % factor or width % factor:
        raise InputError(
            f"images of {source.name} are {height}x{width}, not divisible by the product {factor} of "
            f"autoencoder.model.strides={strides}; set data.image_size to a multiple of {factor}, or other strides"
        )
    indices = np.unique(np.linspace(0, source.size - 1, VARIANCE_IMAGES).astype(np.int64))
    variance = 4.0 * _variance(source, indices) / source.levels**2
    if not variance:
        raise InputError(f"all pixels of {source.name} have one and the same value: there is nothing to learn")
    return Facts(source.shape, source.levels, source.num_classes, variance)


def _variance(source: data.Source, indices: np.ndarray) -> float:
    """Of all values of these images. Sums of integers, a few images at a time: exact, and small in memory."""
    total = squares = count = 0
    size = at_once(source.shape)
    for start in range(0, len(indices), size):
        values = source.read(indices[start : start + size])["image"].astype(np.int64)
        total, squares, count = total + int(values.sum()), squares + int((values * values).sum()), count + values.size
    return (squares - total * total / count) / count
