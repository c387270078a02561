"""The output of a very deep VAE: from a network's outputs to the likelihood of the image, and to images.

Source: Efficient-VDVAE, sections 4.2 and 6: discretised mixtures of logistics with smoothed gradients, bounded or not,
and Bernoulli pixels. The arithmetic of the mixtures is `bitsperdim.distributions`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key, UInt8

from bitsperdim import distributions
from bitsperdim.errors import InputError
from vdvae import latents
from vdvae.config import ModelConfig

# exp(80) times any distance is finite in float32; beyond it a scale is as good as zero.
LEAST_LOG_SCALE = -80.0
LEAST_UNIFORM = 1e-5  # the published samplers draw uniforms from [this, 1 - this]


class Output(NamedTuple):
    """Functions of a network's outputs, of the unpadded image."""

    numbers: int  # of outputs for each pixel
    levels: int  # of the image whose likelihood it is
    values: Callable[[UInt8[Array, "b h w c"]], Float[Array, "b h w c"]]  # what the network sees of these levels
    nats: Callable[[Float[Array, "b h w o"], Integer[Array, "b h w c"]], Float[Array, " b"]]  # -log p(x | z)
    # (outputs, a key for each image, temperature) -> levels
    draw: Callable[[Float[Array, "b h w o"], Key[Array, " b"], Array | float], UInt8[Array, "b h w c"]]
    likeliest: Callable[[Float[Array, "b h w o"]], UInt8[Array, "b h w c"]]  # `draw` at temperature 0


def make(config: ModelConfig, channels: int, levels: int) -> Output:
    """The output for images of as many channels and levels. Raises InputError where they do not fit the config."""
    if config.target_bits < 8:
        if levels != 256:
            raise InputError(f"model.target_bits={config.target_bits} needs images of 256 levels, not {levels}")
        levels = 2**config.target_bits
    if config.output == "bernoulli":
        if levels != 2:
            raise InputError(f"model.output='bernoulli' needs images of 2 levels, not {levels}; set data.binarize")
        return _bernoulli(channels)
    return _logistic_mixture(config, channels, levels)


def bins(config: ModelConfig, levels: int) -> distributions.Bins:
    """Where the levels lie. Raises InputError where the published arithmetic does not know their number."""
    if config.bins == "normalised":
        return distributions.bins(levels)
    if 256 % levels:
        raise InputError(f"model.bins='{config.bins}' knows 2, 4, ... 256 levels, not {levels}")
    is_efficient = config.bins == "published_efficient"
    beta = config.output_beta if is_efficient and config.output_scale == "log_std" else 1.0
    return distributions.published_bins(levels, is_efficient or levels == 256, beta)


def log_scale(config: ModelConfig) -> Callable[[Array], Array]:
    """log s from a network's output u, at least `min_log_scale` (before beta, where it is 'log_std')."""

    def of_output(u: Array) -> Array:
        if config.output_scale == "log_std":
            log = config.output_beta * jnp.maximum(u, config.min_log_scale)
        else:
            log = jnp.maximum(latents.log_softplus(u, config.output_beta), config.min_log_scale)
        return jnp.maximum(log, LEAST_LOG_SCALE)

    return of_output


def _logistic_mixture(config: ModelConfig, channels: int, levels: int) -> Output:
    of_levels, scale = bins(config, levels), log_scale(config)
    mixture = lambda raw: distributions.logistic_mixture(raw, channels, scale)

    def nats(raw: Float[Array, "b h w o"], x: Integer[Array, "b h w c"]) -> Float[Array, " b"]:
        return -distributions.mixture_log_prob(mixture(raw), x, of_levels).sum((1, 2))

    def draw(raw: Float[Array, "b h w o"], keys: Key[Array, " b"], temperature: Array | float) -> Array:
        def uniform(key: Key[Array, ""]) -> tuple[Array, Array]:
            of_mixture, of_logistic = jax.random.split(key)
            draw = lambda key, last: jax.random.uniform(
                key, (*raw.shape[1:3], last), minval=LEAST_UNIFORM, maxval=1.0 - LEAST_UNIFORM
            )
            return draw(of_mixture, config.mixtures), draw(of_logistic, channels)

        return of_uniforms(raw, *jax.vmap(uniform)(keys), temperature)

    def of_uniforms(raw: Array, u_mix: Array, u_log: Array, temperature: Array | float) -> Array:
        values = distributions.sample_mixture(mixture(raw), u_mix, u_log, of_levels, temperature=temperature)
        return jnp.round((values + 1.0) / of_levels.step).astype(jnp.uint8)

    def likeliest(raw: Float[Array, "b h w o"]) -> Array:
        """The mean of the likeliest component, whatever the uniforms."""
        half = lambda last: jnp.full((*raw.shape[:3], last), 0.5)
        return of_uniforms(raw, half(config.mixtures), half(channels), 0.0)

    numbers = distributions.mixture_outputs(channels, config.mixtures)
    return Output(numbers, levels, of_levels.values, nats, draw, likeliest)


def _bernoulli(channels: int) -> Output:
    def nats(raw: Float[Array, "b h w c"], x: Integer[Array, "b h w c"]) -> Float[Array, " b"]:
        return -distributions.bernoulli_log_prob(raw, x).sum((1, 2, 3))

    def draw(raw: Float[Array, "b h w c"], keys: Key[Array, " b"], temperature: Array | float) -> Array:
        """1 with probability sigmoid(logit / T)."""
        u = jax.vmap(lambda key: jax.random.uniform(key, raw.shape[1:], minval=LEAST_UNIFORM))(keys)
        return (raw > temperature * (jnp.log(u) - jnp.log1p(-u))).astype(jnp.uint8)

    likeliest = lambda raw: (raw > 0).astype(jnp.uint8)
    return Output(channels, 2, lambda x: x.astype(jnp.float32), nats, draw, likeliest)
