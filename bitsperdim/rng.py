"""Randomness as a function of (seed, step, purpose, example), never of devices, hosts or micro-batches.

No key is carried through the training loop. A step derives its key from the seed and its number; a purpose ("dropout",
"revival") is folded in by name; noise that belongs to an example is drawn from that example's own key.
"""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def step_key(seed: int, step: Int[Array, ""] | int) -> Key[Array, ""]:
    """The key of one step of a run."""
    return jax.random.fold_in(jax.random.key(seed), step)


def for_purpose(key: Key[Array, ""], purpose: str) -> Key[Array, ""]:
    """An independent key for each named purpose. CRC-32 of the name, so it is the same on every machine."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def per_example(key: Key[Array, ""], position: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key per example, from its position in the *global* batch."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(position)


def dropout(keys: Key[Array, " b"], rate: float, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Inverted dropout (zero with probability `rate`, otherwise divided by 1 - rate), a mask per example key."""
    if rate == 0.0:
        return x
    keep = jax.vmap(lambda key, row: jax.random.bernoulli(key, 1.0 - rate, row.shape))(keys, x)
    return jnp.where(keep, x / (1.0 - rate), 0.0)
