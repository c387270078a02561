"""The stage of a run and the one on request, and the figures of the whole."""

from typing import Any

from bitsperdim.model import Stage
from vdvae import latent_store, model_stage
from vdvae.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    return (model_stage.stage(config), latent_store.stage())


def report(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """The bound of the likelihood and its two parts; the divergence of each resolution, whose difference between
    training and held-out images shows overfitting (appendix C.4)."""
    names = ("bits_per_dim", "nats", "reconstruction_nats", "kl_nats", "ssim")
    of_resolutions = filter(model_stage.OF_RESOLUTION.fullmatch, measured["model"])
    return {name: measured["model"][name] for name in (*names, *of_resolutions)}
