"""Convolutions of stride 2 and their transposes, computed as convolutions over blocks of 2x2 pixels.

The same functions and parameters as `nn.Conv` and `nn.ConvTranspose` with strides (2, 2), padding SAME and kernel
(4, 4), or (2, 2) for `BlockConvTranspose`. Moving the four pixels of a block into channels leaves convolutions without
strides or dilation, forward and backward. Of dilated ones XLA multiplies the zeros, on CPUs, which made a training step
at 256 px three times as long.

A mesh that divides images by rows (`mesh.spatial`) has no place for blocks that lie between its parts, of which there
is one more than it can divide. There the same convolutions are computed without them.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from bitsperdim import sharding
from bitsperdim.convolution import convolve


class HalvingConv(nn.Module):
    """out[i] = sum_t K[t] x[2 i + t - 1], t = 0 ... 3, in both directions: 4x4, stride 2, one pixel of zeros around."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 f"]:
        kernel, bias = _parameters(self, x.shape[-1])
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if sharding.divides_rows():
            return convolve(x, kernel, (2, 2), ((1, 1), (1, 1))) + bias
        # K[2 a + p] meets pixel p of the block a blocks further.
        blocks = kernel.reshape(2, 2, 2, 2, -1, self.features).transpose(0, 2, 1, 3, 4, 5)
        x = space_to_depth(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
        return convolve(x, blocks.reshape(2, 2, -1, self.features)) + bias


class DoublingConv(nn.Module):
    """out[2 i] = K[0] x[i - 1] + K[2] x[i],   out[2 i + 1] = K[1] x[i] + K[3] x[i + 1], in both directions."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w f"]:
        kernel, bias = _parameters(self, x.shape[-1])
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if sharding.divides_rows():
            both = [(p, q) for p in (0, 1) for q in (0, 1)]
            of_phase = lambda p, q: convolve(x, kernel[p::2, q::2], padding=((1 - p, p), (1 - q, q)))
            return depth_to_space(jnp.concatenate([of_phase(p, q) for p, q in both], -1)) + bias
        # Blocks between pixels, not on them: block i holds out[2 i - 1] of K[1], K[3] and out[2 i] of K[0], K[2].
        phases = kernel.reshape(2, 2, 2, 2, -1, self.features)[:, ::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5)
        phases = phases.reshape(2, 2, -1, 4 * self.features)
        x = convolve(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), phases)
        return depth_to_space(x)[:, 1:-1, 1:-1] + bias


class BlockConvTranspose(nn.Module):
    """out[2 i + t] = K[1 - t] x[i], t = 0, 1, in both directions: 2x2, stride 2. Every pixel becomes a block."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w f"]:
        kernel, bias = _parameters(self, x.shape[-1], side=2)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return depth_to_space(x @ kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(x.shape[-1], -1)) + bias


def _parameters(module: nn.Module, channels: int, side: int = 4) -> tuple[Array, Array]:
    """Those of `nn.Conv` and `nn.ConvTranspose`, by name, shape and distribution."""
    kernel = module.param("kernel", nn.initializers.lecun_normal(), (side, side, channels, module.features))
    return kernel, module.param("bias", nn.initializers.zeros, (module.features,))


def space_to_depth(x: Float[Array, "b 2*h 2*w c"]) -> Float[Array, "b h w 4*c"]:
    """Channel (2 dy + dx) C + c of the result is channel c of the pixel at offset (dy, dx) of its 2x2 block."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // 2, width // 2, 4 * channels)


def depth_to_space(x: Float[Array, "b h w 4*c"]) -> Float[Array, "b 2*h 2*w c"]:
    """The inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, 2 * height, 2 * width, channels // 4)
