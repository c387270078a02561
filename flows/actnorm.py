"""Activation normalisation: a per-channel affine bijector whose first batch sets its scale.

Source: Kingma & Dhariwal 2018 (Glow), section 3.1; MaCow uses it unchanged.
Not here: the invertible 1x1 convolution that follows it in a step (`conv1x1.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flows import convolution
from flows.bijector import Bijector, Condition, LogDet
from flows.convolution import Params


def actnorm(channels: int) -> Bijector:
    """y = exp(s) x + t, log|det dy/dx| = h w sum_c s_c. Starts at s ~ N(0, 0.05^2), t = 0."""

    def init(key: Key[Array, ""]) -> Params:
        log_scale = convolution.INIT_DEVIATION * jax.random.normal(key, (channels,), float)
        return {"log_scale": log_scale, "shift": jnp.zeros_like(log_scale)}

    return Bijector(init, forward_and_log_det, inverse_and_log_det, init_from_batch)


def forward_and_log_det(
    params: Params, x: Float[Array, "b h w c"], condition: Condition = None
) -> tuple[Float[Array, "b h w c"], LogDet]:
    return x * jnp.exp(params["log_scale"]) + params["shift"], _log_det(params, x)


def inverse_and_log_det(
    params: Params, y: Float[Array, "b h w c"], condition: Condition = None
) -> tuple[Float[Array, "b h w c"], LogDet]:
    """x = (y - t) exp(-s). No epsilon: exp never vanishes."""
    return (y - params["shift"]) * jnp.exp(-params["log_scale"]), -_log_det(params, y)


def init_from_batch(
    params: Params, x: Float[Array, "b h w c"], condition: Condition = None
) -> tuple[Params, Float[Array, "b h w c"]]:
    """Parameters under which this batch leaves with zero mean and unit (unbiased) deviation in every channel.

    The statistics run over the whole (global) batch; under `jit` on a sharded batch they need no explicit reduction.
    """
    mean, deviation = convolution.moments(forward_and_log_det(params, x)[0])
    scale = 1.0 / (deviation + convolution.EPSILON)
    found = {"log_scale": params["log_scale"] + jnp.log(scale), "shift": (params["shift"] - mean) * scale}
    return found, forward_and_log_det(found, x)[0]


def _log_det(params: Params, x: Float[Array, "b h w c"]) -> LogDet:
    batch, height, width, _ = x.shape
    return jnp.full((batch,), height * width * params["log_scale"].sum())
