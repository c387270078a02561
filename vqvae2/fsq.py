"""Finite scalar quantisation: every channel is bounded and rounded to one of a few integers; no codebook is learned.

Source: Mentzer et al. 2023, section 3.1 and appendix A.1. Not here: learned codebooks (`quantizer.py`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqvae2.quantizer import Quantized


def table(levels: tuple[int, ...]) -> Float[np.ndarray, "k d"]:
    """The vectors of all codes, in [-1, 1]; the first channel varies fastest. A constant."""
    digits = np.arange(math.prod(levels))[:, None] // _places(levels) % np.array(levels)
    half = np.array(levels) // 2
    return ((digits - half) / half).astype(np.float32)


def bound(levels: tuple[int, ...], z: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """(L - 1) / 2 tanh(z + s) - o with o = 1/2 where L is even, else 0; s = artanh(2 o / (L - 1)), so that 0 stays 0.

    It lies between -floor(L / 2) and ceil(L / 2) - 1, so that its rounding takes L values: an even number of integers
    is not symmetric about 0, hence o. s is artanh, the inverse of the bound, not the tan of the paper's listing, with
    which 0 is moved. L is at least 3: with two values s is infinite.
    """
    half = (np.array(levels, np.float32) - 1) / 2
    offset = np.where(np.array(levels) % 2, 0.0, 0.5).astype(np.float32)
    return jnp.tanh(z + np.arctanh(offset / half)) * half - offset


def quantize(levels: tuple[int, ...], z: Float[Array, "b h w d"]) -> Quantized:
    """q = round(bound(z)); the output is b + sg(q - b), b = bound(z), over floor(L / 2), in [-1, 1].

    So d output / d z is that of the bound. The code is the number with the digits q + floor(L / 2). In float32,
    whatever `z` comes in. `squared_error` is 0: the bound keeps z near its codes, no commitment has to.
    """
    bounded = bound(levels, z.astype(jnp.float32))
    rounded = jax.lax.stop_gradient(jnp.round(bounded))
    half = np.array(levels) // 2
    codes = ((rounded.astype(jnp.int32) + half) * _places(levels)).sum(-1).astype(jnp.int32)
    straight_through = (bounded + jax.lax.stop_gradient(rounded - bounded)) / half.astype(np.float32)
    return Quantized(straight_through, codes, jnp.zeros(len(z)))


def _places(levels: tuple[int, ...]) -> np.ndarray:
    """What one unit of each digit is worth."""
    return np.cumprod([1, *levels[:-1]])
