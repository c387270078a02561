"""The autoregressive prior over one level's codes: gated residual layers and causal attention, after PixelSNAIL.

Source: Razavi et al. 2019, supplement A.2 and tables 1-2; Chen et al. 2018 (PixelSNAIL), section 3 and its released
code, where the paper's own figure of the gated layer is not available. The keys of the attention come from the *raw*
input, as in that code: ports that take them from the shifted stream leave the first column of every row blind to the
code before it. Without attention a cell sees the rows above up to one column to its right, and no further: the price
of quadrant kernels.
Every module evaluates whole grids, or with a `Cell` one cell after another from what it keeps of those before: the
convolutions in the collection `ROWS`, the attention in `ATTENDED`.
Not here: weight normalisation (the original has it; plain weights are cheaper to sample from), and sampling.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bitsperdim import rng
from bitsperdim.causal import ROWS, CausalConv, Cell, attention_weights, shift_down, shift_right, strictly_before
from bitsperdim.convolution import Conv
from bitsperdim.distributions import mixture_outputs
from vqvae2.conditioning import Conditioner
from vqvae2.embedding import Embedding, Projection

ATTENDED = "attended"  # the collection of keys and values
KEPT = (ROWS, ATTENDED)

# Output convolutions of residual branches start at a tenth of the usual deviation (PixelSNAIL's init scale 0.1).
SMALL_INIT = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


def concat_elu(x: Float[Array, "... c"]) -> Float[Array, "... 2*c"]:
    """elu([x, -x])."""
    return nn.elu(jnp.concatenate([x, -x], -1))


ACTIVATIONS = {"elu": nn.elu, "concat_elu": concat_elu}


def nll(logits: Float[Array, "b h w k"], codes: Int[Array, "b h w"]) -> Float[Array, " b"]:
    """-sum over cells of log softmax(logits)[code], in nats per example."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, codes[..., None], axis=-1).sum((1, 2, 3))


def background(height: int, width: int) -> Float[Array, "1 h w 2"]:
    """Where a cell is: ((i - H/2) / H, (j - W/2) / W)."""
    rows = (jnp.arange(height) - height / 2) / height
    columns = (jnp.arange(width) - width / 2) / width
    return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1)[None]


