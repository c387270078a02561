"""Forecasters: guesses of the dimensions that are not yet sampled, from everything known after a network call.

A forecast decides how many calls a sample takes, never which sample it is. Source: Wiggers & Hoogeboom 2020; which
trivial baselines the paper compares with is not in its supplement, `zeros` and `last` are names of ours.
Not here: the loop that verifies forecasts (`engine.py`), the networks behind learned ones (`modules.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


class Call(NamedTuple):
    """What is known after a network call; one row for each lane, that is for each sample in work.

    The network was called on `inputs` and evaluated the window of w dimensions from `start`.
    """

    ids: Int[Array, " b"]  # the samples
    inputs: Int[Array, "b d"]  # accepted dimensions, then forecasts
    # y: what the sample would be if all inputs were right; accepted dimensions stay, and so does what is not evaluated
    outputs: Int[Array, "b d"]
    accepted: Bool[Array, "b d"]  # drawn and accepted in this call
    frontier: Int[Array, " b"]  # the first dimension to forecast; num_dims when the sample is finished
    start: Int[Array, " b"]
    logits: Float[Array, "b w k"]  # mu, without noise and unrestricted
    hidden: PyTree  # what the network returned beside its logits
    noise: Callable[[Int[Array, "b t"]], Float[Array, "b t k"]]  # eps of any dimensions
    draw: Callable[[Float[Array, "b t k"], Int[Array, "b t"]], Int[Array, "b t"]]  # of logits at dimensions, with eps


class Forecaster(NamedTuple):
    """A forecaster as two functions.

    `init(b)`: the state of lanes about to begin a sample, leading axis b.
    `forecast(params, call, state)`: values for all dimensions, of which those from the frontier on are used where they
    are not given, and the new state. It must treat every lane by itself: a sample may not depend on its batch.
    """

    init: Callable[[int], PyTree]
    forecast: Callable[[PyTree, Call, PyTree], tuple[Int[Array, "b d"], PyTree]]
    trusted: bool = True  # False: no forecast is ever taken as right, one free dimension is accepted in each call


def none() -> Forecaster:
    """Ancestral sampling: one free dimension a call, in D calls without given dimensions."""
    return zeros()._replace(trusted=False)


def zeros() -> Forecaster:
    """Every dimension is 0."""
    return _stateless(lambda call: jnp.zeros_like(call.inputs))


def last() -> Forecaster:
    """Every dimension repeats the last one that was accepted."""
    before = lambda call: jnp.take_along_axis(call.outputs, jnp.maximum(call.frontier, 1)[:, None] - 1, 1)
    return _stateless(lambda call: jnp.broadcast_to(before(call), call.inputs.shape))


def fixed_point() -> Forecaster:
    """ARM fixed-point iteration: the forecast is y, the network's own draw on the last inputs, with the same noise."""
    return _stateless(lambda call: call.outputs)


def fixed_point_without_noise() -> Forecaster:
    """The ablation without reparametrisation: the likeliest values under the last call's logits, argmax_k mu_k."""

    def forecast(call: Call) -> Int[Array, "b d"]:
        likeliest = call.logits.argmax(-1).astype(call.inputs.dtype)
        return in_place(likeliest, call.start, call.outputs)

    return _stateless(forecast)


def in_place(values: Int[Array, "b w"], start: Int[Array, " b"], into: Int[Array, "b d"]) -> Int[Array, "b d"]:
    """`into` with each lane's `values` from its `start` on."""
    position = jnp.arange(into.shape[1]) - start[:, None]
    inside = (position >= 0) & (position < values.shape[1])
    return jnp.where(inside, jnp.take_along_axis(values, position.clip(0, values.shape[1] - 1), 1), into)


class ModulesState(NamedTuple):
    """How far the calls after either forecast have come; index 0: fixed point, 1: modules."""

    followed: Int[Array, " b"]  # which made the inputs of the next call; -1 before the first
    calls: Int[Array, "b 2"]
    accepted: Int[Array, "b 2"]  # dimensions


TRIAL = 2  # calls that either way is given before their records are compared


# predict(params, call, pixel) -> logits of the T modules at each lane's anchor `pixel` (raster position in the image)
Predict = Callable[[PyTree, Call, Int[Array, " b"]], Float[Array, "b t c k"]]


def modules(predict: Predict, num_modules: int, grid: tuple[int, int, int], *, fallback: bool = True) -> Forecaster:
    """Learned forecasting modules for the next pixels, fixed-point iteration beyond them.

    `grid` is (height, width, channels), dimension d = (row width + column) channels + channel. The anchor is the
    pixel of the frontier; module t forecasts pixel anchor + t, as argmax_k(logits_k + eps_k) with the noise of the
    dimension it forecasts. The anchor lies in the evaluated window: after a call that accepted the whole window there
    is none, and the forecast is that of the fixed point.

    With `fallback` every sample keeps the mean number of dimensions that a call accepts after either forecast, and
    follows the modules where theirs is the better one, after a trial of both and never for more than every second
    call. Whose single values are right more often would not tell: a module that is right gains a pixel, one that is
    wrong breaks a run of right values of the fixed point.
    """
    height, width, channels = grid
    num_dims = height * width * channels

    def init(batch: int) -> ModulesState:
        zeros = jnp.zeros((batch, 2), jnp.int32)
        return ModulesState(jnp.full(batch, -1, jnp.int32), zeros, zeros)

    def learned_forecast(params: PyTree, call: Call) -> Int[Array, "b d"]:
        pixel = jnp.minimum(call.frontier // channels, height * width - 1)
        logits = predict(params, call, pixel)
        first = pixel * channels
        dims = first[:, None] + jnp.arange(num_modules * channels)
        values = call.draw(logits.reshape(*dims.shape, -1), jnp.minimum(dims, num_dims - 1))
        anchored = call.frontier < call.start + call.logits.shape[1]
        return in_place(jnp.where(anchored[:, None], values, -1), first, jnp.full_like(call.inputs, -1))

    def forecast(params: PyTree, call: Call, state: ModulesState) -> tuple[Int[Array, "b d"], ModulesState]:
        of_this_call = state.followed[:, None] == jnp.arange(2)
        calls = state.calls + of_this_call
        accepted = state.accepted + jnp.where(of_this_call, call.accepted.sum(1)[:, None], 0)
        learned = learned_forecast(params, call)
        follows_modules = _is_better(calls, accepted) if fallback else jnp.ones(len(learned), bool)
        used = (learned >= 0) & follows_modules[:, None]
        state = ModulesState(follows_modules.astype(jnp.int32), calls, accepted.astype(jnp.int32))
        return jnp.where(used, learned, call.outputs), state

    return Forecaster(init, forecast)


def _is_better(calls: Int[Array, "b 2"], accepted: Int[Array, "b 2"]) -> Bool[Array, " b"]:
    """Whether the modules' turn has come, or their mean is the better one."""
    # accepted_1 / calls_1 > accepted_0 / calls_0 without division.
    ahead = accepted[:, 1] * calls[:, 0] > accepted[:, 0] * calls[:, 1]
    # A few short runs by chance must not keep the fixed point out for good.
    tried = calls[:, 0] >= jnp.maximum(calls[:, 1], TRIAL)
    return tried & ((calls[:, 1] < TRIAL) | ahead)


def _stateless(forecast: Callable[[Call], Int[Array, "b d"]]) -> Forecaster:
    return Forecaster(lambda batch: (), lambda params, call, state: (forecast(call), state))
