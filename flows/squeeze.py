"""Squeezing, and splitting off latents: how a flow changes its resolution.

The order of channels is that of MaCow's released code, offset-major: channel (2 dy + dx) C + c of the squeezed image is
channel c of the pixel at offset (dy, dx) of its 2x2 block. Glow's and TensorFlow's space-to-depth differ.
"""

from jaxtyping import Array, Float

from bitsperdim.strided import depth_to_space, space_to_depth

squeeze, unsqueeze = space_to_depth, depth_to_space


def split(y: Float[Array, "b h w c"], last: int) -> tuple[Float[Array, "b h w k"], Float[Array, "b h w l"]]:
    """What is kept, and the `last` channels, which are split off."""
    kept = y.shape[-1] - last
    return y[..., :kept], y[..., kept:]
