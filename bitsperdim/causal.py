"""Convolution and attention that respect raster order: the shifted ("masked") convolution and the strict mask.

Cells are ordered row by row, left to right. A kernel is never masked: the input is padded above and to the left, a
VALID convolution follows, and a shift by one row or column makes the result blind to its own cell where that is wanted
(Salimans et al. 2017, PixelCNN++, section 2.3; Chen et al. 2018, PixelSNAIL, section 3). The functions take the
arrays; the module owns the parameters, and evaluates whole grids or, from the rows that it keeps, one cell.
Not here: the networks made of these parts, and the dropout between them.
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


class Cell(NamedTuple):
    """One cell of a grid, whose size is known when a program is compiled."""

    row: Int[Array, ""]
    column: Int[Array, ""]
    height: int
    width: int

    @property
    def position(self) -> Int[Array, ""]:
        """In raster order."""
        return self.row * self.width + self.column


def next_row(kept: PyTree) -> PyTree:
    """The collection `ROWS` before the first cell of a row: every row moves up by one."""
    return jax.tree.map(lambda rows: jnp.concatenate([rows[:, 1:], rows[:, -1:]], 1), kept)


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

    With a cell, x is its input alone and so is the result. Cells must come in raster order, with `next_row` before each
    row and all rows zero at first: what lies above and to the left is kept in the collection `ROWS`.
    """

    features: int
    kernel_size: tuple[int, int]
    right: int = 0
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], cell: Cell | None = None) -> Float[Array, "b h w d"]:
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if cell is None:
            return causal_conv(x, kernel, self.right) + bias
        seen = self._surrounded(x, cell)
        # A matrix product: a convolution with one output is much slower.
        return (seen.reshape(len(x), -1) @ kernel.reshape(-1, self.features) + bias)[:, None, None]

    def _surrounded(self, x: Float[Array, "b 1 1 c"], cell: Cell) -> Float[Array, "b kh kw c"]:
        """The quadrant of inputs that ends with x; the columns of zeros are those left of the grid."""
        if self.right:
            raise ValueError("cells to the right of the current one are not known yet")
        height, width = self.kernel_size
        shape = (len(x), height, cell.width + width - 1, x.shape[-1])
        rows = self.variable(ROWS, "rows", jnp.zeros, shape, x.dtype)
        rows.value = jax.lax.dynamic_update_slice(rows.value, x, (0, height - 1, cell.column + width - 1, 0))
        return jax.lax.dynamic_slice_in_dim(rows.value, cell.column, width, 2)


def strictly_before(length: int) -> Bool[Array, "q k"]:
    """mask[q, k] is true where raster position k comes before q; row 0 is empty."""
    return jnp.tri(length, k=-1, dtype=bool)


def attention_weights(
    query: Float[Array, "b q n d"], key: Float[Array, "b k n d"], visible: Bool[Array, "#q k"]
) -> Float[Array, "b n q k"]:
    """softmax_k(query . key / sqrt(d)) over the visible positions, in float32; all zeros for a query that sees none."""
    scores = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32) / query.shape[-1] ** 0.5
    # A finite floor: with -inf the softmax of an empty row is NaN, and so is its gradient even where it is masked out.
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.where(visible, weights, 0.0)
