"""Convolutions and residual cells as functions of named arrays, and the tables from which those are initialised.

A table is a nested dict of `Initial`: the shape of every parameter and how it begins. Parameters of like layers are
stacked, their first axis the layer, so that a loop can run over them; `unstacked` gives them one by one.
Source: Efficient-VDVAE, figure 5, and VDVAE. Not here: what the two make of cells (`efficient.py`, `baseline.py`).
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from bitsperdim.convolution import convolve

Params = dict[str, Any]


class Initial(NamedTuple):
    """A parameter begins at `fill` plus uniform noise in (-bound, bound)."""

    shape: tuple[int, ...]
    bound: float = 0.0
    fill: float = 0.0


class Arithmetic(NamedTuple):
    """What the trunk is computed in."""

    dtype: Any
    precision: str


def at_least_float32(arithmetic: Arithmetic) -> Arithmetic:
    """For heads and outputs: bfloat16 knows a mean in [-1, 1] to half a level of 256 only."""
    return arithmetic._replace(dtype=jnp.promote_types(arithmetic.dtype, jnp.float32))


def conv_table(inputs: int, outputs: int, kernel: int = 1, scale: float = 1.0, initial: str = "glorot") -> Params:
    """Of one convolution: Glorot-uniform, bias zero ('glorot'); or PyTorch's default, uniform in +-1 / sqrt(fan in),
    with the bias alike ('torch') or zero ('torch_without_bias'). The kernel is multiplied by `scale`."""
    fan_in, fan_out = inputs * kernel**2, outputs * kernel**2
    bound = math.sqrt(6.0 / (fan_in + fan_out)) if initial == "glorot" else fan_in**-0.5
    bias = fan_in**-0.5 if initial == "torch" else 0.0
    return {"kernel": Initial((kernel, kernel, inputs, outputs), scale * bound), "bias": Initial((outputs,), bias)}


def cell_table(inputs: int, inside: int, outputs: int, kernel: int, initials: tuple[str, str], scale: float) -> Params:
    """Of `cell`. `initials` are those of the first convolution and of the rest, `scale` is the last kernel's."""
    first, rest = initials
    return {
        "conv_0": conv_table(inputs, inside, 1, initial=first),
        "conv_1": conv_table(inside, inside, kernel, initial=rest),
        "conv_2": conv_table(inside, inside, kernel, initial=rest),
        "conv_3": conv_table(inside, outputs, 1, scale, initial=rest),
    }


def stacked(table: PyTree, count: int) -> PyTree:
    """The table of `count` like layers. Their fans are those of one."""
    add = lambda leaf: leaf._replace(shape=(count, *leaf.shape))
    return jax.tree.map(add, table, is_leaf=lambda leaf: isinstance(leaf, Initial))


def init(key: Key[Array, ""], table: PyTree) -> PyTree:
    """Every parameter from its own key, which comes from its path."""

    def make(path: Any, leaf: Initial) -> Array:
        value = jnp.full(leaf.shape, leaf.fill, jnp.float32)
        if not leaf.bound:
            return value
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path, simple=True, separator="/").encode()))
        return value + jax.random.uniform(own, leaf.shape, minval=-leaf.bound, maxval=leaf.bound)

    return jax.tree_util.tree_map_with_path(make, table, is_leaf=lambda leaf: isinstance(leaf, Initial))


def size(table: PyTree) -> int:
    """The number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, Initial)))


def unstacked(params: PyTree, count: int) -> list[PyTree]:
    """The parameters of each layer. One split, whose gradient is one concatenation: indexing would pad each layer's
    gradient to the whole stack."""
    leaves, tree = jax.tree.flatten(params)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [jax.tree.unflatten(tree, [part[i] for part in parts]) for i in range(count)]


def conv(
    params: Params, x: Float[Array, "b h w i"], arithmetic: Arithmetic, stride: int = 1
) -> Float[Array, "b h/s w/s o"]:
    """Convolution with zero padding to the same size; with a stride its kernel is as large, and there is no padding."""
    kernel, bias = (params[name].astype(arithmetic.dtype) for name in ("kernel", "bias"))
    x = x.astype(arithmetic.dtype)
    return convolve(x, kernel, (stride, stride), "SAME" if stride == 1 else "VALID", arithmetic.precision) + bias


def cell(
    params: Params,
    x: Float[Array, "b h w i"],
    activation: Callable[[Array], Array],
    arithmetic: Arithmetic,
) -> Float[Array, "b h w o"]:
    """Activation and convolution, four times: 1x1, k x k, k x k, 1x1."""
    return activated_conv(
        params["conv_3"], cell_before_last(params, (x,), activation, arithmetic), activation, arithmetic
    )


def cell_before_last(
    params: Params,
    parts: Sequence[Float[Array, "b h w _"]],
    activation: Callable[[Array], Array],
    arithmetic: Arithmetic,
) -> Float[Array, "b h w m"]:
    """What the last activation of a cell sees, where the channels of its input come in `parts`."""
    x = conv_of_parts(params["conv_0"], parts, activation, arithmetic)
    for name in ("conv_1", "conv_2"):
        x = activated_conv(params[name], x, activation, arithmetic)
    return x


def activated_conv(
    params: Params, x: Float[Array, "b h w i"], activation: Callable[[Array], Array], arithmetic: Arithmetic
) -> Float[Array, "b h w o"]:
    """The convolution of the activation of x. Of both the backward pass keeps x alone, and makes the activation again:
    else a loop over layers would keep four arrays for each, most of the memory of a training step."""
    function = lambda params, x: conv(params, activation(x), arithmetic)
    return jax.checkpoint(function, prevent_cse=False)(params, x)


def conv_of_parts(
    params: Params,
    parts: Sequence[Float[Array, "b h w _"]],
    activation: Callable[[Array], Array],
    arithmetic: Arithmetic,
) -> Float[Array, "b h w o"]:
    """A 1x1 convolution of activated parts that are not joined first. As of `conv_into_parts`, the arrays that are
    split are the kernels: XLA's CPU backend computes what stands before or behind a concatenation once for each
    element, ten times slower, and a concatenation takes memory everywhere."""
    bounds = np.cumsum([part.shape[-1] for part in parts])[:-1]
    kernels = jnp.split(params["kernel"], bounds, axis=2)
    none = jnp.zeros_like(params["bias"])
    biases = [params["bias"], *[none] * (len(parts) - 1)]
    return sum(
        activated_conv({"kernel": kernel, "bias": bias}, part, activation, arithmetic)
        for kernel, bias, part in zip(kernels, biases, parts, strict=True)
    )  # pyright: ignore


def conv_into_parts(
    params: Params,
    x: Float[Array, "b h w i"],
    sizes: Sequence[int],
    arithmetic: Arithmetic,
    activation: Callable[[Array], Array] = lambda x: x,
) -> list[Float[Array, "b h w _"]]:
    """A 1x1 convolution whose outputs come in parts of these sizes."""
    bounds = np.cumsum(sizes)[:-1]
    kernels, biases = (jnp.split(params[name], bounds, axis=-1) for name in ("kernel", "bias"))
    of_parts = zip(kernels, biases, strict=True)
    return [activated_conv({"kernel": kernel, "bias": bias}, x, activation, arithmetic) for kernel, bias in of_parts]


def upsampled(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h*f w*f c"]:
    """Each pixel as a square of factor x factor (nearest neighbours)."""
    if factor == 1:
        return x
    batch, height, width, channels = x.shape
    shape = (batch, height, factor, width, factor, channels)
    x = jnp.broadcast_to(x[:, :, None, :, None, :], shape)
    return x.reshape(batch, height * factor, width * factor, channels)
