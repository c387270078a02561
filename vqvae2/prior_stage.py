"""Stages `top`, (`middle`,) `bottom`: the priors over codes, each trained alone on the codes of the training split.

Source: Razavi et al. 2019, section 3.2 and algorithm 2: log p(top) + log p(bottom | top), a rate in nats per code and
not a likelihood of the image (supplement, section E). A level is conditioned on the true codes of all coarser ones, so
no prior needs another: all of them may train at once, on as many machines.
Stage `pixels`, where a config has it: log p(image | all codes) by the same network, whose cells are then pixels; the
supplement's only road to a likelihood of the image.
Not here: the networks (`prior.py`, `conditioning.py`) and how the levels sample together (`chain.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from bitsperdim import batch_norm, data, images, rng
from bitsperdim.model import Aux, Batch, Model, Pictures, Stage
from bitsperdim.run import Run
from bitsperdim.sources import Source
from vqvae2 import autoencoder_stage, chain, codes, facts, latents
from vqvae2.config import Config
from vqvae2.prior import nll

NUM_PICTURES = 16
IDS = np.arange(NUM_PICTURES, dtype=np.int32)


def stage(config: Config, level: str) -> Stage:
    """The stage of a level's prior, or of the pixels below all levels."""
    section = config.prior(level)
    pictures = {"top": _top_pictures, chain.PIXELS: _pixel_pictures}.get(level, _lower_pictures)
    return Stage(
        level,
        needs=("autoencoder", "codes"),
        model=lambda run: make(run, level),
        source=_images_and_codes if level == chain.PIXELS else codes.open_codes,
        example=lambda run: _example(run, level),
        pictures=lambda run, mesh: pictures(run, mesh, level),
        optim=section.optim,
        settings=section.train,
    )


