"""The four ways from encoder vectors to codes, each as one record of functions, as a config names them.

Not here: their mathematics (`quantizer.py`: the codebooks that are learned; `fsq.py`;
`latents.py`, where nothing is quantised but for storage).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vqvae2 import fsq, latents, quantizer
from vqvae2.config import AutoencoderConfig
from vqvae2.quantizer import Codebook, Quantized, Statistics


class Quantizer(NamedTuple):
    """What the loss calls; `quantize` and `lookup` are part of the network."""

    init: Callable[[Key[Array, ""]], Codebook]
    quantize: Callable[[Float[Array, "k d"], Float[Array, "b h w d"]], Quantized]
    statistics: Callable[..., Statistics]  # the arguments of `quantizer.statistics`
    update: Callable[[Codebook, Statistics], Codebook]
    lookup: Callable[[Float[Array, "k d"], Int[Array, "b h w ..."]], Float[Array, "b h w d"]] = quantizer.lookup


def make(config: AutoencoderConfig) -> Quantizer:
    """By `config.quantizer`: 'ema' (Euclidean codes), 'cosine' (of unit length), 'fsq' (a constant grid), 'none'."""
    if config.quantizer == "none":
        return Quantizer(
            init=lambda key: latents.init(config.num_codes, config.code_dim),
            quantize=functools.partial(latents.quantize, config.num_codes),
            statistics=latents.statistics,
            update=functools.partial(latents.update, decay=config.codebook_decay),
            lookup=functools.partial(latents.lookup, config.num_codes),
        )
    if config.quantizer == "fsq":
        return _fsq(config.fsq_levels)
    init = functools.partial(quantizer.init, num_codes=config.num_codes, dim=config.code_dim)
    update = functools.partial(
        quantizer.update,
        decay=config.codebook_decay,
        epsilon=config.codebook_epsilon,
        revival_threshold=config.revival_threshold,
        kmeans_iterations=config.kmeans_iterations if config.codebook_init == "kmeans" else 0,
    )
    if config.quantizer == "ema":
        return Quantizer(init, quantizer.quantize, quantizer.statistics, update)
    return Quantizer(
        init=lambda key: quantizer.at_unit_length(init(key), init(key)),
        quantize=lambda embedding, z: quantizer.quantize(embedding, quantizer.unit(z)),
        statistics=lambda z, *args, **named: quantizer.statistics(quantizer.unit(z), *args, **named),
        update=lambda codebook, statistics: quantizer.at_unit_length(update(codebook, statistics), codebook),
    )


def _fsq(levels: tuple[int, ...]) -> Quantizer:
    """The constant grid stands where the others keep what they learn, so that codes are looked up alike; averages, of
    which there are none, stay 0."""
    embedding = fsq.table(levels)
    count, dim = embedding.shape
    constant = lambda: Codebook(
        jnp.asarray(embedding), jnp.zeros(count), jnp.zeros((count, dim)), jnp.zeros((), jnp.int32)
    )
    return Quantizer(
        init=lambda key: constant(),
        quantize=lambda embedding, z: fsq.quantize(levels, z),
        statistics=quantizer.statistics,
        update=lambda codebook, statistics: codebook,
    )
