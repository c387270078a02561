"""The chain of a whole run: top codes, bottom codes given them, the image that both stand for.

Source: Razavi et al. 2019, algorithm 2. Not here: training the parts (`autoencoder_stage.py`, `prior_stage.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from bitsperdim import dequantize, rng, trainer
from bitsperdim.errors import InputError
from bitsperdim.run import Run
from vqvae2 import autoencoder_stage, codes, facts, sampling
from vqvae2.autoencoder import level_names
from vqvae2.conditioning import Conditioner, ConditioningStack
from vqvae2.config import ConditionedPriorConfig
from vqvae2.prior import PixelSnail, Prior

Draw = Callable[..., Int[Array, "b h w"]]
BATCH = 64  # samples drawn at once


def network(run: Run, name: str) -> Prior:
    """The prior of a level. Raises InputError where classes are asked of data that have none."""
    config, about = getattr(run.config, name).model, facts.of_run(run)
    if config.class_conditional and not about.num_classes:
        raise InputError(f"{name}.model.class_conditional=True, but the images have no labels")
    num_codes = run.config.autoencoder.model.num_codes
    pixel_snail = PixelSnail(
        num_codes=num_codes,
        embedding=config.embedding,
        hidden=config.hidden,
        residual=config.residual,
        layers=config.layers,
        kernel=config.kernel,
        activation=config.activation,
        attention_every=config.attention_every,
        attention_heads=config.attention_heads,
        attention_features=config.attention_features,
        output_layers=config.output_layers,
        dropout=config.dropout,
        num_classes=about.num_classes if config.class_conditional else 0,
    )
    if not isinstance(config, ConditionedPriorConfig):
        return Prior(pixel_snail)
    shape = config.conditioning
    stack = ConditioningStack(shape.blocks, shape.widths, shape.bottlenecks, shape.norm)
    grid = grids(run)
    octaves = (grid[name][0] // grid[_above(name)][0]).bit_length() - 1
    return Prior(pixel_snail, Conditioner(num_codes, config.embedding, stack, octaves))


def grids(run: Run) -> dict[str, tuple[int, int]]:
    """Height and width of every level's codes, top first."""
    strides = run.config.autoencoder.model.strides
    return facts.of_run(run).grids(strides, level_names(len(strides)))


def upper(run: Run, name: str, batch: dict[str, Any]) -> tuple[Any, ...]:
    """The codes above level `name`, coarsest first."""
    levels = list(grids(run))
    return tuple(batch[level] for level in levels[: levels.index(name)])


def draw(run: Run, name: str) -> Draw:
    """(params, extra, example keys, codes above, labels, temperature) -> codes of level `name`, compiled.

    An example's codes depend on its own key alone, not on the batch. The conditioning stack runs once.
    """
    net, (height, width) = network(run, name), grids(run)[name]

    @jax.jit
    def sample(
        params: PyTree,
        extra: PyTree,
        keys: Key[Array, " b"],
        above: tuple[Int[Array, "b hl wl"], ...],
        label: Int[Array, " b"] | None,
        temperature: Float[Array, ""],
    ) -> Int[Array, "b h w"]:
        variables = {"params": params, **extra}
        condition = net.apply(variables, above, method="condition")
        logits = lambda grid: net.apply(variables, grid, condition, label, method="logits")
        keys = jax.vmap(lambda key: rng.for_purpose(key, name))(keys)
        noise = sampling.gumbel_noise(keys, net.network.num_codes)
        return sampling.sample_codes(logits, noise, (len(keys), height, width), temperature)  # pyright: ignore

    return sample


def decoder(run: Run, state: PyTree) -> Callable[[dict[str, Array]], UInt8[np.ndarray, "b h w c"]]:
    """Codes of all levels -> pictures, 0 ... 255.

    Of levels that are not given the codes' mean vector is taken: the picture then shows what the given ones know.
    """
    about, config = facts.of_run(run), run.config.autoencoder.model
    net = autoencoder_stage.network(config, about)

    @jax.jit
    def decode(params: PyTree, codebooks: PyTree, given: dict[str, Array]) -> Array:
        tables = autoencoder_stage.embeddings(codebooks)
        batch = len(next(iter(given.values())))
        for level, grid in grids(run).items():
            if level not in given:
                mean = codebooks[level].ema_sums.sum(0) / codebooks[level].ema_counts.sum()
                tables[level] = jnp.broadcast_to(mean, tables[level].shape)
                given = given | {level: jnp.zeros((batch, *grid), jnp.int32)}
        x = net.apply({"params": params}, given, tables, method="decode")
        return autoencoder_stage.to_picture(x, about.levels)  # pyright: ignore

    def pictures(given: dict[str, Array]) -> UInt8[np.ndarray, "b h w c"]:
        return dequantize.to_uint8(np.asarray(decode(state["ema"], state["extra"]["codebooks"], given)), about.levels)

    return pictures


def sampler(run: Run, mesh: Mesh) -> Callable[..., tuple[UInt8[np.ndarray, "n h w c"], dict[str, Any]]]:
    """sample(key, count, temperature, label) -> pictures 0 ... 255, and what drawing them took.

    Raises InputError where a stage has no checkpoint, or a label does not fit.
    """
    trained = {name: trainer.restore(run, name, mesh)[1] for name in grids(run)}
    draws = {name: draw(run, name) for name in grids(run)}
    decode = decoder(run, codes.autoencoder(run, mesh))

    def some(keys: Key[Array, " b"], label: Array | None, temperature: float) -> np.ndarray:
        drawn: dict[str, Array] = {}
        for name, state in trained.items():
            above = upper(run, name, drawn)
            drawn[name] = draws[name](state["ema"], state["extra"], keys, above, label, jnp.float32(temperature))
        return decode(drawn)

    def sample(key: Key[Array, ""], count: int, temperature: float = 1.0, label: int | None = None):
        labels = _labels(run, count, label)
        keys = rng.per_example(key, jnp.arange(count))
        report = trainer.progress("samples", count)
        pictures = []
        for start in range(0, count, BATCH):
            part = slice(start, min(start + BATCH, count))
            pictures.append(some(keys[part], None if labels is None else labels[part], temperature))
            report(part.stop)
        calls = {name: height * width for name, (height, width) in grids(run).items()}
        return np.concatenate(pictures), {"network_calls_per_batch": calls, "batch": min(count, BATCH)}

    return sample


def _labels(run: Run, count: int, label: int | None) -> Array | None:
    """The wanted class for every sample, or all classes in turn; None for priors without classes."""
    conditional = any(getattr(run.config, name).model.class_conditional for name in grids(run))
    if not conditional:
        if label is not None:
            raise InputError(f"--label={label}, but the priors of {run.workdir} were trained without classes")
        return None
    num_classes = facts.of_run(run).num_classes
    if label is not None and not 0 <= label < num_classes:
        raise InputError(f"--label must lie in 0..{num_classes - 1}, not {label}")
    return jnp.arange(count, dtype=jnp.int32) % num_classes if label is None else jnp.full(count, label, jnp.int32)


def _above(name: str) -> str:
    return {"bottom": "top"}[name]
