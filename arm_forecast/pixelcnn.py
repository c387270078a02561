"""PixelCNN++ with a categorical output for every channel, or with the original mixture of logistics: the trunk.

Source: Salimans et al. 2017 (PixelCNN++) in the layout of the PyTorch port pclucas14/pixel-cnn-pp; Wiggers & Hoogeboom
2020, supplement A.1, for the categorical output, which sees the earlier channels of its own pixel through masks. Two
streams run through a U-Net of three resolutions: u knows the rows above, ul also what is left in the row. u never
depends on ul, so it is computed first.

The trunk is `u_stream` and `ul_stream`, written over an executor (`layers.Whole` for whole images).
Not here: the likelihood of the outputs (`bitsperdim/distributions.py`), and sampling.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key, PyTree

from arm_forecast import layers
from arm_forecast.layers import Layer, Mask, Weights, concat_elu
from bitsperdim.config import at_least, one_of
from bitsperdim.errors import InputError

LAST_LEVEL = 2  # resolutions 1, 1/2, 1/4


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network; the defaults are the supplement's for images (Table A.1)."""

    resnets: int = 5  # gated layers of a block
    filters: int = 162  # a multiple of the number of channels for categorical outputs
    dropout: float = 0.5
    # 'channel' drops features over the whole image, as the port on which the paper builds; 'element' as PixelCNN++.
    dropout_kind: str = "channel"
    output: str = "categorical"  # or 'dmol': a mixture of discretised logistics
    mixtures: int = 10  # of 'dmol'
    weight_norm: bool = False
    dtype: str = "float32"  # of the trunk; or 'bfloat16'. Parameters, logits and likelihood stay float32

    def __post_init__(self) -> None:
        at_least(self, 1, "resnets", "filters", "mixtures")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        one_of(
            self,
            dropout_kind=("channel", "element"),
            output=("categorical", "dmol"),
            dtype=("float32", "bfloat16"),
        )


class Grid(NamedTuple):
    """The images: height, width, channels, and the number of values (levels) of a channel."""

    height: int
    width: int
    channels: int
    values: int


def check(config: NetworkConfig, grid: Grid) -> None:
    """Raises InputError where the network does not fit the images."""
    if grid.height % 4 or grid.width % 4:
        raise InputError(
            f"the network halves {grid.height}x{grid.width} pixels or codes twice, so both must be multiples of 4: set "
            "data.image_size to such a number, under an autoencoder to a multiple of 16"
        )
    if config.output == "categorical" and config.filters % grid.channels:
        raise InputError(
            f"filters={config.filters} must be a multiple of the images' {grid.channels} channels: "
            "the features are split into one group for each"
        )
    if config.output == "dmol" and grid.channels not in (1, 3):
        raise InputError(f"output='dmol' takes images of 1 or 3 channels, not {grid.channels}")


