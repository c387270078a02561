"""Images to latents and back, and images from the prior: pure functions of a model's parameters.

Not here: batches, devices and checks of what people give (`sampling.py`).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from bitsperdim import rng
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
    keys_of = lambda purpose: jax.vmap(lambda key: rng.for_purpose(key, purpose))(keys)
    sources = network.prior_sources(keys_of("latents"), temperatures)
    raw, _ = vae.generate(model, params, sources)
    return model.output.draw(raw, keys_of("image"), output)


def encoded(model: Vae, params: Params, image: UInt8[Array, "b h w c"]) -> list[Float[Array, "b h w z"]]:
    """The latents of every layer, each the mean of its posterior given the ones before."""
    middle = Source(noise=jnp.zeros((len(image), 1, 1, 1)))
    _, latents = vae.infer(model, params, image, [middle] * model.num_layers, lambda draw: draw.z)
    return latents


def decoded(model: Vae, params: Params, latents: Sequence[Float[Array, "b h w z"]]) -> UInt8[Array, "b h w c"]:
    """The likeliest image of the latents of all layers: of the likeliest component the mean."""
    raw, _ = vae.generate(model, params, [Source(given=z) for z in latents])
    return _likeliest(model, raw)


def reconstructed(model: Vae, params: Params, image: UInt8[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """`decoded` of `encoded`, in one pass."""
    middle = Source(noise=jnp.zeros((len(image), 1, 1, 1)))
    raw, _ = vae.infer(model, params, image, [middle] * model.num_layers, lambda draw: None)
    return _likeliest(model, raw)


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


def _likeliest(model: Vae, raw: Float[Array, "b h w o"]) -> UInt8[Array, "b h w c"]:
    keys = rng.per_example(jax.random.key(0), jnp.arange(len(raw)))  # of no effect at temperature 0
    return model.output.draw(raw, keys, 0.0)
