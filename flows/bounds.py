"""Bounds on log P(x) from several samples of the dequantization noise, as one formula.

With w_k = p(x + u_k) / q(u_k | x), u_k ~ q, K samples (Hoogeboom et al. 2020; Burda et al. 2016; Li & Turner 2016):

    L_alpha = 1 / (1 - alpha) log 1/K sum_k w_k^(1 - alpha)

alpha -> 1 is the mean of log w_k, the evidence lower bound (MaCow, eq. 3); alpha = 0 the importance-weighted bound,
which rises to log P(x) as K grows. Negative orders estimate upper bounds, from below.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def renyi(log_weights: Float[Array, "k b"], alpha: float) -> Float[Array, " b"]:
    """L_alpha of each example, in nats."""
    if alpha == 1.0:
        return log_weights.mean(0)
    order = 1.0 - alpha
    return (jax.nn.logsumexp(order * log_weights, 0) - math.log(len(log_weights))) / order


def kind(alpha: float) -> str:
    """What L_alpha is called in the names of figures."""
    return "importance_weighted" if alpha == 0.0 else f"renyi_{alpha:g}"


def in_chunks(
    some: Callable[[Int[Array, " m"]], tuple[Float[Array, "m b"], ...]], count: int, chunk: int
) -> tuple[Float[Array, "k b"], ...]:
    """`some` of the samples 0 ... count - 1, at most `chunk` of them in memory at once, in gradients too.

    `count` is at most `chunk`, or a multiple of it.
    """
    if count <= chunk:
        return some(jnp.arange(count))
    found = jax.lax.map(jax.checkpoint(some), jnp.arange(count).reshape(-1, chunk))
    return jax.tree.map(lambda values: values.reshape(count, -1), found)
