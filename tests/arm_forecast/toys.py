"""Table models small enough to enumerate, networks with a real cache over them, and forecasters that mean ill."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from arm_forecast import engine
from arm_forecast.forecasters import Forecaster


def table(seed, num_dims, num_values, strength=1.0):
    """Parameters of logits[i] = b[i] + sum_{j<i} W[i, j, x_j], as in the golden files."""
    generator = np.random.default_rng(seed)
    pairs = strength * generator.standard_normal((num_dims, num_dims, num_values, num_values))
    pairs *= np.tril(np.ones((num_dims, num_dims)), -1)[:, :, None, None]
    return {"W": jnp.float32(pairs), "b": jnp.float32(generator.standard_normal((num_dims, num_values)))}


def table_logits(params, x, context=None):
    """[b d k]. A context [b d k] is added. Values that are none (-1) contribute nothing."""
    num_values = params["b"].shape[-1]
    logits = params["b"] + jnp.einsum("ijlk,bjl->bik", params["W"], jax.nn.one_hot(x, num_values))
    return logits if context is None else logits + context


def table_network(params):
    """The table evaluated whole; only its shape is read here."""
    return engine.whole(lambda params, x, context: (table_logits(params, x, context), ()), *params["b"].shape)


def windowed_network(params, window, stride):
    """The table in windows: what x before a window contributes is in the cache and not read again.

    As activations do, the cache lags by one: it holds sum_{j < start - 1} W[:, j, x_j], and the call adds dimension
    start - 1 itself, whose last input may have been wrong.
    """
    num_dims, num_values = params["b"].shape

    def init(batch):
        return jnp.zeros((batch, num_dims, num_values))

    def call(params, cache, x, start, context):
        every = jnp.arange(num_dims)
        # Dimensions that the cache stands for, and those after the window, are made unreadable.
        x = jnp.where((every < start[:, None] - 1) | (every >= start[:, None] + window), -1, x)
        each = jnp.einsum("ijlk,bjl->bjik", params["W"], jax.nn.one_hot(x, num_values))
        dims = start[:, None] + jnp.arange(window)
        logits = params["b"] + cache + each.sum(1) + (0.0 if context is None else context)
        return jnp.take_along_axis(logits, dims[..., None], 1), (), (cache, each, start)

    def advance(pending, shift):
        cache, each, start = pending
        done = jnp.arange(num_dims) < (start + shift * stride - 1)[:, None]
        return cache + jnp.where(done[:, :, None, None], each, 0.0).sum(1)

    return engine.Network(num_dims, num_values, window, stride, init, call, advance)


def golden_noise(eps):
    """Noise from a table [n d k], given to the sampler as its key."""
    return lambda ids, dims, call=None: jnp.float32(eps)[ids[:, None], dims]


def grids(num_dims, num_values):
    return np.array(list(itertools.product(range(num_values), repeat=num_dims)), np.int32)


def probabilities(logits_fn, num_dims, num_values):
    """softmax products of all grids in the order of `grids`, from logits_fn(x [g d]) -> [g d k]."""
    x = grids(num_dims, num_values)
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_fn(x))), np.float64)
    return np.exp(np.take_along_axis(log_probs, x[..., None], -1).sum((1, 2)))


def ancestral(logits_fn, eps, num_dims):
    """One dimension after another: x_d = argmax(logits_d + eps_d), eps [n d k]."""
    x = np.zeros((len(eps), num_dims), np.int32)
    for dim in range(num_dims):
        x[:, dim] = (np.asarray(logits_fn(x)) + eps)[:, dim].argmax(-1)
    return x


def jacobi(logits_fn, eps, num_dims):
    """Plain iteration x <- y from zeros until y = x, the verifying call counted: iterates and calls of one sample."""
    iterates = [np.zeros(num_dims, np.int32)]
    while True:
        iterates.append((np.asarray(logits_fn(iterates[-1][None]))[0] + eps).argmax(-1))
        if (iterates[-1] == iterates[-2]).all():
            return np.stack(iterates), len(iterates) - 1


def fixed_point_by_hand(logits_fn, eps, window=None, stride=None, given=None):
    """Predictive sampling of one sample, dimension by dimension: x, call_of, calls, where forecasts were wrong."""
    num_dims = len(eps)
    window, stride = window or num_dims, stride or num_dims
    given = np.full(num_dims, -1) if given is None else given
    x, call_of, wrong = np.maximum(given, 0), np.zeros(num_dims, int), np.zeros(num_dims, bool)
    calls = start = i = 0
    while i < num_dims and given[i] >= 0:
        i += 1
    while i < num_dims:
        calls += 1
        y = (np.asarray(logits_fn(x[None]))[0] + eps).argmax(-1)
        end = start + window
        while i < end:
            call_of[i] = calls
            wrong[i] = given[i] < 0 and x[i] != y[i]
            x[i] = y[i] if given[i] < 0 else given[i]
            i += 1
            if wrong[i - 1]:
                break
        right = min(i, end)
        while i < num_dims and given[i] >= 0:
            call_of[i] = calls
            i += 1
        for dim in range(i, end):
            x[dim] = y[dim] if given[dim] < 0 else given[dim]
        start = min(right // stride * stride, num_dims - window)
    return x, call_of, calls, wrong


def one_of(choices):
    """The forecaster that params["mode"] selects: one compiled sampler for all of them."""

    def forecast(params, call, states):
        every = [choice.forecast(params, call, state) for choice, state in zip(choices, states, strict=True)]
        return jnp.stack([values for values, _ in every])[params["mode"]], tuple(state for _, state in every)

    return Forecaster(lambda batch: tuple(choice.init(batch) for choice in choices), forecast)


def stateless(forecast):
    return Forecaster(lambda batch: (), lambda params, call, state: (forecast(params, call), state))


def next_dims(logits_fn, count, with_noise):
    """The next `count` dimensions from logits [b d k] of all dimensions, y beyond; `logits_fn(params, call)`."""

    def forecast(params, call):
        logits = logits_fn(params, call)
        num_dims = logits.shape[1]
        every = jnp.broadcast_to(jnp.arange(num_dims), logits.shape[:2])
        guess = call.draw(logits, every) if with_noise else logits.argmax(-1)
        return jnp.where(every < call.frontier[:, None] + count, guess, call.outputs)

    return stateless(forecast)
