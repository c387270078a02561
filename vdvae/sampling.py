"""A trained run of a very deep VAE as functions: samples, bounds of likelihoods, latents and back.

Not here: the mathematics of them (`coding.py`).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree, UInt8

from bitsperdim import facts, rng, sharding, trainer
from bitsperdim.errors import InputError
from bitsperdim.model import Loaded
from bitsperdim.run import Run
from vdvae import coding, figures, latent_store, levels, vae
from vdvae.config import Config
from vdvae.vae import Vae

Latents = list[Float[np.ndarray, "n h w z"]]


def load(run: Run, mesh: Mesh) -> Loaded:
    """What can be done with a trained run. Its weights are restored when they are first needed."""
    model = vae.make(run.config.model, facts.of_run(run))
    params = functools.cache(lambda: trainer.restore(run, "model", mesh)[1]["ema"])
    check = lambda images: facts.check_images(images, model.facts)
    in_batches = functools.partial(sharding.in_batches, mesh=mesh, size=run.config.sampling.batch_size)
    sample = jax.jit(functools.partial(coding.sampled, model))
    encoded = jax.jit(functools.partial(coding.encoded, model))
    decoded = jax.jit(functools.partial(coding.decoded, model))
    completed = jax.jit(functools.partial(coding.completed, model))
    between = jax.jit(functools.partial(coding.interpolated, model))
    reconstruct = jax.jit(functools.partial(coding.reconstructed, model))
    weighted = jax.jit(functools.partial(coding.importance_weighted, model), static_argnums=3)

    @jax.jit
    def bound(params: PyTree, image: Array, keys: Array) -> Array:
        reconstruction, kl = vae.bound(model, params, image, keys)
        return reconstruction + kl.sum(0)

    def log_prob(
        images: UInt8[np.ndarray, "n h w c"], key: Key[Array, ""] | None = None, samples: int = 1
    ) -> Float[np.ndarray, " n"]:
        """A lower bound of log p(x) in nats: one draw of z, or with more samples the importance-weighted bound."""
        keys = rng.per_example(jax.random.key(0) if key is None else key, jnp.arange(len(images)))
        rows = {"image": check(images), "keys": keys}
        if samples > 1:
            return -in_batches(lambda rows: weighted(params(), rows["image"], rows["keys"], samples), rows)
        return -in_batches(lambda rows: bound(params(), rows["image"], rows["keys"]), rows)

    def draw(
        key: Key[Array, ""],
        n: int,
        temperature: float | Sequence[float] | Mapping[str, float] | None = None,
        output_temperature: float | None = None,
        batch_size: int = 0,
    ) -> tuple[UInt8[np.ndarray, "n h w c"], dict[str, Any]]:
        """`temperature` of the prior: one number, one for each level (deepest first), or by name: {'1': 0.9, ...}
        (`config.levels`), where the others keep those of the config. `output_temperature` is that of p(x | z)."""
        of_levels = _temperatures(run.config, temperature)
        chosen = run.config.sampling.output_temperature if output_temperature is None else output_temperature
        if not 0 <= chosen < math.inf:
            raise InputError(f"output_temperature must be at least 0, not {chosen}")
        of_layers = coding.by_layer(model, of_levels)
        size = batch_size or run.config.sampling.batch_size
        rows = {"keys": rng.per_example(key, jnp.arange(n))}
        images = in_batches(lambda rows: sample(params(), rows["keys"], of_layers, chosen), rows, size=size)
        about = {"network_calls": -(-n // size), "temperatures": list(of_levels), "output_temperature": chosen}
        return images, about

    def encode(images: UInt8[np.ndarray, "n h w c"], key: Key[Array, ""] | None = None) -> Latents:
        """The latents of every layer, the first drawn first: means of the posteriors, with a key a draw from them."""
        images = check(images)
        if key is None:
            return in_batches(lambda rows: encoded(params(), rows), images)
        rows = {"image": images, "keys": rng.per_example(key, jnp.arange(len(images)))}
        return in_batches(lambda rows: encoded(params(), rows["image"], rows["keys"]), rows)

    def decode(
        latents: Sequence[Float[np.ndarray, "n h w z"] | None],
        key: Key[Array, ""] | None = None,
        temperature: float | Sequence[float] | Mapping[str, float] | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """The likeliest images of the latents. Layers given as None are drawn from the prior with the key (default: of
        0) and the temperature, as `draw` takes it; so latents can be swapped, and left open behind any layer."""
        given, known = _checked_latents(model, latents)
        if all(known):
            return in_batches(lambda rows: decoded(params(), rows), given)
        of_layers = coding.by_layer(model, _temperatures(run.config, temperature))
        keys = rng.per_example(jax.random.key(0) if key is None else key, jnp.arange(len(given[0])))
        masks, rows = [np.float32(is_known) for is_known in known], {"latents": given, "keys": keys}
        complete = lambda rows: completed(params(), rows["latents"], masks, rows["keys"], of_layers)
        return in_batches(complete, rows)

    def interpolate(
        one: UInt8[np.ndarray, "n h w c"], other: UInt8[np.ndarray, "n h w c"], share: float
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Images `share` of the way from the reconstruction of one to that of the other (`coding.interpolated`)."""
        rows = (check(one), check(other))
        if len(rows[0]) != len(rows[1]):
            raise InputError(f"images to interpolate between must be as many, not {len(one)} and {len(other)}")
        return in_batches(lambda rows: between(params(), *rows, share), rows)

    loaded = Loaded(
        config=run.config,
        levels=model.output.levels,
        log_prob=log_prob,
        draw=draw,
        encode=encode,
        decode=decode,
        reconstruct=lambda images: in_batches(lambda rows: reconstruct(params(), rows), check(images)),
        interpolate=interpolate,
        decode_stored=functools.partial(latent_store.decode, run, mesh),
    )
    return loaded._replace(figures=figures.of_run(run, mesh, loaded))


