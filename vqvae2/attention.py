"""Causal attention over a grid of codes, after PixelSNAIL.

Source: Chen et al. 2018, section 3 and its released code; Razavi et al. 2019, supplement A.2. The keys come from the
*raw* input, as in that code: ports that take them from the shifted stream leave the first column of every row blind to
the code before it.
With a `Cell` it evaluates that cell alone, from the keys and values that it keeps in the collection `ATTENDED`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bitsperdim.causal import Cell, attention_weights, put, strictly_before, take
from bitsperdim.convolution import Conv
from vqvae2.layers import NO_CONTEXT, Context, GatedResidual, dropout

ATTENDED = "attended"  # the collection of keys and values
DROPPED = ("probabilities", "logits")


def background(height: int, width: int) -> Float[Array, "1 h w 2"]:
    """Where a cell is: ((i - H/2) / H, (j - W/2) / W)."""
    rows = (jnp.arange(height) - height / 2) / height
    columns = (jnp.arange(width) - width / 2) / width
    return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1)[None]


class CausalAttention(nn.Module):
    """Multi-head attention over all cells strictly before one's own; the first cell receives zeros.

    Keys and values come from [embedded codes, x, background], queries from [x, background], each through a 1x1 gated
    layer; the result enters a third one on x as its aux. `features` counts the key (= query = value) dimensions of all
    heads. `dropped` is what dropout acts on: probabilities become zero, so that a cell is not seen; logits become zero
    before the mask, which the paper's words ("dropout on attention logits") say, and which draws probabilities towards
    the uniform.
    """

    heads: int
    features: int
    activation: str
    dropout: float = 0.0
    dropped: str = "probabilities"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        embedded: Float[Array, "b h w e"],
        context: Context = NO_CONTEXT,
        index: Int[Array, ""] | int = 0,
    ) -> Float[Array, "b h w c"]:
        """With a cell, `embedded` is the code before it: the code of the cell itself is not known yet."""
        batch, height, width, channels = x.shape
        if context.place is None:
            place = background(height, width)
            kv = self._project(_with_place(x, place, embedded), "key_value", 2 * self.features)
            visible = strictly_before(height * width)
        else:
            assert isinstance(context.place, Cell)  # whole rows of horizontal streams are not evaluated
            place, kv, visible = self._kept(x, embedded, context.place)
        query = self._project(_with_place(x, place), "query", self.features)
        key, value = jnp.split(kv, 2, -1)
        by_head = lambda t: t.reshape(batch, -1, self.heads, self.features // self.heads)
        drop = functools.partial(dropout, "attention", index, context.keys, self.dropout)
        on = {name: drop if name == self.dropped else (lambda values: values) for name in DROPPED}
        weights = attention_weights(by_head(query), by_head(key), visible, on["logits"])
        weights = on["probabilities"](weights).astype(value.dtype)
        attended = jnp.einsum("bnqk,bknd->bqnd", weights, by_head(value)).reshape(batch, height, width, -1)
        return self._gated(channels, "output")(x, aux=attended)

    def _kept(
        self, x: Float[Array, "b 1 1 c"], embedded: Float[Array, "b 1 1 e"], cell: Cell
    ) -> tuple[Float[Array, "1 1 1 2"], Float[Array, "b p 1 f"], Bool[Array, "1 p"]]:
        """Background of the cell, keys and values of all cells with those of the one before added, which are visible.

        They wait for the next cell because they read the code of their own.
        """
        cells, layer = cell.height * cell.width, cell.layer
        places = background(cell.height, cell.width).reshape(1, -1, 1, 2)
        previous = jnp.maximum(cell.position - 1, 0)
        place, place_before = (jax.lax.dynamic_slice_in_dim(places, p, 1, 1) for p in (cell.position, previous))
        before = self.variable(ATTENDED, "before", jnp.zeros, x.shape, x.dtype)
        x_before = take(before.value, layer, (0, 0, 0, 0), x.shape)
        before.value = put(before.value, x, layer, (0, 0, 0, 0))
        kv = self._project(_with_place(x_before, place_before, embedded), "key_value", 2 * self.features)
        # At the first cell this writes to its own place, which nothing sees before it is written again.
        shape = (len(x), cells, 1, 2 * self.features)
        kept = self.variable(ATTENDED, "key_value", jnp.zeros, shape, kv.dtype)
        kept.value = put(kept.value, kv, layer, (0, previous, 0, 0))
        return place, take(kept.value, layer, (0, 0, 0, 0), shape), jnp.arange(cells)[None] < cell.position

    def _gated(self, residual: int, name: str) -> GatedResidual:
        return GatedResidual(residual, 1, self.activation, dtype=self.dtype, name=name)

    def _project(self, x: Float[Array, "b h w c"], name: str, features: int) -> Float[Array, "b h w d"]:
        x = self._gated(x.shape[-1], f"{name}_gated")(x)
        return Conv(features, (1, 1), dtype=self.dtype, name=f"{name}_projection")(x)


def _with_place(
    x: Float[Array, "b h w c"], place: Float[Array, "1 h w 2"], *before: Float[Array, "b h w e"]
) -> Float[Array, "b h w f"]:
    place = jnp.broadcast_to(place.astype(x.dtype), (*x.shape[:-1], 2))
    return jnp.concatenate([*before, x, place], -1)
