"""The layers of a prior: gated residual layers, the stem before and the output blocks behind them.

Source: Razavi et al. 2019, supplement A.2 and tables 1-2; Chen et al. 2018 (PixelSNAIL), section 3 and its released
code, where the paper's own figure of the gated layer is not available.
With a `Cell` a layer evaluates that cell alone, from what it keeps of those before in the collection `ROWS`.
Not here: weight normalisation (the original has it; plain weights are cheaper to sample from); the dense reading of the
paper's kernels (`two_stack.py`); attention (`attention.py`).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bitsperdim import rng
from bitsperdim.causal import CausalConv, Cell, Row, shift_down, shift_right
from bitsperdim.convolution import Conv
from vqvae2.embedding import Embedding

# Output convolutions of residual branches start at a tenth of the usual deviation (PixelSNAIL's init scale 0.1).
SMALL_INIT = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


class Context(NamedTuple):
    """What every layer of a prior is given beside its input."""

    conditioning: Float[Array, "b h w u"] | None = None  # of the cells that are evaluated
    label: Int[Array, " b"] | None = None
    keys: Key[Array, " b"] | None = None  # of dropout, one for each example; None: none
    place: Cell | Row | None = None  # what is evaluated; None: the whole grid
    # Nothing is kept yet: layers make what they keep. Else like layers keep theirs in one array, see `Cell.layer`.
    fresh: bool = False

    def of_layer(self, *layer: Int[Array, ""] | int) -> "Context":
        """For the layer at this place among its likes."""
        if self.place is None or self.fresh:
            return self
        return self._replace(place=self.place._replace(layer=layer))


NO_CONTEXT = Context()


def concat_elu(x: Float[Array, "... c"]) -> Float[Array, "... 2*c"]:
    """elu([x, -x])."""
    return nn.elu(jnp.concatenate([x, -x], -1))


ACTIVATIONS = {"elu": nn.elu, "concat_elu": concat_elu}


def dropout(
    purpose: str, index: Int[Array, ""] | int, keys: Key[Array, " b"] | None, rate: float, x: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """Dropout with noise of the `index`-th layer of its kind, whether it is scanned or not; none without keys."""
    if keys is None:
        return x
    own = lambda key: jax.random.fold_in(rng.for_purpose(key, purpose), index)
    return rng.dropout(jax.vmap(own)(keys), rate, x)


def gated(x: Float[Array, "b h w c"], h: Float[Array, "b h w 2*c"]) -> Float[Array, "b h w c"]:
    """x + a sigmoid(b), with a, b the channel halves of h."""
    a, b = jnp.split(h, 2, -1)
    return x + a * nn.sigmoid(b)


class Told(nn.Module):
    """What a layer adds to h for the codes above and for the class: conv1x1(conditioning) + table[label], or nothing.

    The table begins at zero.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"], context: Context) -> Float[Array, "b h w c"]:
        features = h.shape[-1]
        if context.conditioning is not None:
            conv = Conv(features, (1, 1), use_bias=False, dtype=self.dtype, name="conditioning")
            h = h + conv(context.conditioning)
        if self.num_classes:
            zeros = nn.initializers.zeros
            bias = Embedding(self.num_classes, features, self.dtype, table_init=zeros, name="class_bias")
            assert context.label is not None
            h = h + bias(context.label)[:, None, None, :]
        return h


class Stem(nn.Module):
    """The first layer, blind to its own cell: it sees (i-1, j-1 ... j+1) and (i-1 ... i, j-1).

    A constant channel of ones tells the image from its padding.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.above = CausalConv(self.features, (1, 3), right=1, dtype=self.dtype)
        self.left = CausalConv(self.features, (2, 1), dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w e"]) -> Float[Array, "b h w c"]:
        x = with_ones(x)
        return shift_down(self.above(x)) + shift_right(self.left(x))

    def at_cell(self, x: Float[Array, "b 2 3 e"], exists: Bool[Array, "b 2 3"]) -> Float[Array, "b 1 1 c"]:
        """The same at one cell, from rows i-1 ... i and columns j-1 ... j+1; x is zero where `exists` is false.

        The shifts of whole grids bring zeros in, without a bias, where there is no row above or no column to the left.
        """
        exists = exists[..., None].astype(x.dtype)
        x = jnp.concatenate([x, exists], -1)
        above = self.above(x[:, :1])[:, :, 1:2] * exists[:, :1, 1:2]
        return above + self.left(x[:, :, :1])[:, 1:] * exists[:, 1:, :1]


def with_ones(x: Float[Array, "b h w e"]) -> Float[Array, "b h w e+1"]:
    """A constant channel, which is zero in padding alone."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)


class GatedResidual(nn.Module):
    """x + a sigmoid(b), where a, b are the channel halves of c2 and f is the activation:

    c1 = conv(f(x)) [+ conv1x1(f(aux))],   c2 = conv(dropout(f(c1))) [+ conv1x1(conditioning)] [+ bias of the class].

    Both convolutions see the upper left quadrant of side `kernel`, their own cell included: the stem has already
    shifted.
    """

    residual: int
    kernel: int
    activation: str
    dropout: float = 0.0
    num_classes: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Context = NO_CONTEXT,
        index: Int[Array, ""] | int = 0,
        aux: Float[Array, "b h w v"] | None = None,
    ) -> Float[Array, "b h w c"]:
        activation, size = ACTIVATIONS[self.activation], (self.kernel, self.kernel)
        h = CausalConv(self.residual, size, dtype=self.dtype, name="conv_in")(activation(x), context.place)
        if aux is not None:
            h = h + Conv(self.residual, (1, 1), dtype=self.dtype, name="aux")(activation(aux))
        h = dropout("layer", index, context.keys, self.dropout, activation(h))
        conv_out = CausalConv(2 * x.shape[-1], size, dtype=self.dtype, kernel_init=SMALL_INIT, name="conv_out")
        h = conv_out(h, context.place)
        return gated(x, Told(self.num_classes, self.dtype, name="told")(h, context))


class OutputBlock(nn.Module):
    """x + conv1x1(dropout(f(conv1x1(f(x))))): depth on top of the causal stack, cheap since it looks at one cell."""

    residual: int
    activation: str
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"] | None, index: Int[Array, ""] | int = 0
    ) -> Float[Array, "b h w c"]:
        activation = ACTIVATIONS[self.activation]
        h = activation(Conv(self.residual, (1, 1), dtype=self.dtype, name="conv_in")(activation(x)))
        h = dropout("output", index, keys, self.dropout, h)
        return x + Conv(x.shape[-1], (1, 1), dtype=self.dtype, kernel_init=SMALL_INIT, name="conv_out")(h)
