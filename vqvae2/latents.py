"""Unregularised latents: no quantiser in training, equal bins for what is stored and modelled.

The ablation of Razavi et al. 2019, supplement B.1 (table 5): the encoder's vectors go to the decoder as they are. To
store them and to give them a probability each channel is divided into K bins that touch each other, over its running
mean +- 4 running deviations (the first and last reach to infinity); bin k stands for its centre. "VQ row" and this one
then have the same unit, bits of a discrete code, but the number is that of the bins: half their width, a bit more for
every channel of every cell. The paper does not give its bins; 256 of them make 8 bits a channel at most, and its rows
lie between 3.0 and 4.5.
Not here: the mixture of logistics that models them (`bitsperdim/distributions.py`), and the network (`prior.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bitsperdim import distributions, rng
from vqvae2.quantizer import Codebook, Quantized, Statistics

SPREAD = 4.0  # deviations on either side of the mean that the bins cover


def init(num_bins: int, dim: int) -> Codebook:
    """Mean 0 and deviation 1 of every channel, until there are averages. `embedding`: [2, d], means and deviations."""
    embedding = jnp.stack([jnp.zeros(dim), jnp.ones(dim)])
    return Codebook(embedding, jnp.zeros(num_bins), jnp.zeros((2, dim)), jnp.zeros((), jnp.int32))


def quantize(num_bins: int, embedding: Float[Array, "2 d"], z: Float[Array, "b h w d"]) -> Quantized:
    """z itself, and the bins of its channels, int32 [b, h, w, d]: round((z - mean) / (4 deviation)) on K levels."""
    z = z.astype(jnp.float32)
    mean, deviation = jax.lax.stop_gradient(embedding)
    bins = distributions.value_to_level((jax.lax.stop_gradient(z) - mean) / (SPREAD * deviation), num_bins)
    return Quantized(z, bins, jnp.zeros(len(z)))


def lookup(num_bins: int, embedding: Float[Array, "2 d"], bins: Int[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """The centres of bins."""
    mean, deviation = embedding
    return mean + SPREAD * deviation * distributions.level_to_value(bins, num_bins)


def beyond(embedding: Float[Array, "2 d"], z: Float[Array, "b h w d"]) -> Float[Array, " b"]:
    """The share of values that lie farther out than the bins, and so are cut off when they are stored."""
    mean, deviation = embedding
    return (jnp.abs(z.astype(jnp.float32) - mean) > SPREAD * deviation).mean((1, 2, 3), dtype=jnp.float32)


def statistics(
    z: Float[Array, "b h w d"],
    bins: Int[Array, "b h w d"],
    *,
    num_codes: int,
    key: Key[Array, ""],
    position: Int[Array, " b"],
    global_batch: int,
) -> Statistics:
    """Hits of every bin, and [sum z, sum z^2] of every channel; nothing is revived."""
    z = jax.lax.stop_gradient(z.astype(jnp.float32))
    sums = jnp.stack([z.sum((0, 1, 2)), jnp.square(z).sum((0, 1, 2))])
    hits = jnp.bincount(bins.ravel(), length=num_codes).astype(jnp.float32)
    return Statistics(hits, sums, jnp.zeros((0, z.shape[-1])))


def update(codebook: Codebook, statistics: Statistics, *, decay: float) -> Codebook:
    """Means and deviations from running sums; both sums have the same bias, so their ratio has none."""
    counts = decay * codebook.ema_counts + (1.0 - decay) * statistics.counts
    sums = decay * codebook.ema_sums + (1.0 - decay) * statistics.sums
    mean, square = sums * (sums.shape[1] / counts.sum())
    deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-12))
    return Codebook(jnp.stack([mean, deviation]), counts, sums, codebook.updates + 1)


def nll(raw: Float[Array, "b h w o"], bins: Int[Array, "b h w d"], num_bins: int) -> Float[Array, " b"]:
    """-sum over cells of log P(bins of the cell), in nats per example."""
    return -distributions.discretized_logistic_mixture_log_prob(raw, bins, num_bins).sum((1, 2))


def uniforms(
    key: Key[Array, ""], ids: Int[Array, " b"], mixtures: int, dim: int
) -> Callable[[Int[Array, ""]], tuple[Float[Array, "b m"], Float[Array, "b d"]]]:
    """noise(position): the uniforms of one cell's draw, a function of (key, sample, raster position) alone."""
    keys = rng.per_example(rng.for_purpose(key, "logistic"), ids)

    def of_example(key: Key[Array, ""], position: Int[Array, ""]) -> tuple[Array, Array]:
        u = jax.random.uniform(jax.random.fold_in(key, position), (mixtures + dim,), minval=jnp.finfo(jnp.float32).tiny)
        return u[:mixtures], u[mixtures:]

    return lambda position: jax.vmap(of_example, (0, None))(keys, position)


def choose(num_bins: int) -> Callable[..., Int[Array, "b d"]]:
    """(outputs of a cell, its uniforms, temperature T, ...) -> its bins, channel after channel.

    T multiplies the noise of the choice of a component, and that of the logistic; 0 gives the mean of the likeliest.
    """

    def of_cell(raw, noise, temperature, top_k=0, top_p=1.0):
        u_mix, u_log = noise
        # -log(-log u) and logit u times T, as uniforms again.
        u_mix = jnp.exp(-jnp.power(-jnp.log(u_mix), temperature))
        u_log = jax.nn.sigmoid(temperature * (jnp.log(u_log) - jnp.log1p(-u_log)))
        values = distributions.sample_discretized_logistic_mixture(raw, u_mix, u_log, num_bins)
        return distributions.value_to_level(values, num_bins)

    return of_cell
