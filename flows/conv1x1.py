"""The invertible 1x1 convolution: one full matrix that mixes the channels of every pixel.

Source: Kingma & Dhariwal 2018 (Glow), section 3.2, without the LU parametrisation. `prepared` computes the determinants
and inverses of all stacked steps at once; what it has not computed is computed on demand, and nothing is cached between
updates of the parameters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from flows import convolution
from flows.bijector import Bijector, Condition, LogDet
from flows.convolution import Params


def conv1x1(channels: int) -> Bijector:
    """y = W x for each pixel, log|det dy/dx| = h w log|det W|. Starts at a random orthogonal matrix."""

    def init(key: Key[Array, ""]) -> Params:
        q, r = jnp.linalg.qr(jax.random.normal(key, (channels, channels), float))
        return {"matrix": q * jnp.sign(jnp.diag(r))}

    keep = lambda params, x, condition: (params, forward_and_log_det(params, x)[0])
    return Bijector(init, forward_and_log_det, inverse_and_log_det, keep)


def forward_and_log_det(
    params: Params, x: Float[Array, "b h w c"], condition: Condition = None
) -> tuple[Float[Array, "b h w c"], LogDet]:
    return _per_pixel(params["matrix"], x), _log_det(params, x)


def inverse_and_log_det(
    params: Params, y: Float[Array, "b h w c"], condition: Condition = None
) -> tuple[Float[Array, "b h w c"], LogDet]:
    inverse = params["inverse"] if "inverse" in params else jnp.linalg.inv(params["matrix"])
    return _per_pixel(inverse, y), -_log_det(params, y)


def prepared(params: PyTree, with_inverse: bool) -> PyTree:
    """The same tree with log|det W|, and W^-1 where it is wanted, beside every matrix."""
    if not isinstance(params, dict):
        return params
    if "matrix" in params:
        found = params | {"log_abs_det": _log_abs_det(params["matrix"])}
        return found | ({"inverse": jnp.linalg.inv(params["matrix"])} if with_inverse else {})
    return {name: prepared(value, with_inverse) for name, value in params.items()}


def _per_pixel(matrix: Float[Array, "d c"], x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    return convolution.matmul(x, matrix.T)


def _log_abs_det(matrix: Float[Array, "*n c c"]) -> Float[Array, "*n"]:
    return jnp.linalg.slogdet(matrix)[1]


def _log_det(params: Params, x: Float[Array, "b h w c"]) -> LogDet:
    log_abs_det = params["log_abs_det"] if "log_abs_det" in params else _log_abs_det(params["matrix"])
    return jnp.full((len(x),), x.shape[1] * x.shape[2] * log_abs_det)
