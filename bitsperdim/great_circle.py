"""Paths between two draws of a standard normal distribution: for interpolation in the latents of VAEs and flows."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def between(a: Float[Array, "b ..."], b: Float[Array, "b ..."], share: Array | float) -> Float[Array, "b ..."]:
    """(sin((1 - t) w) a + sin(t w) b) / sin w, with the angle w between a and b, each example for itself.

    On a straight line the middle of two independent draws has only 1 / sqrt(2) of their deviation, which no draw has.
    """
    over = tuple(range(1, a.ndim))
    total = lambda x: x.sum(over, keepdims=True)
    cosine = total(a * b) / jnp.maximum(jnp.sqrt(total(a * a) * total(b * b)), 1e-30)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    # A straight line where the two nearly coincide or are opposite: there the circle is undefined.
    is_defined = (angle > 1e-3) & (angle < math.pi - 1e-3)
    safe = jnp.where(is_defined, angle, 1.0)
    weight = lambda t: jnp.where(is_defined, jnp.sin(t * safe) / jnp.sin(safe), t)
    return weight(1.0 - share) * a + weight(share) * b
