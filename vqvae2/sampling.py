"""Exact sampling of a grid of codes, three ways.

`sample_codes` makes a whole forward pass for each position, one after another: right for any network that is causal in
raster order, and the truth that the others are compared with. `sample_codes_cached` evaluates each cell once, from what
was kept of those before it (h w times less work). `sample_codes_predictively` evaluates whole grids of forecasts and
accepts as many codes of each as are right (Wiggers & Hoogeboom 2020): less to wait for one after another, more work.
With the same noise all draw the same codes, up to ties within the difference of logits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from arm_forecast import engine, forecasters, gumbel
from bitsperdim import rng
from bitsperdim.causal import ROWS, Cell, next_row


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
    shape: tuple[int, ...],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    choose: Callable[..., Array] | None = None,
) -> Int[Array, "b h w"]:
    """code_p = argmax_k (logits_k + T g_k), a draw from softmax(logits / T) with Gumbel noise g, for p in raster order.

    T = 0 is the greedy grid. `top_k` and `top_p` restrict the values first (`gumbel.restrict`). `shape` is (batch,
    height, width), and what a cell holds where that is more than a code: then `choose`, called as `_choose` is, draws
    it. One compiled loop with static shapes, h w forward passes; call it under `jit` to trace it once.
    """
    batch, height, width, *rest = shape
    choose = choose or _choose

    def draw(position: Int[Array, ""], flat: Int[Array, "b p"]) -> Int[Array, "b p"]:
        logits = logits_fn(flat.reshape(shape)).reshape(batch, height * width, -1)[:, position]
        return flat.at[:, position].set(choose(logits, noise(position), temperature, top_k, top_p))

    flat = jax.lax.fori_loop(0, height * width, draw, jnp.zeros((batch, height * width, *rest), jnp.int32))
    return flat.reshape(shape)


def sample_codes_cached(
    cell_fn: Callable[[Int[Array, "b h w"], Cell, PyTree], tuple[Float[Array, "b k"], PyTree]],
    noise: Callable[[Int[Array, ""]], Float[Array, "b k"]],
    shape: tuple[int, ...],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    choose: Callable[..., Array] | None = None,
) -> Int[Array, "b h w"]:
    """As `sample_codes`, from `cell_fn(codes, cell, kept) -> logits of that cell, kept`.

    `kept` are the collections of a network that evaluates cells (`Prior.cell_logits`), {} to make them.
    """
    _, height, width, *rest = shape
    choose = choose or _choose

    def draw(column: Int[Array, ""], carry: tuple, row: Int[Array, ""]) -> tuple:
        codes, kept = carry
        cell = Cell(row, column, height, width)
        logits, kept = cell_fn(codes, cell, kept)
        code = choose(logits, noise(cell.position), temperature, top_k, top_p)
        return jax.lax.dynamic_update_slice(codes, code[:, None, None], (0, row, column, *[0] * len(rest))), kept

    def draw_row(row: Int[Array, ""], carry: tuple) -> tuple:
        codes, kept = carry
        kept = {name: next_row(tree) if name == ROWS else tree for name, tree in kept.items()}
        return jax.lax.fori_loop(0, width, lambda column, carry: draw(column, carry, row), (codes, kept))

    codes, first = jnp.zeros(shape, jnp.int32), jnp.int32(0)
    _, kept = jax.eval_shape(lambda: cell_fn(codes, Cell(first, first, height, width), {}))
    kept = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dict(kept))
    codes, _ = jax.lax.fori_loop(0, height, draw_row, (codes, kept))
    return codes


def sample_codes_predictively(
    logits_fn: Callable[[Int[Array, "b h w"], PyTree], Float[Array, "b h w k"]],
    keys: Key[Array, " b"],
    context: PyTree,
    size: tuple[int, int, int],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, "b h w"], Int[Array, " b"]]:
    """As `sample_codes` with the noise of `gumbel_noise(keys)`, by fixed-point iteration; and the calls of each sample.

    `logits_fn(codes, context)`, where the leaves of `context` have the sample as their leading axis. `size`: height,
    width and number of codes.
    """
    height, width, num_codes = size
    count, num_dims = len(keys), height * width

    def logits(params: PyTree, flat: Int[Array, "b d"], context: PyTree) -> tuple[Float[Array, "b d k"], PyTree]:
        return logits_fn(flat.reshape(-1, height, width), context).reshape(*flat.shape, num_codes), ()

    def noise(keys: Key[Array, " n"]) -> gumbel.Noise:
        def at(ids: Int[Array, " b"], dims: Array, call: Array | None = None) -> Float[Array, "b w k"]:
            own = keys[jnp.minimum(ids, count - 1)]  # a lane may be idle
            dims = jnp.broadcast_to(dims, (len(ids), dims.shape[-1]))
            of_lane = lambda key, dims: jax.vmap(lambda dim: gumbel_noise(key[None], num_codes)(dim)[0])(dims)
            return jax.vmap(of_lane)(own, dims)

        return at

    network = engine.whole(logits, num_dims, num_codes)
    options = {"top_k": top_k, "top_p": top_p, "noise": noise}
    draw = engine.sampler(network, forecasters.fixed_point(), count, count, **options)
    samples = draw((), keys, context=context, temperature=temperature)
    return samples.x.reshape(count, height, width), samples.calls


def _choose(
    logits: Float[Array, "b k"],
    eps: Float[Array, "b k"],
    temperature: Float[Array, ""] | float,
    top_k: int,
    top_p: float,
) -> Int[Array, " b"]:
    return gumbel.scores(logits, eps, temperature, top_k, top_p).argmax(-1).astype(jnp.int32)
