"""The blocks of VDVAE: average pooling, enlarged streams mixed into learned constants, heads without projections.

Source: Child 2021 (Very Deep VAEs) and its released code, which Efficient-VDVAE is compared with.
Where widths differ between levels, the stream is padded with zeros on the way up and cut on the way down, so widths may
only grow towards the deepest level.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdvae import layers
from vdvae.blocks import Blocks, Levels
from vdvae.config import ModelConfig
from vdvae.layers import Arithmetic, Initial, Params
from vdvae.levels import Level, num_layers

INITIALS = ("torch_without_bias", "torch_without_bias")


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact one, with the error function."""
    return jax.nn.gelu(x, approximate=False)


def blocks(config: ModelConfig, levels: Levels, numbers_per_channel: int) -> Blocks:
    """Initial kernels are scaled by one over the root of the number of blocks: those of the encoder bottom-up, L
    top-down."""
    num_blocks = sum(level.blocks for level in levels) + sum(level.stride > 1 for level in levels)
    root = num_layers(levels) ** -0.5
    up, down = (num_blocks**-0.5, root) if config.scale_last_convolutions else (1.0, 1.0)
    of_z = root if config.scale_z_projection else 1.0

    def net(level: Level, inputs: int, outputs: int, last: float = 1.0) -> Params:
        # The width inside is that of the stream's, also where a skip connection doubles the input.
        inside = int(level.width * level.bottleneck)
        return layers.cell_table(inputs, inside, outputs, level.kernel, INITIALS, last)

    def bottom_up_table(levels: Levels, i: int) -> Params:
        level, table = levels[i], {}
        if level.blocks:
            cell = net(level, level.width, level.width, up)
            table["blocks"] = layers.stacked({"cell_0": cell}, level.blocks)
        return table | ({"pool": {"cell_0": net(level, level.width, level.width, up)}} if i > 0 else {})

    def top_down_table(levels: Levels, i: int) -> Params:
        level, width = levels[i], levels[i].width
        numbers = numbers_per_channel * level.latent
        layer = {
            "prior": net(level, width, numbers + width, 0.0),
            "posterior": net(level, 2 * width, numbers),
            "z_projection": layers.conv_table(level.latent, width, 1, of_z, "torch_without_bias"),
            "cell_0": net(level, width, width, down),
        }
        table = {"layers": layers.stacked(layer, level.layers)}
        if max(level.height, level.columns) <= config.constants_up_to:
            table["constant"] = Initial((level.height, level.columns, width))
        return table

    def ends_table(levels: Levels, channels: int, outputs: int) -> Params:
        last = levels[-1].width
        return {
            "input": layers.conv_table(channels, last, 3, initial="torch_without_bias"),
            "gain": {"scale": Initial((last,), fill=1.0), "bias": Initial((last,))},
            "output": layers.conv_table(last, outputs, initial="torch_without_bias"),
        }

    return Blocks(
        bottom_up_table=bottom_up_table,
        top_down_table=top_down_table,
        ends_table=ends_table,
        read=lambda ends, x, arithmetic: layers.conv(ends["input"], x, arithmetic),
        block=_block,
        skip=lambda params, y, arithmetic: y,
        pool=_pool,
        start=lambda ends, batch, levels, arithmetic: _nothing(batch, levels[0], arithmetic),
        enter=_enter,
        prior=_prior,
        posterior=_posterior,
        write=_write,
    )


def _block(params: Params, y: Array, arithmetic: Arithmetic) -> Array:
    return y + layers.cell(params["cell_0"], y, gelu, arithmetic)


def _pool(params: Params, y: Array, levels: Levels, i: int, arithmetic: Arithmetic) -> Array:
    """A block, the means of squares, zeros for the channels that the next level has more."""
    y, stride = _block(params["pool"], y, arithmetic), levels[i].stride
    batch, height, width, channels = y.shape
    squares = y.reshape(batch, height // stride, stride, width // stride, stride, channels)
    return jnp.pad(squares.mean((2, 4)), ((0, 0), (0, 0), (0, 0), (0, levels[i - 1].width - channels)))


def _nothing(batch: int, level: Level, arithmetic: Arithmetic) -> Array:
    return jnp.zeros((batch, level.height, level.columns, level.width), arithmetic.dtype)


def _enter(params: Params, y: Array, levels: Levels, i: int, arithmetic: Arithmetic) -> Array:
    """The level's constant, plus as many channels of the enlarged stream as it has."""
    level = levels[i]
    if i > 0:
        y = layers.upsampled(y[..., : level.width], level.stride)
    return y + params["constant"].astype(arithmetic.dtype) if "constant" in params else y


def _prior(params: Params, y: Array, latent: int, arithmetic: Arithmetic) -> tuple[list[Array], Array]:
    """The numbers of the distribution come first, the rest is the deterministic residual."""
    inside, last = layers.cell_before_last(params["prior"], (y,), gelu, arithmetic), params["prior"]["conv_3"]
    count = (last["bias"].shape[-1] - y.shape[-1]) // latent
    sizes = (latent,) * count + (y.shape[-1],)
    *numbers, residual = layers.conv_into_parts(last, inside, sizes, layers.at_least_float32(arithmetic), gelu)
    return numbers, residual.astype(arithmetic.dtype)


def _posterior(params: Params, y: Array, skip: Array, latent: int, arithmetic: Arithmetic) -> list[Array]:
    net, last = params["posterior"], params["posterior"]["conv_3"]
    inside = layers.cell_before_last(net, (y, skip), gelu, arithmetic)
    sizes = (latent,) * (last["bias"].shape[-1] // latent)
    return layers.conv_into_parts(last, inside, sizes, layers.at_least_float32(arithmetic), gelu)


def _write(ends: Params, y: Array, arithmetic: Arithmetic) -> Array:
    exact = layers.at_least_float32(arithmetic)
    y = y.astype(exact.dtype) * ends["gain"]["scale"] + ends["gain"]["bias"]
    return layers.conv(ends["output"], y, exact)
