"""A trained flow as functions: samples, likelihoods, latents and images from them.

Not here: the density (`density.py`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from bitsperdim import dequantize, facts, great_circle, rng, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Loaded
from bitsperdim.run import Run
from flows import bounds, density, figures, stage
from flows.density import Latents


def load(run: Run, mesh: Mesh) -> Loaded:
    """What can be done with a trained run. The weights are restored when they are first needed."""
    config, about = run.config, facts.of_run(run)
    model = density.make(config.model, about)
    params = functools.cache(lambda: trainer.restore(run, "model", mesh)[1]["ema"])
    size = config.sampling.batch_size
    default_key = jax.random.key(config.seed)

    @functools.partial(jax.jit, static_argnames="samples")
    def nats(params: PyTree, image: Array, keys: Array, samples: int) -> Array:
        return bounds.renyi(model.log_weights(params, image, keys, samples)[0], 0.0)

    encoded = jax.jit(lambda params, image, keys: model.encode(params, model.noisy(params, image, keys)))

    @jax.jit
    def decoded(params: PyTree, latents: Latents) -> tuple[Array, Array]:
        return stage.to_levels(model.decode(params, latents), about.levels)

    @jax.jit
    def sampled(params: PyTree, key: Array, position: Array, temperature: Array) -> tuple[Array, Array, Array]:
        latents = stage.normal_latents(model, rng.per_example(key, position), temperature)
        y = model.decode(params, latents)
        return *stage.to_levels(y, about.levels), _largest_difference(model.encode(params, y), latents)

    @jax.jit
    def between(
        params: PyTree, one: tuple[Array, Array], other: tuple[Array, Array], share: Array
    ) -> tuple[Array, Array]:
        ends = (model.encode(params, model.noisy(params, *end)) for end in (one, other))
        latents = tuple(great_circle.between(a, b, share) for a, b in zip(*ends, strict=True))
        return stage.to_levels(model.decode(params, latents), about.levels)

    there_and_back = jax.jit(model.round_trip)

    def log_prob(
        images: UInt8[np.ndarray, "n h w c"], key: Key[Array, ""] | None = None, samples: int = 1
    ) -> Float[np.ndarray, " n"]:
        """A bound on log P(x) in nats: importance-weighted, of so many noise samples; 1: the evidence lower bound."""
        chunk = config.model.chunk
        if samples < 1 or (samples > chunk and samples % chunk):
            raise InputError(f"samples must be at most {chunk} (model.chunk), or a multiple of it, not {samples}")
        return in_batches(lambda x, keys: nats(params(), x, keys, samples), facts.check_images(images, about), key)

    def encode(images: UInt8[np.ndarray, "n h w c"], key: Key[Array, ""] | None = None) -> tuple[np.ndarray, ...]:
        """The latents of the images with one draw of their noise, from the first split off to the top."""
        return in_batches(lambda x, keys: encoded(params(), x, keys), facts.check_images(images, about), key)

    def decode(
        latents: Sequence[Float[np.ndarray, "n h w c"] | None],
        key: Key[Array, ""] | None = None,
        temperature: float = config.sampling.temperature,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """The images of the latents. Those given as None are drawn, temperature x N(0, I), as `draw` draws them, with
        the key (default: of the config's seed): so one scale is varied with the others fixed."""
        given = _checked_latents(latents, model.latent_shapes)
        if any(latent is None for latent in given):
            count = next(len(latent) for latent in given if latent is not None)
            keys = rng.per_example(default_key if key is None else key, jnp.arange(count))
            drawn = jax.device_get(stage.normal_latents(model, keys, _checked_temperature(temperature)))
            given = tuple(new if old is None else old for old, new in zip(given, drawn, strict=True))
        return _said(*in_batches(lambda z, _: decoded(params(), z), given, None))

    def interpolate(
        one: UInt8[np.ndarray, "n h w c"], other: UInt8[np.ndarray, "n h w c"], share: float
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Images `share` of the way from one to the other, on the great circle between their latents, noise as that of
        `encode`: so the ends are the images themselves."""
        rows = facts.check_images(one, about), facts.check_images(other, about)
        if len(rows[0]) != len(rows[1]):
            raise InputError(f"images to interpolate between must be as many, not {len(one)} and {len(other)}")
        both = lambda ends, keys: between(params(), *((end, keys) for end in ends), share)
        return _said(*in_batches(both, rows, None))

    def in_batches(function: Callable, rows: PyTree, key: Key[Array, ""] | None) -> Any:
        """`function(rows, keys)`, each row with a key of its own, in batches."""
        count = len(jax.tree.leaves(rows)[0])
        keys = rng.per_example(rng.for_purpose(default_key if key is None else key, "noise"), jnp.arange(count))
        return sharding.in_batches(lambda both: function(*both), (rows, keys), mesh, size)

    def draw(
        key: Key[Array, ""], n: int, temperature: float = config.sampling.temperature, batch_size: int = size
    ) -> tuple[UInt8[np.ndarray, "n h w c"], dict[str, Any]]:
        """Also the round-trip error: by how much latents differ, at most, from those of the image that they became, and
        which images are not finite. Inverse couplings can grow doubly exponentially; those images are black."""
        drawn = lambda position: sampled(params(), key, position, jnp.asarray(_checked_temperature(temperature), float))
        images, finite, errors = sharding.in_batches(drawn, np.arange(n), mesh, batch_size)
        each = sharding.whole_batch(min(batch_size, n), mesh)
        about_it = {
            "temperature": temperature,
            "batch_size": each,
            "not_finite_images": np.flatnonzero(~finite).tolist(),
        }
        return _said(images, finite), about_it | {"round_trip_error": float(errors[finite].max(initial=0.0))}

    def round_trip(
        images: UInt8[np.ndarray, "n h w c"],
    ) -> tuple[Float[np.ndarray, "n h w c"], Float[np.ndarray, "n h w c"]]:
        rows = facts.check_images(images, about)
        return in_batches(lambda image, keys: there_and_back(params(), image, keys), rows, None)

    def reconstruct(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
        """Encoded and decoded again: equal to the images while the round trip is exact to within the noise, for a flow
        is a bijection. Where it is not, the largest error is said."""
        y, back = round_trip(images)
        found = np.asarray(dequantize.to_levels(jnp.asarray(back), about.levels))
        if (found != images).any():
            error = np.abs(back - y).max()
            run_lib.say(f"warning: reconstructions differ; the largest round-trip error is {error:.2g} levels")
        return found

    loaded = Loaded(
        config=config,
        levels=about.levels,
        log_prob=log_prob,
        draw=draw,
        encode=encode,
        decode=decode,
        reconstruct=reconstruct,
        interpolate=interpolate,
    )
    return loaded._replace(figures=figures.of_run(run, loaded, round_trip))


def _said(images: UInt8[np.ndarray, "n h w c"], finite: Bool[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]:
    if not finite.all():
        run_lib.say(
            f"warning: {(~finite).sum()} of {len(finite)} images are not finite, and black: latents this far out lead "
            "beyond all numbers; a lower temperature (--temperature=0.8) or longer training helps"
        )
    return images


def _largest_difference(some: Latents, others: Latents) -> Float[Array, " b"]:
    """Over all arrays, of each example."""
    each = [jnp.abs(one - other).max((1, 2, 3)) for one, other in zip(some, others, strict=True)]
    return jnp.stack(each).max(0)


def _checked_temperature(temperature: float) -> float:
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be finite and at least 0, not {temperature}")
    return temperature


def _checked_latents(
    latents: Sequence[np.ndarray | None], shapes: tuple[tuple[int, ...], ...]
) -> tuple[np.ndarray | None, ...]:
    found = tuple(None if latent is None else np.asarray(latent) for latent in latents)
    known = [latent for latent in found if latent is not None]
    if not known:
        raise InputError("latents must be given for a scale at least; sample draws all of them")
    fits = [latent is None or latent.shape[1:] == shape for latent, shape in zip(found, shapes, strict=False)]
    if len(found) != len(shapes) or not all(fits) or len({len(latent) for latent in known}) > 1:
        raise InputError(
            f"latents must be {len(shapes)} arrays of shapes {[['n', *shape] for shape in shapes]}, "
            f"not {[None if latent is None else list(latent.shape) for latent in found]}"
        )
    return found
