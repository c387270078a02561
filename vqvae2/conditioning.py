"""What a lower level's prior sees of the codes above it: a deep residual stack over three resolutions.

Source: Razavi et al. 2019, supplement A.2, "Pseudo Code for Conditioning Stack", where the OCR lost the "/" of
`num_conditioning_blocks / 2`. The stack runs once per image, also in sampling.
Unspecified there and chosen here: the stack runs on the grid of the codes above, and one transposed convolution per
octave brings its result to the finer grid.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitsperdim.batch_norm import BatchNorm
from bitsperdim.convolution import Conv
from bitsperdim.strided import BlockConvTranspose, DoublingConv
from vqvae2 import runs
from vqvae2.embedding import Embedding
from vqvae2.runs import Manner


class ConditioningBlock(nn.Module):
    """h + conv1x1(ReLU(conv3x3(ReLU(conv1x1(ReLU(norm(h)))))))."""

    width: int
    norm: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        h = nn.relu(self._normalise(x, train))
        h = nn.relu(Conv(self.width, (1, 1), dtype=self.dtype, name="reduce")(h))
        h = nn.relu(Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(h))
        # Up to sixty blocks add to one stream: small at first, so that their sum starts close to the input.
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        return x + Conv(x.shape[-1], (1, 1), dtype=self.dtype, kernel_init=small, name="expand")(h)

    def _normalise(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        match self.norm:
            case "batch":
                return BatchNorm(self.dtype, name="norm")(x, train)
            case "group":
                groups = math.gcd(32, x.shape[-1])
                return nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name="norm")(x)
            case "none":
                return x
        raise ValueError(f"norm must be 'batch', 'group' or 'none', not {self.norm!r}")


class ConditioningStack(nn.Module):
    """A U of residual blocks: `blocks` at the lowest resolution, half as many before and after it at each other one.

    `widths` and `bottlenecks` name the resolutions from the finest down; the paper's are (1024, 2048, 2048) and
    (256, 512, 512). Each step down is a 1x1 convolution of stride 2, each step up a transposed 2x2 one, added to the
    stream that went down. Half of an odd number is rounded up, and what the step up has too much is cut off. Shorter
    tuples suit grids too small to be halved twice.
    """

    blocks: int
    widths: tuple[int, ...]
    bottlenecks: tuple[int, ...]
    norm: str = "group"
    dtype: jnp.dtype = jnp.float32
    manner: Manner = Manner()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w d"]:
        lowest = len(self.widths) - 1
        x = Conv(self.widths[0], (1, 1), dtype=self.dtype, name="input")(x)
        streams = []
        for i in range(lowest):
            streams.append(self._run(x, f"before_{i}", i, self.blocks // 2, train))
            x = Conv(self.widths[i + 1], (1, 1), (2, 2), dtype=self.dtype, name=f"down_{i}")(streams[-1])
        x = self._run(x, "lowest", lowest, self.blocks, train)
        for i in reversed(range(lowest)):
            _, height, width, features = streams[i].shape
            x = streams[i] + BlockConvTranspose(features, self.dtype, name=f"up_{i}")(x)[:, :height, :width]
            x = self._run(x, f"after_{i}", i, self.blocks // 2, train)
        return x

    def _run(
        self, x: Float[Array, "b h w c"], name: str, resolution: int, count: int, train: bool
    ) -> Float[Array, "b h w c"]:
        if not count:
            return x
        block = ConditioningBlock(self.bottlenecks[resolution], self.norm, self.dtype, name=name)
        return runs.run(block, lambda block, x, index: block(x, train), x, count, self.manner)


class Conditioner(nn.Module):
    """Codes of the levels above, coarsest first -> a feature map on the grid of the level to be modelled.

    Every level is embedded; coarser ones are repeated up to the grid of the finest, where the stack runs. `octaves` is
    the number of halvings between that grid and the one to be modelled.
    """

    num_codes: int
    embedding: int
    stack: ConditioningStack
    octaves: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, upper: tuple[Int[Array, "b hl wl"], ...], train: bool = False) -> Float[Array, "b h w c"]:
        _, height, width = upper[-1].shape
        maps = []
        for i, codes in enumerate(upper):
            repeated = codes.repeat(height // codes.shape[1], 1).repeat(width // codes.shape[2], 2)
            maps.append(Embedding(self.num_codes, self.embedding, self.dtype, name=f"embedding_{i}")(repeated))
        x = self.stack(jnp.concatenate(maps, -1), train)
        for i in range(self.octaves):
            x = DoublingConv(x.shape[-1], self.dtype, name=f"up_{i}")(x)
        return x
