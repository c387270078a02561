"""Images to latents and back, and images from the prior: pure functions of a model's parameters.

Not here: which latents are worth keeping (`pruning.py`), batches, devices and checks of what people give
(`sampling.py`).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from bitsperdim import great_circle, rng
from vdvae import levels, network, vae
from vdvae.layers import Params
from vdvae.network import Source
from vdvae.vae import Vae


def by_layer(model: Vae, temperatures: Sequence[float]) -> list[float]:
    """One temperature for each layer, from one for each level or one for all."""
    of_levels = levels.level_of_layer(model.net.levels)
    given = tuple(temperatures) * (len(model.net.levels) if len(temperatures) == 1 else 1)
    return [given[level] for level in of_levels]


def sampled(
    model: Vae, params: Params, keys: Key[Array, " b"], temperatures: Sequence[Array | float], output: Array | float
) -> UInt8[Array, "b h w c"]:
    """One image from each key. `temperatures`: one for each layer (eq. 4); `output`: that of p(x | z)."""
    sources = network.prior_sources(for_purpose(keys, "latents"), temperatures)
    raw, _ = vae.generate(model, params, sources)
    return model.output.draw(raw, for_purpose(keys, "image"), output)


def encoded(
    model: Vae, params: Params, image: UInt8[Array, "b h w c"], keys: Key[Array, " b"] | None = None
) -> list[Float[Array, "b h w z"]]:
    """The latents of every layer, each the mean of its posterior given the ones before; with keys a draw from it."""
    sources = middles(model, len(image)) if keys is None else network.posterior_sources(keys, model.num_layers)
    _, latents = vae.infer(model, params, image, sources, lambda draw: draw.z)
    return latents


def decoded(model: Vae, params: Params, latents: Sequence[Float[Array, "b h w z"]]) -> UInt8[Array, "b h w c"]:
    """The likeliest image of the latents of all layers: of the likeliest component the mean."""
    raw, _ = vae.generate(model, params, [Source(given=z) for z in latents])
    return model.output.likeliest(raw)


def completed(
    model: Vae,
    params: Params,
    latents: Sequence[Float[Array, "b h w z"]],
    known: Sequence[Float[Array, "..."]],
    keys: Key[Array, " b"],
    temperatures: Sequence[Array | float],
) -> UInt8[Array, "b h w c"]:
    """As `decoded`, but where `known`, of every layer, is 0 latents are drawn from the prior; it broadcasts to them."""
    free = network.prior_sources(for_purpose(keys, "latents"), temperatures)
    given = zip(free, latents, known, strict=True)
    raw, _ = vae.generate(model, params, [source._replace(given=z, mask=mask) for source, z, mask in given])
    return model.output.likeliest(raw)


def reconstructed(model: Vae, params: Params, image: UInt8[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """`decoded` of `encoded`, in one pass."""
    raw, _ = vae.infer(model, params, image, middles(model, len(image)), lambda draw: None)
    return model.output.likeliest(raw)


def interpolated(
    model: Vae, params: Params, one: UInt8[Array, "b h w c"], other: UInt8[Array, "b h w c"], share: Array | float
) -> UInt8[Array, "b h w c"]:
    """An image `share` of the way from the reconstruction of one image to that of another.

    Between them lies in each layer not z but the noise with which the prior would give it, and between two noises the
    great circle: the prior of a layer depends on the layers before, and the deviation of noise stays what it is.
    """

    def noise(image: UInt8[Array, "b h w c"]) -> list[Array]:
        keep = lambda draw: model.net.latent.noise_of(draw.prior, draw.z)
        return vae.infer(model, params, image, middles(model, len(image)), keep)[1]

    between = [great_circle.between(a, b, share) for a, b in zip(noise(one), noise(other), strict=True)]
    raw, _ = vae.generate(model, params, [Source(prior_noise=eps) for eps in between])
    return model.output.likeliest(raw)


def importance_weighted(
    model: Vae, params: Params, image: UInt8[Array, "b h w c"], keys: Key[Array, " b"], samples: int
) -> Float[Array, " b"]:
    """-log (1 / K sum_k p(x | z_k) p(z_k) / q(z_k | x)) in nats (Burda et al. 2016, eq. 8): the more
    samples, the tighter."""
    log_ratio = lambda draw: model.net.latent.log_ratio(draw.z, draw.posterior, draw.prior).sum((1, 2, 3))

    def one(k: Array) -> Array:
        of_sample = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
        sources = network.posterior_sources(of_sample, model.num_layers)
        raw, ratios = vae.infer(model, params, image, sources, log_ratio)
        return -model.output.nats(raw, vae.target(model, image)) - jnp.stack(ratios).sum(0)

    log_weights = jax.lax.map(one, jnp.arange(samples))
    return math.log(samples) - jax.nn.logsumexp(log_weights, axis=0)


def middles(model: Vae, batch: int) -> list[Source]:
    """z is the mean of its posterior in every layer."""
    return [Source(noise=jnp.zeros((batch, 1, 1, 1)))] * model.num_layers


def for_purpose(keys: Key[Array, " b"], purpose: str) -> Key[Array, " b"]:
    """`rng.for_purpose` of every example's key."""
    return jax.vmap(lambda key: rng.for_purpose(key, purpose))(keys)
