"""The encoder of learned dequantization noise: from the image to a few features of every pixel.

Source: the released code of MaCow. Residual blocks at full resolution, then down by strided convolutions, each followed
by residual blocks, and up again by transposed ones; there are no connections between the two ways. All convolutions are
weight-normalised and start from their first batch.
Strided and transposed convolutions are computed over blocks of 2x2 pixels, as dense ones: of dilated ones XLA's CPU
backend multiplies the zeros.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from flows import convolution, squeeze
from flows.convolution import Params

WIDTH, MOST, BLOCKS = 32, 128, 2
# How a layer treats its parameters: `apply` uses them; a data-dependent start replaces them first.
Treat = Callable[[Params, Callable[[Params], Array]], tuple[Params, Array]]


class Encoder(NamedTuple):
    """`apply(params, c)` and, for the data-dependent start, `init_from_batch(params, c)` -> params, features."""

    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[[PyTree, Float[Array, "b h w c"]], Float[Array, "b h w s"]]
    init_from_batch: Callable[[PyTree, Float[Array, "b h w c"]], tuple[PyTree, Float[Array, "b h w s"]]]


def encoder(channels: int, outputs: int, halvings: int) -> Encoder:
    """Images [b, h, w, channels] in [-1, 1) to features [b, h, w, outputs]."""
    widths = [min(WIDTH * (1 + i), MOST) for i in range(halvings + 1)]
    shapes = _block_shapes("resnet", channels, widths[0])
    for i in range(halvings):
        shapes |= {f"down{i}": ((3, 3), widths[i], widths[i + 1])}
        shapes |= _block_shapes(f"resnet{i}", widths[i + 1], widths[i + 1])
    for i in reversed(range(halvings)):
        shapes |= {f"up{i}": ((3, 3), widths[i + 1], widths[i])}
    shapes |= {"head": ((1, 1), widths[0], outputs)}

    def init(key: Key[Array, ""]) -> PyTree:
        keys = jax.random.split(key, len(shapes))
        return {name: convolution.init(key, *shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def run(params: PyTree, c: Array, treat: Treat) -> tuple[PyTree, Array]:
        found = {}

        def layer(name: str, x: Array, convolve: Callable[[Params, Array], Array] = convolution.apply) -> Array:
            found[name], y = treat(params[name], lambda own: convolve(own, x))
            return y

        def blocks(name: str, x: Array) -> Array:
            for i in range(BLOCKS):
                h = jax.nn.elu(layer(f"{name}_block{i}_conv1", x))
                h = layer(f"{name}_block{i}_conv2", h)
                skip = f"{name}_block{i}_skip"
                x = jax.nn.elu(h + (layer(skip, x) if skip in params else x))
            return x

        x = blocks("resnet", c)
        for i in range(halvings):
            x = blocks(f"resnet{i}", jax.nn.elu(layer(f"down{i}", x, halving)))
        for i in reversed(range(halvings)):
            x = jax.nn.elu(layer(f"up{i}", x, doubling))
        return found, layer("head", x)

    return Encoder(init, lambda params, c: run(params, c, _used)[1], lambda params, c: run(params, c, _started))


def _block_shapes(name: str, inputs: int, width: int) -> dict[str, tuple[tuple[int, int], int, int]]:
    shapes = {}
    for i in range(BLOCKS):
        shapes[f"{name}_block{i}_conv1"] = ((3, 3), inputs, width)
        shapes[f"{name}_block{i}_conv2"] = ((3, 3), width, width)
        if inputs != width:
            shapes[f"{name}_block{i}_skip"] = ((1, 1), inputs, width)
        inputs = width
    return shapes


def _used(params: Params, convolve: Callable[[Params], Array]) -> tuple[Params, Array]:
    return params, convolve(params)


def _started(params: Params, convolve: Callable[[Params], Array]) -> tuple[Params, Array]:
    found = convolution.standardised(params, convolve(params))
    return found, convolve(found)


def halving(params: Params, x: Float[Array, "b 2*h 2*w c"]) -> Float[Array, "b h w d"]:
    """out[i] = sum_t K[t] x[2 i + t - 1], t = 0, 1, 2, in both directions: 3x3, stride 2."""
    params = convolution.effective(params)
    inputs, outputs = params["kernel"].shape[2:]
    # As a 4x4 kernel K' with K'[t + 1] = K[t], tap 2 a + p meets pixel p of block i - 1 + a.
    kernel = jnp.pad(params["kernel"], ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(2, 2, 2, 2, inputs, outputs)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * inputs, outputs)
    return convolution.convolve(squeeze.squeeze(x), kernel, (1, 1)) + params["bias"]


def doubling(params: Params, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
    """out[2 i] = K[1] x[i],   out[2 i + 1] = K[0] x[i] + K[2] x[i + 1], in both directions: 3x3, transposed, stride 2.

    The size is exactly doubled, by one more line and column at the end.
    """
    params = convolution.effective(params)
    kernel = params["kernel"]
    inputs, outputs = kernel.shape[2:]
    # [tap a, pixel p]: what x[i + a] gives to pixel p of block i; nothing of x[i + 1] to pixel 0.
    taps = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))[jnp.array([[1, 0], [3, 2]])][
        :, :, jnp.array([[1, 0], [3, 2]])
    ]
    taps = taps.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, inputs, 4 * outputs)
    return squeeze.unsqueeze(convolution.convolve(x, taps, (0, 0))) + params["bias"]
