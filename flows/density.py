"""A flow and its dequantization noise as a density of images: log-weights of noise samples, latents and back.

The flow sees z = scale(x + u); all its densities are in units of a level, so that they bound the likelihood of levels.
Not here: what is trained and measured with it (`stage.py`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
from jaxtyping import Array, Float, Key, PyTree, UInt8

from bitsperdim import dequantize, sharding
from bitsperdim.dequantize import Range
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from flows import bounds, dequantization, layers
from flows.config import FlowConfig, ModelConfig

Latents = tuple[Float[Array, "b h w c"], ...]


class Density(NamedTuple):
    """Pure functions of the parameters {'flow', 'dequantizer'}. Images are levels, y = x + u in units of a level."""

    init: Callable[[Key[Array, ""]], PyTree]
    # (params, images, example keys, samples) -> log w = log p(x + u) - log q(u | x), and log q(u | x), in nats
    log_weights: Callable[..., tuple[Float[Array, "k b"], Float[Array, "k b"]]]
    # (params, images, example keys) -> params whose scales suit these images
    init_from_batch: Callable[[PyTree, UInt8[Array, "b h w c"], Key[Array, " b"]], PyTree]
    # (params, images, example keys) -> y: an image with one sample of its noise
    noisy: Callable[[PyTree, UInt8[Array, "b h w c"], Key[Array, " b"]], Float[Array, "b h w c"]]
    log_prob: Callable[[PyTree, Float[Array, "b h w c"]], Float[Array, " b"]]  # (params, y) -> log p(y), nats
    encode: Callable[[PyTree, Float[Array, "b h w c"]], Latents]  # (params, y) -> latents
    decode: Callable[[PyTree, Latents], Float[Array, "b h w c"]]  # (params, latents) -> y
    # (params, images, example keys) -> y with one sample of noise, and what is decoded of its latents
    round_trip: Callable[..., tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]]
    latent_shapes: tuple[tuple[int, int, int], ...]


def make(config: ModelConfig, about: Facts) -> Density:
    """The density of a config over images of this shape. Raises InputError where they do not fit."""
    check(config, about)
    scan, inverse = config.scan, _inverse(config)
    channels, levels, range = about.shape[-1], about.levels, cast(Range, config.range)
    flow = layers.multi_scale(config.flow, channels, 0, scan, inverse)
    noise = (
        dequantization.uniform(config.noise_width)
        if config.dequantization is None
        else dequantization.variational(config.dequantization, channels, levels, scan)
    )
    log_jacobian = dequantize.log_jacobian(math.prod(about.shape), levels, range)

    def init(key: Key[Array, ""]) -> PyTree:
        of_flow, of_noise = jax.random.split(key)
        return {"flow": flow.init(of_flow), "dequantizer": noise.init(of_noise)}

    def log_prob(params: PyTree, y: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        latents, log_det = flow.forward_and_log_det(params["flow"], dequantize.scale(y, levels, range), None)
        return sum(map(dequantization.log_normal, latents), start=log_det) + log_jacobian

    def log_weights(params: PyTree, images: Array, keys: Key[Array, " b"], samples: int) -> tuple[Array, Array]:
        def some(indices: Array) -> tuple[Array, Array]:
            own = jax.vmap(lambda index: jax.vmap(lambda key: jax.random.fold_in(key, index))(keys))(indices)
            u, log_q = noise.draw(params["dequantizer"], images, own)
            log_p = log_prob(params, dequantization.joined(images + u))
            return dequantization.parted(log_p, len(indices)) - log_q, log_q

        log_w, log_q = bounds.in_chunks(some, samples, config.chunk)
        return log_w, log_q

    def init_from_batch(params: PyTree, images: Array, keys: Key[Array, " b"]) -> PyTree:
        of_noise, u = noise.init_from_batch(params["dequantizer"], images, keys)
        of_flow, _ = flow.init_from_batch(params["flow"], dequantize.scale(images + u, levels, range), None)
        return {"flow": of_flow, "dequantizer": of_noise}

    def noisy(params: PyTree, images: Array, keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
        return images + noise.draw(params["dequantizer"], images, keys[None])[0][0]

    def encode(params: PyTree, y: Float[Array, "b h w c"]) -> Latents:
        return flow.forward_and_log_det(params["flow"], dequantize.scale(y, levels, range), None)[0]

    def decode(params: PyTree, latents: Latents) -> Float[Array, "b h w c"]:
        return dequantize.unscale(flow.inverse_and_log_det(params["flow"], latents, None)[0], levels, range)

    def round_trip(params: PyTree, images: Array, keys: Key[Array, " b"]) -> tuple[Array, Array]:
        y = noisy(params, images, keys)
        return y, decode(params, encode(params, y))

    shapes = _latent_shapes(config.flow, about)
    return Density(init, log_weights, init_from_batch, noisy, log_prob, encode, decode, round_trip, shapes)


def check(config: ModelConfig, about: Facts) -> None:
    """Raises InputError where the images cannot be halved as often as the flows do, or have too few channels."""
    height, width, _ = about.shape
    flows = {"flow": config.flow} | (
        {"dequantization.flow": config.dequantization.flow} if config.dequantization else {}
    )
    for name, flow in flows.items():
        factor = 2**flow.num_halvings
        if height % factor or width % factor:
            raise InputError(
                f"images are {height}x{width}, but model.{name}.steps has {len(flow.steps)} levels: both edges must be "
                f"multiples of {factor}"
            )
        if any(0 in shape for shape in _latent_shapes(flow, about)):
            raise InputError(
                f"model.{name}.factor={flow.factor} would split nothing off a level that has fewer channels; take a "
                "smaller one"
            )


def _latent_shapes(config: FlowConfig, about: Facts) -> tuple[tuple[int, int, int], ...]:
    image = jax.ShapeDtypeStruct((1, *about.shape), float)
    return tuple(latent.shape[1:] for latent in jax.eval_shape(lambda x: layers.unpack(config, x), image))


def _inverse(config: ModelConfig) -> str:
    """How masked convolutions are inverted, where the config leaves it open."""
    if config.inverse != "auto":
        return config.inverse
    return "lines" if sharding.platform() == "cpu" else "fixed_point"
