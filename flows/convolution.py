"""Convolutions of the flows: weight normalisation and its data-dependent start.

Source: Salimans & Kingma 2016 (weight normalisation, data-dependent initialisation), as MaCow's released code has it.
A convolution's parameters are a dict: `kernel` (the direction v, HWIO), `gain` (g) and `bias`; `effective` turns
w = g v / |v| into `kernel` and leaves out `gain`, for all stacked steps of a flow at once. Every function takes either.
Not here: what the convolutions are parts of (`masked_conv.py`, `coupling.py`, `encoder.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from bitsperdim import convolution as shared

Params = dict[str, Array]
# Of all products: a flow must be undone, so that the fewer digits of accelerators' fast products are too few.
PRECISION = "highest"
INIT_DEVIATION = 0.05  # of the directions, and of actnorm's log-scales
EPSILON = 1e-6  # beside the deviations of data-dependent starts: a constant channel would ask for an infinite scale


def init(key: Key[Array, ""], kernel_size: tuple[int, int], inputs: int, outputs: int) -> Params:
    """v ~ N(0, 0.05^2), g = |v| (so that w = v at first), b = 0."""
    kernel = INIT_DEVIATION * jax.random.normal(key, (*kernel_size, inputs, outputs), float)
    return {"kernel": kernel, "gain": _norm(kernel), "bias": jnp.zeros(outputs, kernel.dtype)}


def _norm(kernel: Float[Array, "*n kh kw c d"]) -> Float[Array, "*n d"]:
    return jnp.sqrt(jnp.square(kernel).sum((-4, -3, -2)))


def effective(params: PyTree) -> PyTree:
    """The same tree with the kernels g v / |v| themselves, the norm over all axes but the output channel."""
    if not isinstance(params, dict):
        return params
    if "gain" in params:
        scale = params["gain"] / _norm(params["kernel"])
        return {"kernel": params["kernel"] * scale[..., None, None, None, :], "bias": params["bias"]}
    return {name: effective(value) for name, value in params.items()}


def apply(params: Params, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """w * x + b, zero padded to the same size; odd kernels."""
    params = effective(params)
    height, width = params["kernel"].shape[:2]
    return convolve(x, params["kernel"], (height // 2, width // 2)) + params["bias"]


def standardised(params: Params, y: Float[Array, "b h w d"]) -> Params:
    """The parameters under which the output y would have zero mean and unit (unbiased) deviation in each channel.

    g <- g / (std + 1e-6), b <- (b - mean) / (std + 1e-6). The statistics run over the whole batch, which under `jit` is
    the global one.
    """
    mean, deviation = moments(y)
    return params | {
        "gain": params["gain"] / (deviation + EPSILON),
        "bias": (params["bias"] - mean) / (deviation + EPSILON),
    }


def moments(y: Float[Array, "b h w d"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and unbiased deviation of each channel."""
    return y.mean((0, 1, 2)), y.std((0, 1, 2), ddof=1)


def zeroed(params: Params) -> Params:
    """The last convolution of a net after its data-dependent start: g = 0, b = 0, so that every transform starts as
    mu = 0, sigma = sigmoid(2)."""
    return params | {name: jnp.zeros_like(params[name]) for name in ("gain", "bias")}


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c d"], before: tuple[int, int]
) -> Float[Array, "b h w d"]:
    """y[i, j] = sum_kl x[i + k - before_0, j + l - before_1] w[k, l], zeros outside, of the size of x."""
    height, width = kernel.shape[:2]
    padding = [(before[0], height - 1 - before[0]), (before[1], width - 1 - before[1])]
    return shared.convolve(x, kernel, padding=padding, precision=PRECISION)


def matmul(x: Float[Array, "... c"], matrix: Float[Array, "c d"]) -> Float[Array, "... d"]:
    """x times a matrix, for every pixel."""
    # Two-dimensional, since XLA's CPU backend passes only such products on to its fast kernels.
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision=PRECISION)
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])
