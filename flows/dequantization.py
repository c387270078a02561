"""Dequantization: noise u in [0, 1) for each value of an image, uniform or drawn by a flow that sees the image.

Source: Ma et al. 2019 (MaCow), appendix A; Ho et al. 2019 (Flow++), section 3.1. The density of y = x + u bounds the
likelihood of the levels x (eq. 3): log P(x) >= E_q [log p(x + u) - log q(u | x)].
Not here: the bounds made of several samples of u (`bounds.py`), levels and scaling (`bitsperdim/dequantize.py`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt8

from bitsperdim import dequantize
from flows import layers
from flows.bijector import LogDet
from flows.config import DequantizationConfig
from flows.encoder import encoder

LARGEST = 1.0 - 2.0**-16  # of u, the largest value of `dequantize.uniform_noise`


class Dequantizer(NamedTuple):
    """q(u | x) as pure functions. Keys are those of examples, [k, b] for k samples of each image."""

    init: Callable[[Key[Array, ""]], PyTree]
    # (params, images, keys) -> u [k, b, h, w, c], log q(u | x) [k, b] in nats
    draw: Callable[[PyTree, UInt8[Array, "b h w c"], Key[Array, "k b"]], tuple[Array, Array]]
    # (params, images, keys [b]) -> params for a data-dependent start, and u under them
    init_from_batch: Callable[[PyTree, UInt8[Array, "b h w c"], Key[Array, " b"]], tuple[PyTree, Array]]
    # (params, e [k, b, h, w, c], features of the encoder) -> as `draw`, from given Gaussian noise
    from_normal: Callable[[PyTree, Float[Array, "k b h w c"], Array], tuple[Array, Array]] | None = None


def uniform(width: float = 1.0) -> Dequantizer:
    """q(u | x) = width^-D on [0, width)^D: log q = -D log width, 0 for the whole cell."""

    def draw(params: PyTree, images: Array, keys: Key[Array, "k b"]) -> tuple[Array, Array]:
        noise = jax.vmap(lambda keys: dequantize.uniform_noise(keys, images.shape[1:]))(keys)
        return width * noise, jnp.full(keys.shape, -math.log(width) * math.prod(images.shape[1:]))

    def init_from_batch(params: PyTree, images: Array, keys: Key[Array, " b"]) -> tuple[PyTree, Array]:
        return params, draw(params, images, keys[None])[0][0]

    return Dequantizer(lambda key: {}, draw, init_from_batch)


def variational(config: DequantizationConfig, channels: int, levels: int, scan: bool) -> Dequantizer:
    """u = sigmoid(v), v = flow(e; s), e ~ N(0, I), s = encoder(c), c = x scaled to [-1, 1) (eq. 4).

    The noise takes the parallel direction of the flow, so that drawing it is one pass, and its density is known:
    log q(u | x) = log N(e) - log|det dv/de| - sum log sigmoid'(v). A saturated u is held below 1, `LARGEST`, so that
    floor(x + u) = x in float32 for every v.
    """
    flow = layers.multi_scale(config.flow, channels, config.condition_channels, scan, "lines")
    net = encoder(channels, config.condition_channels, config.flow.num_halvings)
    normals = lambda keys, shape: jax.vmap(lambda key: jax.random.normal(key, shape, float))(keys)
    to_condition = lambda images: dequantize.scale(images.astype(float), levels, "symmetric")

    def init(key: Key[Array, ""]) -> PyTree:
        of_flow, of_encoder = jax.random.split(key)
        return {"flow": flow.init(of_flow), "encoder": net.init(of_encoder)}

    def draw(params: PyTree, images: Array, keys: Key[Array, "k b"]) -> tuple[Array, Array]:
        features = net.apply(params["encoder"], to_condition(images))
        noise = jax.vmap(lambda keys: normals(keys, images.shape[1:]))(keys)
        return from_normal(params, noise, features)

    def from_normal(params: PyTree, noise: Float[Array, "k b h w c"], features: Array) -> tuple[Array, Array]:
        flat = joined(noise)
        repeated = joined(jnp.broadcast_to(features, (len(noise), *features.shape)))
        latents, log_det = flow.forward_and_log_det(params["flow"], flat, repeated)
        v = layers.pack(config.flow, latents)
        log_q = log_normal(flat) - log_det - log_sigmoid_slope(v)
        return parted(to_noise(v), len(noise)), parted(log_q, len(noise))

    def init_from_batch(params: PyTree, images: Array, keys: Key[Array, " b"]) -> tuple[PyTree, Array]:
        of_encoder, features = net.init_from_batch(params["encoder"], to_condition(images))
        of_flow, latents = flow.init_from_batch(params["flow"], normals(keys, images.shape[1:]), features)
        return {"flow": of_flow, "encoder": of_encoder}, to_noise(layers.pack(config.flow, latents))

    return Dequantizer(init, draw, init_from_batch, from_normal)


def joined(samples: Float[Array, "k b ..."]) -> Float[Array, "b*k ..."]:
    """All samples of all images as one batch: those of one image stand together.

    The other way around the batch would not lie on the devices as the images do, so that each computed all of it.
    """
    return samples.swapaxes(0, 1).reshape(-1, *samples.shape[2:])


def parted(batch: Float[Array, "b*k ..."], count: int) -> Float[Array, "k b ..."]:
    """The inverse of `joined`, of `count` samples."""
    return batch.reshape(-1, count, *batch.shape[1:]).swapaxes(0, 1)


def to_noise(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """u = sigmoid(v), at most `LARGEST`: 255 + u would otherwise round to 256, outside the cell of the level."""
    return jnp.minimum(jax.nn.sigmoid(v), LARGEST)


def log_sigmoid_slope(v: Float[Array, "b h w c"]) -> LogDet:
    """sum log sigmoid'(v) = sum -softplus(v) - softplus(-v), for each example."""
    return (jax.nn.log_sigmoid(v) + jax.nn.log_sigmoid(-v)).sum((1, 2, 3))


def log_normal(e: Float[Array, "b h w c"]) -> LogDet:
    """log N(e; 0, I) of each example, in nats."""
    return -0.5 * (jnp.square(e) + math.log(2.0 * math.pi)).sum((1, 2, 3))
