"""A trained run of an autoregressive model as functions: samples, likelihoods, codes.

Not here: the samplers (`samplers.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from arm_forecast import autoencoder_stage, codes, comparison, engine, facts, networks, pixelcnn, samplers
from arm_forecast.pixelcnn import Grid
from arm_forecast.samplers import Arm, Samples
from bitsperdim import sharding, trainer
from bitsperdim.errors import InputError
from bitsperdim.facts import check_images
from bitsperdim.model import Loaded
from bitsperdim.run import Run


def restore(run: Run, mesh: Mesh) -> Arm:
    """The run's ARM, with the modules of its last stage that trained any."""
    config = run.config
    params = trainer.restore(run, "arm", mesh)[1]["ema"]
    modules = config.arm.forecast if config.arm.forecast.modules else None
    if config.modules is not None and trainer.restored_step(run, "modules"):
        params, modules = params | {"modules": trainer.restore(run, "modules", mesh)[1]["ema"]}, config.modules.model
    grid = facts.grid(run)
    return Arm(jax.jit(lambda p: networks.prepared(p, config.arm.model, grid))(params), config.arm.model, modules, grid)


def load(run: Run, mesh: Mesh) -> Loaded:
    """What can be done with a trained run. Each stage is restored when it is first needed."""
    arm = functools.cache(lambda: restore(run, mesh))
    about, config, latent = facts.of_run(run), run.config, run.config.autoencoder is not None
    autoencoder = functools.cache(lambda: codes.autoencoder(run, mesh))

    def encode(images: UInt8[np.ndarray, "n h w c"]) -> Int[np.ndarray, "n h w l"]:
        _require_latent(latent, "encode")
        return autoencoder_stage.coder(run).encode(autoencoder()["ema"], autoencoder()["extra"], images)

    def decode(given: Int[np.ndarray, "n h w l"]) -> UInt8[np.ndarray, "n h w c"]:
        _require_latent(latent, "decode")
        return autoencoder_stage.coder(run).decode(autoencoder()["ema"], autoencoder()["extra"], given)

    def drawn(
        key: Key[Array, ""],
        n: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sampler: str = "",
        batch_size: int = 0,
        given: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        for name, value, least in (("n", n, 1), ("batch_size", batch_size, 0)):
            if value < least:
                raise InputError(f"{name} must be at least 1, not {value}")
        known = None if given is None else _given(given, n, facts.grid(run), latent)
        batch = min(n, sharding.whole_batch(batch_size or config.sampling.batch_size, mesh))
        chosen = _sampler(run, sampler, batch, arm())
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        samples = samplers.draw(
            arm(), chosen, key, n, batch, given=known, mesh=mesh if mesh.size > 1 else None, **options
        )
        x = np.asarray(samples.x).reshape(n, arm().grid.height, arm().grid.width, arm().grid.channels)
        report = {"sampler": str(chosen), "batch_size": batch, **describe(samples)}
        # How often each image's network was called, and how many of its dimensions were final after each call.
        report |= {"calls": np.asarray(samples.calls), "accepted": engine.trace(samples.call_of)}
        return (decode(x) if latent else x.astype(np.uint8)), report

    return Loaded(
        config=config,
        levels=about.levels,
        log_prob=_log_prob(run, arm, latent),
        draw=drawn,
        encode=encode,
        decode=decode,
        reconstruct=lambda images: decode(encode(images)),
        compare_samplers=functools.partial(comparison.compare, arm, about.levels, decode if latent else None),
    )


def _sampler(run: Run, name: str, batch: int, arm: Arm) -> samplers.Sampler:
    """The one that is asked for, by name or by the config."""
    of_config = run.config.sampling.sampler
    if (name or of_config) == "auto":
        return samplers.choose(run, batch, arm.grid, arm.modules is not None)
    try:
        return samplers.parse(name or of_config, arm.grid, arm.modules is not None)
    except InputError as error:
        raise error if name else InputError(f"config value sampling.sampler: {error}") from error


def describe(samples: Samples) -> dict[str, Any]:
    """Calls of the network and how safely the samples are those that any other sampler would draw.

    `smallest_margin` is None where nothing was drawn.
    """
    num_dims, margin = samples.x.shape[1], float(np.min(samples.margin))
    return {
        "network_calls": int(samples.network_calls),
        "calls_per_image": float(np.mean(samples.calls)),
        "calls_in_percent_of_dims": 100.0 * float(np.mean(samples.calls)) / num_dims,
        "smallest_margin": margin if math.isfinite(margin) else None,
        "mean_log_prob_nats": float(np.mean(samples.log_prob)),
    }


def _log_prob(run: Run, arm: Callable[[], Arm], latent: bool) -> Callable[..., Float[np.ndarray, " n"]]:
    @functools.cache
    def nats() -> Callable:
        config, grid = run.config.arm.model, arm().grid

        def evaluate(params: PyTree, x: Int[Array, "b h w c"]) -> Float[Array, " b"]:
            h = pixelcnn.hidden(params["arm"], config, grid, x)
            return -networks.nll(pixelcnn.logits(params["arm"], config, grid, h), x, config.output, grid)

        return jax.jit(evaluate)

    def log_prob(
        images: UInt8[np.ndarray, "n h w c"], key: Key[Array, ""] | None = None, samples: int = 1
    ) -> Float[np.ndarray, " n"]:
        """log P(x) in nats, exact: key and samples are not used."""
        if latent:
            raise InputError(
                "a latent run gives no likelihood of an image: its model rates the codes of a reconstruction "
                "(evaluate.py reports that rate beside the distortion)"
            )
        about = facts.of_run(run)
        images = check_images(images, about)
        size = min(max(len(images), 1), run.config.arm.train.batch_size)
        padded = np.concatenate([images, np.zeros((-len(images) % size, *about.shape), np.uint8)])
        parts = [
            nats()(arm().params, jnp.asarray(padded[i : i + size], jnp.int32)) for i in range(0, len(padded), size)
        ]
        return np.concatenate([np.zeros(0, np.float32), *map(np.asarray, parts)])[: len(images)]

    return log_prob


def _require_latent(latent: bool, what: str) -> None:
    if not latent:
        raise InputError(f"a model of pixels has no codes to {what}; runs with an autoencoder do")


def _given(given: np.ndarray, n: int, grid: Grid, latent: bool) -> Int[np.ndarray, "_ d"]:
    """Known pixels as the engine takes them; InputError where their shape or values are not those of the run."""
    if latent:
        raise InputError("given pixels mean nothing to a model of codes; give them to a run without autoencoder")
    shape, found = (grid.height, grid.width, grid.channels), np.asarray(given)
    if found.shape not in (shape, (1, *shape), (n, *shape)) or not np.issubdtype(found.dtype, np.integer):
        raise InputError(
            f"given must be integers {list(shape)} or {[n, *shape]}, -1 where free, "
            f"not {found.dtype} {list(found.shape)}"
        )
    if found.min() < -1 or found.max() >= grid.values:
        raise InputError(f"given must hold levels 0..{grid.values - 1}, or -1; found {found.min()}..{found.max()}")
    return found.astype(np.int32).reshape(-1, math.prod(shape))
