"""Forecasting modules: from the ARM's last activation h to guesses of the pixels that are not yet sampled.

Source: Wiggers & Hoogeboom 2020, supplement A.2: a strictly triangular 3x3 convolution and a 1x1 convolution for each
module, trained by the divergence between its distribution and the ARM's. Module t forecasts the pixel t places ahead
of its own in raster order; the paper leaves the unit open, and all C K outputs of a module fit one pixel.

For the dimension d = (i W + j) C + c module 0 sees h of dimensions before d alone. After a network call whose first d
dimensions were right h_{d-1} is right too, but h_d may have seen a wrong x_{d-1}: so "strictly" is needed, and the
forecast of x_d never knows x_{d-1} through h. A module that is given x as an input knows it.
Not here: when a forecast is used (`forecasters.py`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from arm_forecast.config import ModulesConfig
from arm_forecast.gumbel import kl_divergence
from arm_forecast.pixelcnn import Grid
from bitsperdim import rng
from bitsperdim.convolution import convolve
from bitsperdim.errors import InputError


def check(config: ModulesConfig, grid: Grid, section: str) -> None:
    """Raises InputError where the filters do not split into one group for each channel. `section` of the config."""
    if config.filters % grid.channels:
        raise InputError(
            f"{section}.filters={config.filters} is not divisible by the {grid.channels} channels that are modelled"
        )


def init(key: Key[Array, ""], config: ModulesConfig, features: int, grid: Grid) -> PyTree:
    """Uniform in +- 1/sqrt(fan in), as PyTorch initialises convolutions."""
    count, filters, outputs = config.modules, config.filters, grid.channels * grid.values
    fan_in = 9 * (features + len(config.inputs) * outputs)
    uniform = lambda name, shape, fan: jax.random.uniform(
        rng.for_purpose(key, name), shape, jnp.float32, -(fan**-0.5), fan**-0.5
    )
    params = {
        "h": uniform("h", (count, 3, 3, features, filters), fan_in),
        "bias": uniform("bias", (count, filters), fan_in),
        "out": uniform("out", (count, filters, outputs), filters),
        "out_bias": uniform("out_bias", (count, outputs), filters),
    }
    return params | {name: uniform(name, (count, 3, 3, outputs, filters), fan_in) for name in config.inputs}


def whole(
    params: PyTree, grid: Grid, h: Float[Array, "b h w f"], inputs: dict[str, Array]
) -> Float[Array, "b h w t c k"]:
    """Logits of every module at every pixel. `inputs`: those of `ModulesConfig.inputs`, from `module_inputs`."""
    count, filters = params["bias"].shape
    features = params["bias"].reshape(-1)
    for name, maps in {"h": h.astype(jnp.float32), **inputs}.items():
        kernel = jnp.moveaxis(_masked(params, name, grid), 0, -2)  # [3, 3, in, t, m]
        kernel = kernel.reshape(3, 3, maps.shape[-1], count * filters)
        features += convolve(maps, kernel, padding="SAME")
    return _logits(params, grid, features.reshape(*h.shape[:3], count, filters))


def at_pixel(params: PyTree, grid: Grid, patches: dict[str, Float[Array, "b 3 3 _"]]) -> Float[Array, "b t c k"]:
    """The same logits at one pixel, from the 3x3 patches around it of 'h' and of the other inputs."""
    features = params["bias"]
    for name, patch in patches.items():
        features += jnp.einsum("byxf,tyxfm->btm", patch.astype(jnp.float32), _masked(params, name, grid))
    return _logits(params, grid, features)


def module_inputs(
    config: ModulesConfig, x: Int[Array, "b h w c"], noise: Float[Array, "b h w c k"] | None, values: int
) -> dict[str, Float[Array, "b h w c*k"]]:
    """The extra inputs as maps: x one-hot, noise as it is. Values of x outside 0..K-1 (not yet known) are zeros."""
    maps: dict[str, Array] = {}
    if "x" in config.inputs:
        maps["x"] = jax.nn.one_hot(x, values).reshape(*x.shape[:3], -1)
    if "noise" in config.inputs:
        assert noise is not None
        maps["noise"] = noise.reshape(*x.shape[:3], -1)
    return maps


def divergence(arm: Float[Array, "b h w c k"], forecast: Float[Array, "b h w t c k"]) -> Float[Array, " b"]:
    """sum_t sum_d KL( P_ARM(x_{d+t} | x_<d+t) || P_t(x_{d+t} | h_<d) ), in nats per example (supplement, A.2).

    The ARM's distribution is the teacher and a constant: no gradient reaches it. Pixels ahead of the last one are left
    out.
    """
    batch, height, width, count, channels, values = forecast.shape
    teacher = jax.lax.stop_gradient(arm).reshape(batch, height * width, channels, values)
    forecast = forecast.reshape(batch, height * width, count, channels, values)
    # Modules that look beyond the whole image have nothing to learn from it.
    ahead = range(min(count, height * width))
    terms = [kl_divergence(teacher[:, t:], forecast[:, : height * width - t, t]).sum((1, 2)) for t in ahead]
    return functools.reduce(jnp.add, terms)


def _logits(params: PyTree, grid: Grid, features: Float[Array, "... t m"]) -> Float[Array, "... t c k"]:
    filters = features.shape[-1]
    group_in = np.arange(filters) // (filters // grid.channels)
    mask = np.repeat(np.arange(grid.channels), grid.values)[None] >= group_in[:, None]
    out = jnp.einsum("...tm,tmo->...to", jax.nn.elu(features), params["out"] * mask) + params["out_bias"]
    return out.reshape(*out.shape[:-1], grid.channels, grid.values)


def _masked(params: PyTree, name: str, grid: Grid) -> Float[Array, "t 3 3 f m"]:
    kernel = params[name]
    features, filters = kernel.shape[-2:]
    if name == "noise":
        return kernel  # all noise is known before sampling begins
    return kernel * _strictly_before(features, filters, grid.channels)


@functools.cache
def _strictly_before(features: int, filters: int, channels: int) -> Bool[np.ndarray, "3 3 f m"]:
    """Taps above, left, and in the centre those of earlier channel groups; both widths split evenly into groups."""
    mask = np.zeros((3, 3, features, filters), bool)
    mask[0] = mask[1, 0] = True
    group_in = np.arange(features) // (features // channels)
    group_out = np.arange(filters) // (filters // channels)
    mask[1, 1] = group_in[:, None] < group_out[None]
    return mask
