"""Gumbel noise: counter-based draws, the scores whose maximum is the sample, and the noise behind a given sample.

    x = argmax_k(mu_k + eps_k), eps_k ~ Gumbel(0, 1), is a draw from softmax(mu).

Source: Wiggers & Hoogeboom 2020, supplement B, with its eq. (3) corrected (`posterior_noise`); Maddison et al. 2014.
Not here: how few network calls a sample takes (`engine.py`).
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from bitsperdim import rng
from bitsperdim.errors import InputError


class Noise(Protocol):
    """eps of dimensions `dims` (the same for all lanes, or each lane's own) of the samples `ids`.

    With `call`, a number for each lane, the noise of that call alone: independent of that of every other.
    """

    def __call__(
        self, ids: Int[Array, " b"], dims: Int[Array, " w"] | Int[Array, "b w"], call: Int[Array, " b"] | None = None
    ) -> Float[Array, "b w k"]: ...


def noise(key: Key[Array, ""], num_values: int) -> Noise:
    """Standard Gumbel variables as a function of (key, sample, dimension, value) and of nothing else.

    So a sample depends neither on its batch, nor on its lane, nor on the window that is evaluated. They are float32
    with 46 random bits each, so that the upper tail reaches 32: the default of `jax.random.gumbel` ends at 16, and
    values less likely than 1e-7 would never be drawn. That costs 1.4 to 2.3 times the default, a few per cent of a
    forward pass of the full 8-bit model on a CPU core.
    """

    def draw(key: Key[Array, ""], dim: Int[Array, ""]) -> Float[Array, " k"]:
        return jax.random.gumbel(jax.random.fold_in(key, dim), (num_values,), jnp.float32, mode="high")

    def at(
        ids: Int[Array, " b"], dims: Int[Array, " w"] | Int[Array, "b w"], call: Int[Array, " b"] | None = None
    ) -> Float[Array, "b w k"]:
        if call is None:
            keys = rng.per_example(rng.for_purpose(key, "gumbel"), ids)
        else:
            keys = rng.per_example(rng.for_purpose(key, "fresh gumbel"), ids)
            keys = jax.vmap(jax.random.fold_in)(keys, call)
        dims = jnp.broadcast_to(dims, (len(ids), dims.shape[-1]))
        return jax.vmap(jax.vmap(draw, (None, 0)))(keys, dims)

    return at


def gumbel_argmax(logits: Float[Array, "... k"], eps: Float[Array, "... k"]) -> Int[Array, "..."]:
    """argmax_k(mu_k + eps_k), a draw from softmax(mu); among equals the first."""
    return (logits + eps).argmax(-1).astype(jnp.int32)


# --- Scores: temperature, top-k and nucleus sampling -----------------------------------------------------------------


def check_options(temperature: float | Array, top_k: int, top_p: float) -> None:
    """Raises InputError for a temperature, top_k or top_p that no distribution has. Traced values pass."""
    if not isinstance(temperature, Tracer) and not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature must be a finite number of at least 0 (0: greedy), not {temperature}")
    if top_k < 0 or top_k != int(top_k):
        raise InputError(f"top_k must be a whole number of at least 1, or 0 for all values, not {top_k}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1 (1: all values), not {top_p}")


def restrict(
    logits: Float[Array, "... k"], temperature: Float[Array, ""] | float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "... k"]:
    """-inf for what is not among the `top_k` likeliest values, then not in their nucleus at this temperature.

    The nucleus is the smallest set of likeliest values with at least `top_p` of the mass of softmax(mu / T), after
    top-k has been applied and renormalised. It holds at least one value. Of equal logits the first goes in first, as
    in argmax, so that top_k = 1 is greedy at any temperature. top_k = 0, top_k >= K and top_p = 1 change nothing.
    """
    num_values = logits.shape[-1]
    if not 0 < top_k < num_values and top_p >= 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    kept = jnp.broadcast_to(jnp.arange(num_values) < (top_k or num_values), ordered.shape)
    if top_p < 1:
        # Relative to the maximum, so that the quotient cannot overflow; a nucleus at T = 0 is the maximum alone.
        relative = (ordered - ordered[..., :1]) / jnp.maximum(temperature, 1e-6)
        mass = jnp.cumsum(jax.nn.softmax(jnp.where(kept, relative, -jnp.inf)), -1)
        before = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(1, 0)])[..., :-1]
        kept &= before < top_p
    return jnp.where(_largest(logits, ordered, kept.sum(-1, keepdims=True)), logits, -jnp.inf)


def _largest(
    logits: Float[Array, "... k"], ordered: Float[Array, "... k"], count: Int[Array, "... 1"]
) -> Bool[Array, "... k"]:
    """Where the `count` largest are; of those equal to the smallest of them, the first ones."""
    threshold = jnp.take_along_axis(ordered, count - 1, -1)
    above, equal = logits > threshold, logits == threshold
    return above | (equal & (jnp.cumsum(equal, -1) <= count - above.sum(-1, keepdims=True)))


def scores(
    logits: Float[Array, "... k"],
    eps: Float[Array, "... k"],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Float[Array, "... k"]:
    """mu_k + T eps_k over the values that `restrict` leaves: the argmax is a draw from softmax(mu / T) among them.

    T = 0 is greedy; nothing is divided by T. The noise must be finite.
    """
    return restrict(logits, temperature, top_k, top_p) + temperature * eps


# --- Posterior noise: eps given x -------------------------------------------------------------------------------------


def truncated_gumbel(
    location: Float[Array, "..."], standard: Float[Array, "..."], bound: Float[Array, "..."]
) -> Float[Array, "..."]:
    """-log(exp(-b) + exp(-(mu + g))): from g ~ Gumbel(0) a draw from Gumbel(mu) given that it is below b."""
    a = location + standard
    return jnp.minimum(a, bound) - jnp.log1p(jnp.exp(-jnp.abs(a - bound)))


def posterior_noise(
    keys: Key[Array, " b"], logits: Float[Array, "b *dims k"], x: Int[Array, "b *dims"]
) -> Float[Array, "b *dims k"]:
    """eps ~ p(eps | x) of argmax_k(mu_k + eps_k) = x, from one key per example; exact.

    The maximum and its place are independent, and the maximum is Gumbel(logsumexp mu): see `exact_posterior`.
    """
    return exact_posterior(_standard(keys, logits), logits, x)


def posterior_noise_literal(
    keys: Key[Array, " b"], logits: Float[Array, "b *dims k"], x: Int[Array, "b *dims"]
) -> Float[Array, "b *dims k"]:
    """The noise as the supplement's eq. (3) has it when read literally: eps_x ~ Gumbel(0).

    It reproduces x, but its law is not the posterior: averaged over x ~ softmax(mu) it is not Gumbel. For comparison.
    """
    return literal_posterior(_standard(keys, logits), logits, x)


def exact_posterior(
    standard: Float[Array, "... k"], logits: Float[Array, "... k"], x: Int[Array, "..."]
) -> Float[Array, "... k"]:
    """Posterior noise from standard Gumbels g:

    m = logsumexp(mu) + g_x,   eps_x = m - mu_x,   mu_c + eps_c = Gumbel(mu_c) truncated at m   for c != x.
    """
    logits = logits.astype(standard.dtype)
    return _below(standard, logits, x, jax.nn.logsumexp(logits, -1, keepdims=True) + _at(standard, x))


def literal_posterior(
    standard: Float[Array, "... k"], logits: Float[Array, "... k"], x: Int[Array, "..."]
) -> Float[Array, "... k"]:
    """The same with m = mu_x + g_x: eq. (3) and (4) of the supplement, read literally. Not the posterior."""
    logits = logits.astype(standard.dtype)
    return _below(standard, logits, x, _at(logits, x) + _at(standard, x))


def _below(
    standard: Float[Array, "... k"], logits: Float[Array, "... k"], x: Int[Array, "..."], top: Float[Array, "... 1"]
) -> Float[Array, "... k"]:
    """Noise whose largest score is `top`, at x."""
    # g - softplus(mu + g - m) is the truncated Gumbel less mu, without adding and subtracting a large mu.
    eps = standard - jax.nn.softplus(logits + standard - top)
    at_x = top - _at(logits, x)
    # A score that rounds to the maximum, or above it, would move the argmax: such ones go a few roundings below.
    highest = _at(logits, x) + at_x
    slack = 4 * jnp.finfo(logits.dtype).eps * jnp.maximum(1, jnp.maximum(jnp.abs(highest), jnp.abs(logits)))
    eps = jnp.minimum(eps, jnp.where(jnp.isfinite(logits), highest - logits - slack, jnp.inf))
    return jnp.where(jnp.arange(logits.shape[-1]) == x[..., None], at_x, eps)


def _at(values: Float[Array, "... k"], x: Int[Array, "..."]) -> Float[Array, "... 1"]:
    return jnp.take_along_axis(values, x[..., None], -1)


def _standard(keys: Key[Array, " b"], logits: Float[Array, "b *dims k"]) -> Float[Array, "b *dims k"]:
    shape, dtype = logits.shape[1:], jnp.promote_types(logits.dtype, jnp.float32)
    one = lambda key: jax.random.gumbel(rng.for_purpose(key, "posterior"), shape, dtype, mode="high")
    return jax.vmap(one)(keys)


# --- The loss of a forecast -------------------------------------------------------------------------------------------


def kl_divergence(arm: Float[Array, "... k"], forecast: Float[Array, "... k"]) -> Float[Array, "..."]:
    """KL(softmax(arm) || softmax(forecast)) in nats, from logits.

    The gradient with respect to the forecast's logits is softmax(forecast) - softmax(arm). Nothing is detached here: a
    caller who trains forecasts on the ARM as a fixed teacher puts `stop_gradient` around `arm`.
    """
    log_p, log_q = jax.nn.log_softmax(arm), jax.nn.log_softmax(forecast)
    p = jnp.exp(log_p)
    # A value of no probability contributes nothing, whatever its logarithm.
    return (p * jnp.where(p > 0, log_p - log_q, 0.0)).sum(-1)
