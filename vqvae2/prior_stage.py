"""Stages `top` and `bottom`: the priors over codes, each trained alone on the codes of the training split.

Source: Razavi et al. 2019, section 3.2 and algorithm 2: log p(top) + log p(bottom | top), a rate in nats per code and
not a likelihood of the image (supplement, section E).
Not here: the networks (`prior.py`, `conditioning.py`) and how the levels sample together (`chain.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from bitsperdim import batch_norm, images, rng
from bitsperdim.model import Aux, Batch, Model, Pictures, Stage
from bitsperdim.run import Run
from vqvae2 import autoencoder_stage, chain, codes, facts
from vqvae2.config import BottomStageConfig, Config, TopStageConfig
from vqvae2.prior import nll

NUM_PICTURES = 16


def top(config: Config) -> Stage:
    return _stage("top", config.top, _top_pictures)


def bottom(config: Config) -> Stage:
    """Conditioned on the true top codes, so it needs no top prior: both may train at once, on two machines."""
    return _stage("bottom", config.bottom, _bottom_pictures)


def _stage(name: str, config: TopStageConfig | BottomStageConfig, pictures: Callable[[Run, Mesh], Pictures]) -> Stage:
    return Stage(
        name,
        needs=("autoencoder", "codes"),
        model=lambda run: make(run, name),
        source=codes.open_codes,
        pictures=pictures,
        optim=config.optim,
        settings=config.train,
    )


def make(run: Run, name: str) -> Model:
    """L = -log p(codes | codes above, class) / (h w), in nats per code; BatchNorm's running moments are in `extra`."""
    net, grids, config = chain.network(run, name), chain.grids(run), getattr(run.config, name).model
    height, width = grids[name]

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        empty = {level: jnp.zeros((1, *grid), jnp.int32) for level, grid in grids.items()}
        label = jnp.zeros(1, jnp.int32)
        variables = net.init(key, empty[name], chain.upper(run, name, empty), label)
        return variables["params"], {"batch_stats": variables.get("batch_stats", {})}

    def arguments(batch: Batch) -> tuple:
        return batch[name], chain.upper(run, name, batch), batch["label"] if config.class_conditional else None

    def parts(logits: Array, batch: Batch) -> dict[str, Array]:
        return {"nats_per_code": nll(logits, batch[name]) / (height * width)}

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        keys = rng.per_example(rng.for_purpose(key, "dropout"), batch["position"])
        logits, moments = net.apply(
            {"params": params, **extra}, *arguments(batch), keys, train=True, mutable=["batch_moments"]
        )
        values = parts(logits, batch)
        statistics = {"moments": moments.get("batch_moments", {}), "batches": jnp.ones(())}
        return values["nats_per_code"].mean(), Aux(values, (), statistics)

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        logits = net.apply({"params": params, **extra}, *arguments(batch))
        return Aux(parts(logits, batch), (), ())  # pyright: ignore

    def update_extra(extra: PyTree, statistics: PyTree, key: Array, step: Array) -> PyTree:
        moments, batches = statistics["moments"], statistics["batches"]
        return {"batch_stats": batch_norm.update_running(extra["batch_stats"], moments, batches)}

    def summarize(means: dict[str, float], tallies: PyTree) -> dict[str, float]:
        bits = means["nats_per_code"] * height * width / math.log(2.0)
        return {"nats_per_code": means["nats_per_code"], "rate_bits_per_image": bits}

    return Model(init, loss, measure, summarize, update_extra)


def _keys(key: Key[Array, ""]) -> Key[Array, " b"]:
    return rng.per_example(rng.for_purpose(key, "pictures"), jnp.arange(NUM_PICTURES))


def _labels(run: Run, batch: dict[str, np.ndarray], name: str) -> Array | None:
    return jnp.asarray(batch["label"]) if getattr(run.config, name).model.class_conditional else None


def _held_out(run: Run) -> dict[str, np.ndarray]:
    source = codes.open_codes(run, "evaluation")
    return source.read(np.linspace(0, source.size - 1, NUM_PICTURES).astype(np.int64))


def _top_pictures(run: Run, mesh: Mesh) -> Pictures:
    """Sampled top codes, decoded without bottom codes: layout and colour, no detail."""
    draw, decode, batch = chain.draw(run, "top"), _decoder(run, mesh), _held_out(run)

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        sampled = draw(params, extra, _keys(key), (), _labels(run, batch, "top"), jnp.float32(1.0))
        return {"samples_top_alone": images.grid(decode({"top": sampled}), levels=facts.of_run(run).levels)}

    return pictures


def _bottom_pictures(run: Run, mesh: Mesh) -> Pictures:
    """Held-out images as their codes decode, above the same top codes with sampled bottom codes."""
    draw, decode, batch = chain.draw(run, "bottom"), _decoder(run, mesh), _held_out(run)
    reconstructed = decode({level: batch[level] for level in chain.grids(run)})

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        above = tuple(map(jnp.asarray, chain.upper(run, "bottom", batch)))
        sampled = draw(params, extra, _keys(key), above, _labels(run, batch, "bottom"), jnp.float32(1.0))
        resampled = decode({"top": above[0], "bottom": sampled})
        return {"samples_given_top": images.pairs(reconstructed, resampled, levels=facts.of_run(run).levels)}

    return pictures


def _decoder(run: Run, mesh: Mesh) -> Callable[[dict[str, Any]], np.ndarray]:
    """Codes to images by the autoencoder that the run's codes were made with."""
    state = codes.autoencoder(run, mesh)
    return functools.partial(autoencoder_stage.coder(run).decode, state["ema"], state["extra"])
