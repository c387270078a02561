"""The dimensions of an autoregressive model, from what the images of its run turned out to be (`bitsperdim.facts`)."""

from arm_forecast.pixelcnn import Grid
from bitsperdim.errors import InputError
from bitsperdim.facts import of_run
from bitsperdim.run import Run

DOWNSAMPLING = 4  # of the autoencoder under a latent ARM


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
