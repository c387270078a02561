"""Squeezing, and splitting off latents: how a flow changes its resolution.

The order of channels is that of MaCow's released code, offset-major: channel (2 dy + dx) C + c of the squeezed image is
channel c of the pixel at offset (dy, dx) of its 2x2 block. Glow's and TensorFlow's space-to-depth differ.
"""

from jaxtyping import Array, Float


def squeeze(x: Float[Array, "b 2*h 2*w c"]) -> Float[Array, "b h w 4*c"]:
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // 2, width // 2, 4 * channels)


def unsqueeze(y: Float[Array, "b h w 4*c"]) -> Float[Array, "b 2*h 2*w c"]:
    """The inverse of `squeeze`."""
    batch, height, width, channels = y.shape
    blocks = y.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, 2 * height, 2 * width, channels // 4)


def split(y: Float[Array, "b h w c"], last: int) -> tuple[Float[Array, "b h w k"], Float[Array, "b h w l"]]:
    """What is kept, and the `last` channels, which are split off."""
    kept = y.shape[-1] - last
    return y[..., :kept], y[..., kept:]
