"""The Bijector record, and how bijectors are put together: one after another, and many like ones.

`forward` is the direction of the likelihood, data to latents. Log-determinants are per example, in nats, of the map in
the direction that the name says, and never hold an epsilon. Parameters are nested dicts of arrays.
Not here: the bijectors themselves (`actnorm.py`, `conv1x1.py`, `masked_conv.py`, `coupling.py`, `squeeze.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

Condition = Float[Array, "b h w s"] | None
LogDet = Float[Array, " b"]


class Bijector(NamedTuple):
    """A map with a known inverse and log-determinant, as pure functions of its parameters.

    x is [b, h, w, c]; y is such an array too, or a tuple of arrays where latents are split off. `condition` is an image
    of features that parametrises the map, or None.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    forward_and_log_det: Callable[[PyTree, Array, Condition], tuple[Any, LogDet]]
    inverse_and_log_det: Callable[[PyTree, Any, Condition], tuple[Array, LogDet]]
    # (params, x, condition) -> params whose scales suit this batch (the data-dependent start), and y under them
    init_from_batch: Callable[[PyTree, Array, Condition], tuple[PyTree, Any]]


def chain(parts: Mapping[str, Bijector]) -> Bijector:
    """The parts one after another, each with its parameters under its name."""

    def init(key: Key[Array, ""]) -> PyTree:
        keys = jax.random.split(key, len(parts))
        return {name: part.init(key) for key, (name, part) in zip(keys, parts.items(), strict=True)}

    def forward(params: PyTree, x: Array, condition: Condition) -> tuple[Any, LogDet]:
        total = zero_log_det(x)
        for name, part in parts.items():
            x, log_det = part.forward_and_log_det(params[name], x, condition)
            total = total + log_det
        return x, total

    def inverse(params: PyTree, y: Any, condition: Condition) -> tuple[Array, LogDet]:
        total: Any = 0.0
        for name, part in reversed(list(parts.items())):
            y, log_det = part.inverse_and_log_det(params[name], y, condition)
            total = total + log_det
        return y, total

    def init_from_batch(params: PyTree, x: Array, condition: Condition) -> tuple[PyTree, Any]:
        found = {}
        for name, part in parts.items():
            found[name], x = part.init_from_batch(params[name], x, condition)
        return found, x

    return Bijector(init, forward, inverse, init_from_batch)


def zero_log_det(x: Float[Array, "b h w c"]) -> LogDet:
    return jnp.zeros(len(x), x.dtype)


def repeat(part: Bijector, count: int, scan: bool, memory: str = "plain") -> Bijector:
    """`count` bijectors like `part`, their parameters stacked along a first axis.

    `scan`: one compiled body for all of them in the forward direction, instead of an unrolled program; the inverse is
    always scanned. `memory` says what the gradient keeps of each: 'plain' all activations, 'remat' its input, from
    which the rest is computed again, 'reversible' nothing, its input is recovered by the inverse (then it is scanned).
    """
    one = jax.checkpoint(part.forward_and_log_det) if memory == "remat" else part.forward_and_log_det

    def init(key: Key[Array, ""]) -> PyTree:
        return jax.vmap(part.init)(jax.random.split(key, count))

    def forward(params: PyTree, x: Array, condition: Condition) -> tuple[Array, LogDet]:
        if scan:
            return _scanned(one, params, x, condition)
        total = zero_log_det(x)
        for own in unstacked(params, count):
            x, log_det = one(own, x, condition)
            total = total + log_det
        return x, total

    def inverse(params: PyTree, y: Array, condition: Condition) -> tuple[Array, LogDet]:
        step = lambda y, own: part.inverse_and_log_det(own, y, condition)
        x, log_dets = jax.lax.scan(step, y, params, reverse=True)
        return x, log_dets.sum(0)

    def init_from_batch(params: PyTree, x: Array, condition: Condition) -> tuple[PyTree, Array]:
        def step(x: Array, own: PyTree) -> tuple[Array, PyTree]:
            own, y = part.init_from_batch(own, x, condition)
            return y, own

        y, found = jax.lax.scan(step, x, params)
        return found, y

    return Bijector(init, _reversible(part) if memory == "reversible" else forward, inverse, init_from_batch)


def unstacked(params: PyTree, count: int) -> list[PyTree]:
    """The trees along the first axis. By one split of each array, whose gradient is one concatenation; the gradient of
    `count` slices would be as many arrays of full size."""
    parts = jax.tree.map(lambda leaf: [part[0] for part in jax.lax.split(leaf, [1] * count, 0)], params)
    is_list = lambda value: isinstance(value, list)
    return [jax.tree.map(lambda found, i=i: found[i], parts, is_leaf=is_list) for i in range(count)]


def _scanned(step: Callable, params: PyTree, x: Array, condition: Condition) -> tuple[Array, LogDet]:
    x, log_dets = jax.lax.scan(lambda x, own: step(own, x, condition), x, params)
    return x, log_dets.sum(0)


def _reversible(part: Bijector) -> Callable[..., tuple[Array, LogDet]]:
    """Like steps whose gradient keeps their common output alone: going back, each step's input is its inverse of it.

    Memory does not grow with the number of steps; the cost is one inverse and one forward pass of each step more. The
    recovered inputs differ from the true ones by the round-trip error, which the gradients inherit.
    """

    @jax.custom_vjp
    def run(params: PyTree, x: Array, condition: Condition) -> tuple[Array, LogDet]:
        return _scanned(part.forward_and_log_det, params, x, condition)

    def forward(params: PyTree, x: Array, condition: Condition) -> tuple[tuple[Array, LogDet], PyTree]:
        y, log_det = run(params, x, condition)
        return (y, log_det), (params, y, condition)

    def backward(kept: PyTree, gradients: tuple[Array, LogDet]) -> tuple[PyTree, Array, Condition]:
        params, y, condition = kept
        of_log_det = gradients[1]

        def step(carry: PyTree, own: PyTree) -> tuple[PyTree, PyTree]:
            y, of_y, of_condition = carry
            x, _ = part.inverse_and_log_det(own, y, condition)
            _, pull_back = jax.vjp(part.forward_and_log_det, own, x, condition)
            of_own, of_x, more = pull_back((of_y, of_log_det))
            return (x, of_x, jax.tree.map(jnp.add, of_condition, more)), of_own

        start = (y, gradients[0], jax.tree.map(jnp.zeros_like, condition))
        (_, of_x, of_condition), of_params = jax.lax.scan(step, start, params, reverse=True)
        return of_params, of_x, of_condition

    run.defvjp(forward, backward)
    return run
