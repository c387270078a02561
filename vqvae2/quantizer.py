"""The vector quantiser of VQ-VAE-2 and its codebook, learned by debiased exponential moving averages.

Source: van den Oord et al. 2017, section 3.2 and appendix A.1; Razavi et al. 2019, section 3.1; codes of unit length:
Yu et al. 2022 (ViT-VQGAN), section 3.2, where they are learned by gradients, not by averages. The averages are
debiased by 1 - decay^t as in DeepMind's code. Without that, the rule of most PyTorch ports, a code that the first
batch does not hit jumps to some 1e5 times its size and hardly any code is used for a thousand steps.
Not here: the commitment loss that is built from `squared_error`, and where codebooks are kept between steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

HIGHEST = jax.lax.Precision.HIGHEST
UNIT_FLOOR = 1e-6  # vectors shorter than this are not brought to unit length; so no gradient exceeds its inverse


class Codebook(NamedTuple):
    """The codebook of one level: e_k, and the raw (not debiased) averages N_k and M_k after `updates` updates."""

    embedding: Float[Array, "k d"]
    ema_counts: Float[Array, " k"]
    ema_sums: Float[Array, "k d"]
    updates: Int[Array, ""]


class Quantized(NamedTuple):
    """What `quantize` makes of encoder vectors: z + sg(e - z), the codes, and mean |sg(e) - z|^2 of each example."""

    straight_through: Float[Array, "b h w d"]
    codes: Int[Array, "b h w"]
    squared_error: Float[Array, " b"]


class Statistics(NamedTuple):
    """What one update needs of a batch. Each field is a sum over examples: add those of shards and micro-batches."""

    counts: Float[Array, " k"]
    sums: Float[Array, "k d"]
    candidates: Float[Array, "k d"]


def init(key: Key[Array, ""], num_codes: int, dim: int) -> Codebook:
    """Codes uniform in +-sqrt(3 / dim), that is of unit expected squared length; both averages at zero."""
    bound = (3.0 / dim) ** 0.5
    embedding = jax.random.uniform(key, (num_codes, dim), minval=-bound, maxval=bound)
    return Codebook(embedding, jnp.zeros(num_codes), jnp.zeros((num_codes, dim)), jnp.zeros((), jnp.int32))


def lookup(embedding: Float[Array, "k d"], codes: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
    """The vector e_k of every code."""
    return jnp.take(embedding, codes, axis=0)


def quantize(embedding: Float[Array, "k d"], z: Float[Array, "b h w d"]) -> Quantized:
    """code = argmin_k |z - e_k|^2 (the first on a tie); output z + sg(e - z), so that d output / d z is the identity.

    In float32 and at full matmul precision whatever `z` comes in: rounding flips codes. `squared_error` is the mean
    over cells and channels, differentiable in `z` alone; the commitment loss is beta times its mean over examples.
    """
    z = z.astype(jnp.float32)
    embedding = jax.lax.stop_gradient(embedding.astype(jnp.float32))
    # |z|^2 is the same for every code: leaving it out changes no argmin and keeps the digits that decide it.
    products = jnp.einsum("bhwd,kd->bhwk", jax.lax.stop_gradient(z), embedding, precision=HIGHEST)
    codes = jnp.argmin(jnp.square(embedding).sum(-1) - 2.0 * products, axis=-1).astype(jnp.int32)
    nearest = lookup(embedding, codes)
    squared_error = jnp.square(nearest - z).mean((1, 2, 3))
    return Quantized(z + jax.lax.stop_gradient(nearest - z), codes, squared_error)


def statistics(
    z: Float[Array, "b h w d"],
    codes: Int[Array, "b h w"],
    *,
    num_codes: int,
    key: Key[Array, ""],
    position: Int[Array, " b"],
    global_batch: int,
) -> Statistics:
    """Hits n_k, vector sums s_k = sum of z over the cells with code k, and one candidate vector for every code.

    The candidate of code k is the encoder vector at a random cell of a random example of the *global* batch. All
    shards and micro-batches draw the same choice from the same `key`; the one that holds the chosen example, known by
    its `position` in the global batch, contributes the vector and the others contribute zero.
    """
    # Statistics are data, not a path for gradients.
    z = jax.lax.stop_gradient(z.astype(jnp.float32))
    # A product with one-hot codes, not a scatter-add: it partitions over devices and adds in a fixed order on a GPU.
    hits = jax.nn.one_hot(codes, num_codes, dtype=jnp.float32)
    sums = jnp.einsum("bhwk,bhwd->kd", hits, z, precision=HIGHEST)
    return Statistics(hits.sum((0, 1, 2)), sums, _candidates(z, num_codes, key, position, global_batch))


def _candidates(
    z: Float[Array, "b h w d"], num_codes: int, key: Key[Array, ""], position: Int[Array, " b"], global_batch: int
) -> Float[Array, "k d"]:
    batch, height, width, dim = z.shape
    key_example, key_cell = jax.random.split(key)
    example = jax.random.randint(key_example, (num_codes,), 0, global_batch)
    cell = jax.random.randint(key_cell, (num_codes,), 0, height * width)
    vectors = jnp.take(z.reshape(batch, height * width, dim), cell, axis=1)
    chosen = position[:, None] == example[None, :]
    return jnp.where(chosen[..., None], vectors, 0.0).sum(0)


def unit(z: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """z / max(|z|, 1e-6), in float32. The zero vector stays zero, and gradients grow at most a millionfold.

    Among codes of unit length the nearest one to unit(z) is that of the largest cosine, and `quantize` finds it.
    """
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), UNIT_FLOOR**2))


def at_unit_length(codebook: Codebook, before: Codebook) -> Codebook:
    """e_k <- M_k / |M_k|, the direction of the hits (spherical k-means); where that is zero e_k stays as before."""
    is_zero = jnp.square(codebook.embedding).sum(-1, keepdims=True) == 0
    return codebook._replace(embedding=jnp.where(is_zero, before.embedding, unit(codebook.embedding)))


def update(
    codebook: Codebook,
    statistics: Statistics,
    *,
    decay: float,
    epsilon: float,
    revival_threshold: float,
    kmeans_iterations: int = 0,
) -> Codebook:
    """One step of the averages, new codes from them, then revival of the dead. To be called after the forward pass.

    With t the number of updates including this one and c_t = 1 - decay^t (0 < decay < 1):

        N <- decay N + (1 - decay) n,   M <- decay M + (1 - decay) s
        N^ = N / c_t,   N~_k = (N^_k + epsilon) / (sum N^ + K epsilon) sum N^,   e_k = (M_k / c_t) / N~_k

    Revival. `revival_threshold` is a fraction of the fair share n_bar = sum_k n_k / K, the hits of every code if all
    were used alike; so it means the same for any batch, grid and K. Code k is dead when N^_k < revival_threshold
    n_bar. It becomes its candidate vector in all three buffers, so that e = M / N goes on to hold:

        e_k <- candidate_k,   N_k <- revival_threshold n_bar c_{t+g} / decay^g,   M_k <- N_k candidate_k

    with g = 1 / (1 - decay), the time constant of the averages. That count is the one for which a code that is never
    hit stays put and is declared dead again after g further updates, at any t; and it is small (about e times the
    threshold, in the raw buffer), so that a code that is hit soon follows its hits. Two slots may draw the same
    vector: the first wins every tie and the second is drawn again g updates later. `revival_threshold=0` turns revival
    off: the paper's rule.

    k-means start. Before each of the first `kmeans_iterations` updates N and M are set to zero, and t counts from the
    last of them. The debiased first update is e_k = s_k / n_k, a Lloyd iteration on the vectors of the global batch;
    so this is k-means over the first batches, one iteration on each, with encoder vectors for codes that nothing hits
    (also without revival). A pass of its own over the data before training would see the same untrained encoder, and
    would need another program and a state to resume from. These codes are those of an encoder that has begun to learn,
    they are the same on any devices, and a run stopped within them goes on as if it had not been.
    """
    t = codebook.updates + 1
    starting = t <= kmeans_iterations
    kept = jnp.where(starting, 0.0, decay)
    age = jnp.maximum(t - max(kmeans_iterations - 1, 0), 1)
    counts = kept * codebook.ema_counts + (1.0 - decay) * statistics.counts
    sums = kept * codebook.ema_sums + (1.0 - decay) * statistics.sums
    debiased = counts / _bias(decay, age)
    total, num_codes = debiased.sum(), debiased.shape[0]
    smoothed = (debiased + epsilon) / (total + num_codes * epsilon) * total
    embedding = sums / _bias(decay, age) / smoothed[:, None]

    threshold = revival_threshold * statistics.counts.mean()
    grace = 1.0 / (1.0 - decay)
    revived_count = threshold * _bias(decay, age + grace) / decay**grace
    dead = (debiased < threshold) | (starting & (statistics.counts == 0))
    return Codebook(
        embedding=jnp.where(dead[:, None], statistics.candidates, embedding),
        ema_counts=jnp.where(dead, revived_count, counts),
        ema_sums=jnp.where(dead[:, None], revived_count * statistics.candidates, sums),
        updates=t,
    )


def _bias(decay: float, t: Int[Array, ""] | Float[Array, ""]) -> Float[Array, ""]:
    """1 - decay^t, without the cancellation that costs digits in the first steps."""
    return -jnp.expm1(t * jnp.log(decay))


def mean_vector(codebook: Codebook) -> Float[Array, " d"]:
    """The mean of all encoder vectors, sum_k M_k / sum_k N_k; zero where there are no averages."""
    return codebook.ema_sums.sum(0) / jnp.maximum(codebook.ema_counts.sum(), 1e-20)


def perplexity(counts: Float[Array, " k"]) -> Float[Array, ""]:
    """exp(-sum_k p_k log(p_k + 1e-10)), p = counts / sum counts: the effective number of codes in use, 1 to K."""
    p = counts / counts.sum()
    return jnp.exp(-(p * jnp.log(p + 1e-10)).sum())


def codes_in_use(counts: Float[Array, " k"]) -> Int[Array, ""]:
    """How many codes were hit at all."""
    return (counts > 0).sum()
