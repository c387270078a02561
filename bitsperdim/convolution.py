"""The convolution that all families use: XLA's own, but with gradients that its CPU backend computes fast.

On CPUs XLA is slow at the two gradients of a convolution, an order of magnitude slower where they stand inside a
`lax.scan`, and at convolutions whose kernels have one pixel or whose outputs are few. Both gradients are linear maps
that can be written as what it is fast at, ordinary convolutions and matrix products:

    dL/dx = dL/dy padded by k - 1 less the padding of x, convolved with the kernel turned by 180 degrees,
    dL/dk[i, j] = x[i : i + h, j : j + w]^T dL/dy, a matrix product for each tap, or one for all of them.

Both keep the padding inside the convolution, where it costs nothing, and where 'SAME' meets XLA's fastest kernels.

So scanned layers, steps and micro-batches run on CPUs as fast as unrolled ones. Accelerators have kernels of their own
for these gradients and get XLA's operation. The price, on CPUs: no forward-mode differentiation (`jax.jvp`, `jacfwd`)
through a convolution.
Not here: what makes convolutions causal (`causal.py`); 4x4 kernels of stride 2 (`strided.py`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bitsperdim import sharding

LAYOUT = ("NHWC", "HWIO", "NHWC")
Sides = tuple[tuple[int, int], tuple[int, int]]  # (before, after) of both axes
Padding = str | Sequence[tuple[int, int]]  # 'SAME', 'VALID' or sides
NO_PADDING: Sides = ((0, 0), (0, 0))


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c f"],
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "VALID",
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "b _ _ f"]:
    """y[i, j] = sum over a, b of x[s i + a, s j + b] k[a, b], without a bias, as `lax.conv_general_dilated`.

    `precision` is that of an accelerator's products. Where a mesh divides images by rows, its results lie so.
    """
    return sharding.over_rows(_convolve(sharding.over_rows(x), kernel, strides, padding, precision))


def _convolve(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding, precision: jax.lax.PrecisionLike
) -> Array:
    if sharding.platform() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT, precision=precision)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    if kernel.shape[:2] == (1, 1):
        x = _padded(x, padding)[:, :: strides[0], :: strides[1]]
        # Of two dimensions: XLA hands only such products to its fast kernels.
        return _product(x.reshape(-1, x.shape[-1]), kernel[0, 0]).reshape(*x.shape[:-1], -1)
    if strides != (1, 1):
        return _strideless(*_blocks(_padded(x, padding), kernel, strides), NO_PADDING)
    return _strideless(x, kernel, ((top, bottom), (left, right)))


def _blocks(x: Array, kernel: Array, strides: tuple[int, int]) -> tuple[Array, Array]:
    """The same convolution without strides, over blocks of pixels moved into channels.

    The kernel is filled up with zeros to whole blocks. What is left of x beyond the last output is cut off.
    """
    (sy, sx), (kh, kw, inputs, outputs) = strides, kernel.shape
    by, bx = -(-kh // sy), -(-kw // sx)
    height, width = ((x.shape[1] - kh) // sy + by) * sy, ((x.shape[2] - kw) // sx + bx) * sx
    x = jnp.pad(x, ((0, 0), (0, max(height - x.shape[1], 0)), (0, max(width - x.shape[2], 0)), (0, 0)))
    x = x[:, :height, :width].reshape(len(x), height // sy, sy, width // sx, sx, inputs)
    kernel = jnp.pad(kernel, ((0, by * sy - kh), (0, bx * sx - kw), (0, 0), (0, 0)))
    kernel = kernel.reshape(by, sy, bx, sx, inputs, outputs).transpose(0, 2, 1, 3, 4, 5)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(*x.shape[:3], -1), kernel.reshape(by, bx, -1, outputs)


@jax.custom_vjp
def _product(x: Float[Array, "n c"], matrix: Float[Array, "c f"]) -> Float[Array, "n f"]:
    return x @ matrix


_product.defvjp(
    lambda x, matrix: (_product(x, matrix), (x, matrix)),
    lambda kept, dy: (dy @ kept[1].T, _over_pixels(kept[0], dy)),
)


def _without_strides(x: Array, kernel: Array, padding: Sides) -> Array:
    kh, kw, inputs, outputs = kernel.shape
    if kh * kw * outputs > inputs:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=LAYOUT)
    # Of so few outputs one product for all taps, whose parts are moved and added, is up to ten times faster.
    taps = kernel.transpose(2, 0, 1, 3).reshape(inputs, -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = jnp.matmul(x.reshape(-1, inputs), taps, preferred_element_type=wide).reshape(*x.shape[:3], -1)
    (top, bottom), (left, right) = padding
    moved = [
        _padded(part, ((top - a, bottom - (kh - 1 - a)), (left - b, right - (kw - 1 - b))))
        for (a, b), part in zip(np.ndindex(kh, kw), jax.lax.split(products, [outputs] * (kh * kw), 3), strict=True)
    ]
    return functools.reduce(jnp.add, moved).astype(x.dtype)


_strideless = jax.custom_vjp(_without_strides, nondiff_argnums=(2,))


def _forward(x: Array, kernel: Array, padding: Sides) -> tuple[Array, tuple[Array, Array]]:
    return _strideless(x, kernel, padding), (x, kernel)


def _backward(padding: Sides, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (kh, kw, inputs, outputs), (height, width) = kernel.shape, dy.shape[1:3]
    (top, bottom), (left, right) = padding
    turned = (kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right)
    dx = _strideless(dy, kernel[::-1, ::-1].swapaxes(2, 3), turned)
    taps = [(a, b) for a in range(kh) for b in range(kw)]
    if outputs < inputs:
        # What is cut out for each tap is that of the fewer channels: dy, so that one product holds all taps.
        around, (rows, columns) = _padded(dy, turned), x.shape[1:3]
        shifted = [around[:, kh - 1 - a : kh - 1 - a + rows, kw - 1 - b : kw - 1 - b + columns] for a, b in taps]
        products = _over_pixels(x, jnp.concatenate(shifted, -1)).reshape(inputs, kh, kw, outputs)
        return dx, products.transpose(1, 2, 0, 3)
    around = _padded(x, padding)
    products = [_over_pixels(around[:, a : a + height, b : b + width], dy) for a, b in taps]
    return dx, jnp.stack(products).reshape(kernel.shape)


def _padded(x: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """Rows and columns of zeros around; a negative number cuts off."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*sides, 0) for sides in padding), (0, 0, 0)])


def _over_pixels(x: Array, dy: Array) -> Array:
    """x^T dy, of all pixels."""
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    product = lambda a, b: jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))
    if dy.shape[1] >= x.shape[1]:
        return product(x, dy)
    # Products with long rows are up to twice as fast; the barrier keeps XLA from exchanging the two again.
    return jax.lax.optimization_barrier(product(dy, x)).T


_strideless.defvjp(_forward, _backward)


def _of_linen(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Padding,
    feature_group_count: int = 1,
    **dilation: Any,
) -> Array:
    """`convolve` as `nn.Conv` calls its `conv_general_dilated`."""
    dilated = any(step != 1 for name in ("lhs_dilation", "rhs_dilation") for step in dilation[name])
    if dilated or feature_group_count != 1 or lhs.ndim != 4:
        raise ValueError("this convolution has two dimensions, one group and no dilation; use flax.linen.Conv itself")
    return convolve(lhs, rhs, (window_strides[0], window_strides[1]), padding)


# `flax.linen.Conv` of two dimensions with this convolution.
Conv = functools.partial(nn.Conv, conv_general_dilated=_of_linen)
