"""What the PixelCNN++ trunk is made of: its parameters, their masks and weight normalisation, and `Whole`, which
evaluates it on whole images.

Source: Salimans et al. 2017 (PixelCNN++) and its released code for the layers; Wiggers & Hoogeboom 2020, supplement
A.1, for channel autoregression by masks. Convolutions are causal by padding: the kernels of the u stream (2x3) look
one row up and one column to either side, those of the ul stream (2x2) one row up and one column left.

The trunk (`pixelcnn.py`) is written once over an executor, which supplies `gated`, `linear`, `here` and `below`.
`Whole` is the executor of training; those of fast sampling (`incremental.py`) replace what it does at the upper edge
and between the levels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key, PyTree

from bitsperdim import rng
from bitsperdim.convolution import convolve

OUTSIDE = -1  # stands for a pixel beyond the image's edge among the integer levels


class Mask(NamedTuple):
    """Which features one tap of a kernel, the one on the current pixel, may connect, by their groups.

    Group g of the features knows the channels before g of the current pixel; the constant plane and the u stream,
    which know none, have group -1. `own` lets a group see itself (mask B), else only those before it (mask A).
    """

    tap: tuple[int, int]
    own: bool
    inputs: np.ndarray
    outputs: np.ndarray


class Layer(NamedTuple):
    """The shape of one linear map. `level` counts the halvings of its input's resolution.

    The kernel is [height, width, inputs, outputs]. `streams` is 2 where the inputs are the concat-ELU of [u, ul].
    """

    kernel: tuple[int, int]
    inputs: int
    outputs: int
    level: int
    mask: Mask | None = None
    streams: int = 1


class Weights(NamedTuple):
    """Kernels and biases ready for use, by layer name: masked, normalised, in the computing type."""

    layers: dict[str, dict[str, Array]]


def init(key: Key[Array, ""], table: dict[str, Layer], weight_norm: bool) -> PyTree:
    """Kernels and biases uniform in +-1/sqrt(fan in), as PyTorch's convolutions; fan in does not know of masks.

    With weight normalisation the gains start at ||v||, so the function is the same. All numbers are drawn at once:
    a generator for each of several hundred arrays would take minutes to compile.
    """
    sizes = [math.prod(layer.kernel) * layer.inputs * layer.outputs + layer.outputs for layer in table.values()]
    uniform = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    pieces = jnp.split(uniform, np.cumsum(sizes)[:-1])
    params: dict = {}
    for (name, layer), piece in zip(table.items(), pieces, strict=True):
        piece = piece * (math.prod(layer.kernel) * layer.inputs) ** -0.5
        kernel = piece[layer.outputs :].reshape(*layer.kernel, layer.inputs, layer.outputs)
        leaf = {"v": kernel, "g": _norm(kernel, keep=-1).ravel()} if weight_norm else {"kernel": kernel}
        insert(params, name, leaf | {"bias": piece[: layer.outputs]})
    return params


def insert(tree: dict, name: str, leaf: Any) -> None:
    """tree["a"]["b"]["c"] = leaf for the name "a/b/c"."""
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def lookup(tree: PyTree, name: str) -> Any:
    """tree["a"]["b"]["c"] for the name "a/b/c"."""
    for part in name.split("/"):
        tree = tree[part]
    return tree


def effective_kernel(leaf: dict[str, Array]) -> Float[Array, "kh kw i o"]:
    """The kernel itself, or with weight normalisation g v / ||v||, the norm over all axes but the gain's.

    That axis is the output ("g"). The public PyTorch port normalises its transposed convolutions per *input* feature;
    weights imported from it say so by the name of their gain, "g_in".
    """
    if "kernel" in leaf:
        return leaf["kernel"]
    if "g_in" in leaf:
        return leaf["v"] * (leaf["g_in"][:, None] / _norm(leaf["v"], keep=-2))
    return leaf["v"] * (leaf["g"] / _norm(leaf["v"], keep=-1))


def _norm(v: Float[Array, "kh kw i o"], keep: int) -> Float[Array, "1 1 _ _"]:
    axes = tuple(axis for axis in range(4) if axis != 4 + keep)
    return jnp.sqrt(jnp.square(v).sum(axes, keepdims=True))


def prepare(params: PyTree, table: dict[str, Layer], dtypes: Callable[[str], Any]) -> Weights:
    """Masks, weight normalisation and the cast to `dtypes(name)`, once for many evaluations.

    The kernel of a layer with two streams is split: `name` keeps what multiplies u, and the bias; `name`_ul has the
    rest. So the part of u can be computed before ul is known.
    """
    layers = {}
    for name, layer in table.items():
        leaf, dtype = lookup(params, name), dtypes(name)
        kernel, bias = masked(effective_kernel(leaf), layer.mask).astype(dtype), leaf["bias"].astype(dtype)
        if layer.streams == 2:
            # The inputs are [u, ul, -u, -ul] before the ELU.
            u, ul = jnp.moveaxis(kernel.reshape(*layer.kernel, 2, 2, -1, layer.outputs), 3, 0)
            shape = (*layer.kernel, -1, layer.outputs)
            layers[f"{name}_ul"] = {"kernel": ul.reshape(shape), "bias": jnp.zeros_like(bias)}
            kernel = u.reshape(shape)
        layers[name] = {"kernel": kernel, "bias": bias}
    return Weights(layers)


def masked(kernel: Float[Array, "kh kw i o"], mask: Mask | None) -> Float[Array, "kh kw i o"]:
    """The kernel with zeros where the mask forbids a connection."""
    if mask is None:
        return kernel
    # Compared on the device: the C x F^2 truth values would otherwise be constants of the compiled program.
    outputs, inputs = jnp.asarray(mask.outputs), jnp.asarray(mask.inputs)[:, None]
    visible = outputs >= inputs if mask.own else outputs > inputs
    return jnp.asarray(kernel).at[mask.tap].multiply(visible.astype(kernel.dtype))


def concat_elu(x: Float[Array, "... c"]) -> Float[Array, "... 2*c"]:
    """elu([x, -x])."""
    return jax.nn.elu(jnp.concatenate([x, -x], -1))


def surround(
    x: Integer[Array, "b h w c"], rows: Int[Array, "#b r"], columns: Int[Array, " s"]
) -> Integer[Array, "b r s c"]:
    """The pixels at these rows (of each example) and columns; `OUTSIDE` beyond the edges."""
    rows = jnp.broadcast_to(rows, (len(x), rows.shape[1]))
    pick = lambda image, rows: image.at[rows[:, None], columns].get(
        mode="fill", fill_value=OUTSIDE, wrap_negative_indices=False
    )
    return jax.vmap(pick)(x.astype(jnp.int32), rows)


def encode(x: Integer[Array, "... c"], values: int, one_hot: bool, dtype: Any) -> Float[Array, "... e"]:
    """The planes that the first layers see, and a plane of ones which tells the image from what is `OUTSIDE` (zeros).

    One-hot: plane c K + k is 1 where channel c has level k. Else one plane a channel, 2 x / (K - 1) - 1.
    """
    inside = x >= 0
    if one_hot:
        planes = jax.nn.one_hot(x, values, dtype=dtype).reshape(*x.shape[:-1], -1)
    else:
        planes = jnp.where(inside, x * (2.0 / (values - 1)) - 1.0, 0.0).astype(dtype)
    return jnp.concatenate([planes, inside[..., :1].astype(dtype)], -1)


def conv(x: Float[Array, "b h w i"], layer: dict[str, Array], stride: int = 1) -> Float[Array, "b _ _ o"]:
    """A convolution without any padding."""
    kernel = layer["kernel"]
    if x.shape[1:3] == kernel.shape[:2]:  # one output: a matrix product, which is faster
        return x.reshape(len(x), 1, 1, -1) @ kernel.reshape(-1, kernel.shape[-1]) + layer["bias"]
    return convolve(x, kernel, (stride, stride)) + layer["bias"]


def u_stem(weights: Weights, e: Float[Array, "b h+2 w+2 e"]) -> Float[Array, "b h w f"]:
    """The first activation of the u stream at rows i, columns j from the encoded rows i-2 ... i, columns j-1 ... j+1.

    It sees three columns of the two rows above.
    """
    return conv(e[:, :-1], weights.layers["stem/u"]) * _exists(e[:, 1:-1, 1:-1])


def ul_stem(weights: Weights, e: Float[Array, "b h+2 w+2 e"]) -> Float[Array, "b h w f"]:
    """The first activation of the ul stream, from the same encoded rows and columns as `u_stem`.

    It sees three columns of the row above, the pixel to the left and the one above that; with channel groups also the
    earlier channels of the pixel itself.
    """
    kernels = weights.layers
    above = conv(e[:, 1:-1], kernels["stem/ul_above"]) * _exists(e[:, 1:-1, 1:-1])
    left = conv(e[:, 1:, :-2], kernels["stem/ul_left"]) * _exists(e[:, 2:, :-2])
    if "stem/ul_here" not in kernels:
        return above + left
    return above + left + conv(e[:, 2:, 1:-1], kernels["stem/ul_here"])


def _exists(e: Float[Array, "b h w e"]) -> Float[Array, "b h w 1"]:
    """The plane of ones. In the original the stems are shifted after their bias, so it vanishes with the neighbour."""
    return e[..., -1:]


def upsample(x: Float[Array, "b h w i"], layer: dict[str, Array]) -> Float[Array, "b 2*h 2*w o"]:
    """The transposed convolution of stride 2, cropped to twice the size.

    2x2 kernels (ul): y[2i + p, 2j + q] = x[i, j] k[p, q]. 2x3 kernels (u) are centred on the even columns:
    y[2i + p, 2j] = x[i, j] k[p, 1] and y[2i + p, 2j + 1] = x[i, j] k[p, 2] + x[i, j + 1] k[p, 0].
    """
    batch, height, width, _ = x.shape
    y = jnp.einsum("bhwi,pqio->bhpwqo", x, layer["kernel"])
    if layer["kernel"].shape[1] == 3:
        right = jnp.pad(y[..., 1:, 0, :], ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)))
        y = jnp.stack([y[..., 1, :], y[..., 2, :] + right], -2)
    return y.reshape(batch, 2 * height, 2 * width, -1) + layer["bias"]


class Dropout(NamedTuple):
    """Inverted dropout with noise from each example's key; `whole_channels` drops features over all of the image."""

    keys: Key[Array, " b"]
    rate: float
    whole_channels: bool

    def __call__(self, name: str, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Dropout with the noise of the layer called `name`."""
        keys = jax.vmap(lambda key: rng.for_purpose(key, name))(self.keys)
        if self.whole_channels:
            return x * rng.dropout(keys, self.rate, jnp.ones((len(x), 1, 1, x.shape[-1]), x.dtype))
        return rng.dropout(keys, self.rate, x)


class Whole:
    """Evaluates the trunk on whole images: zeros above the first row."""

    def __init__(self, weights: Weights, dropout: Dropout | None = None) -> None:
        self.weights = weights
        self.dropout = dropout

    def gated(
        self, name: str, x: Float[Array, "b h w f"], skip: Float[Array, "b h w f"] | None = None
    ) -> Float[Array, "b h w f"]:
        """x + p sigmoid(q), with p, q the halves of conv(dropout(g(conv(g(x)) [+ skip]))) and g the concat-ELU."""
        y = self.conv(f"{name}/conv_in", concat_elu(x))
        y = concat_elu(y if skip is None else y + skip)
        y = y if self.dropout is None else self.dropout(name, y)
        p, q = jnp.split(self.conv(f"{name}/conv_out", y), 2, -1)
        return x + p * jax.nn.sigmoid(q)

    def linear(self, name: str, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """A map of the features at each pixel."""
        layer = self.weights.layers[name]
        return x @ layer["kernel"][0, 0] + layer["bias"]

    def conv(self, name: str, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """The causal convolution of the layer called `name`."""
        return conv(self.surrounded(name, x), self.weights.layers[name])

    def surrounded(self, name: str, x: Float[Array, "b h w i"]) -> Float[Array, "b h+1 _ i"]:
        """The input of the convolution called `name` with the row above it and columns of zeros beside it."""
        columns = (1, self.weights.layers[name]["kernel"].shape[1] - 2)
        return jnp.pad(self.with_row_above(name, x), ((0, 0), (0, 0), columns, (0, 0)))

    def with_row_above(self, name: str, x: Float[Array, "b h w i"]) -> Float[Array, "b h+1 w i"]:
        """The input of the convolution called `name` with the row above it."""
        return jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))

    def here(self, u: Float[Array, "b h w f"]) -> Float[Array, "b h w f"]:
        """The part of an activation of the u stream where the ul stream is evaluated."""
        return u

    def below(self, name: str, x: Float[Array, "b h w f"], inner: Callable) -> tuple[Float[Array, "b h w f"], Any]:
        """`inner(executor, z) -> z, extra` at half the resolution, and back; `name` is LEVEL/STREAM."""
        down, up = (self.weights.layers[f"{way}{name}"] for way in ("downsize", "upsize"))
        z, extra = inner(self, conv(self.surrounded(f"downsize{name}", x), down, stride=2))
        return upsample(z, up), extra
