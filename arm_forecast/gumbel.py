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

COLDEST = 1e-6  # the temperature at which a nucleus is taken where it is lower


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
    before = _mass_before(ordered, temperature, top_k, top_p)
    count = (before < top_p).sum(-1, keepdims=True)
    return jnp.where(_largest(logits, ordered, count), logits, -jnp.inf)


def _mass_before(
    ordered: Float[Array, "... k"], temperature: Float[Array, ""] | float, top_k: int, top_p: float
) -> Float[Array, "... k"]:
    """The mass of the values that are likelier than each, among the `top_k`: a value is kept where it is below `top_p`.

    Infinite beyond the top k. Without a nucleus there is no mass to compare: -1.
    """
    num_values = ordered.shape[-1]
    among = jnp.broadcast_to(jnp.arange(num_values) < (top_k or num_values), ordered.shape)
    if top_p >= 1:
        return jnp.where(among, -1.0, jnp.inf)
    # Relative to the maximum, so that the quotient cannot overflow; a nucleus at T = 0 is the maximum alone.
    relative = (ordered - ordered[..., :1]) / jnp.maximum(temperature, COLDEST)
    mass = jnp.cumsum(jax.nn.softmax(jnp.where(among, relative, -jnp.inf)), -1)
    before = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(1, 0)])[..., :-1]
    return jnp.where(among, before, jnp.inf)


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


def best(
    logits: Float[Array, "... k"],
    eps: Float[Array, "... k"],
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """The value of the best score, and its margin: logits that differ by less than half of it choose the same value.

    It is how far the second best is behind; where top-k or a nucleus restrict the values, also how near the edge comes
    to changing the choice (`_margin_of_cut`). Infinite where there is but one value.
    """
    kept = restrict(logits, temperature, top_k, top_p)
    found = kept + temperature * eps
    value = found.argmax(-1).astype(jnp.int32)
    others = jnp.where(jnp.arange(logits.shape[-1]) == value[..., None], -jnp.inf, found)
    margin = found.max(-1) - others.max(-1)
    if kept is logits:
        return value, margin
    outside = jnp.where(jnp.isfinite(kept), -jnp.inf, logits + temperature * eps).max(-1)
    ahead, chosen = found.max(-1) - outside, _at(logits, value)
    return value, jnp.minimum(margin, _margin_of_cut(logits, chosen, ahead, temperature, top_k, top_p))


def _margin_of_cut(
    logits: Float[Array, "... k"],
    chosen: Float[Array, "... 1"],
    ahead: Float[Array, "..."],
    temperature: Float[Array, ""] | float,
    top_k: int,
    top_p: float,
) -> Float[Array, "..."]:
    """The margin of `best` as far as the edge is concerned. `chosen`: the logit of the value; `ahead`: how far the best
    score outside the edge is behind its own (negative where it would have won).

    The choice stays where the same values are kept; or where it is kept, and nothing from outside could beat it. Sorted
    logits move as much as logits do, and log m/(1 - m) of the mass m of the n likeliest moves twice as much over T.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = _mass_before(ordered, temperature, top_k, top_p)
    kept = before < top_p
    next_logit = jnp.concatenate([ordered[..., 1:], jnp.full_like(chosen, -jnp.inf)], -1)
    if top_p < 1:
        log_odds = lambda m: jnp.log(m) - jnp.log1p(-m)
        distance = jnp.abs(log_odds(jnp.minimum(before, 1.0)) - log_odds(top_p)) * jnp.maximum(temperature, COLDEST)
    else:
        distance = jnp.full_like(ordered, jnp.inf)
    last = jnp.arange(ordered.shape[-1]) == kept.sum(-1, keepdims=True) - 1
    of_set = jnp.where(last, jnp.minimum(ordered - next_logit, distance), jnp.where(kept, jnp.inf, distance)).min(-1)
    # For any rank n among the kept: the choice stays above all but n values, and the n-th likeliest is kept.
    of_choice = jnp.where(kept, jnp.minimum(chosen - next_logit, distance), -jnp.inf).max(-1)
    return jnp.maximum(of_set, jnp.minimum(of_choice, ahead))


# --- Posterior noise: eps given x -------------------------------------------------------------------------------------


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
    # A draw from Gumbel(mu) below m is -log(exp(-m) + exp(-(mu + g))) = mu + g - softplus(mu + g - m); less mu, without
    # adding and subtracting a large one.
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
