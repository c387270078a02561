"""The network where most of an image is already final: a window of rows, or one pixel, from cached activations.

Every convolution looks one row up, so above the rows that are evaluated one row of its input is enough. Two executors
of the trunk follow from that:

* windows (`window_*`, `advance`): some rows of each image, beginning at a row of its own, for predictive sampling;
* cells (`cells_*`): one pixel at a time, the same for all images, for ancestral sampling. The u stream runs once a row,
  the ul stream once a pixel and channel; the coarser levels only where row and column are even, their result is held.

A row of activations never sees its last pixel's last channel, so it is final as soon as all dimensions before that one
are. Not here: the samplers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PyTree

from arm_forecast import layers, pixelcnn
from arm_forecast.layers import Weights
from arm_forecast.pixelcnn import LAST_LEVEL, Grid, NetworkConfig, Us

STRIDE = 2**LAST_LEVEL  # rows of the finest level to one of the coarsest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Rows of every convolution's input, by its name: the cached one above the window; or, while `advance` has not
    chosen among them, those above each row that the next window can begin at."""

    rows: dict[str, Float[Array, "b n w i"]]
    height: int = dataclasses.field(metadata={"static": True})


def window_cache(config: NetworkConfig, grid: Grid, batch: int, window: int) -> Window:
    """The cache of windows of `window` rows (a multiple of 4) that begin at row 0."""
    if window % STRIDE or not 0 < window <= grid.height:
        raise ValueError(f"window must be a multiple of {STRIDE} in {STRIDE}..{grid.height}, not {window}")
    zeros = lambda layer: jnp.zeros((batch, 1, grid.width >> layer.level, layer.inputs), jnp.dtype(config.dtype))
    return Window({name: zeros(layer) for name, layer in _causal(config, grid).items()}, window)


def _causal(config: NetworkConfig, grid: Grid) -> dict[str, layers.Layer]:
    """The layers that look at the row above, the stems (which read the image) apart."""
    table = pixelcnn.table(config, grid)
    apart = ("stem", "upsize")
    return {name: layer for name, layer in table.items() if layer.kernel[0] == 2 and not name.startswith(apart)}


def window_hidden(
    params: PyTree | Weights,
    config: NetworkConfig,
    grid: Grid,
    cache: Window,
    x: Integer[Array, "b h w c"],
    start: Int[Array, " b"],
) -> tuple[Float[Array, "b window w f"], Window]:
    """h of the rows start ... start + window - 1 of each image, and what `advance` takes.

    `x` are whole images. The rows above `start`, a multiple of 4, must be final; the cache must belong to `start`.
    """
    weights = pixelcnn.prepare(params, config, grid)
    rows = start[:, None] + jnp.arange(-2, cache.height)
    e = pixelcnn.encode(config, grid, layers.surround(x, rows, jnp.arange(-1, grid.width + 1)))
    executor = _Rows(weights, cache)
    us = pixelcnn.u_stream(executor, config, layers.u_stem(weights, e))
    h = pixelcnn.ul_stream(executor, layers.ul_stem(weights, e), us)
    return h, Window(executor.pending, cache.height)


def advance(pending: Window, shift: Int[Array, " b"]) -> Window:
    """The cache of windows that begin 4 `shift` rows further down, 0 <= shift <= window / 4, each image its own.

    All rows above the new window must have been final in the call that left `pending`, but for the very last dimension.
    """
    pick = jax.vmap(lambda rows, index: jax.lax.dynamic_slice_in_dim(rows, index, 1))
    return Window({name: pick(rows, shift) for name, rows in pending.rows.items()}, pending.height)


