"""The elementwise transform of masked convolutions and couplings: y = sigma x + mu, or y = x + mu.

sigma = sigmoid(r + 2), through its logarithm: the log-determinant is never the log of a rounded sigmoid, and no epsilon
keeps the inverse from dividing by zero, for exp(-log sigma) = 1 + exp(-(r + 2)).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flows.bijector import LogDet


def num_outputs(channels: int, affine: bool) -> int:
    """What a net must give for each pixel: mu, and r where it is affine, mu first."""
    return 2 * channels if affine else channels


def forward(net: Float[Array, "b h w d"], x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], LogDet]:
    """y, and sum log sigma of each example. Affine if the net gives twice the channels of x."""
    if net.shape[-1] == x.shape[-1]:
        return x + net, jnp.zeros(len(x), x.dtype)
    mean, raw = jnp.split(net, 2, -1)
    log_scale = jax.nn.log_sigmoid(raw + 2.0)
    return x * jnp.exp(log_scale) + mean, log_scale.sum((1, 2, 3))


def inverse(net: Float[Array, "b ... d"], y: Float[Array, "b ... c"]) -> tuple[Float[Array, "b ... c"], LogDet]:
    """x = (y - mu) (1 + exp(-(r + 2))), and minus the sum of log sigma of each example."""
    if net.shape[-1] == y.shape[-1]:
        return y - net, jnp.zeros(len(y), y.dtype)
    mean, raw = jnp.split(net, 2, -1)
    x = (y - mean) * (1.0 + jnp.exp(-(raw + 2.0)))
    return x, -jax.nn.log_sigmoid(raw + 2.0).sum(tuple(range(1, y.ndim)))
