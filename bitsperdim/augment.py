"""Random changes of training images on the device, each from the key of its own example.

Colours are changed as in TensorFlow's image operations, which the papers used, on values in [0, 1]; what leaves that
range is cut off, as a stored image would have it.
Not here: cropping and resizing, on the host (`decode.py`), and dequantization noise, which belongs to the likelihood
(`dequantize.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from bitsperdim import rng
from bitsperdim.config import at_least


@dataclasses.dataclass(frozen=True)
class ColourConfig:
    """By how much colours change at most; 0: not at all. Values are those of images in [0, 1]."""

    brightness: float = 0.0  # added to every value
    hue: float = 0.0  # added to the hue, in turns of the colour circle
    saturation: float = 0.0  # its factor lies in 1 +- this
    contrast: float = 0.0  # the factor of the distance to the mean of each channel lies in 1 +- this
    noise: float = 0.0  # deviation of Gaussian noise
    noise_probability: float = 0.5  # of an image to get noise at all

    def __post_init__(self) -> None:
        at_least(self, 0, "brightness", "hue", "saturation", "contrast", "noise", "noise_probability")
        for key in ("brightness", "hue", "saturation", "contrast", "noise_probability"):
            if getattr(self, key) > 1:
                raise ValueError(f"{key} must be at most 1, not {getattr(self, key)}")


def flip(keys: Key[Array, " b"], images: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
    """Each image mirrored left to right with probability 1/2, independently.

    `keys` are example keys of this purpose alone: `rng.per_example(rng.for_purpose(key, "flip"), position)`.
    """
    return jax.vmap(lambda key, image: jnp.where(jax.random.bernoulli(key), image[:, ::-1], image))(keys, images)


def shift(keys: Key[Array, " b"], images: Shaped[Array, "b h w c"], most: int) -> Shaped[Array, "b h w c"]:
    """Each image moved by a random number of pixels from -most to most in both directions, its border mirrored.

    That is a random crop of the image padded by `most` reflected pixels. `keys` as for `flip`.
    """
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="reflect")
    window = images.shape[1:]

    def one(key: Key[Array, ""], image: Shaped[Array, "H W c"]) -> Shaped[Array, "h w c"]:
        corner = jax.random.randint(key, (2,), 0, 2 * most + 1)
        return jax.lax.dynamic_slice(image, (*corner, 0), window)

    return jax.vmap(one)(keys, padded)


def colour(
    config: ColourConfig, key: Key[Array, ""], position: Int[Array, " b"], images: Float[Array, "b h w 3"]
) -> Float[Array, "b h w 3"]:
    """Brightness, hue, saturation, contrast and noise, in this order, each drawn anew for every image; in [0, 1]."""
    draw = lambda name: rng.per_example(rng.for_purpose(key, name), position)
    if config.brightness:
        images = brightness(images, _uniform(draw("brightness"), config.brightness))
    if config.hue or config.saturation:
        turns = _uniform(draw("hue"), config.hue)
        images = hue_and_saturation(images, turns, 1.0 + _uniform(draw("saturation"), config.saturation))
    if config.contrast:
        images = contrast(images, 1.0 + _uniform(draw("contrast"), config.contrast))
    if config.noise:
        images = noise(draw("noise"), images, config.noise, config.noise_probability)
    return images


def _uniform(keys: Key[Array, " b"], most: float) -> Float[Array, "b 1 1 1"]:
    drawn = jax.vmap(lambda key: jax.random.uniform(key, minval=-most, maxval=most))(keys)
    return drawn[:, None, None, None]


def brightness(images: Float[Array, "b h w c"], delta: Float[Array, "b 1 1 1"]) -> Float[Array, "b h w c"]:
    """x + delta."""
    return jnp.clip(images + delta, 0.0, 1.0)


def contrast(images: Float[Array, "b h w c"], factor: Float[Array, "b 1 1 1"]) -> Float[Array, "b h w c"]:
    """mean + factor (x - mean), the mean of each channel of each image."""
    mean = images.mean((1, 2), keepdims=True)
    return jnp.clip(mean + factor * (images - mean), 0.0, 1.0)


def hue_and_saturation(
    images: Float[Array, "b h w 3"], turns: Float[Array, "b 1 1 1"], factor: Float[Array, "b 1 1 1"]
) -> Float[Array, "b h w 3"]:
    """Through HSV: hue + turns, modulo 1; saturation times factor, at most 1. The value max(R, G, B) stays.

    With hue h, saturation s and value v, channel n in (5, 3, 1) is v - v s clip(min(k, 4 - k), 0, 1), where
    k = (n + 6 h) mod 6.
    """
    value = images.max(-1, keepdims=True)
    range = value - images.min(-1, keepdims=True)
    safe = jnp.where(range > 0, range, 1.0)
    red, green, blue = jnp.split(images, 3, -1)
    sixths = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    saturation = jnp.clip(factor * range / jnp.where(value > 0, value, 1.0), 0.0, 1.0)
    k = jnp.mod(jnp.array([5.0, 3.0, 1.0]) + sixths + 6.0 * turns, 6.0)
    return value - value * saturation * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def noise(
    keys: Key[Array, " b"], images: Float[Array, "b h w c"], deviation: float, probability: float
) -> Float[Array, "b h w c"]:
    """x + deviation e, e standard normal, for each image with this probability."""

    def one(key: Key[Array, ""], image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        key_coin, key_noise = jax.random.split(key)
        noisy = jnp.clip(image + deviation * jax.random.normal(key_noise, image.shape), 0.0, 1.0)
        return jnp.where(jax.random.bernoulli(key_coin, probability), noisy, image)

    return jax.vmap(one)(keys, images)
