"""What the data of a run turned out to be, kept in the run, so that sampling needs no data set."""

import dataclasses
import functools

from arm_forecast.pixelcnn import Grid
from bitsperdim import data
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run

DOWNSAMPLING = 4  # of the autoencoder under a latent ARM


@dataclasses.dataclass(frozen=True)
class Facts:
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


def grid(run: Run) -> Grid:
    """The dimensions of the ARM: those of the images, or of the codes of the autoencoder under it."""
    about, latent = of_run(run), run.config.autoencoder
    if latent is None:
        return Grid(*about.shape, about.levels)
    height, width, _ = about.shape
    if height % DOWNSAMPLING or width % DOWNSAMPLING:
        raise InputError(
            f"images of {height}x{width} are not divisible by the autoencoder's factor {DOWNSAMPLING}; set "
            "data.image_size to a multiple of 16, which the model of its codes needs"
        )
    return Grid(height // DOWNSAMPLING, width // DOWNSAMPLING, latent.model.latent_channels, latent.model.categories)