def _example(run: Run, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    grids = chain.shapes(run)
    levels = [level for level in grids if level != chain.PIXELS or name == chain.PIXELS]
    shapes = {level: (*grids[level], *chain.values(run, level)[1]) for level in levels}
    shapes |= {"label": ()} if facts.of_run(run).num_classes else {}
    return {field: jax.ShapeDtypeStruct(shape, jnp.int32) for field, shape in shapes.items()}


def make(run: Run, name: str) -> Model:
    """L = -log p(codes | codes above, class) / (h w), in nats per code, that is per cell of the grid.

    BatchNorm's running moments are in `extra`.
    """
    net, grids, config = chain.network(run, name), chain.shapes(run), run.config.prior(name).model
    (height, width), (num_values, cell) = grids[name], chain.values(run, name)
    unit = "nats_per_pixel" if name == chain.PIXELS else "nats_per_code"

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        shape = lambda level: (1, *grids[level], *chain.values(run, level)[1])
        empty = {level: jnp.zeros(shape(level), jnp.int32) for level in grids}
        label = jnp.zeros(1, jnp.int32)
        variables = net.init(key, empty[name], chain.upper(run, name, empty), label)
        return variables["params"], {"batch_stats": variables.get("batch_stats", {})}

    def arguments(batch: Batch) -> tuple:
        return batch[name], chain.upper(run, name, batch), batch["label"] if config.class_conditional else None

    def parts(logits: Array, batch: Batch) -> dict[str, Array]:
        nats = latents.nll(logits, batch[name], num_values) if cell else nll(logits, batch[name])
        return {unit: nats / (height * width)}

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        keys = rng.per_example(rng.for_purpose(key, "dropout"), batch["position"])
        logits, moments = net.apply(
            {"params": params, **extra}, *arguments(batch), keys, train=True, mutable=["batch_moments"]
        )
        values = parts(logits, batch)
        statistics = {"moments": moments.get("batch_moments", {}), "batches": jnp.ones(())}
        return values[unit].mean(), Aux(values, (), statistics)

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        logits = net.apply({"params": params, **extra}, *arguments(batch))
        return Aux(parts(logits, batch), (), ())  # pyright: ignore

    def update_extra(extra: PyTree, statistics: PyTree, key: Array, step: Array) -> PyTree:
        moments, batches = statistics["moments"], statistics["batches"]
        return {"batch_stats": batch_norm.update_running(extra["batch_stats"], moments, batches)}

    def summarize(means: dict[str, float], tallies: PyTree) -> dict[str, float]:
        bits = means[unit] * height * width / math.log(2.0)
        if name == chain.PIXELS:  # given codes that have bits of their own: no likelihood by itself
            per_dim = bits / (height * width * sum(cell))
            return {unit: means[unit], "bits_per_image_given_codes": bits, "bits_per_dim_given_codes": per_dim}
        return {unit: means[unit], "rate_bits_per_image": bits}

    return Model(init, loss, measure, summarize, update_extra)


def _labels(run: Run, batch: dict[str, np.ndarray], name: str) -> Array | None:
    return jnp.asarray(batch["label"]) if run.config.prior(name).model.class_conditional else None


def _held_out(run: Run) -> dict[str, np.ndarray]:
    source = codes.open_codes(run, "evaluation")
    return source.read(np.linspace(0, source.size - 1, NUM_PICTURES).astype(np.int64))


def _top_pictures(run: Run, mesh: Mesh, level: str) -> Pictures:
    """Sampled top codes, decoded without those of finer levels: layout and colour, no detail."""
    draw, decode, batch = chain.draw(run, level, mesh), _decoder(run, mesh), _held_out(run)

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        key = rng.for_purpose(key, "pictures")
        sampled, _ = draw(params, extra, key, IDS, (), _labels(run, batch, level), 1.0)
        return {"samples_top_alone": images.grid(decode({level: sampled}), levels=facts.of_run(run).levels)}

    return pictures


def _lower_pictures(run: Run, mesh: Mesh, level: str) -> Pictures:
    """Held-out images as their codes down to this level decode; below each the same with this level's codes sampled."""
    draw, decode, batch = chain.draw(run, level, mesh), _decoder(run, mesh), _held_out(run)
    coarser = run.config.levels[: run.config.levels.index(level)]
    given = {name: batch[name] for name in coarser}
    reconstructed = decode(given | {level: batch[level]})

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        above = tuple(map(jnp.asarray, chain.upper(run, level, batch)))
        key = rng.for_purpose(key, "pictures")
        sampled, _ = draw(params, extra, key, IDS, above, _labels(run, batch, level), 1.0)
        labels, shown = ("true codes", f"{level} drawn"), decode(given | {level: sampled})
        pairs = images.pairs(reconstructed, shown, levels=facts.of_run(run).levels, labels=labels)
        return {f"samples_given_{coarser[-1]}": pairs}

    return pictures


def _images_and_codes(run: Run, split: str) -> Source:
    """The codes of a split, and beside them as `pixels` the images that they were made of."""
    of_codes, of_images = codes.open_codes(run, split), data.open_source(run.config.data, split)
    read = lambda indices: of_codes.read(indices) | {chain.PIXELS: of_images.read(indices)["image"].astype(np.int32)}
    name = f"{of_images.name} and their codes"
    return of_codes._replace(name=name, shape=of_images.shape, levels=of_images.levels, read=read)


def _pixel_pictures(run: Run, mesh: Mesh, level: str) -> Pictures:
    """Held-out images, what their codes decode to, and pixels drawn given the codes."""
    draw, decode, source = chain.draw(run, level, mesh), _decoder(run, mesh), _images_and_codes(run, "evaluation")
    batch = source.read(np.linspace(0, source.size - 1, NUM_PICTURES // 2).astype(np.int64))
    decoded = decode({name: batch[name] for name in run.config.levels})

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        above = tuple(map(jnp.asarray, chain.upper(run, level, batch)))
        key, ids = rng.for_purpose(key, "pictures"), IDS[: NUM_PICTURES // 2]
        drawn, _ = draw(params, extra, key, ids, above, _labels(run, batch, level), 1.0)
        rows = [batch[level].astype(np.uint8), decoded, np.asarray(drawn).astype(np.uint8)]
        tiles = np.stack(rows, 1).reshape(-1, *source.shape)
        grid = images.grid(tiles, columns=3, levels=source.levels)
        return {"pixels_given_codes": images.labelled(grid, columns=("image", "decoded", "drawn"))}

    return pictures


def _decoder(run: Run, mesh: Mesh) -> Callable[[dict[str, Any]], np.ndarray]:
    """Codes to images by the autoencoder that the run's codes were made with."""
    state = codes.autoencoder(run, mesh)
    return functools.partial(autoencoder_stage.coder(run).decode, state["ema"], state["extra"])
