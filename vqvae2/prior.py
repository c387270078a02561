"""The autoregressive prior over one level's codes: a causal stack after PixelSNAIL, and what it is conditioned on.

Source: Razavi et al. 2019, supplement A.2 and tables 1-2; Chen et al. 2018 (PixelSNAIL).
The network evaluates whole grids, or with a `Cell` one cell after another from what its layers keep of those before:
convolutions in the collection `ROWS`, attention in `ATTENDED`.
Not here: the layers (`layers.py`, `two_stack.py`, `attention.py`), and sampling (`sampling.py`).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Key, PyTree

from bitsperdim.causal import ROWS, Cell, Row, next_row
from bitsperdim.convolution import Conv
from bitsperdim.distributions import mixture_outputs
from vqvae2 import runs
from vqvae2.attention import ATTENDED, CausalAttention
from vqvae2.conditioning import Conditioner
from vqvae2.embedding import Embedding, Projection
from vqvae2.layers import Context, GatedResidual, OutputBlock, Stem, with_ones
from vqvae2.runs import Manner
from vqvae2.sampling import Incremental
from vqvae2.two_stack import Streams, TwoStackResidual, TwoStackStem, stem_input

KEPT = (ROWS, ATTENDED)
READINGS = ("quadrant", "causal")

State = Float[Array, "b h w c"] | Streams  # what runs through the layers


def nll(logits: Float[Array, "b h w k"], codes: Int[Array, "b h w"]) -> Float[Array, " b"]:
    """-sum over cells of log softmax(logits)[code], in nats per example."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, codes[..., None], axis=-1).sum((1, 2, 3))


class Group(nn.Module):
    """`every` gated layers and one attention, which reads and changes the horizontal stream where there are two."""

    layer: GatedResidual | TwoStackResidual
    attention: CausalAttention
    every: int
    manner: Manner

    def __call__(
        self, x: State, index: Int[Array, ""], embedded: Float[Array, "b h w e"] | None, context: Context
    ) -> State:
        place = lambda i: (index, i)
        x = _layers(self.layer, x, self.every, self.manner, context, place, index * self.every)
        if isinstance(context.place, Row):
            return x
        attend = lambda attention, x: attention(x, embedded, context.of_layer(index), index)
        attend = _of_its_own(attend, self.manner, context, (index,))
        if isinstance(x, Streams):
            return x._replace(horizontal=attend(self.attention, x.horizontal))
        return attend(self.attention, x)


def _layers(
    layer: GatedResidual | TwoStackResidual,
    x: State,
    count: int,
    manner: Manner,
    context: Context,
    place: Callable[[Int[Array, ""]], tuple] = lambda i: (i,),
    first: Int[Array, ""] | int = 0,
) -> State:
    """A run of gated layers, of the numbers `first`, first + 1, ... in the network."""

    def apply(layer: nn.Module, x: State, i: Int[Array, ""]) -> State:
        call = lambda layer, x: layer(x, context.of_layer(*place(i)), first + i)
        return _of_its_own(call, manner, context, place(i))(layer, x)

    return _run(layer, apply, x, count, manner, context)


def _of_its_own(call: Callable, manner: Manner, context: Context, place: tuple) -> Callable:
    """call(module, x) with the parameters at this place of the runs, or with what `runs.run` hands it as its own."""
    if context.place is None:
        return runs.rematerialised(call, manner)
    return call if context.fresh else runs.at_place(call, place)


def _run(block: nn.Module, apply: Callable, x: State, count: int, manner: Manner, context: Context) -> State:
    """`runs.run`, or what does the same for a cell or a row."""
    manner = manner._replace(remat=False)  # the parts of blocks are, see `_of_its_own`
    if context.place is None or context.fresh:
        return runs.run(block, apply, x, count, manner, made=KEPT if context.fresh else ())
    return runs.loop(block, apply, x, count, manner, carried=KEPT)


