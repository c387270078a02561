"""The discrete autoencoder under a latent ARM: categories by argmax, gradients by the softmax.

Source: Wiggers & Hoogeboom 2020, supplement A.3. Stated there: the layers, their widths, the quantisation and its
gradient. Not stated and chosen here: a ReLU after every plain convolution but the last of encoder and decoder, and no
norm there; the residual blocks have theirs (He et al. 2016, "BasicBlock": two 3x3 convolutions with BatchNorm).
Not here: the loss (`autoencoder_stage.py`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitsperdim.batch_norm import BatchNorm
from bitsperdim.convolution import Conv
from bitsperdim.strided import DoublingConv, HalvingConv


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), 3x3 convolutions without bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        conv = lambda name: Conv(x.shape[-1], (3, 3), use_bias=False, name=name)
        h = nn.relu(BatchNorm(name="norm_1")(conv("conv_1")(x), train))
        return nn.relu(x + BatchNorm(name="norm_2")(conv("conv_2")(h), train))


class Encoder(nn.Module):
    """Images in [-1, 1] to logits of the codes, on a grid of a quarter of their height and width."""

    width: int
    channels: int
    categories: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h/4 w/4 l k"]:
        half, full = self.width // 2, self.width
        for name in ("conv_1", "conv_2"):
            x = nn.relu(Conv(half, (3, 3), name=name)(x))
        x = nn.relu(HalvingConv(half, name="down_1")(x))
        x = nn.relu(HalvingConv(full, name="down_2")(x))
        for name in ("block_1", "block_2"):
            x = BasicBlock(name=name)(x, train)
        x = Conv(self.channels * self.categories, (1, 1), name="to_codes")(x)
        return x.reshape(*x.shape[:3], self.channels, self.categories)


class Decoder(nn.Module):
    """One-hot codes to images in [-1, 1], the encoder mirrored."""

    width: int
    image_channels: int

    @nn.compact
    def __call__(self, codes: Float[Array, "b h w l k"], train: bool) -> Float[Array, "b 4*h 4*w c"]:
        half, full = self.width // 2, self.width
        x = nn.relu(Conv(full, (1, 1), name="from_codes")(codes.reshape(*codes.shape[:3], -1)))
        for name in ("block_1", "block_2"):
            x = BasicBlock(name=name)(x, train)
        x = nn.relu(DoublingConv(full, name="up_1")(x))
        x = nn.relu(DoublingConv(half, name="up_2")(x))
        x = nn.relu(Conv(half, (3, 3), name="conv_1")(x))
        return Conv(self.image_channels, (3, 3), name="conv_2")(x)


class Autoencoder(nn.Module):
    """Both halves. `__call__` gives the reconstruction and the codes."""

    width: int
    channels: int
    categories: int
    image_channels: int

    def setup(self) -> None:
        self.encoder = Encoder(self.width, self.channels, self.categories)
        self.decoder = Decoder(self.width, self.image_channels)

    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> tuple[Float[Array, "b h w c"], Int[Array, "b h/4 w/4 l"]]:
        one_hot, codes = quantize(self.encoder(x, train))
        return self.decoder(one_hot, train), codes

    def encode(self, x: Float[Array, "b h w c"]) -> Int[Array, "b h/4 w/4 l"]:
        return quantize(self.encoder(x, False))[1]

    def decode(self, codes: Int[Array, "b h w l"]) -> Float[Array, "b 4*h 4*w c"]:
        return self.decoder(jax.nn.one_hot(codes, self.categories), False)


def quantize(logits: Float[Array, "... k"]) -> tuple[Float[Array, "... k"], Int[Array, "..."]]:
    """(one-hot of argmax softmax(logits), the argmax). The gradient of the one-hot is that of the softmax."""
    codes = logits.argmax(-1)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))
    one_hot = jax.nn.one_hot(codes, logits.shape[-1])
    # Not p + sg(onehot - p): that sum is one-hot only up to rounding, and the decoder later sees the exact one.
    straight_through = one_hot + (probabilities - jax.lax.stop_gradient(probabilities))
    return straight_through, codes
