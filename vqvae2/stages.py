"""The stages of a VQ-VAE-2 run and the figures of the whole.

autoencoder -> codes -> a prior of every level, which do not need each other (Razavi et al. 2019, algorithms 1 and 2).
"""

from typing import Any

from bitsperdim.model import Stage
from vqvae2 import autoencoder_stage, chain, codes, prior_stage
from vqvae2.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    names = (*config.levels, chain.PIXELS) if config.pixels else config.levels
    priors = (prior_stage.stage(config, name) for name in names)
    return autoencoder_stage.stage(config), codes.stage(), *priors


def report(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """The rate of all levels beside the distortion. A rate and a distortion are no likelihood of the image: the bits
    name the reconstruction, not the image itself (supplement, section E).

    With the stage `pixels` they do both, and the sum of its bits and those of the codes c bounds the likelihood:
    -log p(x) <= -log p(x | c(x)) - log p(c(x)), `bits_per_dim_bound`, for c is a function of x.
    """
    levels = [name for name in config.levels if name in measured]
    distortion = measured.get("autoencoder", {})
    names = ("mse", "mse_over_variance", "psnr_db")
    figures: dict[str, Any] = {name: distortion[name] for name in names if name in distortion}
    if len(levels) == len(config.levels):
        figures["rate_bits_per_image"] = sum(measured[name]["rate_bits_per_image"] for name in levels)
    if chain.PIXELS in measured and "rate_bits_per_image" in figures:
        pixels = measured[chain.PIXELS]
        figures["bits_per_dim_bound"] = pixels["bits_per_dim_given_codes"] * (
            1.0 + figures["rate_bits_per_image"] / pixels["bits_per_image_given_codes"]
        )
    if config.autoencoder.model.quantizer == "none":
        figures["bins_per_channel"] = config.autoencoder.model.num_codes  # the rate is that of this many
    return figures | {f"nats_per_code_{name}": measured[name]["nats_per_code"] for name in levels}
