"""Stage `model`: the objective of a very deep VAE, its schedules, and what it reports.

Source: Efficient-VDVAE, eq. 5; the warm-up of the divergence and the balancing of the layers (after NVAE) are those of
its released code, whose configs all use them. Not here: the model (`vae.py`), and the optimiser (`bitsperdim.optim`).
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from bitsperdim import augment, data, likelihood, rng
from bitsperdim import facts as facts_lib
from bitsperdim.facts import Facts
from bitsperdim.model import Aux, Batch, Model, Stage
from bitsperdim.ssim import ssim
from vdvae import coding, levels, network, pictures, vae
from vdvae.config import Config, ObjectiveConfig
from vdvae.vae import Vae

NEAR_ZERO = 0.05  # nats an image: a resolution with less says nothing
OF_RESOLUTION = re.compile(r"kl_nats_\d+x\d+")


def stage(config: Config) -> Stage:
    """The stage `model`: what is trained, what evaluate.py measures beside it, and what is said of both."""
    return Stage(
        "model",
        model=lambda run: make(config, facts_lib.of_run(run)),
        evaluated=lambda run: evaluated(config, facts_lib.of_run(run)),
        source=lambda run, split: data.open_source(config.data, split),
        pictures=pictures.of_run,
        facts=lambda run: facts_lib.of_run(run)._asdict(),
        optim=config.optim,
        settings=config.train,
        remarks=lambda run, step, figures: remarks(config.objective, step, figures),
        by_rows=True,
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

    def augmented(params: PyTree, batch: Batch, key: Array) -> tuple[Array, Array]:
        image = batch["image"]
        if config.model.flip:
            image = augment.flip(rng.per_example(rng.for_purpose(key, "flip"), batch["position"]), image)
        return forward(params, image, key, batch["position"])

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        reconstruction, kl = augmented(params, batch, key)
        update = step + 1  # the number of the update that is being taken, as the published schedules count
        balanced_by = batch["whole_batch"] if "whole_batch" in batch else kl.mean(1)
        weights = beta(objective, update) * gamma(objective, update, balanced_by, sizes)
        value = (reconstruction.mean() + (weights * kl.mean(1)).sum()) / model.num_dims
        return value, Aux(_parts(model, reconstruction, kl), (), ())

    def divergences(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> Array:
        found = lambda: augmented(params, batch, key)[1].mean(1)
        return jax.lax.cond(step < objective.gamma_steps, found, lambda: jnp.zeros_like(sizes))

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        keys = rng.per_example(rng.for_purpose(key, "latents"), batch["position"])
        return Aux(_measured(model, params, batch["image"], keys)[0], (), ())

    init = lambda key: (vae.init(model, key), {})
    # Under accumulation the balance takes a pass more, as long as there is one.
    whole_batch = divergences if objective.gamma_steps else None
    return Model(init, loss, measure, lambda means, tallies: means, whole_batch=whole_batch)


def evaluated(config: Config, facts: Facts) -> Model:
    """With the KL of every layer too, and the importance-weighted bound of `evaluation.samples` draws where they are
    more than one."""
    trained, model, samples = make(config, facts), vae.make(config.model, facts), config.evaluation.samples

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        keys = rng.per_example(rng.for_purpose(key, "latents"), batch["position"])
        parts, kl = _measured(model, params, batch["image"], keys)
        if samples > 1:
            nats = coding.importance_weighted(model, params, batch["image"], keys, samples)
            parts[f"bits_per_dim_importance_weighted_{samples}"] = likelihood.bits_per_dim(nats, model.num_dims)
            parts[f"nats_importance_weighted_{samples}"] = nats
        # Of layers sums alone: their standard errors would make the table twice as long.
        return Aux(parts, {"kl": (kl * batch["mask"]).sum(1), "images": batch["mask"].sum()}, ())

    def summarize(means: dict[str, float], tallies: PyTree) -> dict[str, float]:
        of_layers = np.asarray(tallies["kl"]) / tallies["images"]
        return means | {f"kl_nats_layer_{layer:02d}": float(kl) for layer, kl in enumerate(of_layers)}

    return trained._replace(measure=measure, summarize=summarize)


def remarks(config: ObjectiveConfig, step: int, figures: dict[str, float]) -> list[str]:
    """Which resolutions have stayed without information (appendix A.1), once the warm-up of the divergence is over."""
    if step <= max(2 * config.kl_start + config.kl_steps, config.gamma_steps):
        return []
    found = {name.removeprefix("kl_nats_"): kl for name, kl in figures.items() if OF_RESOLUTION.fullmatch(name)}
    return [
        f"warning: the latents of {name} say nothing of the image (KL {kl:.2g} nats); a longer warm-up may help: "
        "objective.kl_steps, gamma_steps"
        for name, kl in found.items()
        if kl < NEAR_ZERO
    ]


def _measured(
    model: Vae, params: PyTree, image: UInt8[Array, "b h w c"], keys: Key[Array, " b"]
) -> tuple[dict[str, Array], Float[Array, "l b"]]:
    """The bound of a draw of z and its parts, how alike the likeliest image given z is, and the KL of each layer."""
    target = vae.target(model, image)
    raw, kl = vae.infer(model, params, image, network.posterior_sources(keys, model.num_layers), vae.kl_of_image)
    parts = _parts(model, model.output.nats(raw, target), jnp.stack(kl))
    return parts | {"ssim": ssim(target, model.output.likeliest(raw), model.output.levels)}, jnp.stack(kl)


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
