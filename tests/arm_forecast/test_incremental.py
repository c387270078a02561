"""Windows of rows and single pixels, evaluated from cached activations, against whole images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import incremental, pixelcnn
from arm_forecast.pixelcnn import Grid, NetworkConfig

CATEGORICAL = NetworkConfig(resnets=1, filters=6)
MIXTURE = NetworkConfig(resnets=1, filters=6, output="dmol", mixtures=2)
TWO_DEEP = NetworkConfig(resnets=2, filters=6)


@functools.partial(jax.jit, static_argnums=(1, 2))
def hidden(params, config, grid, x):
    return pixelcnn.hidden(params, config, grid, x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def window_hidden(params, config, grid, cache, x, start):
    return incremental.window_hidden(params, config, grid, cache, x, start)


@functools.partial(jax.jit, static_argnums=(1, 2))
def pixel_by_pixel(params, config, grid, x):
    """h from cells, fed as ancestral sampling does: what is not drawn yet is 0. The group of features of a channel is
    taken when that channel is next."""
    batch, filters = len(x), config.filters
    weights = pixelcnn.prepare(params, config, grid)

    def pixel(position, carry):
        known, cells, h = carry
        row, column = position // grid.width, position % grid.width
        begin = lambda cells: incremental.cells_row(weights, config, grid, cells, known, row)
        cells = jax.lax.cond(column == 0, begin, lambda cells: cells, cells)
        for channel in range(grid.channels):
            here, cells = incremental.cells_hidden(weights, config, grid, cells, known, row, column)
            group = jnp.arange(filters) // (filters // grid.channels) == channel
            old = jax.lax.dynamic_slice(h, (0, row, column, 0), (batch, 1, 1, filters))
            h = jax.lax.dynamic_update_slice(h, jnp.where(group, here[:, None, None], old), (0, row, column, 0))
            drawn = jax.lax.dynamic_slice(x, (0, row, column, channel), (batch, 1, 1, 1))
            known = jax.lax.dynamic_update_slice(known, drawn, (0, row, column, channel))
        return known, cells, h

    cells = incremental.cells_start(config, grid, batch)
    start = jnp.zeros_like(x), cells, jnp.zeros((*x.shape[:3], filters))
    return jax.lax.fori_loop(0, grid.height * grid.width, pixel, start)[2]


def random_images(grid, batch):
    return np.asarray(jax.random.randint(jax.random.key(1), (batch, *grid[:3]), 0, grid.values))


@pytest.mark.parametrize("config, channels, window", [(CATEGORICAL, 3, 4), (TWO_DEEP, 1, 8), (MIXTURE, 3, 8)])
def test_a_sliding_window_gives_the_rows_of_the_whole_image(config, channels, window, random_params):
    """Each image moves on at its own pace. In every call the dimensions that the next window counts as final are right
    but for the last one, and everything behind is wrong."""
    grid, batch, row_dims = Grid(16, 8, channels, 4), 3, 8 * channels
    params, generator = random_params(config, grid), np.random.default_rng(0)
    truth = random_images(grid, batch)
    start, cache = np.zeros(batch, int), incremental.window_cache(config, grid, batch, window)
    shifts = [[0, window // 4, 1], [window // 4, 0, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    for shift in shifts:
        next_start = np.minimum(start + 4 * np.array(shift), 16 - window)
        wrong = (truth + generator.integers(1, 4, truth.shape)) % 4
        final = np.arange(16 * row_dims) < (next_start * row_dims - 1)[:, None]
        # What lies above the window is final in any case.
        final |= np.arange(16 * row_dims) < (start * row_dims)[:, None]
        x = np.where(final.reshape(truth.shape), truth, wrong)
        h, pending = window_hidden(params, config, grid, cache, x, start)
        expected = hidden(params, config, grid, x)
        for lane in range(batch):
            rows = slice(start[lane], start[lane] + window)
            np.testing.assert_allclose(h[lane], expected[lane, rows], atol=1e-5)
        cache = incremental.advance(pending, jnp.asarray((next_start - start) // 4))
        start = next_start
    assert (start == 16 - window).all()


def test_a_window_of_the_whole_image_is_the_whole_image(random_params):
    grid = Grid(8, 8, 3, 4)
    params, x = random_params(CATEGORICAL, grid), random_images(grid, 2)
    cache = incremental.window_cache(CATEGORICAL, grid, 2, 8)
    h, _ = window_hidden(params, CATEGORICAL, grid, cache, x, np.zeros(2, int))
    np.testing.assert_allclose(h, hidden(params, CATEGORICAL, grid, x), atol=1e-5)


@pytest.mark.parametrize("window", [0, 6, 20])
def test_a_window_that_does_not_fit_the_levels_is_refused(window):
    with pytest.raises(ValueError, match=f"a multiple of 4 in 4..16, not {window}"):
        incremental.window_cache(CATEGORICAL, Grid(16, 8, 3, 4), 2, window)


@pytest.mark.parametrize(
    "config, grid",
    [
        (CATEGORICAL, Grid(8, 8, 3, 4)),
        (TWO_DEEP, Grid(4, 12, 1, 4)),
        (MIXTURE, Grid(8, 8, 3, 4)),
        (MIXTURE, Grid(8, 4, 1, 4)),
    ],
)
def test_pixels_one_by_one_give_the_whole_image(config, grid, random_params):
    params, x = random_params(config, grid), random_images(grid, 2)
    found = pixel_by_pixel(params, config, grid, x)
    np.testing.assert_allclose(found, hidden(params, config, grid, x), atol=1e-5)


def test_caches_of_half_precision_keep_their_type_in_a_loop(random_params):
    config, grid = NetworkConfig(resnets=1, filters=6, dtype="bfloat16"), Grid(8, 8, 3, 4)
    params, x = random_params(config, grid), random_images(grid, 2)
    jax.eval_shape(lambda: pixel_by_pixel(params, config, grid, x))  # a loop refuses a carry that changes type
    cache = incremental.window_cache(config, grid, 2, 4)
    h, pending = jax.eval_shape(lambda: incremental.window_hidden(params, config, grid, cache, x, jnp.zeros(2, int)))
    assert h.dtype == jnp.bfloat16
    types = jax.tree.map(lambda leaf: leaf.dtype, (pending.rows, cache.rows))
    assert types[0] == types[1]