class PixelSnail(nn.Module):
    """Logits (float32) of every code given the codes before it in raster order.

    The input is a learned embedding. A one-hot input is the special case `embedding = num_codes` with the identity as
    its table; a narrower table keeps the attention's key layers, which read the input too, from growing with
    `num_codes`. `attention_every` layers comes one attention (0: none). The class enters every layer as a bias, the
    conditioning map by a projection.
    `reading` says what the convolutions see: 'quadrant', the upper left one of side `kernel` as in PixelSNAIL (2
    there); or 'causal', all of a kernel of side `kernel` that comes before. Without attention a cell of the former sees
    the rows above up to one column to its right, and no further.
    """

    num_codes: int
    embedding: int
    hidden: int
    residual: int
    layers: int
    kernel: int = 3
    reading: str = "quadrant"
    activation: str = "elu"
    attention_every: int = 0
    attention_heads: int = 8
    attention_features: int = 0
    attention_dropped: str = "probabilities"
    output_layers: int = 0
    dropout: float = 0.0
    num_classes: int = 0
    dtype: jnp.dtype = jnp.float32
    manner: Manner = Manner()
    channels: int = 0  # D > 0: a cell holds D levels of num_codes each, and the outputs are those of a mixture
    mixtures: int = 10  # its components

    @nn.compact
    def __call__(
        self,
        codes: Int[Array, "b h w"] | Int[Array, "b h w d"],
        conditioning: Float[Array, "b h w u"] | None = None,
        label: Int[Array, " b"] | None = None,
        keys: Key[Array, " b"] | None = None,
        place: Cell | Row | None = None,
    ) -> Float[Array, "b h w k"] | None:
        """With a cell its logits alone, [b 1 1 k], from the codes before it and their `KEPT` collections. With a row
        nothing but those of the row above it, which must be evaluated first where `reading` is 'causal'. Then
        `conditioning` is that of the cell, or of the row above."""
        context = Context(conditioning, label, keys, place, fresh=not self.variables.get(ROWS))
        x, embedded = self._embedded(codes, place)
        x = self._stack(x, embedded, context)
        if isinstance(place, Row):
            return None
        x = x.horizontal if isinstance(x, Streams) else x
        assert x is not None
        if self.output_layers:
            block = OutputBlock(self.residual, self.activation, self.dropout, self.dtype, name="output")
            apply = lambda block, x, index: block(x, keys, index)
            manner = self.manner._replace(remat=self.manner.remat and place is None)
            x = runs.run(block, apply, x, self.output_layers, manner)
        outputs = mixture_outputs(self.channels, self.mixtures) if self.channels else self.num_codes
        return Conv(outputs, (1, 1), name="head")(nn.elu(x).astype(jnp.float32))

    def _embedded(
        self, codes: Int[Array, "b h w"], place: Cell | Row | None
    ) -> tuple[State, Float[Array, "b h w e"] | None]:
        """What the stem makes of the codes, and the embedding of those that the attention reads."""
        embedding = Projection if self.channels else Embedding
        embed = embedding(self.num_codes, self.embedding, self.dtype, name="embedding")
        causal = self.reading == "causal"
        stem = TwoStackStem(self.hidden, self.kernel, self.dtype, name="stem") if causal else None
        if place is None:
            embedded = embed(codes)
            x = stem(stem_input(embedded)) if stem else Stem(self.hidden, self.dtype, name="stem")(embedded)
            return x, embedded
        if isinstance(place, Row):
            assert stem
            above = jax.lax.dynamic_slice_in_dim(codes, jnp.maximum(place.row - 1, 0), 1, 1)
            return stem(Streams(with_ones(embed(above)), None), place), None
        before = jnp.maximum(place.position - 1, 0)
        in_order = codes.reshape(len(codes), -1, 1, *codes.shape[3:])
        embedded = embed(jax.lax.dynamic_slice_in_dim(in_order, before, 1, 1))
        if stem:
            return stem(Streams(None, with_ones(embedded) * (place.column > 0)), place), embedded
        around = _around(codes, place)
        # Index -1, outside of the grid, is embedded as zero.
        exists = (around >= 0).reshape(len(codes), 2, 3, -1)[..., 0]
        return Stem(self.hidden, self.dtype, name="stem").at_cell(embed(around), exists), embedded

    def _stack(self, x: State, embedded: Float[Array, "b h w e"] | None, context: Context) -> State:
        """Groups of layers with an attention behind them, then what layers are left over."""
        shared = {"activation": self.activation, "dropout": self.dropout, "dtype": self.dtype}
        kind = TwoStackResidual if self.reading == "causal" else GatedResidual
        layer = functools.partial(kind, self.residual, self.kernel, num_classes=self.num_classes, **shared)
        groups, rest = divmod(self.layers, self.attention_every) if self.attention_every else (0, self.layers)
        if groups:
            sizes = self.attention_heads, self.attention_features
            attention = CausalAttention(*sizes, dropped=self.attention_dropped, **shared, parent=None)
            group = Group(layer(parent=None), attention, self.attention_every, self.manner, name="groups")
            apply = lambda group, x, index: group(x, index, embedded, context)
            x = _run(group, apply, x, groups, self.manner, context)
        if rest:
            x = _layers(layer(name="layers"), x, rest, self.manner, context, first=groups * self.attention_every)
        return x


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
        logits = self.network(codes, conditioning, label, keys)
        assert logits is not None
        return logits

    def cell_logits(
        self,
        codes: Int[Array, "b h w"],
        cell: Cell,
        conditioning: Float[Array, "b h w u"] | None = None,
        label: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b k"]:
        """Logits of one cell under a given conditioning map, from what the collections `KEPT` hold of the cells before.

        `incremental` calls this.
        """
        if conditioning is not None:
            size = (len(codes), 1, 1, conditioning.shape[-1])
            conditioning = jax.lax.dynamic_slice(conditioning, (0, cell.row, cell.column, 0), size)
        logits = self.network(codes, conditioning, label, place=cell)
        assert logits is not None
        return logits[:, 0, 0]

    def begin_row(
        self,
        codes: Int[Array, "b h w"],
        row: Row,
        conditioning: Float[Array, "b h w u"] | None = None,
        label: Int[Array, " b"] | None = None,
    ) -> None:
        """Leaves in the collections `KEPT` what the cells of a row need of the one above it. `incremental` calls this.

        Only where there is a vertical stream; quadrants keep what they need cell by cell.
        """
        if self.network.reading == "causal":
            if conditioning is not None:
                conditioning = jax.lax.dynamic_slice_in_dim(conditioning, jnp.maximum(row.row - 1, 0), 1, 1)
            self.network(codes, conditioning, label, place=row)


def incremental(
    prior: Prior,
    variables: PyTree,
    conditioning: Float[Array, "b h w u"] | None = None,
    label: Int[Array, " b"] | None = None,
) -> Incremental:
    """The prior cell by cell under a given conditioning map; codes of cells to come are not read."""

    def begin_row(codes: Int[Array, "b h w"], row: Int[Array, ""], kept: PyTree) -> PyTree:
        kept = {name: next_row(tree) if name == ROWS else tree for name, tree in kept.items()}
        arguments = codes, Row(row, codes.shape[1], codes.shape[2]), conditioning, label
        return kept | dict(prior.apply(variables | kept, *arguments, method="begin_row", mutable=KEPT)[1])  # pyright: ignore

    def cell_logits(codes: Int[Array, "b h w"], row: Int[Array, ""], column: Int[Array, ""], kept: PyTree):
        arguments = codes, Cell(row, column, codes.shape[1], codes.shape[2]), conditioning, label
        logits, changed = prior.apply(variables | kept, *arguments, method="cell_logits", mutable=KEPT)  # pyright: ignore
        return logits, kept | dict(changed)

    def nothing(codes: Int[Array, "b h w"]) -> PyTree:
        first = jnp.int32(0)
        of_row = jax.eval_shape(lambda: begin_row(codes, first, {}))
        _, of_cell = jax.eval_shape(lambda: cell_logits(codes, first, first, {}))
        shapes = unflatten_dict(flatten_dict(of_row) | flatten_dict(of_cell))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return Incremental(nothing, begin_row, cell_logits)