def outputs(config: NetworkConfig, grid: Grid) -> int:
    """The number of outputs a pixel: C K logits; or M (1 + 2 C + C (C - 1) / 2) parameters of the mixture."""
    c = grid.channels
    return c * grid.values if config.output == "categorical" else config.mixtures * (1 + 2 * c + c * (c - 1) // 2)


def table(config: NetworkConfig, grid: Grid) -> dict[str, Layer]:
    """Every layer by name. The digit after up, down, downsize and upsize is the level; blocks count from 0.

    up, down: the gated layers on the way to the coarsest level and back; downsizeL goes from level L to L + 1 and
    upsizeL back. The skips of the ul stream take u (up) or [u, ul] (down).
    """
    check(config, grid)
    f, groups = config.filters, _groups(config, grid)
    stem = {"stem/u": (2, 3), "stem/ul_above": (1, 3), "stem/ul_left": (2, 1)}
    encoded = 1 + grid.channels * (grid.values if config.output == "categorical" else 1)
    found = {name: Layer(kernel, encoded, f, 0) for name, kernel in stem.items()}
    if groups:
        here = Mask((0, 0), False, np.append(np.repeat(np.arange(grid.channels), grid.values), -1), groups.features(1))
        found["stem/ul_here"] = Layer((1, 1), encoded, f, 0, here)
    for level in range(LAST_LEVEL + 1):
        for i in range(config.resnets):
            found |= _gated(f"up{level}", i, f, level, groups, down=False)
        if level < LAST_LEVEL:
            for name, tap in (("downsize", (1, 1)), ("upsize", (0, 0))):
                mask = groups and Mask(tap, True, groups.features(1), groups.features(1))
                of = level if name == "downsize" else level + 1
                found[f"{name}{level}/u"] = Layer((2, 3), f, f, of)
                found[f"{name}{level}/ul"] = Layer((2, 2), f, f, of, mask)
        for i in range(config.resnets + (level < LAST_LEVEL)):
            found |= _gated(f"down{level}", i, f, level, groups, down=True)
    mask = groups and Mask((0, 0), True, groups.features(1), np.repeat(np.arange(grid.channels), grid.values))
    return found | {"head": Layer((1, 1), f, outputs(config, grid), 0, mask)}


class _Groups(NamedTuple):
    """The group of each feature: F features in C equal parts."""

    filters: int
    channels: int

    def features(self, copies: int) -> np.ndarray:
        """Of `copies` times F features, as concat-ELU (2) and the two halves of a gate (2) have them."""
        return np.tile(np.arange(self.filters) // (self.filters // self.channels), copies)

    def with_u(self) -> np.ndarray:
        """Of the concat-ELU of [u, ul]."""
        return np.tile(np.concatenate([np.full(self.filters, -1), self.features(1)]), 2)


def _groups(config: NetworkConfig, grid: Grid) -> _Groups | None:
    return _Groups(config.filters, grid.channels) if config.output == "categorical" else None


def _gated(block: str, i: int, f: int, level: int, groups: _Groups | None, down: bool) -> dict[str, Layer]:
    """The layers of the i-th pair of gated layers (u and ul) of a block."""
    mask_in = groups and Mask((1, 1), True, groups.features(2), groups.features(1))
    mask_out = groups and Mask((1, 1), True, groups.features(2), groups.features(2))
    mask_skip = groups and Mask((0, 0), True, groups.with_u(), groups.features(1))
    u, ul = f"{block}/u{i}", f"{block}/ul{i}"
    found = {f"{u}/conv_in": Layer((2, 3), 2 * f, f, level), f"{u}/conv_out": Layer((2, 3), 2 * f, 2 * f, level)}
    if down:
        found[f"{u}/skip"] = Layer((1, 1), 2 * f, f, level)
    found[f"{ul}/conv_in"] = Layer((2, 2), 2 * f, f, level, mask_in)
    found[f"{ul}/skip"] = Layer((1, 1), 2 * f, f, level)
    if down:
        found[f"{ul}/skip"] = Layer((1, 1), 4 * f, f, level, mask_skip, streams=2)
    found[f"{ul}/conv_out"] = Layer((2, 2), 2 * f, 2 * f, level, mask_out)
    return found


def init(key: Key[Array, ""], config: NetworkConfig, grid: Grid) -> PyTree:
    """Parameters {"up0": {"u1": {"conv_in": {"kernel", "bias"}}}, ...}, float32; with weight norm "v", "g" for kernels.

    Raises InputError where the network does not fit the images.
    """
    return layers.init(key, table(config, grid), config.weight_norm)


def prepare(params: PyTree | Weights, config: NetworkConfig, grid: Grid) -> Weights:
    """Masked and normalised weights in the computing type; weights that already are come back as they are.

    Every function below takes either. Before a sampling loop prepare once: it costs a pass over all parameters.
    """
    if isinstance(params, Weights):
        return params
    trunk = jnp.dtype(config.dtype)
    return layers.prepare(params, table(config, grid), lambda name: jnp.float32 if name == "head" else trunk)


def encode(config: NetworkConfig, grid: Grid, x: Integer[Array, "... c"]) -> Float[Array, "... e"]:
    """The planes that the stems see; levels `layers.OUTSIDE` become zeros."""
    return layers.encode(x, grid.values, config.output == "categorical", jnp.dtype(config.dtype))


def hidden(
    params: PyTree | Weights,
    config: NetworkConfig,
    grid: Grid,
    x: Integer[Array, "b h w c"],
    keys: Key[Array, " b"] | None = None,
) -> Float[Array, "b h w f"]:
    """h, the last activation of the ul stream (before the ELU of the head) for images of integer levels.

    With a categorical output group g of the features at a pixel (g = feature // (F/C)) sees all pixels before it and
    the channels before g of its own; for 'dmol' no channel of its own. `keys`, one per example, bring dropout.
    """
    weights = prepare(params, config, grid)
    dropout = None if keys is None else layers.Dropout(keys, config.dropout, config.dropout_kind == "channel")
    executor = layers.Whole(weights, dropout)
    padding = ((0, 0), (2, 0), (1, 1), (0, 0))
    e = encode(config, grid, jnp.pad(x.astype(jnp.int32), padding, constant_values=layers.OUTSIDE))
    us = u_stream(executor, config, layers.u_stem(weights, e))
    return ul_stream(executor, layers.ul_stem(weights, e), us)


def logits(
    params: PyTree | Weights, config: NetworkConfig, grid: Grid, h: Float[Array, "... f"]
) -> Float[Array, "... c k"] | Float[Array, "... o"]:
    """The head, float32: logits [..., channel, value], or the raw parameters of the mixture [..., `outputs`]."""
    if isinstance(params, Weights):
        layer = params.layers["head"]
    else:
        layer = layers.prepare(params, {"head": table(config, grid)["head"]}, lambda _: jnp.float32).layers["head"]
    # By default an accelerator multiplies float32 with fewer bits, and near ties of two values would fall either way.
    exact = jax.lax.Precision.HIGHEST
    out = jnp.matmul(jax.nn.elu(h.astype(jnp.float32)), layer["kernel"][0, 0], precision=exact) + layer["bias"]
    return out.reshape(*h.shape[:-1], grid.channels, grid.values) if config.output == "categorical" else out


class Us(NamedTuple):
    """What the gated layers of the ul stream add from the u stream, at one level and those below it."""

    up: list[Float[Array, "b h w f"]]
    below: Any  # of the next level, or None at the last
    down: list[Float[Array, "b h w f"]]


def u_stream(executor: layers.Whole, config: NetworkConfig, u: Float[Array, "b h w f"]) -> Us:
    """The u stream from its stem's output, projected to what the ul stream takes of it."""
    return _u_level(executor, config.resnets, 0, u)[1]


def _u_level(executor: layers.Whole, resnets: int, level: int, u: Float[Array, "b h w f"]) -> tuple[Array, Us]:
    """The U-Net from this level downwards: up block, the levels below, down block with skips last in, first out."""
    stack, up, down = [u], [], []
    for i in range(resnets):
        u = executor.gated(f"up{level}/u{i}", u)
        stack.append(u)
        up.append(executor.linear(f"up{level}/ul{i}/skip", concat_elu(u)))
    if level < LAST_LEVEL:
        u, below = executor.below(f"{level}/u", u, lambda inside, z: _u_level(inside, resnets, level + 1, z))
    else:
        u, below = stack.pop(), None
    for i, skip in enumerate(reversed(stack)):
        u = executor.gated(f"down{level}/u{i}", u, executor.linear(f"down{level}/u{i}/skip", concat_elu(skip)))
        down.append(executor.linear(f"down{level}/ul{i}/skip", concat_elu(u)))
    return u, Us(up, below, down)


def ul_stream(executor: layers.Whole, ul: Float[Array, "b h w f"], us: Us) -> Float[Array, "b h w f"]:
    """The ul stream from its stem's output: h."""
    return _ul_level(executor, 0, ul, us)


def _ul_level(executor: layers.Whole, level: int, ul: Float[Array, "b h w f"], us: Us) -> Float[Array, "b h w f"]:
    stack = [ul]
    for i, from_u in enumerate(us.up):
        ul = executor.gated(f"up{level}/ul{i}", ul, executor.here(from_u))
        stack.append(ul)
    if us.below is None:
        ul = stack.pop()
    else:
        ul, _ = executor.below(f"{level}/ul", ul, lambda inside, z: (_ul_level(inside, level + 1, z, us.below), None))
    for i, (from_u, skip) in enumerate(zip(us.down, reversed(stack), strict=True)):
        skip = executor.linear(f"down{level}/ul{i}/skip_ul", concat_elu(skip))
        ul = executor.gated(f"down{level}/ul{i}", ul, executor.here(from_u) + skip)
    return ul
