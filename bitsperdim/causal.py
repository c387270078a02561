"""Convolution and attention that respect raster order: the shifted ("masked") convolution and the strict mask.

Cells are ordered row by row, left to right. A kernel is never masked: the input is padded above and to the left, a
VALID convolution follows, and a shift by one row or column makes the result blind to its own cell where that is wanted
(Salimans et al. 2017, PixelCNN++, section 2.3; Chen et al. 2018, PixelSNAIL, section 3). The functions take the
arrays; the module owns the parameters, and evaluates whole grids or, from the rows that it keeps, one row or one cell.
Not here: the networks made of these parts.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int, PyTree

from bitsperdim.convolution import convolve

ROWS = "rows"  # the collection of what `CausalConv` keeps between cells


Layer = tuple[Int[Array, ""] | int, ...]


class Cell(NamedTuple):
    """One cell of a grid, whose size is known when a program is compiled.

    Like layers that are scanned keep what they keep in one array, with leading axes for them; `layer` is the place in
    it of the one that is evaluated. () where an array belongs to one layer.
    """

    row: Int[Array, ""]
    column: Int[Array, ""]
    height: int
    width: int
    layer: Layer = ()

    @property
    def position(self) -> Int[Array, ""]:
        """In raster order."""
        return self.row * self.width + self.column


class Row(NamedTuple):
    """All cells of a row at once, for layers that see whole rows above; as `Cell`."""

    row: Int[Array, ""]
    height: int
    width: int
    layer: Layer = ()


def next_row(kept: PyTree) -> PyTree:
    """The collection `ROWS` before a row is evaluated: every row moves up by one."""
    return jax.tree.map(lambda rows: jnp.concatenate([rows[..., 1:, :, :], rows[..., -1:, :, :]], -3), kept)


def put(kept: Array, x: Array, layer: Layer, start: tuple) -> Array:
    """`kept` with x from the indices `start` of the part `layer` on; in place where a loop carries it."""
    return jax.lax.dynamic_update_slice(kept, x.reshape((1,) * len(layer) + x.shape), (*layer, *start))


def take(kept: Array, layer: Layer, start: tuple, shape: tuple[int, ...]) -> Array:
    """The values of that shape from the indices `start` of the part `layer` on."""
    return jax.lax.dynamic_slice(kept, (*layer, *start), (1,) * len(layer) + shape).reshape(shape)


def shift_down(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """y[i, j] = x[i - 1, j]; the first row is zero."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))


def shift_right(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """y[i, j] = x[i, j - 1]; the first column is zero."""
    return jnp.pad(x[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))


def causal_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c d"], right: int = 0
) -> Float[Array, "b h w d"]:
    """Output (i, j) sees rows i - kh + 1 ... i and columns j - (kw - 1 - right) ... j + right, its own cell included.

    With `right = 0` that is the upper left quadrant. With `right > 0` the result is causal only after `shift_down`.
    """
    height, width = kernel.shape[:2]
    padding = ((height - 1, 0), (width - 1 - right, right))
    return convolve(x, kernel, padding=padding)


class CausalConv(nn.Module):
    """`causal_conv` with a learned kernel and bias; computes in `dtype`, keeps float32 parameters.

    With a cell (or a row), x is its input alone and so is the result. They must come in raster order, with `next_row`
    before each row and all rows zero at first: what lies above and to the left is kept in the collection `ROWS`.
    """

    features: int
    kernel_size: tuple[int, int]
    right: int = 0
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], place: Cell | Row | None = None) -> Float[Array, "b h w d"]:
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if place is None:
            return causal_conv(x, kernel, self.right) + bias
        seen = self._surrounded(x, place)
        if isinstance(place, Row):
            return convolve(seen, kernel) + bias
        # A matrix product: a convolution with one output is much slower.
        return (seen.reshape(len(x), -1) @ kernel.reshape(-1, self.features) + bias)[:, None, None]

    def _surrounded(self, x: Float[Array, "b 1 w c"], place: Cell | Row) -> Float[Array, "b kh _ c"]:
        """What ends with x: a cell's quadrant, or all columns of the rows; zeros stand for columns off the grid."""
        if self.right and isinstance(place, Cell):
            raise ValueError("cells to the right of the current one are not known yet")
        height, width = self.kernel_size
        columns = place.width + width - 1
        rows = self.variable(ROWS, "rows", jnp.zeros, (len(x), height, columns, x.shape[-1]), x.dtype)
        start, wide = (0, columns) if isinstance(place, Row) else (place.column, width)
        rows.value = put(rows.value, x, place.layer, (0, height - 1, start + width - 1 - self.right, 0))
        return take(rows.value, place.layer, (0, 0, start, 0), (len(x), height, wide, x.shape[-1]))


def strictly_before(length: int) -> Bool[Array, "q k"]:
    """mask[q, k] is true where raster position k comes before q; row 0 is empty."""
    return jnp.tri(length, k=-1, dtype=bool)


def attention_weights(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    visible: Bool[Array, "#q k"],
    drop: Callable[[Array], Array] = lambda scores: scores,
) -> Float[Array, "b n q k"]:
    """softmax_k(query . key / sqrt(d)) over the visible positions, in float32; all zeros for a query that sees none.

    `drop` changes the scores before the mask: dropout on logits.
    """
    scores = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32) / query.shape[-1] ** 0.5
    scores = drop(scores)
    # A finite floor: with -inf the softmax of an empty row is NaN, and so is its gradient even where it is masked out.
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.where(visible, weights, 0.0)
