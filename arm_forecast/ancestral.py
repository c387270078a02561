"""Cached ancestral sampling: one dimension after another, each pixel computed from the activations already there.

All lanes are at the same pixel, and an image costs about one forward pass for the u stream and one for each channel
for the ul stream, whatever the number of dimensions; but as many small steps one after another. So it wins where many
images are drawn at once, and predictive sampling (`engine.py`) where few are. With the same noise both draw the same
samples, up to ties within the difference of logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

from arm_forecast import gumbel, incremental, networks
from arm_forecast.engine import Samples, check_values
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import sharding


class _Drawn(NamedTuple):
    """The images as far as they are drawn, the activations behind them, and what `Samples` tells of them."""

    x: Int[Array, "n h w c"]
    cells: incremental.Cells
    margin: Float[Array, " n"]
    log_prob: Float[Array, " n"]


# (logits, eps) -> values and their margins
Choose = Callable[[Float[Array, "n k"], Float[Array, "n k"]], tuple[Int[Array, " n"], Float[Array, " n"]]]


def sampler(
    config: NetworkConfig, grid: Grid, num_samples: int, *, top_k: int = 0, top_p: float = 1.0, mesh: Mesh | None = None
) -> Callable[..., Samples]:
    """draw(params, key, given, first_id, temperature) -> `num_samples` samples at once; as `engine.sampler`."""
    num_dims = grid.height * grid.width * grid.channels

    @jax.jit
    def run(
        params: PyTree,
        key: Key[Array, ""],
        given: Int[Array, "n d"],
        first_id: Int[Array, ""],
        temperature: Float[Array, ""],
    ) -> Samples:
        ids, noise = first_id + jnp.arange(num_samples), gumbel.noise(key, grid.values)
        known = given.reshape(num_samples, grid.height, grid.width, grid.channels)
        choose = lambda logits, eps: gumbel.best(logits, eps, temperature, top_k, top_p)

        def pixel(position: Int[Array, ""], drawn: _Drawn) -> _Drawn:
            eps = noise(ids, position * grid.channels + jnp.arange(grid.channels))
            return _pixel(params, config, grid, known, eps, choose, position, drawn)

        x = jnp.zeros(known.shape, jnp.int32)
        if mesh is not None:
            x = jax.lax.with_sharding_constraint(x, sharding.over_batch(mesh))
        cells = incremental.cells_start(config, grid, num_samples)
        start = _Drawn(x, cells, jnp.full(num_samples, jnp.inf), jnp.zeros(num_samples))
        drawn = jax.lax.fori_loop(0, grid.height * grid.width, pixel, start)
        return _samples(drawn, given, 1 if config.output == "categorical" else grid.channels)

    def draw(
        params: PyTree,
        key: Key[Array, ""],
        *,
        given: ArrayLike | None = None,
        first_id: int = 0,
        temperature: float = 1.0,
    ) -> Samples:
        gumbel.check_options(temperature, top_k, top_p)
        known = check_values(-1 if given is None else given, "given", -1, (num_samples, num_dims, grid.values))
        known = jnp.broadcast_to(known, (num_samples, num_dims))
        return run(params, key, known, jnp.int32(first_id), jnp.float32(temperature))

    return draw


def _pixel(
    params: PyTree,
    config: NetworkConfig,
    grid: Grid,
    known: Int[Array, "n h w c"],
    eps: Float[Array, "n c k"],
    choose: Choose,
    position: Int[Array, ""],
    drawn: _Drawn,
) -> _Drawn:
    """Draws the channels of one pixel, all images at the same one."""
    x, cells, margin, log_prob = drawn
    row, column = position // grid.width, position % grid.width
    begin_row = lambda cells: incremental.cells_row(params["arm"], config, grid, cells, x, row)
    cells = jax.lax.cond(column == 0, begin_row, lambda cells: cells, cells)
    for channel in range(grid.channels):
        # A mixture of logistics knows the earlier channels by its coefficients, h does not.
        if channel == 0 or config.output == "categorical":
            h, cells = incremental.cells_hidden(params["arm"], config, grid, cells, x, row, column)
        here = jax.lax.dynamic_slice(x, (0, row, column, 0), (len(x), 1, 1, grid.channels))
        logits = networks.conditional_logits(params["arm"], config, grid, h[:, None, None], here)
        logits = logits[:, 0, 0, channel]
        value, lead = choose(logits, eps[:, channel])
        clamp = jax.lax.dynamic_slice(known, (0, row, column, channel), (len(x), 1, 1, 1)).ravel()
        free = clamp < 0
        value = jnp.where(free, value, clamp)
        x = jax.lax.dynamic_update_slice(x, value[:, None, None, None], (0, row, column, channel))
        margin = jnp.where(free, jnp.minimum(margin, lead), margin)
        gained = jnp.take_along_axis(jax.nn.log_softmax(logits), value[:, None], 1)[:, 0]
        log_prob += jnp.where(free, gained, 0.0)
    return _Drawn(x, cells, margin, log_prob)


def _samples(drawn: _Drawn, given: Int[Array, "n d"], together: int) -> Samples:
    """`together`: the dimensions that one evaluation serves, all channels of a mixture of logistics, else one."""
    num_samples, num_dims = given.shape
    needed = (given < 0).reshape(num_samples, -1, together).any(-1)
    call_of = jnp.cumsum(needed, axis=1, dtype=jnp.int32)
    x, evaluations = drawn.x.reshape(num_samples, -1), jnp.int32(num_dims // together)
    return Samples(x, call_of.repeat(together, 1), call_of[:, -1], drawn.margin, drawn.log_prob, evaluations)