class _Rows(layers.Whole):
    """Evaluates windows of rows."""

    def __init__(self, weights: Weights, cache: Window) -> None:
        super().__init__(weights)
        self.cache = cache
        self.pending: dict[str, Array] = {}

    def with_row_above(self, name: str, x: Float[Array, "b h w i"]) -> Float[Array, "b h+1 w i"]:
        rows = jnp.concatenate([self.cache.rows[name], x], 1)
        self.pending[name] = rows[:, :: x.shape[1] * STRIDE // self.cache.height]
        return rows


class _Level(NamedTuple):
    """What is kept of one stream at one level: inputs of its convolutions, and all about the levels below (None at the
    last): two rows of their result at this level's resolution, what else they return, and what they keep."""

    inputs: dict[str, Array]
    held: Any  # Float[Array, "b 2 w f"]
    extra: Any
    below: Any


class Cells(NamedTuple):
    """What is kept between pixels: of the u stream the last row of every input, of the ul stream the last two rows and
    a column of zeros to their left; and what the u stream has to say about the current row."""

    u: _Level
    ul: _Level
    us: Us


def cells_start(config: NetworkConfig, grid: Grid, batch: int) -> Cells:
    """The cells before the first pixel."""
    dtype, causal = jnp.dtype(config.dtype), _causal(config, grid)
    zeros = lambda rows, columns, features: jnp.zeros((batch, rows, columns, features), dtype)

    def us(level: int) -> Us:
        row = zeros(1, grid.width >> level, config.filters)
        last = level == LAST_LEVEL
        return Us([row] * config.resnets, None if last else us(level + 1), [row] * (config.resnets + (not last)))

    def stream(level: int, name: str) -> _Level:
        width, rows, left = grid.width >> level, *((1, 0) if name == "u" else (2, 1))
        ours = {key: layer for key, layer in causal.items() if layer.level == level and _stream_of(key) == name}
        inputs = {key: zeros(rows, width + left, layer.inputs) for key, layer in ours.items()}
        if level == LAST_LEVEL:
            return _Level(inputs, None, None, None)
        extra = us(level + 1) if name == "u" else None
        return _Level(inputs, zeros(2, width, config.filters), extra, stream(level + 1, name))

    return Cells(stream(0, "u"), stream(0, "ul"), us(0))


def _stream_of(name: str) -> str:
    """up0/ul1/conv_in -> ul."""
    return name.split("/")[1].rstrip("0123456789")


def cells_row(
    params: PyTree | Weights,
    config: NetworkConfig,
    grid: Grid,
    cells: Cells,
    x: Integer[Array, "b h w c"],
    row: Int[Array, ""],
) -> Cells:
    """Before the first pixel of a row: the u stream of that row, from the rows of `x` above it, which must be final."""
    weights = pixelcnn.prepare(params, config, grid)
    rows = row + jnp.arange(-2, 1)
    e = pixelcnn.encode(config, grid, layers.surround(x, rows[None], jnp.arange(-1, grid.width + 1)))
    executor = _Row(weights, cells.u, row, 0)
    us = pixelcnn.u_stream(executor, config, layers.u_stem(weights, e))
    return Cells(executor.level, _next_row(cells.ul, row), us)


def _next_row(level: _Level, row: Int[Array, ""]) -> _Level:
    """The current row becomes the one above, at coarser levels where they begin a row too."""
    inputs = {name: rows.at[:, 0].set(rows[:, 1]) for name, rows in level.inputs.items()}
    below = level.below
    if below is not None:
        below = jax.lax.cond(row % 2 == 0, lambda below: _next_row(below, row // 2), lambda below: below, below)
    return level._replace(inputs=inputs, below=below)


def cells_hidden(
    params: PyTree | Weights,
    config: NetworkConfig,
    grid: Grid,
    cells: Cells,
    x: Integer[Array, "b h w c"],
    row: Int[Array, ""],
    column: Int[Array, ""],
) -> tuple[Float[Array, "b f"], Cells]:
    """h of one pixel, from the pixels of `x` before it and its own channels as far as they are known.

    Of a pixel whose channels are drawn one by one it is called again for each; the group of features of channel c is
    right once the channels before c are.
    """
    weights = pixelcnn.prepare(params, config, grid)
    rows, columns = row + jnp.arange(-2, 1), column + jnp.arange(-1, 2)
    e = pixelcnn.encode(config, grid, layers.surround(x, rows[None], columns))
    executor = _Pixel(weights, cells.ul, row, column)
    h = pixelcnn.ul_stream(executor, layers.ul_stem(weights, e), cells.us)
    return h[:, 0, 0], cells._replace(ul=executor.level)


class _Cells(layers.Whole):
    """Evaluates a part of a row of one level, from `column` on, and keeps in `level` what the next ones need."""

    def __init__(self, weights: Weights, level: _Level, row: Int[Array, ""], column: Int[Array, ""] | int) -> None:
        super().__init__(weights)
        self.level = level
        self.row = row
        self.column = column

    def keep(self, name: str, x: Array) -> None:
        """Replaces what is kept of one input."""
        self.level = self.level._replace(inputs=self.level.inputs | {name: x})

    def below(self, name: str, x: Float[Array, "b 1 w f"], inner: Callable) -> tuple[Float[Array, "b 1 w f"], Any]:
        """The levels below run where row and column are even; what they gave is held for the odd ones."""
        down, up = (self.weights.layers[f"{way}{name}"] for way in ("downsize", "upsize"))
        seen = self.surrounded(f"downsize{name}", x)

        def evaluate(level: _Level) -> _Level:
            executor = type(self)(self.weights, level.below, self.row // 2, self.column // 2)
            z, extra = inner(executor, layers.conv(seen, down, stride=2))
            held = jax.lax.dynamic_update_slice(level.held, layers.upsample(z, up), (0, 0, self.column, 0))
            return _Level({}, held, extra, executor.level)

        changed = self.level._replace(inputs={})
        even = (self.row % 2 == 0) & (self.column % 2 == 0)
        changed = jax.lax.cond(even, evaluate, lambda level: level, changed)
        self.level = changed._replace(inputs=self.level.inputs)
        return jax.lax.dynamic_slice(changed.held, (0, self.row % 2, self.column, 0), x.shape), changed.extra


class _Row(_Cells):
    """Evaluates the u stream of one row; keeps the row before."""

    def with_row_above(self, name: str, x: Float[Array, "b 1 w i"]) -> Float[Array, "b 2 w i"]:
        above = self.level.inputs[name]
        self.keep(name, x)
        return jnp.concatenate([above, x], 1)


class _Pixel(_Cells):
    """Evaluates the ul stream of one pixel; keeps two rows and a column of zeros at their left."""

    def surrounded(self, name: str, x: Float[Array, "b 1 1 i"]) -> Float[Array, "b 2 2 i"]:
        rows = jax.lax.dynamic_update_slice(self.level.inputs[name], x, (0, 1, self.column + 1, 0))
        self.keep(name, rows)
        return jax.lax.dynamic_slice_in_dim(rows, self.column, 2, 2)

    def here(self, u: Float[Array, "b 1 w f"]) -> Float[Array, "b 1 1 f"]:
        return jax.lax.dynamic_slice_in_dim(u, self.column, 1, 2)
