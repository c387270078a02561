"""Distributions over integer levels 0..K-1: categorical, Bernoulli, and the mixture of discretised logistics.

Source: Salimans et al. 2017 (PixelCNN++), section 2.1-2.2 and its released code, whose layout of the parameters is
kept. Level k stands for x = 2 k / (K - 1) - 1; its bin reaches half a level, w = 1 / (K - 1), to either side, and the
first and last bins reach to infinity. So the levels' probabilities sum to one, whatever K.

The public codes differ in three ways. They tell the edges by comparing floats (x < -0.999), which fails in bfloat16 and
for fewer levels. Where a bin's mass is below 1e-5 they take the density at its centre times 2 w instead, so narrow
components (scale s) lose the factor (w/s) / sinh(w/s) in their tails. Their sampler returns values between the levels.
Here edges are decided on the integers, and a bin's mass is exact in every tail:

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)),   a - b = 2 w / s.

For fewer than 8 bits the very deep VAEs also keep the distance between levels of the 8-bit image they come from, but
not the width of their bins, so that the masses do not sum to one; `published_bins` has their arithmetic, for comparison
with their figures.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

MIN_LOG_SCALE = -7.0


def categorical_log_prob(logits: Float[Array, "... k"], x: Integer[Array, "..."]) -> Float[Array, "..."]:
    """log softmax(logits)[x], in nats, float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_probs, x[..., None].astype(jnp.int32), axis=-1)[..., 0]


def bernoulli_log_prob(logits: Float[Array, "..."], x: Integer[Array, "..."]) -> Float[Array, "..."]:
    """log P(x) of x in {0, 1} with P(1) = sigmoid(logits), in nats, float32 or better."""
    logits = _real(logits)
    return jax.nn.log_sigmoid(jnp.where(x == 1, logits, -logits))


class Bins(NamedTuple):
    """Where K levels lie on the line, x = step k - 1, and what belongs to each: x - half .. x + half."""

    levels: int
    step: float
    half: float
    top_is_open: bool = True  # the last bin reaches to infinity, as the first does
    least_mass: float = 0.0  # below which a bin's mass is taken as density times width; 0: never
    density_beta: float = 1.0  # the log-scale of that density is divided by it

    def values(self, x: Integer[Array, "..."], dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "..."]:
        return x.astype(dtype) * self.step - 1.0


def bins(levels: int) -> Bins:
    """Bins that touch each other and fill the line: the masses sum to one."""
    return Bins(levels, 2.0 / (levels - 1), 1.0 / (levels - 1))


