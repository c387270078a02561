"""Between integer levels 0..L-1 and the real line: noise, scaling, and the constants that bits/dim needs.

A density p of y = x + u with u uniform on [0, 1) bounds the likelihood of the levels from below (Theis, van den Oord &
Bethge 2016, eq. 4-6):

    log P(x) = log of the integral of p(x + u) over [0, 1)^D  >=  E_u log p(x + u)

Everything takes the number of levels L of the source; nothing assumes 256. Not here: learned noise, and the sums over a
bin that discretised likelihoods take.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key, UInt8

Range = Literal["unit", "symmetric"]  # [0, 1) or [-1, 1)
_STRETCH_AND_OFFSET = {"unit": (1.0, 0.0), "symmetric": (2.0, -1.0)}  # of y / L


def uniform_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """u in [0, 1), one array of `shape` for each example key, as multiples of 2**-16.

    The grid is what float32 can add: x + u has 24 significant bits for x up to 255, so the sum is exact and
    floor(x + u) = x. With a 24-bit u, 255 + u could round to 256, outside the support of every density here.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint16))(keys)
    return bits.astype(jnp.float32) * 2.0**-16


def dequantize(image: UInt8[Array, "b h w c"], noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """y = x + u, in [0, L), in units of a level."""
    return image.astype(jnp.float32) + noise


def centre(image: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """y = x + 1/2, the middle of the cell, for models that see the discrete image."""
    return image.astype(jnp.float32) + 0.5


def scale(y: Float[Array, "..."], levels: int, range: Range) -> Float[Array, "..."]:
    """z = y / L in [0, 1) for 'unit', z = 2 y / L - 1 in [-1, 1) for 'symmetric'.

    Exact where L is a power of two. The upper end stays out of reach in float32 there and for every L up to 64; for
    other L the last few values of the noise may round to it.
    """
    stretch, offset = _STRETCH_AND_OFFSET[range]
    return stretch * (y / levels) + offset


def unscale(z: Float[Array, "..."], levels: int, range: Range) -> Float[Array, "..."]:
    """y = L z for 'unit', y = L (z + 1) / 2 for 'symmetric': the inverse of `scale`."""
    stretch, offset = _STRETCH_AND_OFFSET[range]
    return (z - offset) / stretch * levels


def log_jacobian(num_dims: int, levels: int, range: Range) -> float:
    """log|det dz/dy| = D log a of `scale`, in nats, with a = 1/L for 'unit' and 2/L for 'symmetric'.

    log p(y) = log p(z) + log_jacobian, the density in units of a level, which is what bounds log P(x).
    """
    stretch, _ = _STRETCH_AND_OFFSET[range]
    return num_dims * math.log(stretch / levels)


def to_levels(y: Float[Array, "..."], levels: int) -> UInt8[Array, "..."]:
    """x = floor(y) clipped to 0..L-1: what `dequantize` and `centre` undo, and the last step of a sampler."""
    return jnp.clip(jnp.floor(y), 0, levels - 1).astype(jnp.uint8)


def to_uint8(image: Integer[Array | np.ndarray, "..."], levels: int) -> UInt8[Array | np.ndarray, "..."]:
    """Levels 0..L-1 stretched to 0..255, for pictures: round(255 x / (L - 1)) on integers, halves upwards."""
    top = levels - 1
    return ((image.astype(np.int32) * 255 + top // 2) // top).astype(np.uint8)
