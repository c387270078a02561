"""The one stage of a run, and the figures of the whole."""

from typing import Any

from bitsperdim.model import Stage
from vdvae import model_stage
from vdvae.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    return (model_stage.stage(config),)


def report(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """The bound of the likelihood and its two parts."""
    names = ("bits_per_dim", "nats", "reconstruction_nats", "kl_nats")
    return {name: measured["model"][name] for name in names}
