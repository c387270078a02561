"""Exact ancestral sampling of a grid of codes, one position after another, with a whole forward pass for each.

The plain form, right for any network that is causal in raster order, and the truth that faster samplers are compared
with.
Not here: evaluation that reuses the passes before (h w times less work per position).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bitsperdim import rng


def gumbel_noise(keys: Key[Array, " b"], num_codes: int) -> Callable[[Int[Array, ""]], Float[Array, "b k"]]:
    """noise(position): standard Gumbel variables, a function of (an example's key, raster position) and nothing else.

    So an example's sample does not depend on the batch that it is drawn in.
    """
    return lambda position: jax.vmap(lambda key: jax.random.gumbel(key, (num_codes,)))(_at(keys, position))


def _at(keys: Key[Array, " b"], position: Int[Array, ""]) -> Key[Array, " b"]:
    return jax.vmap(lambda key: jax.random.fold_in(rng.for_purpose(key, "gumbel"), position))(keys)


def sample_codes(
    logits_fn: Callable[[Int[Array, "b h w"]], Float[Array, "b h w k"]],
    noise: Callable[[Int[Array, ""]], Float[Array, "b k"]],
    shape: tuple[int, int, int],
    temperature: Float[Array, ""] | float = 1.0,
) -> Int[Array, "b h w"]:
    """code_p = argmax_k (logits_k + T g_k), a draw from softmax(logits / T) with Gumbel noise g, for p in raster order.

    T = 0 is the greedy grid. `shape` is (batch, height, width). One compiled loop with static shapes, h w forward
    passes; call it under `jit` to trace it once.
    """
    batch, height, width = shape

    def draw(position: Int[Array, ""], flat: Int[Array, "b p"]) -> Int[Array, "b p"]:
        logits = logits_fn(flat.reshape(shape)).reshape(batch, height * width, -1)
        scores = logits[:, position] + temperature * noise(position)
        return flat.at[:, position].set(scores.argmax(-1).astype(jnp.int32))

    flat = jax.lax.fori_loop(0, height * width, draw, jnp.zeros((batch, height * width), jnp.int32))
    return flat.reshape(shape)
