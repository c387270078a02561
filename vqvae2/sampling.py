"""Exact sampling of a grid of codes, three ways.

`sample_codes` draws one position after another. With a network that keeps what it has of the cells before
(`Incremental`, made by `prior.incremental`) each cell is evaluated once; with `whole` each position takes a whole
forward pass, h w times the work: right for any network that is causal in raster order, and the truth that the others
are compared with.
`sample_codes_predictively` evaluates whole grids of forecasts and accepts as many codes of each as are right (Wiggers &
Hoogeboom 2020): less to wait for one after another, more work.
With the same noise all draw the same codes, up to ties within the difference of logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from arm_forecast import engine, forecasters, gumbel


class Incremental(NamedTuple):
    """A network that evaluates one cell after another in raster order, from what it kept of those before."""

    # codes -> what is kept before any cell
    nothing: Callable[[Int[Array, "b h w"]], PyTree]
    # (codes, row, kept) -> kept, before the first cell of each row
    begin_row: Callable[[Int[Array, "b h w"], Int[Array, ""], PyTree], PyTree]
    # (codes, row, column, kept) -> logits of that cell, kept
    cell_logits: Callable[..., tuple[Float[Array, "b k"], PyTree]]


def whole(logits_fn: Callable[[Int[Array, "b h w"]], Float[Array, "b h w k"]]) -> Incremental:
    """A network that keeps nothing and evaluates the whole grid for each cell."""
    return Incremental(
        nothing=lambda codes: (),
        begin_row=lambda codes, row, kept: kept,
        cell_logits=lambda codes, row, column, kept: (logits_fn(codes)[:, row, column], kept),
    )


def gumbel_noise(
    key: Key[Array, ""], ids: Int[Array, " b"], num_codes: int
) -> Callable[[Int[Array, ""]], Float[Array, "b k"]]:
    """noise(position): standard Gumbel variables, a function of (key, sample, raster position) and nothing else.

    So a sample depends neither on its batch nor on the sampler.
    """
    noise = gumbel.noise(key, num_codes)
    return lambda position: noise(ids, position[None])[:, 0]


# (logits of a cell, its noise, temperature, top_k, top_p) -> what is drawn for the cell
Choose = Callable[[Float[Array, "b k"], PyTree, Float[Array, ""] | float, int, float], Int[Array, "b ..."]]


def choose_code(
    logits: Float[Array, "b k"],
    eps: Float[Array, "b k"],
    temperature: Float[Array, ""] | float,
    top_k: int,
    top_p: float,
) -> Int[Array, " b"]:
    return gumbel.scores(logits, eps, temperature, top_k, top_p).argmax(-1).astype(jnp.int32)


def sample_codes(
    network: Incremental,
    noise: Callable[[Int[Array, ""]], PyTree],
    shape: tuple[int, ...],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    choose: Choose = choose_code,
) -> Int[Array, "b h w"]:
    """code_p = argmax_k (logits_k + T g_k), a draw from softmax(logits / T) with Gumbel noise g, for p in raster order.

    T = 0 is the greedy grid. `top_k` and `top_p` restrict the values first (`gumbel.restrict`). `shape` is (batch,
    height, width), and what a cell holds where that is more than a code: then `choose` draws it. One compiled loop with
    static shapes; call it under `jit` to trace it once.
    """
    _, height, width, *rest = shape

    def draw(row: Int[Array, ""], column: Int[Array, ""], codes: Int[Array, "b h w"], kept: PyTree) -> tuple:
        logits, kept = network.cell_logits(codes, row, column, kept)
        code = choose(logits, noise(row * width + column), temperature, top_k, top_p)
        return jax.lax.dynamic_update_slice(codes, code[:, None, None], (0, row, column, *[0] * len(rest))), kept

    def draw_row(row: Int[Array, ""], carry: tuple) -> tuple:
        codes, kept = carry
        kept = network.begin_row(codes, row, kept)
        return jax.lax.fori_loop(0, width, lambda column, carry: draw(row, column, *carry), (codes, kept))

    codes = jnp.zeros(shape, jnp.int32)
    return jax.lax.fori_loop(0, height, draw_row, (codes, network.nothing(codes)))[0]


def sample_codes_predictively(
    logits_fn: Callable[[Int[Array, "b h w"], PyTree], Float[Array, "b h w k"]],
    key: Key[Array, ""],
    ids: Int[Array, " b"],
    context: PyTree,
    size: tuple[int, int, int],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, "b h w"], Int[Array, " b"]]:
    """As `sample_codes` with `gumbel_noise(key, ids)`, by fixed-point iteration; and the calls of each sample.

    `logits_fn(codes, context)`, where the leaves of `context` have the sample as their leading axis. `size`: height,
    width and number of codes.
    """
    height, width, num_codes = size
    count, num_dims = len(ids), height * width

    def logits(params: PyTree, flat: Int[Array, "b d"], context: PyTree) -> tuple[Float[Array, "b d k"], PyTree]:
        return logits_fn(flat.reshape(-1, height, width), context).reshape(*flat.shape, num_codes), ()

    def noise(key: Key[Array, ""]) -> gumbel.Noise:
        of_ids = gumbel.noise(key, num_codes)
        # The engine numbers its samples 0, 1, ...; one past the last stands for none.
        return lambda rows, dims, call=None: of_ids(ids[jnp.minimum(rows, count - 1)], dims, call)  # pyright: ignore

    network = engine.whole(logits, num_dims, num_codes)
    options = {"top_k": top_k, "top_p": top_p, "noise": noise}
    draw = engine.sampler(network, forecasters.fixed_point(), count, count, **options)
    samples = draw((), key, context=context, temperature=temperature)
    return samples.x.reshape(count, height, width), samples.calls
