"""The coupling layer: the last channels are transformed by a net that sees the others.

Source: Dinh et al. 2017 (Real NVP), Kingma & Dhariwal 2018 (Glow), section 3.3; the net and the split are those of
MaCow's released code: always the same, contiguous split, the mixing is left to the 1x1 convolution before it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from flows import convolution, transform
from flows.bijector import Bijector, Condition, LogDet
from flows.squeeze import split

NET = ("conv1", "conv2", "conv3")


def coupling(channels: int, hidden: int, factor: int = 2, affine: bool = True, condition_channels: int = 0) -> Bijector:
    """y = [z1, transform(z2; net(z1))] with z2 the last floor(C / factor) channels.

    The net is 3x3 -> ELU -> 1x1 -> ELU -> 3x3, weight-normalised; the condition stands behind z1 on its channels.
    """
    moved = channels // factor
    inputs, outputs = channels - moved + condition_channels, transform.num_outputs(moved, affine)
    layers = {"conv1": ((3, 3), inputs, hidden), "conv2": ((1, 1), hidden, hidden), "conv3": ((3, 3), hidden, outputs)}

    def init(key: Key[Array, ""]) -> PyTree:
        keys = jax.random.split(key, len(NET))
        return {name: convolution.init(key, *layers[name]) for key, name in zip(keys, NET, strict=True)}

    def forward(params: PyTree, x: Array, condition: Condition) -> tuple[Array, LogDet]:
        seen, changed = split(x, moved)
        changed, log_det = transform.forward(_net(params, seen, condition), changed)
        return jnp.concatenate([seen, changed], -1), log_det

    def inverse(params: PyTree, y: Array, condition: Condition) -> tuple[Array, LogDet]:
        seen, changed = split(y, moved)
        changed, log_det = transform.inverse(_net(params, seen, condition), changed)
        return jnp.concatenate([seen, changed], -1), log_det

    def init_from_batch(params: PyTree, x: Array, condition: Condition) -> tuple[PyTree, Array]:
        h, found = _joined(split(x, moved)[0], condition), {}
        for name in NET[:-1]:
            found[name] = convolution.standardised(params[name], convolution.apply(params[name], h))
            h = jax.nn.elu(convolution.apply(found[name], h))
        found |= {NET[-1]: convolution.zeroed(params[NET[-1]])}
        return found, forward(found, x, condition)[0]

    return Bijector(init, forward, inverse, init_from_batch)


def _net(params: PyTree, seen: Array, condition: Condition) -> Float[Array, "b h w d"]:
    h = _joined(seen, condition)
    for name in NET[:-1]:
        h = jax.nn.elu(convolution.apply(params[name], h))
    return convolution.apply(params[NET[-1]], h)


def _joined(seen: Array, condition: Condition) -> Array:
    return seen if condition is None else jnp.concatenate([seen, condition], -1)
