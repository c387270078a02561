"""Stage `model`: the bound that a flow is trained on, what is measured of it, its data-dependent start, its pictures.

Source: Ma et al. 2019 (MaCow), appendix A and B.2. The start sees dequantized images, unlike the released code's, whose
first batch has no noise.
Not here: the density itself (`density.py`), and what is done with a trained one (`sampling.py`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from bitsperdim import augment, data, dequantize, facts, images, likelihood, rng, sharding
from bitsperdim.facts import Facts
from bitsperdim.model import Aux, Batch, Model, Pictures, Stage
from bitsperdim.run import Run
from flows import bounds, density
from flows.config import Config, ModelConfig
from flows.density import Density

NUM_PICTURES = 16


def stage(config: Config) -> Stage:
    """The stage. evaluate.py measures it with more noise samples than evaluations during training, and its inverse."""
    measured = config.model.measured_samples
    return Stage(
        "model",
        model=lambda run: make(config.model, facts.of_run(run), measured),
        evaluated=lambda run: make(config.model, facts.of_run(run), config.evaluation.samples, inverts=True),
        source=lambda run, split: data.open_source(config.data, split),
        pictures=_pictures,
        begin=_begin,
        facts=lambda run: facts.of_run(run)._asdict(),
        optim=config.optim,
        settings=config.train,
    )


def make(config: ModelConfig, about: Facts, measured_samples: int, inverts: bool = False) -> Model:
    """L = -L_alpha of `config.samples` noise samples, a mean over examples, in nats per image (`bounds.py`).

    While it trains, `bits_per_dim` is the evidence lower bound too, whatever the objective; another objective stands
    beside it under its kind and K.

    Measured are the evidence lower bound (the mean over `measured_samples` draws) and the importance-weighted bound
    with as many, whose difference estimates KL(q(u | x) || p(u | x)) from below (eq. 3). `inverts`: also the error of
    y = x + u, in levels, when it is encoded and decoded again, and the share of images whose levels are then x.
    """
    model, dims = density.make(config, about), math.prod(about.shape)

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        return model.init(key), {}

    def parts(log_w: Array, log_q: Array) -> dict[str, Float[Array, " b"]]:
        return {"nats": -bounds.renyi(log_w, 1.0), "noise_entropy_nats": -log_q.mean(0)}

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        keys = lambda purpose: rng.per_example(rng.for_purpose(key, purpose), batch["position"])
        image = batch["image"]
        if config.shift:
            image = augment.shift(keys("shift"), image, config.shift)
        if config.flip:
            image = augment.flip(keys("flip"), image)
        log_w, log_q = model.log_weights(params, image, keys("noise"), config.samples)
        values, objective = parts(log_w, log_q), -bounds.renyi(log_w, config.alpha)
        bits = {"bits_per_dim": likelihood.bits_per_dim(values["nats"], dims)}
        if config.alpha != 1.0:
            name = f"bits_per_dim_{bounds.kind(config.alpha)}_{config.samples}"
            bits[name] = likelihood.bits_per_dim(objective, dims)
        return objective.mean(), Aux(values | bits, (), ())

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        keys = rng.per_example(rng.for_purpose(key, "noise"), batch["position"])
        log_w, log_q = model.log_weights(params, batch["image"], keys, measured_samples)
        values = parts(log_w, log_q) | {"importance_weighted_nats": -bounds.renyi(log_w, 0.0)}
        if not inverts:
            return Aux(values, (), ())
        means, maxima = round_trip_errors(batch["image"], *model.round_trip(params, batch["image"], keys), about.levels)
        return Aux(values | means, (), (), maxima)

    def summarize(means: dict[str, float], tallies: PyTree) -> dict[str, float]:
        if "importance_weighted_nats" not in means:
            return means
        bits = {name: likelihood.bits_per_dim(means[name], dims) for name in means}
        weighted = f"bits_per_dim_{bounds.kind(0.0)}_{measured_samples}"
        return {
            "bits_per_dim": bits["nats"],
            weighted: bits["importance_weighted_nats"],
            "dequantization_gap_bits_per_dim": bits["nats"] - bits["importance_weighted_nats"],
            "noise_entropy_bits_per_dim": bits["noise_entropy_nats"],
            "nats": means["nats"],
            **{name: value for name, value in means.items() if name.startswith("round_trip")},
        }

    return Model(init, loss, measure, summarize)


def round_trip_errors(
    image: UInt8[Array, "b h w c"], y: Float[Array, "b h w c"], back: Float[Array, "b h w c"], levels: int
) -> tuple[dict[str, Float[Array, " b"]], dict[str, Float[Array, " b"]]]:
    """Of each image: what is to be averaged, and what is to be maximised."""
    over, error = (1, 2, 3), jnp.abs(back - y)
    exact = (dequantize.to_levels(back, levels) == image).all(over)
    means = {"round_trip_mean_error_levels": error.mean(over), "round_trip_exact_images": exact.astype(error.dtype)}
    return means, {"round_trip_largest_error_levels": error.max(over)}


def _begin(run: Run, mesh: Mesh) -> dict[str, PyTree]:
    """Parameters whose scales suit a first batch of training images, dequantized; the statistics run over all of it."""
    config: Config = run.config
    model = density.make(config.model, facts.of_run(run))
    source, seed = data.open_source(config.data, "train"), run.seed("model")
    count = sharding.whole_batch(min(config.model.init_images, source.size), mesh)
    batch = data.train_batch(source, seed, 0, count, sharding.over_batch(mesh))

    def begun(batch: Batch) -> PyTree:
        key = rng.for_purpose(jax.random.key(seed), "init")
        noise = rng.per_example(rng.for_purpose(key, "noise"), batch["position"])
        return model.init_from_batch(model.init(key), batch["image"], noise)

    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    make = jax.jit(begun, out_shardings=sharding.replicated(mesh), compiler_options=options)
    params = make(batch)
    # A copy: a buffer of the state cannot be donated twice.
    return {"params": params, "ema": jax.tree.map(jnp.copy, params)}


def _pictures(run: Run, mesh: Mesh) -> Pictures:
    """Samples, always of the same noise, at the temperatures of the released code."""
    model, about = density.make(run.config.model, facts.of_run(run)), facts.of_run(run)

    @jax.jit
    def drawn(params: PyTree, key: Array, temperature: Array) -> Array:
        latents = normal_latents(model, rng.per_example(key, jnp.arange(NUM_PICTURES)), temperature)
        return to_levels(model.decode(params, latents), about.levels)[0]

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        found = {}
        for temperature in (0.7, 1.0):
            samples = np.asarray(drawn(params, key, jnp.asarray(temperature)))
            found[f"samples_{temperature}"] = images.grid(samples, levels=about.levels)
        return found

    return pictures


def to_levels(y: Float[Array, "b h w c"], levels: int) -> tuple[UInt8[Array, "b h w c"], Bool[Array, " b"]]:
    """The levels of images, and which of these are finite; the others are black."""
    finite = jnp.isfinite(y).all((1, 2, 3))
    return dequantize.to_levels(jnp.where(finite[:, None, None, None], y, 0.0), levels), finite


def normal_latents(model: Density, keys: Key[Array, " n"], temperature: Array | float) -> density.Latents:
    """temperature x N(0, I), the latents of each example from its key alone."""

    def latent(i: int, shape: tuple[int, ...]) -> Array:
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), shape, float)
        return temperature * jax.vmap(draw)(keys)

    return tuple(latent(i, shape) for i, shape in enumerate(model.latent_shapes))