def published_bins(levels: int, top_is_open: bool, density_beta: float = 1.0) -> Bins:
    """The arithmetic of the very deep VAEs for 2**b levels: those of 8 bits, (256 / K) k / 127.5 - 1, with bins of
    half-width 1 / (K - 1), and density times width where the mass is below 1e-5.

    Below 8 bits neighbouring bins overlap, and the masses sum to more than one. Of 32 levels a logistic wider than the
    bins has 1.028, 0.04 bits a dimension; one narrower than an overlap has 2 there, a whole bit: it is certain of level
    k, and of k + 1. In Efficient-VDVAE the top level is an edge; in VDVAE, which compares it with 0.999, it is none.
    Where a scale is exp(beta u), Efficient-VDVAE forgets beta in that density: `density_beta`.
    """
    return Bins(levels, 2.0 * (256 // levels) / 255.0, 1.0 / (levels - 1), top_is_open, 1e-5, density_beta)


class LogisticMixture(NamedTuple):
    """M components over the C channels of a pixel. The mean of channel c moves with the channels before it:

    mean_c + sum over c' < c of coefs[c, c'] x_c', with x in [-1, 1].
    """

    log_weights: Float[Array, "... m"]
    means: Float[Array, "... c m"]
    log_scales: Float[Array, "... c m"]
    coefs: Float[Array, "... p m"]  # of the pairs (c, c') = (1, 0), (2, 0), (2, 1), (3, 0), ...


def mixture_outputs(channels: int, mixtures: int) -> int:
    """How many outputs of a network make a mixture: M (1 + 2 C + C (C - 1) / 2)."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def bounded_log_scale(raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """PixelCNN++: the output itself, at least -7."""
    return jnp.maximum(raw, MIN_LOG_SCALE)


def logistic_mixture(
    raw: Float[Array, "... o"], channels: int, log_scale: Callable[[Array], Array] = bounded_log_scale
) -> LogisticMixture:
    """The mixture from `mixture_outputs` outputs of a network, in float32 or better.

    [M logits] and for each channel [M means, M outputs for the scales] and, of three channels, M coefficients (tanh):
    green from red stand with red, blue from red with green, blue from green with blue. Of any other number of channels
    all coefficients stand at the end, c from c' in the order (1, 0), (2, 0), (2, 1), ...
    """
    mixtures, rest = divmod(raw.shape[-1], mixture_outputs(channels, 1))
    if rest or not mixtures:
        each = mixture_outputs(channels, 1)
        raise ValueError(f"{raw.shape[-1]} outputs do not divide into {each} for each component")
    raw = _real(raw)
    kinds = 3 if channels == 3 else 2
    end = mixtures * (1 + kinds * channels)
    by_channel = raw[..., mixtures:end].reshape(*raw.shape[:-1], channels, kinds, mixtures)
    last = by_channel[..., 2, :] if channels == 3 else raw[..., end:].reshape(*raw.shape[:-1], -1, mixtures)
    log_weights = jax.nn.log_softmax(raw[..., :mixtures])
    return LogisticMixture(log_weights, by_channel[..., 0, :], log_scale(by_channel[..., 1, :]), jnp.tanh(last))


def mixture_log_prob(mixture: LogisticMixture, x: Integer[Array, "... c"], bins: Bins) -> Float[Array, "..."]:
    """log sum_m w_m prod_c P_m(x_c | x_<c), in nats for each pixel."""
    values = bins.values(x, mixture.means.dtype)
    log_probs = [_component_log_probs(mixture, values, x, c, bins) for c in range(x.shape[-1])]
    return jax.nn.logsumexp(mixture.log_weights + sum(log_probs), axis=-1)


def discretized_logistic_mixture_log_prob(
    raw: Float[Array, "... o"], x: Integer[Array, "... c"], levels: int
) -> Float[Array, "..."]:
    """`mixture_log_prob` of a network's outputs, as PixelCNN++ reads them."""
    return mixture_log_prob(logistic_mixture(raw, x.shape[-1]), x, bins(levels))


def discretized_logistic_mixture_log_pmf(
    raw: Float[Array, "... o"], x: Integer[Array, "... c"], levels: int, channel: int
) -> Float[Array, "... k"]:
    """log P(x_c = k | x_<c) of every level k for one channel c, in nats. Of x only the channels before c are used.

    P(x_c | x_<c) = sum_m w'_m P_m(x_c | x_<c), where w'_m is proportional to w_m prod over c' < c of P_m(x_c' | x_<c').
    """
    mixture, of_levels = logistic_mixture(raw, x.shape[-1]), bins(levels)
    values = of_levels.values(x, mixture.means.dtype)
    seen = sum(_component_log_probs(mixture, values, x, c, of_levels) for c in range(channel))
    log_weights = jax.nn.log_softmax(mixture.log_weights + seen)
    every = jnp.arange(levels)[:, None]
    mean = _mean(mixture, values, channel)[..., None, :]
    log_masses = _log_mass(every, mean, mixture.log_scales[..., channel, None, :], of_levels)
    return jax.nn.logsumexp(log_weights[..., None, :] + log_masses, axis=-1)


def sample_mixture(
    mixture: LogisticMixture,
    u_mix: Float[Array, "... m"],
    u_log: Float[Array, "... c"],
    bins: Bins,
    rounds: bool = True,
    temperature: Float[Array, ""] | float = 1.0,
) -> Float[Array, "... c"]:
    """The published sampler as a function of its uniforms: m = argmax(log w - T log(-log u_mix)), then

    x_c = clip(mean_c + T s_c (log u_c - log(1 - u_c))), rounded to the nearest level before the next channel sees it
    unless `rounds` is False, as in the public codes. T = 0: the mean of the likeliest component.
    """
    chosen = jnp.argmax(mixture.log_weights - temperature * jnp.log(-jnp.log(u_mix)), axis=-1)[..., None]
    noise = temperature * (jnp.log(u_log) - jnp.log1p(-u_log))
    of_chosen = lambda t: jnp.take_along_axis(jnp.broadcast_to(t, u_mix.shape), chosen, axis=-1)[..., 0]
    values = jnp.zeros_like(noise)
    for c in range(u_log.shape[-1]):
        scale = jnp.exp(of_chosen(mixture.log_scales[..., c, :]))
        value = of_chosen(_mean(mixture, values, c)) + scale * noise[..., c]
        value = jnp.clip(value, -1.0, bins.step * (bins.levels - 1) - 1.0)
        if rounds:
            value = bins.values(jnp.round((value + 1.0) / bins.step), value.dtype)
        values = values.at[..., c].set(value)
    return values


def sample_discretized_logistic_mixture(
    raw: Float[Array, "... o"], u_mix: Float[Array, "... m"], u_log: Float[Array, "... c"], levels: int | None
) -> Float[Array, "... c"]:
    """`sample_mixture` from a network's outputs, as PixelCNN++ reads them; `levels=None` does not round."""
    mixture = logistic_mixture(raw, u_log.shape[-1])
    return sample_mixture(mixture, u_mix, u_log, bins(levels or 256), rounds=levels is not None)


def level_to_value(x: Integer[Array, "..."], levels: int) -> Float[Array, "..."]:
    """2 x / (K - 1) - 1, in [-1, 1]."""
    return bins(levels).values(x)


def value_to_level(values: Float[Array, "..."], levels: int) -> Int[Array, "..."]:
    """The nearest level to each value of [-1, 1]."""
    return jnp.clip(jnp.round((values + 1.0) * ((levels - 1) / 2.0)), 0, levels - 1).astype(jnp.int32)


def _mean(mixture: LogisticMixture, values: Float[Array, "... c"], channel: int) -> Float[Array, "... m"]:
    """The components' means of one channel given the channels before it."""
    if not channel:
        return mixture.means[..., 0, :]
    first = channel * (channel - 1) // 2
    coefs = mixture.coefs[..., first : first + channel, :]
    return mixture.means[..., channel, :] + (coefs * values[..., :channel, None]).sum(-2)


def _component_log_probs(
    mixture: LogisticMixture, values: Float[Array, "... c"], x: Integer[Array, "... c"], channel: int, bins: Bins
) -> Float[Array, "... m"]:
    """log P_m(x_c | x_<c) of every component m."""
    mean = _mean(mixture, values, channel)
    return _log_mass(x[..., channel, None], mean, mixture.log_scales[..., channel, :], bins)


def _log_mass(
    x: Integer[Array, "..."], mean: Float[Array, "..."], log_scale: Float[Array, "..."], bins: Bins
) -> Float[Array, "..."]:
    """log of a logistic's mass in the bin of level x."""
    centred, inverse = bins.values(x, mean.dtype) - mean, jnp.exp(-log_scale)
    below_top = jax.nn.log_sigmoid((centred + bins.half) * inverse)
    above_bottom = jax.nn.log_sigmoid((bins.half - centred) * inverse)
    # 1 - exp(-2 w / s) is 2 w / s where that is small; taken in logarithms, as 1 / s underflows for scales above e^87.
    ratio = 2.0 * bins.half * inverse
    is_small = ratio < 1e-6
    log_factor = jnp.log(-jnp.expm1(-jnp.where(is_small, 1.0, ratio)))
    between = below_top + above_bottom + jnp.where(is_small, math.log(2.0 * bins.half) - log_scale, log_factor)
    if bins.least_mass:
        z = centred * inverse
        log_density = jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z) - log_scale / bins.density_beta
        between = jnp.where(jnp.exp(between) > bins.least_mass, between, log_density + math.log(2.0 * bins.half))
    last = jnp.where(x == bins.levels - 1, above_bottom, between) if bins.top_is_open else between
    return jnp.where(x == 0, below_top, last)


def _real(raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """In float32, or in float64 where it is that already."""
    return raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