def _temperatures(config: Config, given: float | Sequence[float] | Mapping[str, float] | None) -> tuple[float, ...]:
    """One for each level. Raises InputError for levels that there are not."""
    names, default = config.levels, config.sampling.temperatures
    default = default * len(names) if len(default) == 1 else default
    if given is None:
        return default
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(names)):
            raise InputError(f"temperature of '{unknown[0]}': the levels are {', '.join(dict.fromkeys(names))}")
        given = [given.get(name, t) for name, t in zip(names, default, strict=True)]
    values = (float(given),) if isinstance(given, int | float) else tuple(float(t) for t in given)
    if len(values) not in (1, len(names)) or not all(0 <= t < math.inf for t in values):
        raise InputError(
            f"temperature must be at least 0, one number or one for each of {len(names)} levels, not {given}"
        )
    return values * len(names) if len(values) == 1 else values


def _checked_latents(model: Vae, latents: Sequence[Float[np.ndarray, "n h w z"] | None]) -> tuple[Latents, list[bool]]:
    """The latents, zeros in place of None, and which of them are given."""
    expected = levels.latent_shapes(model.net.levels)
    if len(latents) != len(expected):
        raise InputError(f"latents must be a list of {len(expected)} arrays, one a layer, not of {len(latents)}")
    known = [z is not None for z in latents]
    count = next((len(z) for z in latents if z is not None), 0)
    if not any(known):
        raise InputError("latents must be given for a layer at least; sample draws all of them")
    found = [
        np.zeros((count, *shape), np.float32) if z is None else np.asarray(z, np.float32)
        for z, shape in zip(latents, expected, strict=True)
    ]
    for layer, (z, shape) in enumerate(zip(found, expected, strict=True)):
        if z.shape != (count, *shape):
            raise InputError(f"latents of layer {layer} must be {['n', *shape]}, not {list(z.shape)}")
    return found, known
