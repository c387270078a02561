"""The hierarchical encoder and decoder of VQ-VAE-2, for any number of levels.

Source: Razavi et al. 2019, section 3.1 and algorithm 1, supplement table 3; what the paper leaves open (4x4 strided
convolutions, pre-activation residual blocks) follows DeepMind's public single-level notebook.
Codebooks are arguments, not parameters: they learn by moving averages (`quantizer.py`). Not here: the loss, and the
kinds of quantiser (`quantizers.py`).
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bitsperdim.convolution import Conv
from bitsperdim.strided import DoublingConv, HalvingConv
from vqvae2 import quantizer
from vqvae2.quantizer import Quantized


def level_names(num_levels: int) -> tuple[str, ...]:
    """The levels from the coarsest down: ("top", "bottom"), ("top", "middle", "bottom"), ("top", "middle_1", ...)."""
    if num_levels == 1:
        return ("top",)
    middle = ("middle",) if num_levels == 3 else tuple(f"middle_{i}" for i in range(1, num_levels - 1))
    return ("top", *middle, "bottom")


def _octaves(stride: int) -> int:
    if stride < 2 or stride & (stride - 1):
        raise ValueError(f"a level's stride must be a power of two from 2 on, not {stride}")
    return stride.bit_length() - 1


class ResidualStack(nn.Module):
    """x + conv1x1(ReLU(conv3x3(ReLU(x)))), `layers` times, and a last ReLU."""

    layers: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        for i in range(self.layers):
            h = Conv(self.width, (3, 3), dtype=self.dtype, name=f"block_{i}_conv3")(nn.relu(x))
            x = x + Conv(x.shape[-1], (1, 1), dtype=self.dtype, name=f"block_{i}_conv1")(nn.relu(h))
        return nn.relu(x)


class Encoder(nn.Module):
    """log2(stride) 4x4 convolutions of stride 2 (the first `hidden` / 2 wide), a 3x3 one, residual blocks."""

    stride: int
    hidden: int
    residual: int
    layers: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s d"]:
        for i in range(_octaves(self.stride)):
            width = self.hidden // 2 if i == 0 else self.hidden
            x = nn.relu(HalvingConv(width, self.dtype, name=f"down_{i}")(x))
        x = Conv(self.hidden, (3, 3), dtype=self.dtype, name="conv")(x)
        return ResidualStack(self.layers, self.residual, self.dtype, name="residual")(x)


class Decoder(nn.Module):
    """A 3x3 convolution, residual blocks, log2(stride) transposed 4x4 ones: hidden, ..., hidden / 2, features wide."""

    stride: int
    features: int
    hidden: int
    residual: int
    layers: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h*s w*s d"]:
        octaves = _octaves(self.stride)
        x = Conv(self.hidden, (3, 3), dtype=self.dtype, name="conv")(x)
        x = ResidualStack(self.layers, self.residual, self.dtype, name="residual")(x)
        widths = ([self.hidden] * octaves + [self.hidden // 2, self.features])[-octaves:]
        for i, width in enumerate(widths):
            x = DoublingConv(width, self.dtype, name=f"up_{i}")(x if i == 0 else nn.relu(x))
        return x


class Upsampler(nn.Module):
    """Brings the code vectors of a coarser level to a finer grid: one linear transposed 4x4 convolution per octave."""

    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h*s w*s d"]:
        for i in range(_octaves(self.stride)):
            x = DoublingConv(x.shape[-1], self.dtype, name=f"up_{i}")(x)
        return x


class Autoencoder(nn.Module):
    """Encoders bottom-up, then quantisation top-down, each level seeing what the coarser ones decode to.

    With h_l the encoder output of level l, from the top down (algorithm 1):

        z_l = conv1x1([decoder(c_{l+1}), h_l]),   q_l = quantize(z_l),   c_l = [up(c_{l+1}), q_l]
        image = decoder(c_1)

    c_l holds the code vectors of level l and of all coarser ones, coarsest first, each brought to the grid of level l.
    For three levels the paper does not say whether the middle decoder sees the top codes; here it does.

    `strides` run from the image upwards: (4, 2) puts grids of 1/4 and 1/8 of the image's side under the names "bottom"
    and "top". Images are floats in a symmetric range such as [-1, 1].
    """

    strides: tuple[int, ...]
    hidden: int = 128
    residual: int = 64
    layers: int = 2
    code_dim: int = 64
    channels: int = 3
    dtype: jnp.dtype = jnp.float32
    quantize: Callable[[Float[Array, "k d"], Float[Array, "b h w d"]], Quantized] = quantizer.quantize
    lookup: Callable[[Float[Array, "k d"], Int[Array, "b h w ..."]], Float[Array, "b h w d"]] = quantizer.lookup

    @property
    def levels(self) -> tuple[str, ...]:
        """The names of the levels, top first."""
        return level_names(len(self.strides))

    def setup(self):
        strides = dict(zip(self.levels, reversed(self.strides), strict=True))
        widths = {level: self.code_dim for level in self.levels} | {self.levels[-1]: self.channels}
        sizes = {"hidden": self.hidden, "residual": self.residual, "layers": self.layers, "dtype": self.dtype}
        self.encoders = {level: Encoder(strides[level], **sizes, name=f"encoder_{level}") for level in self.levels}
        self.to_code = {
            level: Conv(self.code_dim, (1, 1), dtype=self.dtype, name=f"to_code_{level}") for level in self.levels
        }
        self.decoders = {
            level: Decoder(strides[level], widths[level], **sizes, name=f"decoder_{level}") for level in self.levels
        }
        # One for every coarser level and every grid below it. Its factor is the stride of the level just above that
        # grid.
        self.upsamplers = {
            f"{source}_to_{target}": Upsampler(strides[above], self.dtype, name=f"upsample_{source}_to_{target}")
            for above, target in zip(self.levels, self.levels[1:], strict=False)
            for source in self.levels[: self.levels.index(target)]
        }

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        embeddings: dict[str, Float[Array, "k d"]],
        absent: dict[str, tuple[Bool[Array, " b"], Float[Array, " d"]]] | None = None,
    ) -> tuple[Float[Array, "b h w c"], dict[str, Float[Array, "b hl wl d"]], dict[str, Quantized]]:
        """The reconstruction (float32); for every level the encoder vectors z, and what the quantiser made of them.

        `absent` names examples that are decoded without some levels, and the vector that stands for all codes of each.
        """
        hidden, x = {}, images
        for level in reversed(self.levels):
            hidden[level] = x = self.encoders[level](x)
        z, quantized, context, decoded = {}, {}, {}, []
        for level in self.levels:
            z[level] = self.to_code[level](jnp.concatenate([*decoded, hidden[level]], -1))
            quantized[level] = self.quantize(embeddings[level], z[level])
            vectors = quantized[level].straight_through
            if absent and level in absent:
                is_absent, instead = absent[level]
                vectors = jnp.where(is_absent[:, None, None, None], instead, vectors)
            context = self._extend(context, level, vectors)
            decoded = [self.decoders[level](jnp.concatenate(list(context.values()), -1))]
        return decoded[0].astype(jnp.float32), z, quantized

    def encode(
        self, images: Float[Array, "b h w c"], embeddings: dict[str, Float[Array, "k d"]]
    ) -> dict[str, Int[Array, "b hl wl"]]:
        """The codes of every level. Under `jit` the image decoder, whose result is not used, costs nothing."""
        _, _, quantized = self(images, embeddings)
        return {level: quantized[level].codes for level in self.levels}

    def decode(
        self, codes: dict[str, Int[Array, "b hl wl"]], embeddings: dict[str, Float[Array, "k d"]]
    ) -> Float[Array, "b h w c"]:
        """The image (float32) that the codes of all levels stand for."""
        context = {}
        for level in self.levels:
            context = self._extend(context, level, self.lookup(embeddings[level], codes[level]))
        image = self.decoders[self.levels[-1]](jnp.concatenate(list(context.values()), -1))
        return image.astype(jnp.float32)

    def _extend(
        self, context: dict[str, Float[Array, "b h w d"]], level: str, vectors: Float[Array, "b hl wl d"]
    ) -> dict[str, Float[Array, "b hl wl d"]]:
        """c_l from c_{l+1}: every coarser level goes one grid down, and level l's own vectors come last."""
        coarser = {source: self.upsamplers[f"{source}_to_{level}"](x) for source, x in context.items()}
        return coarser | {level: vectors}
