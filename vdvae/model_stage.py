"""Stage `model`: the objective of a very deep VAE, its schedules, and what it reports.

Source: Efficient-VDVAE, eq. 5; the warm-up of the divergence and the balancing of the layers (after NVAE) are those of
its released code, whose configs all use them. Not here: the model (`vae.py`), and the optimiser (`bitsperdim.optim`).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bitsperdim import augment, data, likelihood, rng
from bitsperdim import facts as facts_lib
from bitsperdim.facts import Facts
from bitsperdim.model import Aux, Batch, Model, Stage
from vdvae import levels, pictures, vae
from vdvae.config import Config, ObjectiveConfig
from vdvae.vae import Vae


def stage(config: Config) -> Stage:
    return Stage(
        "model",
        model=lambda run: make(config, facts_lib.of_run(run)),
        source=lambda run, split: data.open_source(config.data, split),
        pictures=pictures.of_run,
        facts=lambda run: facts_lib.of_run(run)._asdict(),
        optim=config.optim,
        settings=config.train,
        warning=_warning(config),
    )


def _warning(config: Config) -> str:
    parts, last = config.train.accumulation, config.objective.gamma_steps
    if parts == 1 or not last:
        return ""
    return (
        f"accumulation={parts}: up to update {last:,} the layers are balanced by their divergences over each "
        f"micro-batch of {config.train.batch_size // parts}, not over the whole batch; objective.gamma_steps=0 "
        "balances nothing"
    )


def make(config: Config, facts: Facts) -> Model:
    """L = (-log p(x | z) + beta sum_l gamma_l KL_l) / D, in nats per dimension, averaged over the batch.

    Reported are the parts of the bound itself, without beta and gamma: a bound on -log p(x) at any step.
    """
    model, objective = vae.make(config.model, facts), config.objective
    sizes = jnp.asarray([math.prod(shape) for shape in levels.latent_shapes(model.net.levels)], jnp.float32)

    def forward(params: PyTree, image: Array, key: Array, position: Array) -> tuple[Array, Array]:
        keys = rng.per_example(rng.for_purpose(key, "latents"), position)
        return vae.bound(model, params, image, keys)

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        image = batch["image"]
        if config.model.flip:
            image = augment.flip(rng.per_example(rng.for_purpose(key, "flip"), batch["position"]), image)
        reconstruction, kl = forward(params, image, key, batch["position"])
        update = step + 1  # the number of the update that is being taken, as the published schedules count
        weights = beta(objective, update) * gamma(objective, update, kl.mean(1), sizes)
        value = (reconstruction.mean() + (weights * kl.mean(1)).sum()) / model.num_dims
        return value, Aux(_parts(model, reconstruction, kl), (), ())

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        return Aux(_parts(model, *forward(params, batch["image"], key, batch["position"])), (), ())

    init = lambda key: (vae.init(model, key), {})
    return Model(init, loss, measure, lambda means, tallies: means)


def _parts(model: Vae, reconstruction: Float[Array, " b"], kl: Float[Array, "l b"]) -> dict[str, Array]:
    """-log p(x) <= reconstruction + sum of all KL, in nats per image; the KL of every resolution too."""
    nats = reconstruction + kl.sum(0)
    parts = {"bits_per_dim": likelihood.bits_per_dim(nats, model.num_dims), "nats": nats}
    parts |= {"reconstruction_nats": reconstruction, "kl_nats": kl.sum(0)}
    for level, of_layer in zip(levels.level_of_layer(model.net.levels), kl, strict=True):
        found = model.net.levels[level]
        name = f"kl_nats_{found.height}x{found.columns}"
        parts[name] = parts.get(name, 0.0) + of_layer
    return parts


def beta(config: ObjectiveConfig, update: Int[Array, ""] | int) -> Float[Array, ""]:
    """clip((s - start) / (start + steps), least, 1) at update s: 1 from s = 2 start + steps on."""
    if not config.kl_steps:
        return jnp.ones(())
    progress = (jnp.asarray(update, jnp.float32) - config.kl_start) / (config.kl_start + config.kl_steps)
    return jnp.clip(progress, config.kl_least, 1.0)


def gamma(
    config: ObjectiveConfig, update: Int[Array, ""] | int, kl: Float[Array, " l"], sizes: Float[Array, " l"]
) -> Float[Array, " l"]:
    """L a_l / sum of a, a constant for the gradient, with a_l = KL_l / size of the latent; 1 behind `gamma_steps`.

    So a layer that says little for its size costs little until it has begun to be used. `kl` are means over the batch.
    """
    share = kl / sizes
    balanced = jax.lax.stop_gradient(len(sizes) * share / jnp.maximum(share.sum(), 1e-30))
    return jnp.where(update <= config.gamma_steps, balanced, 1.0)
