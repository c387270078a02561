"""What can be done with the latents of a trained flow: paths between images, one scale varied, round trips measured.

    run = bitsperdim.load("runs/flows_celebahq256-base")
    path = latents.interpolate(run, images[0], images[1], 8)

Latents are a tuple of arrays [n, h, w, c], from the first split off, at high resolution, to the top.
"""

import jax
import numpy as np
from jaxtyping import Array, Key, UInt8

from bitsperdim.errors import InputError
from bitsperdim.model import Loaded


def interpolate(
    run: Loaded, first: UInt8[np.ndarray, "h w c"], last: UInt8[np.ndarray, "h w c"], count: int
) -> UInt8[np.ndarray, "n h w c"]:
    """`count` images on the straight line between the latents of two, both ends included."""
    if count < 2:
        raise InputError(f"count must be at least 2, not {count}")
    ends = run.encode(np.stack([first, last]))
    weights = np.linspace(0.0, 1.0, count, dtype=np.float32)[:, None, None, None]
    return run.decode(tuple((1.0 - weights) * latent[:1] + weights * latent[1:] for latent in ends))


def vary(
    run: Loaded,
    image: UInt8[np.ndarray, "h w c"],
    scale: int,
    key: Key[Array, ""],
    count: int,
    temperature: float = 1.0,
) -> UInt8[np.ndarray, "n h w c"]:
    """`count` images with latent number `scale` drawn anew and all others as those of the image.

    0 is the first latent that was split off, -1 the top. Raises InputError where there is no such latent.
    """
    found = run.encode(image[None])
    if not -len(found) <= scale < len(found):
        raise InputError(f"scale must lie in {-len(found)}..{len(found) - 1}, for there are {len(found)} latents")
    latents = [np.repeat(latent, count, 0) for latent in found]
    latents[scale] = temperature * np.asarray(jax.random.normal(key, latents[scale].shape))
    return run.decode(tuple(latents))
