"""Stage `arm`: the autoregressive model, on images or on the codes of an autoencoder, and the modules trained with it.

Source: Wiggers & Hoogeboom 2020, supplement A: cross-entropy of the next dimension given those before, plus 0.01 times
the divergence of the forecasts.
Not here: the networks (`pixelcnn.py`, `modules.py`) and sampling (`sampling.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from arm_forecast import codes, facts, gumbel, modules, networks, pictures, pixelcnn
from arm_forecast.config import ArmStageConfig, Config
from arm_forecast.pixelcnn import Grid
from bitsperdim import data, likelihood, rng
from bitsperdim.errors import InputError
from bitsperdim.model import Aux, Batch, Model, Stage
from bitsperdim.run import Run
from bitsperdim.sources import Source


def stage(config: Config) -> Stage:
    """The stage `arm`: on images, or on the codes that an earlier stage has made of them."""
    latent = config.autoencoder is not None
    return Stage(
        "arm",
        needs=("autoencoder", "codes") if latent else (),
        model=lambda run: make(config.arm, facts.grid(run), "codes" if latent else "image"),
        source=_source,
        example=_example if latent else None,
        pictures=pictures.of_arm,
        facts=None if latent else lambda run: facts.of_run(run)._asdict(),
        optim=config.arm.optim,
        settings=config.arm.train,
    )


def _source(run: Run, split: str) -> Source:
    if run.config.autoencoder is not None:
        return codes.open_codes(run, split)
    return data.open_source(run.config.data, split)


def _example(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    grid = facts.grid(run)
    return {"codes": jax.ShapeDtypeStruct((grid.height, grid.width, grid.channels), jnp.int32)}


def make(config: ArmStageConfig, grid: Grid, field: str) -> Model:
    """L = -log P(x) / D + weight sum_t KL_t / D, in nats per dimension, D = height x width x channels.

    -log P(x) is exact, no bound: each factor is a normalised categorical (or discretised mixture of logistics). `field`
    is what the source calls x: 'image', or 'codes', whose likelihood is a rate and not that of an image. Raises
    InputError where network and data do not fit.
    """
    has_modules = config.forecast.modules > 0
    if has_modules and config.model.output != "categorical":
        raise InputError("arm.forecast.modules forecast categories; set arm.model.output='categorical' or modules=0")
    pixelcnn.check(config.model, grid)
    if has_modules:
        modules.check(config.forecast, grid, "arm.forecast")
    dims = grid.height * grid.width * grid.channels

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        params = {"arm": pixelcnn.init(rng.for_purpose(key, "arm"), config.model, grid)}
        if has_modules:
            key = rng.for_purpose(key, "modules")
            params["modules"] = modules.init(key, config.forecast, config.model.filters, grid)
        return params, {}

    def forward(
        params: PyTree, x: Int[Array, "b h w c"], keys: Key[Array, " b"] | None, noise_keys: Key[Array, " b"]
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """-log P(x) and the divergence, in nats per example."""
        h = pixelcnn.hidden(params["arm"], config.model, grid, x, keys)
        logits = pixelcnn.logits(params["arm"], config.model, grid, h)
        nats = networks.nll(logits, x, config.model.output, grid)
        if not has_modules:
            return nats, jnp.zeros_like(nats)
        noise = None
        if "noise" in config.forecast.inputs:
            posterior = {"exact": gumbel.posterior_noise, "literal": gumbel.posterior_noise_literal}
            noise = posterior[config.forecast.posterior](noise_keys, jax.lax.stop_gradient(logits), x)
        inputs = modules.module_inputs(config.forecast, x, noise, grid.values)
        seen = h if config.forecast.gradient_to_arm else jax.lax.stop_gradient(h)
        return nats, modules.divergence(logits, modules.whole(params["modules"], grid, seen, inputs))

    def parts(nats: Array, divergence: Array) -> dict[str, Array]:
        if field == "image":
            values = {"bits_per_dim": likelihood.bits_per_dim(nats, dims), "nats": nats}
        else:
            values = {"nats_per_code": nats / dims, "rate_bits_per_image": likelihood.nats_to_bits(nats)}
        return values | ({"forecast_kl_nats": divergence} if has_modules else {})

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        keys = rng.per_example(rng.for_purpose(key, "dropout"), batch["position"])
        noise_keys = rng.per_example(rng.for_purpose(key, "posterior"), batch["position"])
        nats, divergence = forward(params, batch[field].astype(jnp.int32), keys, noise_keys)
        objective = (nats + config.forecast.weight * divergence).mean() / dims
        return objective, Aux(parts(nats, divergence), (), ())

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        noise_keys = rng.per_example(rng.for_purpose(key, "posterior"), batch["position"])
        return Aux(parts(*forward(params, batch[field].astype(jnp.int32), None, noise_keys)), (), ())

    return Model(init, loss, measure, lambda means, tallies: means)
