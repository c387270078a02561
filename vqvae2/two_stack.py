"""Dense causal kernels without a blind spot: a stack that sees the rows above, and one that sees the row itself.

A masked k x k kernel sees the half of its cells that comes before. Layers of them never see what lies above and far to
the right: to go there takes a step to the right within a row, and that is masked. So two streams run side by side: the
vertical one of whole rows, down to and including a cell's own, and the horizontal one of the cells to the left, which
is told of the vertical one a row above.

    vertical = conv[(k+1)/2 x k](v),   horizontal = conv[1 x (k+1)/2](h) + conv1x1(vertical shifted down by one row)

Source: van den Oord et al. 2016 (Conditional PixelCNN), section 2.3 and figure 2.
With a `Row` the vertical stream evaluates the row above it, with a `Cell` the horizontal one that cell, from what both
keep in the collection `ROWS`. Not here: layers that see a quadrant (`layers.py`), half the work.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitsperdim.causal import ROWS, CausalConv, Cell, Row, put, shift_down, shift_right, take
from bitsperdim.convolution import Conv
from vqvae2.layers import ACTIVATIONS, NO_CONTEXT, SMALL_INIT, Context, Told, dropout, gated, with_ones


class Streams(NamedTuple):
    """The two streams; None for the one that is not evaluated at a row or a cell."""

    vertical: Float[Array, "b h w c"] | None
    horizontal: Float[Array, "b h w c"] | None


class TwoStackConv(nn.Module):
    """The convolution above of both streams, kernels k = `kernel`; the horizontal one has `columns` columns."""

    features: int
    kernel: int
    columns: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Streams, place: Cell | Row | None = None) -> Streams:
        half, settings = self.kernel // 2, {"dtype": self.dtype, "kernel_init": self.kernel_init}
        down = CausalConv(self.features, (half + 1, self.kernel), half, **settings, name="vertical")
        link = Conv(self.features, (1, 1), **settings, name="link")
        across = CausalConv(self.features, (1, self.columns), **settings, name="horizontal")
        if place is None:
            assert x.vertical is not None and x.horizontal is not None
            vertical = down(x.vertical)
            return Streams(vertical, across(x.horizontal) + link(shift_down(vertical)))
        shape = (len(jax.tree.leaves(x)[0]), 1, place.width, self.features)
        above = self.variable(ROWS, "above", jnp.zeros, shape, self.dtype)
        if isinstance(place, Row):
            assert x.vertical is not None
            # Above the first row there is nothing, not even a bias.
            exists = (place.row > 0).astype(self.dtype)
            vertical = down(x.vertical * exists, place) * exists
            above.value = put(above.value, link(vertical), place.layer, (0, 0, 0, 0))
            return Streams(vertical, None)
        assert x.horizontal is not None
        here = take(above.value, place.layer, (0, 0, place.column, 0), (shape[0], 1, 1, self.features))
        return Streams(None, across(x.horizontal, place) + here)


class TwoStackStem(nn.Module):
    """The first layer: its horizontal stream is blind to its own cell, and with it all that follow."""

    features: int
    kernel: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Streams, place: Cell | Row | None = None) -> Streams:
        """From the codes' embeddings with a channel of ones: those of the row, those of the cells one to the left."""
        return TwoStackConv(self.features, self.kernel, self.kernel // 2, self.dtype, name="conv")(x, place)


def stem_input(embedded: Float[Array, "b h w e"]) -> Streams:
    """What `TwoStackStem` takes of a whole grid."""
    x = with_ones(embedded)
    return Streams(x, shift_right(x))


class TwoStackResidual(nn.Module):
    """`GatedResidual` with `TwoStackConv` for its convolutions, the rest done to each stream by itself."""

    residual: int
    kernel: int
    activation: str
    dropout: float = 0.0
    num_classes: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Streams, context: Context = NO_CONTEXT, index: Int[Array, ""] | int = 0) -> Streams:
        features, columns = jax.tree.leaves(x)[0].shape[-1], self.kernel // 2 + 1
        activation = lambda streams: jax.tree.map(ACTIVATIONS[self.activation], streams)
        sizes = self.kernel, columns, self.dtype
        h = TwoStackConv(self.residual, *sizes, name="conv_in")(activation(x), context.place)
        h = _each(lambda name, h: dropout(name, index, context.keys, self.dropout, h), activation(h))
        h = TwoStackConv(2 * features, *sizes, SMALL_INIT, name="conv_out")(h, context.place)
        told = lambda name, h: Told(self.num_classes, self.dtype, name=f"{name}_told")(h, context)
        return jax.tree.map(gated, x, _each(told, h))


def _each(function: Callable[[str, Array], Array], streams: Streams) -> Streams:
    """function(name, stream) of both, or of the one that is there."""
    pairs = zip(Streams._fields, streams, strict=True)
    return Streams(*(None if stream is None else function(name, stream) for name, stream in pairs))
