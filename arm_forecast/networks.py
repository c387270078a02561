"""PixelCNN as the sampling engine sees it: whole images or windows of rows, and its forecasting modules.

The parameters of everything here are {"arm": weights ready for use, "modules": theirs, where there are some}; see
`prepared`. Dimensions are ordered by rows, columns, channels: d = (i W + j) C + c.
Not here: cached ancestral sampling, which evaluates single pixels (`ancestral.py`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from arm_forecast import engine, forecasters, incremental, modules, pixelcnn
from arm_forecast.config import ModulesConfig
from arm_forecast.forecasters import Call
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import distributions

ALIGNMENT = 4  # windows begin at multiples of it: the lowest resolution has a quarter of the rows


class Hidden(NamedTuple):
    """What the modules see: h of the window's rows, and the row above it (zeros above the image)."""

    rows: Float[Array, "b w+1 width f"]
    first: Int[Array, " b"]  # the image's row that stands first in `rows`


class WindowCache(NamedTuple):
    network: PyTree
    above: Float[Array, "b 1 width f"]  # h of the row above the window


def prepared(params: PyTree, config: NetworkConfig, grid: Grid) -> PyTree:
    """Trained parameters, masked and normalised once for all calls of a sampler."""
    return params | {"arm": pixelcnn.prepare(params["arm"], config, grid)}


def conditional_logits(
    weights: PyTree, config: NetworkConfig, grid: Grid, h: Float[Array, "b h w f"], x: Int[Array, "b h w c"]
) -> Float[Array, "b h w c k"]:
    """log P(x_d = k | x_<d), up to a constant of each dimension, for both kinds of output."""
    out = pixelcnn.logits(weights, config, grid, h)
    if config.output == "categorical":
        return out
    log_pmf = distributions.discretized_logistic_mixture_log_pmf
    return jnp.stack([log_pmf(out, x, grid.values, channel) for channel in range(grid.channels)], -2)


def nll(logits: Array, x: Int[Array, "b h w c"], output: str, grid: Grid) -> Float[Array, " b"]:
    """-log P(x) in nats per example, from the network's output."""
    if output == "dmol":
        return -distributions.discretized_logistic_mixture_log_prob(logits, x, grid.values).sum((1, 2))
    return -distributions.categorical_log_prob(logits, x).sum((1, 2, 3))


def whole(config: NetworkConfig, grid: Grid) -> engine.Network:
    """Every call evaluates whole images."""

    def function(params: PyTree, x: Int[Array, "b d"], context: PyTree) -> tuple[Float[Array, "b d k"], Hidden]:
        images = _images(x, grid)
        h = pixelcnn.hidden(params["arm"], config, grid, images)
        logits = conditional_logits(params["arm"], config, grid, h, images)
        rows = jnp.pad(h, ((0, 0), (1, 0), (0, 0), (0, 0)))
        return logits.reshape(*x.shape, grid.values), Hidden(rows, jnp.full(len(x), -1))

    return engine.whole(function, _dims(grid), grid.values)


def windowed(config: NetworkConfig, grid: Grid, rows: int) -> engine.Network:
    """Every call evaluates `rows` rows, a multiple of 4, from the first one that is not yet sampled.

    What lies above is final: every convolution keeps one row of its input.
    """
    row_dims = grid.width * grid.channels

    def init(batch: int) -> WindowCache:
        above = jnp.zeros((batch, 1, grid.width, config.filters), jnp.dtype(config.dtype))
        return WindowCache(incremental.window_cache(config, grid, batch, rows), above)

    def call(params, cache: WindowCache, x, start, context):
        images, first = _images(x, grid), start // row_dims
        h, pending = incremental.window_hidden(params["arm"], config, grid, cache.network, images, first)
        take = lambda image, row: jax.lax.dynamic_slice_in_dim(image, row, rows)
        logits = conditional_logits(params["arm"], config, grid, h, jax.vmap(take)(images, first))
        hidden = Hidden(jnp.concatenate([cache.above, h], 1), first - 1)
        return logits.reshape(len(x), rows * row_dims, grid.values), hidden, (pending, hidden.rows)

    def advance(pending: Any, shift: Int[Array, " b"]) -> WindowCache:
        of_network, h = pending
        take = lambda h, row: jax.lax.dynamic_slice_in_dim(h, row, 1)
        return WindowCache(incremental.advance(of_network, shift), jax.vmap(take)(h, shift * ALIGNMENT))

    stride = ALIGNMENT * row_dims
    return engine.Network(_dims(grid), grid.values, rows * row_dims, stride, init, call, advance)


def predictor(config: ModulesConfig, grid: Grid) -> forecasters.Predict:
    """The logits of the modules at one pixel of every lane, from what the last call has left."""

    def predict(params: PyTree, call: Call, pixel: Int[Array, " b"]) -> Float[Array, "b t c k"]:
        row, column = pixel // grid.width, pixel % grid.width
        patches = {"h": _patch(call.hidden.rows, row - call.hidden.first, column)}
        inputs = modules.module_inputs(config, *_known(config, call, pixel, grid), grid.values)
        return modules.at_pixel(params["modules"], grid, patches | inputs)

    return predict


def _known(config: ModulesConfig, call: Call, pixel: Int[Array, " b"], grid: Grid):
    """x and the noise in the 3x3 pixels around each lane's pixel; x that is not accepted yet, and what lies beyond the
    edges, has level -1 and no noise."""
    if not config.inputs:
        return jnp.zeros((len(pixel), 3, 3, grid.channels), jnp.int32), None
    offset = jnp.arange(-1, 2)
    rows = (pixel // grid.width)[:, None] + offset
    columns = (pixel % grid.width)[:, None] + offset
    inside = ((rows >= 0) & (rows < grid.height))[:, :, None] & ((columns >= 0) & (columns < grid.width))[:, None, :]
    dims = (rows[:, :, None] * grid.width + columns[:, None, :])[..., None] * grid.channels + jnp.arange(grid.channels)
    safe = jnp.where(inside[..., None], dims, 0).reshape(len(pixel), -1)
    known = inside[..., None] & (dims < call.frontier[:, None, None, None])
    x = jnp.where(known, jnp.take_along_axis(call.outputs, safe, 1).reshape(dims.shape), -1)
    if "noise" not in config.inputs:
        return x, None
    noise = call.noise(safe).reshape(*dims.shape, grid.values)
    return x, jnp.where(inside[..., None, None], noise, 0.0)


def _patch(h: Float[Array, "b r w f"], row: Int[Array, " b"], column: Int[Array, " b"]) -> Float[Array, "b 3 3 f"]:
    """The 3x3 places around (row, column) of each example; zeros beyond the edges.

    The row below is out of reach of the modules, so that of the last row may be missing.
    """
    padded = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    take = lambda one, i, j: jax.lax.dynamic_slice(one, (i, j, 0), (3, 3, one.shape[-1]))
    return jax.vmap(take)(padded, row, column)


def _images(x: Int[Array, "b d"], grid: Grid) -> Int[Array, "b h w c"]:
    return x.reshape(len(x), grid.height, grid.width, grid.channels)


def _dims(grid: Grid) -> int:
    return grid.height * grid.width * grid.channels
