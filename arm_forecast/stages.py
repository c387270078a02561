"""The stages of a run and the figures of the whole.

(autoencoder -> codes ->) arm (-> pairs -> modules)
"""

from typing import Any

from arm_forecast import arm_stage, autoencoder_stage, codes, modules_stage
from arm_forecast.config import Config
from bitsperdim.model import Stage


def stages(config: Config) -> tuple[Stage, ...]:
    found = [arm_stage.stage(config)]
    if config.autoencoder is not None:
        found = [autoencoder_stage.stage(config), codes.stage(), *found]
    if config.modules is not None:
        found += [modules_stage.pairs(config), modules_stage.stage(config)]
    return tuple(found)


def report(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """The likelihood of the images; for a latent model the rate of the codes beside the distortion, which is none."""
    arm = measured.get("arm", {})
    if config.autoencoder is None:
        return {name: arm[name] for name in ("bits_per_dim", "nats") if name in arm}
    distortion = measured.get("autoencoder", {})
    figures = {name: distortion[name] for name in ("mse", "mse_over_variance") if name in distortion}
    return figures | {name: arm[name] for name in ("nats_per_code", "rate_bits_per_image") if name in arm}
