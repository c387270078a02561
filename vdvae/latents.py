"""The latents of a layer: from a network's outputs to prior and posterior, draws, and the divergence between them.

Source: Efficient-VDVAE, section 4.2 (gradient smoothing), and eq. 5 (one KL term a layer). A `Latent` record is all
that the rest of the family knows of the distribution: another one takes its place by another record.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vdvae.config import ModelConfig

Distribution = Any  # arrays, whatever the record uses


class Gaussian(NamedTuple):
    """Independent normals; the log-deviation is kept beside the deviation, whose logarithm would lose it."""

    mean: Float[Array, "... z"]
    std: Float[Array, "... z"]
    log_std: Float[Array, "... z"]


class Latent(NamedTuple):
    """Functions of a layer's distribution. Everything is in float32 or better."""

    numbers: int  # that the networks give for each channel of z
    prior: Callable[[Sequence[Float[Array, "... z"]]], Distribution]  # from so many arrays
    posterior: Callable[[Sequence[Float[Array, "... z"]], Distribution], Distribution]  # and from the prior
    noise: Callable[[Key[Array, ""], tuple[int, ...]], Array]  # of one example
    draw: Callable[[Distribution, Array, Array | float], Array]  # with the noise and a temperature
    kl: Callable[[Distribution, Distribution], Array]  # KL(posterior || prior) of each element, in nats
    log_ratio: Callable[[Array, Distribution, Distribution], Array]  # log q(z) - log p(z) of each element, in nats
    noise_of: Callable[[Distribution, Array], Array]  # with which `draw` at temperature 1 gives this z
    packed: Callable[[Distribution], Float[Array, "... z n"]]  # numbers that say all of a distribution, to be stored
    unpacked: Callable[[Float[Array, "... z n"]], Distribution]


def make(config: ModelConfig) -> Latent:
    """Normals with std = softplus_beta(u) ('std') or exp(beta u) ('log_std')."""
    log_std = log_softplus if config.latent == "std" else exponential

    def gaussian(numbers: Sequence[Float[Array, "... z"]]) -> Gaussian:
        mean, u = numbers
        log = log_std(u, config.latent_beta)
        return Gaussian(mean, jnp.exp(log), log)

    def posterior(numbers: Sequence[Float[Array, "... z"]], prior: Gaussian) -> Gaussian:
        own = gaussian(numbers)
        if not config.residual_posterior:
            return own
        return Gaussian(prior.mean + own.mean, prior.std * own.std, prior.log_std + own.log_std)

    return Latent(2, gaussian, posterior, jax.random.normal, draw, kl, log_ratio, noise_of, packed, unpacked)


def draw(distribution: Gaussian, noise: Float[Array, "... z"], temperature: Array | float) -> Float[Array, "... z"]:
    """z = mean + temperature std noise."""
    return distribution.mean + temperature * distribution.std * noise


def kl(posterior: Gaussian, prior: Gaussian) -> Float[Array, "... z"]:
    """((mu_q - mu_p) / s_p)^2 / 2 + (s_q / s_p)^2 / 2 - 1/2 - log(s_q / s_p), in nats, of each element."""
    log_ratio = posterior.log_std - prior.log_std
    distance = (posterior.mean - prior.mean) * jnp.exp(-prior.log_std)
    return 0.5 * jnp.square(distance) + 0.5 * jnp.expm1(2.0 * log_ratio) - log_ratio


def log_ratio(z: Float[Array, "... z"], posterior: Gaussian, prior: Gaussian) -> Float[Array, "... z"]:
    """log q(z) - log p(z), in nats, of each element: its mean over z from q is the divergence."""
    square = lambda distribution: jnp.square((z - distribution.mean) * jnp.exp(-distribution.log_std))
    return 0.5 * square(prior) - 0.5 * square(posterior) + prior.log_std - posterior.log_std


def noise_of(distribution: Gaussian, z: Float[Array, "... z"]) -> Float[Array, "... z"]:
    """(z - mean) / std."""
    return (z - distribution.mean) * jnp.exp(-distribution.log_std)


def packed(distribution: Gaussian) -> Float[Array, "... z 2"]:
    """Mean and log-deviation: a small deviation itself would vanish in half precision."""
    return jnp.stack([distribution.mean, distribution.log_std], axis=-1)


def unpacked(numbers: Float[Array, "... z 2"]) -> Gaussian:
    return Gaussian(numbers[..., 0], jnp.exp(numbers[..., 1]), numbers[..., 1])


def log_softplus(u: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """log(log(1 + exp(beta u)) / beta), which tends to beta u - log(beta) where the exponential is small.

    There the softplus itself, and so its logarithm's gradient, would underflow.
    """
    x = beta * u
    small = x < -15.0  # log(1 + e) = e (1 - e / 2 + ...): beyond float32 from here on
    safe = jnp.where(small, 0.0, x)
    exact = jnp.log(jax.nn.softplus(safe))
    return jnp.where(small, x - 0.5 * jnp.exp(jnp.where(small, x, -15.0)), exact) - jnp.log(jnp.asarray(beta, u.dtype))


def exponential(u: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """log exp(beta u)."""
    return beta * u
