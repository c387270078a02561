"""The blocks of Efficient-VDVAE: strided pooling, learned un-pooling, skip projections, a trainable start.

Source: Efficient-VDVAE, figure 5, and its released code where that differs: Pool is a convolution with a kernel as
large as its stride (the paper says 1x1), and Unpool adds a learned map of the size of the level to the enlarged stream,
which ties a model to one resolution.
Not here: the order in which levels and layers run (`network.py`).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdvae import layers
from vdvae.blocks import Blocks, Levels
from vdvae.config import ModelConfig
from vdvae.layers import Arithmetic, Initial, Params
from vdvae.levels import Level, num_layers


def blocks(config: ModelConfig, levels: Levels, numbers_per_channel: int) -> Blocks:
    """L scales the initial kernels: every z projection, and the last convolution of every residual cell."""
    scale = num_layers(levels) ** -0.5
    of_cell = scale if config.scale_last_convolutions else 1.0
    of_z = scale if config.scale_z_projection else 1.0
    initials = (config.first_convolutions, "glorot")

    def net(level: Level, inputs: int, ratio: float, outputs: int, last: float = 1.0) -> Params:
        return layers.cell_table(inputs, max(int(inputs * ratio), 1), outputs, level.kernel, initials, last)

    def residual(level: Level) -> Params:
        cells = range(level.cells)
        return {f"cell_{i}": net(level, level.width, level.bottleneck, level.width, of_cell) for i in cells}

    def bottom_up_table(levels: Levels, i: int) -> Params:
        level = levels[i]
        table = {"blocks": layers.stacked(residual(level), level.blocks)}
        if level.skips:
            table["skips"] = layers.stacked(layers.conv_table(level.width, level.skip_width), level.skips)
        if level.stride > 1:
            table["pool"] = layers.conv_table(level.width, levels[i - 1].width, level.stride)
        return table

    def top_down_table(levels: Levels, i: int) -> Params:
        level, table = levels[i], {}
        if level.stride > 1:
            map_shape = (level.height, level.columns, level.width)
            table["enter"] = layers.conv_table(levels[i - 1].width, level.width) | {"bias_map": Initial(map_shape)}
        if not level.layers:
            return table | {"block": residual(level)}
        both, numbers = level.width + level.skip_width, numbers_per_channel * level.latent
        layer = {
            "prior": net(level, level.width, level.bottleneck, 2 * level.width, 0.0 if config.zero_prior else 1.0),
            "prior_projection": layers.conv_table(level.width, numbers),
            "posterior": net(level, both, level.bottleneck / 2, both // 2),
            "posterior_projection": layers.conv_table(both // 2, numbers),
            "z_projection": layers.conv_table(level.latent, level.width, scale=of_z),
        }
        return table | {"layers": layers.stacked(layer | residual(level), level.layers)}

    def ends_table(levels: Levels, channels: int, outputs: int) -> Params:
        first = levels[0]
        fan_in = first.width * first.height * first.columns
        return {
            "input": layers.conv_table(channels, levels[-1].width),
            "start": Initial((first.height, first.columns, first.width), math.sqrt(3.0 / fan_in)),
            "output": layers.conv_table(levels[-1].width, outputs),
        }

    return Blocks(
        bottom_up_table=bottom_up_table,
        top_down_table=top_down_table,
        ends_table=ends_table,
        read=lambda ends, x, arithmetic: layers.conv(ends["input"], x, arithmetic),
        block=_block,
        skip=lambda params, y, arithmetic: layers.conv(params, y, arithmetic),  # pyright: ignore
        pool=_pool,
        start=_start,
        enter=_enter,
        prior=_prior,
        posterior=_posterior,
        write=lambda ends, y, arithmetic: layers.conv(ends["output"], y, layers.at_least_float32(arithmetic)),
    )


def _block(params: Params, y: Float[Array, "b h w c"], arithmetic: Arithmetic) -> Float[Array, "b h w c"]:
    """y + cell(y), for each cell."""
    i = 0
    while f"cell_{i}" in params:
        y = y + layers.cell(params[f"cell_{i}"], y, jax.nn.silu, arithmetic)
        i += 1
    return y


def _pool(params: Params, y: Array, levels: Levels, i: int, arithmetic: Arithmetic) -> Array:
    """LeakyReLU_0.1 of a convolution whose kernel is its stride. Levels of one grid have none, and one width."""
    if "pool" not in params:
        return y
    return jax.nn.leaky_relu(layers.conv(params["pool"], y, arithmetic, stride=levels[i].stride), 0.1)


def _start(ends: Params, batch: int, levels: Levels, arithmetic: Arithmetic) -> Array:
    start = ends["start"].astype(arithmetic.dtype)
    return jnp.broadcast_to(start, (batch, *start.shape))


def _enter(params: Params, y: Array, levels: Levels, i: int, arithmetic: Arithmetic) -> Array:
    """Unpool: the LeakyReLU_0.1 of a 1x1 convolution, enlarged, plus the learned map."""
    if "enter" not in params:
        return y
    y = jax.nn.leaky_relu(layers.conv(params["enter"], y, arithmetic), 0.1)
    return layers.upsampled(y, levels[i].stride) + params["enter"]["bias_map"].astype(arithmetic.dtype)


def _prior(params: Params, y: Array, latent: int, arithmetic: Arithmetic) -> tuple[list[Array], Array]:
    """One half of the net's output is the deterministic residual, the other goes into the head."""
    inside, sizes = layers.cell_before_last(params["prior"], (y,), jax.nn.silu, arithmetic), (y.shape[-1],) * 2
    residual, features = layers.conv_into_parts(params["prior"]["conv_3"], inside, sizes, arithmetic, jax.nn.silu)
    return _head(params["prior_projection"], features, latent, arithmetic), residual


def _posterior(params: Params, y: Array, skip: Array, latent: int, arithmetic: Arithmetic) -> list[Array]:
    inside = layers.cell_before_last(params["posterior"], (y, skip), jax.nn.silu, arithmetic)
    features = layers.activated_conv(params["posterior"]["conv_3"], inside, jax.nn.silu, arithmetic)
    return _head(params["posterior_projection"], features, latent, arithmetic)


def _head(params: Params, features: Array, latent: int, arithmetic: Arithmetic) -> list[Array]:
    sizes = (latent,) * (params["bias"].shape[-1] // latent)
    return layers.conv_into_parts(params, features, sizes, layers.at_least_float32(arithmetic))