def _dropout(name: str, keys: Key[Array, " b"] | None, rate: float, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Dropout with noise of the layer called `name`; none without keys."""
    if keys is None:
        return x
    return rng.dropout(jax.vmap(lambda key: rng.for_purpose(key, name))(keys), rate, x)


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
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
        return shift_down(self.above(x)) + shift_right(self.left(x))

    def at_cell(self, x: Float[Array, "b 2 3 e"], exists: Bool[Array, "b 2 3"]) -> Float[Array, "b 1 1 c"]:
        """The same at one cell, from rows i-1 ... i and columns j-1 ... j+1; x is zero where `exists` is false.

        The shifts of whole grids bring zeros in, without a bias, where there is no row above or no column to the left.
        """
        exists = exists[..., None].astype(x.dtype)
        x = jnp.concatenate([x, exists], -1)
        above = self.above(x[:, :1])[:, :, 1:2] * exists[:, :1, 1:2]
        return above + self.left(x[:, :, :1])[:, 1:] * exists[:, 1:, :1]


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
        *,
        aux: Float[Array, "b h w v"] | None = None,
        conditioning: Float[Array, "b h w u"] | None = None,
        label: Int[Array, " b"] | None = None,
        keys: Key[Array, " b"] | None = None,
        cell: Cell | None = None,
    ) -> Float[Array, "b h w c"]:
        activation, features, size = ACTIVATIONS[self.activation], x.shape[-1], (self.kernel, self.kernel)
        h = CausalConv(self.residual, size, dtype=self.dtype, name="conv_in")(activation(x), cell)
        if aux is not None:
            h = h + Conv(self.residual, (1, 1), dtype=self.dtype, name="aux")(activation(aux))
        h = _dropout(self.name, keys, self.dropout, activation(h))
        h = CausalConv(2 * features, size, dtype=self.dtype, kernel_init=SMALL_INIT, name="conv_out")(h, cell)
        if conditioning is not None:
            h = h + Conv(2 * features, (1, 1), use_bias=False, dtype=self.dtype, name="conditioning")(conditioning)
        if self.num_classes:
            zeros = nn.initializers.zeros
            bias = Embedding(self.num_classes, 2 * features, self.dtype, table_init=zeros, name="class_bias")
            h = h + bias(label)[:, None, None, :]
        a, b = jnp.split(h, 2, -1)
        return x + a * nn.sigmoid(b)


class CausalAttention(nn.Module):
    """Multi-head attention over all cells strictly before one's own; the first cell receives zeros.

    Keys and values come from [embedded codes, x, background], queries from [x, background], each through a 1x1 gated
    layer; the result enters a third one on x as its aux. `features` counts the key (= query = value) dimensions of all
    heads.
    """

    heads: int
    features: int
    activation: str
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        embedded: Float[Array, "b h w e"],
        keys: Key[Array, " b"] | None = None,
        cell: Cell | None = None,
    ) -> Float[Array, "b h w c"]:
        """With a cell, `embedded` is the code before it: the code of the cell itself is not known yet."""
        batch, height, width, channels = x.shape
        if cell is None:
            place = background(height, width)
            visible = strictly_before(height * width)
            kv_input = _with_place(x, place, embedded)
        else:
            places = background(cell.height, cell.width).reshape(1, -1, 1, 2)
            before = jnp.maximum(cell.position - 1, 0)
            place, place_before = (jax.lax.dynamic_slice_in_dim(places, p, 1, 1) for p in (cell.position, before))
            visible = jnp.arange(cell.height * cell.width)[None] < cell.position
            x_before = self.variable(ATTENDED, "before", jnp.zeros_like, x)
            kv_input = _with_place(x_before.value, place_before, embedded)
            x_before.value = x
        kv = self._project(kv_input, "key_value", 2 * self.features)
        if cell is not None:
            # At the first cell this writes to its own place, which nothing sees before it is written again.
            shape = (batch, cell.height * cell.width, 1, 2 * self.features)
            kept = self.variable(ATTENDED, "key_value", jnp.zeros, shape, kv.dtype)
            kept.value = kv = jax.lax.dynamic_update_slice_in_dim(kept.value, kv, before, 1)
        query = self._project(_with_place(x, place), "query", self.features)
        key, value = jnp.split(kv, 2, -1)
        by_head = lambda t: t.reshape(batch, -1, self.heads, self.features // self.heads)
        weights = attention_weights(by_head(query), by_head(key), visible)
        weights = _dropout(self.name, keys, self.dropout, weights).astype(value.dtype)
        attended = jnp.einsum("bnqk,bknd->bqnd", weights, by_head(value)).reshape(batch, height, width, -1)
        return self._gated(channels, "output")(x, aux=attended)

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


class OutputBlock(nn.Module):
    """x + conv1x1(dropout(f(conv1x1(f(x))))): depth on top of the causal stack, cheap since it looks at one cell."""

    residual: int
    activation: str
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], keys: Key[Array, " b"] | None) -> Float[Array, "b h w c"]:
        activation = ACTIVATIONS[self.activation]
        h = activation(Conv(self.residual, (1, 1), dtype=self.dtype, name="conv_in")(activation(x)))
        h = _dropout(self.name, keys, self.dropout, h)
        return x + Conv(x.shape[-1], (1, 1), dtype=self.dtype, kernel_init=SMALL_INIT, name="conv_out")(h)


class PixelSnail(nn.Module):
    """Logits (float32) of every code given the codes before it in raster order.

    The input is a learned embedding. A one-hot input is the special case `embedding = num_codes` with the identity as
    its table; a narrower table keeps the attention's key layers, which read the input too, from growing with
    `num_codes`. `kernel` is the side of the quadrant: 2 in PixelSNAIL; 3 is the upper left part of the paper's "filter
    5". `attention_every` layers comes one attention (0: none). The class enters every layer as a bias, the
    conditioning map by a projection.
    """

    num_codes: int
    embedding: int
    hidden: int
    residual: int
    layers: int
    kernel: int = 3
    activation: str = "elu"
    attention_every: int = 0
    attention_heads: int = 8
    attention_features: int = 0
    output_layers: int = 0
    dropout: float = 0.0
    num_classes: int = 0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    channels: int = 0  # D > 0: a cell holds D levels of num_codes each, and the outputs are those of a mixture
    mixtures: int = 10  # its components

    @nn.compact
    def __call__(
        self,
        codes: Int[Array, "b h w"] | Int[Array, "b h w d"],
        conditioning: Float[Array, "b h w u"] | None = None,
        label: Int[Array, " b"] | None = None,
        keys: Key[Array, " b"] | None = None,
        cell: Cell | None = None,
    ) -> Float[Array, "b h w k"]:
        """With a cell its logits alone, [b 1 1 k], from the codes before it and their `KEPT` collections; then
        `conditioning` is that of the cell."""
        shared = {"activation": self.activation, "dropout": self.dropout, "dtype": self.dtype}
        # What a layer computes inside is forgotten and computed again in the backward pass; parameters are the same.
        gated = nn.remat(GatedResidual) if self.remat and cell is None else GatedResidual
        layer = functools.partial(gated, self.residual, self.kernel, num_classes=self.num_classes, **shared)
        attention = functools.partial(CausalAttention, self.attention_heads, self.attention_features, **shared)
        embedding = Projection if self.channels else Embedding
        embed = embedding(self.num_codes, self.embedding, self.dtype, name="embedding")
        stem = Stem(self.hidden, self.dtype, name="stem")
        if cell is None:
            embedded = embed(codes)
            x = stem(embedded)
        else:
            around = _around(codes, cell)
            # Index -1, outside of the grid, is embedded as zero.
            x = stem.at_cell(embed(around), (around >= 0).reshape(len(codes), 2, 3, -1)[..., 0])
            before = jnp.maximum(cell.position - 1, 0)
            embedded = embed(
                jax.lax.dynamic_slice_in_dim(codes.reshape(len(codes), -1, 1, *codes.shape[3:]), before, 1, 1)
            )
        at_cell = {} if cell is None else {"cell": cell}  # nn.remat takes arrays only
        for i in range(self.layers):
            x = layer(name=f"layer_{i}")(x, conditioning=conditioning, label=label, keys=keys, **at_cell)
            if self.attention_every and (i + 1) % self.attention_every == 0:
                x = attention(name=f"attention_{i // self.attention_every}")(x, embedded, keys, cell)
        for i in range(self.output_layers):
            x = OutputBlock(self.residual, **shared, name=f"output_{i}")(x, keys)
        outputs = mixture_outputs(self.channels, self.mixtures) if self.channels else self.num_codes
        return Conv(outputs, (1, 1), name="head")(nn.elu(x).astype(jnp.float32))


def _around(codes: Int[Array, "b h w ..."], cell: Cell) -> Int[Array, "b 2 3 ..."]:
    """Rows i-1 ... i and columns j-1 ... j+1; -1 beyond the edges."""
    rest = codes.shape[3:]
    padded = jnp.pad(codes, ((0, 0), (1, 0), (1, 1), *[(0, 0)] * len(rest)), constant_values=-1)
    start = (0, cell.row, cell.column, *[0] * len(rest))
    return jax.lax.dynamic_slice(padded, start, (len(codes), 2, 3, *rest))


class Prior(nn.Module):
    """p(codes | codes of the levels above, class): a `PixelSnail`, with a `Conditioner` at every level but the top.

    `keys`, one per example, bring dropout; without them the network is deterministic. `train` concerns BatchNorm alone.
    """

    network: PixelSnail
    conditioner: Conditioner | None = None

    def __call__(
        self,
        codes: Int[Array, "b h w"],
        upper: tuple[Int[Array, "b hl wl"], ...] = (),
        label: Int[Array, " b"] | None = None,
        keys: Key[Array, " b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w k"]:
        """Logits of every code; `logits(codes, condition(upper))`."""
        return self.logits(codes, self.condition(upper, train), label, keys)

    def condition(
        self, upper: tuple[Int[Array, "b hl wl"], ...], train: bool = False
    ) -> Float[Array, "b h w u"] | None:
        """The conditioning map, which sampling computes once; `upper` holds the codes above, coarsest first."""
        return None if self.conditioner is None else self.conditioner(upper, train)

    def logits(
        self,
        codes: Int[Array, "b h w"],
        conditioning: Float[Array, "b h w u"] | None = None,
        label: Int[Array, " b"] | None = None,
        keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Logits of every code under a given conditioning map."""
        return self.network(codes, conditioning, label, keys)

    def cell_logits(
        self,
        codes: Int[Array, "b h w"],
        cell: Cell,
        conditioning: Float[Array, "b h w u"] | None = None,
        label: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b k"]:
        """Logits of one cell under a given conditioning map, from what the collections `KEPT` hold of the cells before.

        For cells in raster order; apply with `mutable=KEPT`, and `next_row` on `ROWS` before each row.
        """
        if conditioning is not None:
            size = (len(codes), 1, 1, conditioning.shape[-1])
            conditioning = jax.lax.dynamic_slice(conditioning, (0, cell.row, cell.column, 0), size)
        return self.network(codes, conditioning, label, cell=cell)[:, 0, 0]
