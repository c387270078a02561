"""Units, steps, split-off priors, levels and whole multi-scale flows, of MaCow and of Glow, from the bijectors.

Source: Ma et al. 2019, Table 4 of the appendix for the depths; Kingma & Dhariwal 2018, section 3 (Glow). Where the
released code of MaCow differs from its text it is the code that is followed: a step has two units.
Not here: which flows there are (`config.py` and `configs/`), and what a flow is trained on (`stage.py`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from flows import conv1x1, convolution, masked_conv, squeeze
from flows.actnorm import actnorm
from flows.bijector import Bijector, Condition, LogDet, chain, repeat, zero_log_det
from flows.config import FlowConfig
from flows.coupling import coupling

UNITS = 2  # of a step


class Shape(NamedTuple):
    """What the parts of one level have in common."""

    kind: str  # 'macow' or 'glow'
    kernel: tuple[int, int]
    hidden: int  # channels in the couplings of steps
    affine: bool
    condition_channels: int
    inverse: str


def unit(channels: int, shape: Shape) -> Bijector:
    """actnorm, A, B, actnorm, C, D."""
    orders = {
        order: masked_conv.masked_conv(
            order, channels, shape.kernel, shape.affine, shape.condition_channels, shape.inverse
        )
        for order in masked_conv.ORDERS
    }
    a, b, c, d = orders.items()
    return chain(dict([("actnorm1", actnorm(channels)), a, b, ("actnorm2", actnorm(channels)), c, d]))


def step(channels: int, shape: Shape) -> Bijector:
    """MaCow: two units, then actnorm, 1x1 convolution and coupling. Glow: without the units."""
    units = {f"unit{i}": unit(channels, shape) for i in range(UNITS if shape.kind == "macow" else 0)}
    return chain(units | _glow_step(channels, shape.hidden, 2, shape.affine, shape.condition_channels))


def prior(channels: int, hidden: int, factor: int, affine: bool, condition_channels: int = 0) -> Bijector:
    """What comes before floor(C / factor) channels are split off: actnorm, 1x1 convolution and a coupling that
    transforms just these given the others. It is the conditional Gaussian p(z2 | z1) written as a bijector, so that
    all latents are standard normal."""
    return chain(_glow_step(channels, hidden, factor, affine, condition_channels))


def _glow_step(channels: int, hidden: int, factor: int, affine: bool, condition_channels: int) -> dict[str, Bijector]:
    parts = {"actnorm": actnorm(channels), "conv1x1": conv1x1.conv1x1(channels)}
    if channels < factor:  # one channel, of a grey image, leaves nothing to couple
        return parts
    return parts | {"coupling": coupling(channels, hidden, factor, affine, condition_channels)}


class Part(NamedTuple):
    """Like steps, and how many channels are split off after them (0: none)."""

    steps: Bijector
    prior: Bijector | None
    split: int


def level(parts: Sequence[Part]) -> Bijector:
    """x -> (latents split off, kept): steps, prior, split; steps, prior, split; ..., on one resolution."""

    def names(i: int) -> tuple[str, str]:
        return f"steps{i}", f"prior{i}"

    def init(key: Key[Array, ""]) -> PyTree:
        params = {}
        for i, (part, own) in enumerate(zip(parts, jax.random.split(key, len(parts)), strict=True)):
            of_steps, of_prior = jax.random.split(own)
            params[names(i)[0]] = part.steps.init(of_steps)
            if part.prior is not None:
                params[names(i)[1]] = part.prior.init(of_prior)
        return params

    def forward(params: PyTree, x: Array, condition: Condition) -> tuple[tuple[tuple[Array, ...], Array], LogDet]:
        total, latents = zero_log_det(x), ()
        for i, part in enumerate(parts):
            x, log_det = part.steps.forward_and_log_det(params[names(i)[0]], x, condition)
            total = total + log_det
            if part.prior is not None:
                x, log_det = part.prior.forward_and_log_det(params[names(i)[1]], x, condition)
                total = total + log_det
                x, latent = squeeze.split(x, part.split)
                latents = (*latents, latent)
        return (latents, x), total

    def inverse(params: PyTree, y: tuple[tuple[Array, ...], Array], condition: Condition) -> tuple[Array, LogDet]:
        (latents, x), total = y, zero_log_det(y[1])
        for i, part in reversed(list(enumerate(parts))):
            if part.prior is not None:
                x = jnp.concatenate([x, latents[-1]], -1)
                latents = latents[:-1]
                x, log_det = part.prior.inverse_and_log_det(params[names(i)[1]], x, condition)
                total = total + log_det
            x, log_det = part.steps.inverse_and_log_det(params[names(i)[0]], x, condition)
            total = total + log_det
        return x, total

    def init_from_batch(params: PyTree, x: Array, condition: Condition) -> tuple[PyTree, Any]:
        found, latents = {}, ()
        for i, part in enumerate(parts):
            found[names(i)[0]], x = part.steps.init_from_batch(params[names(i)[0]], x, condition)
            if part.prior is not None:
                found[names(i)[1]], x = part.prior.init_from_batch(params[names(i)[1]], x, condition)
                x, latent = squeeze.split(x, part.split)
                latents = (*latents, latent)
        return found, (latents, x)

    return Bijector(init, forward, inverse, init_from_batch)


def multi_scale(config: FlowConfig, channels: int, condition_channels: int, scan: bool, inverse: str) -> Bijector:
    """x -> latents, from the first split off to the top. MaCow squeezes before every level but the first, Glow before
    every one; the condition is squeezed along, and never split."""
    squeezes = [is_squeezed(config, i) for i in range(len(config.steps))]
    levels: list[Bijector] = []
    for i, squeezed in enumerate(squeezes):
        if squeezed:
            channels, condition_channels = 4 * channels, 4 * condition_channels
        shape = Shape(config.kind, config.kernel, config.widths[i], config.affine, condition_channels, inverse)
        parts = _parts(config, i, channels, shape, scan)
        channels -= sum(part.split for part in parts)
        levels.append(level(parts))

    def squeezed_condition(condition: Condition) -> list[Condition]:
        found = []
        for squeezed in squeezes:
            condition = squeeze.squeeze(condition) if squeezed and condition is not None else condition
            found.append(condition)
        return found

    # All kernels with their norm applied, and the gradients of these, are twice the memory of the parameters, and grow
    # with the depth: where memory is scarce each step applies its own.
    ready = prepared if config.memory == "plain" else lambda params: conv1x1.prepared(params, with_inverse=False)

    def init(key: Key[Array, ""]) -> PyTree:
        keys = jax.random.split(key, len(levels))
        return {f"level{i}": one.init(key) for i, (one, key) in enumerate(zip(levels, keys, strict=True))}

    def forward(params: PyTree, x: Array, condition: Condition) -> tuple[tuple[Array, ...], LogDet]:
        total, latents, params = zero_log_det(x), (), ready(params)
        for i, own in enumerate(squeezed_condition(condition)):
            x = squeeze.squeeze(x) if squeezes[i] else x
            (found, x), log_det = levels[i].forward_and_log_det(params[f"level{i}"], x, own)
            latents, total = (*latents, *found), total + log_det
        return (*latents, x), total

    def inverted(params: PyTree, latents: tuple[Array, ...], condition: Condition) -> tuple[Array, LogDet]:
        params = prepared(params, with_inverse=True)
        latents, x = latents[:-1], latents[-1]
        total = zero_log_det(x)
        for i, own in reversed(list(enumerate(squeezed_condition(condition)))):
            count = num_splits(config, i)
            found, latents = latents[len(latents) - count :], latents[: len(latents) - count]
            x, log_det = levels[i].inverse_and_log_det(params[f"level{i}"], (found, x), own)
            x, total = squeeze.unsqueeze(x) if squeezes[i] else x, total + log_det
        return x, total

    def init_from_batch(params: PyTree, x: Array, condition: Condition) -> tuple[PyTree, tuple[Array, ...]]:
        found, latents = {}, ()
        for i, own in enumerate(squeezed_condition(condition)):
            x = squeeze.squeeze(x) if squeezes[i] else x
            found[f"level{i}"], (split_off, x) = levels[i].init_from_batch(params[f"level{i}"], x, own)
            latents = (*latents, *split_off)
        return found, (*latents, x)

    return Bijector(init, forward, inverted, init_from_batch)


def prepared(params: PyTree, with_inverse: bool = False) -> PyTree:
    """Kernels with their norm applied, and the determinants (and inverses) of the 1x1 matrices: once for all stacked
    steps, instead of once in each."""
    return conv1x1.prepared(convolution.effective(params), with_inverse)


def num_splits(config: FlowConfig, i: int) -> int:
    """How many latents level i splits off: none at the top, nor in MaCow's first level."""
    if i == len(config.steps) - 1 or (config.kind == "macow" and i == 0):
        return 0
    return len(config.steps[i])


def _parts(config: FlowConfig, i: int, channels: int, shape: Shape, scan: bool) -> list[Part]:
    """The steps and splits of level i. Every prior's factor is one lower than the one before it."""
    parts, factor = [], config.factor
    for count in config.steps[i]:
        steps = repeat(step(channels, shape), count, scan, config.memory)
        if not num_splits(config, i):
            parts.append(Part(steps, None, 0))
            continue
        hidden = shape.hidden if config.kind == "macow" else min(8 * channels, shape.hidden)
        before_split = prior(channels, hidden, factor, config.prior_affine, shape.condition_channels)
        parts.append(Part(steps, before_split, channels // factor))
        channels, factor = channels - channels // factor, factor - 1
    return parts


def pack(config: FlowConfig, latents: Sequence[Array]) -> Array:
    """All latents as one array of the image's shape, as the released code lays them out.

    From the top down each level is [deeper, its last split, ..., its first split] on channels, then unsqueezed.
    """
    *latents, packed = latents
    for i in reversed(range(len(config.steps))):
        count = num_splits(config, i)
        own, latents = latents[len(latents) - count :], latents[: len(latents) - count]
        packed = jnp.concatenate([packed, *reversed(own)], -1)
        packed = squeeze.unsqueeze(packed) if is_squeezed(config, i) else packed
    return packed


def unpack(config: FlowConfig, packed: Array) -> tuple[Array, ...]:
    """The inverse of `pack`."""
    latents = ()
    for i in range(len(config.steps)):
        packed = squeeze.squeeze(packed) if is_squeezed(config, i) else packed
        factor, channels = config.factor, packed.shape[-1]
        for _ in range(num_splits(config, i)):
            packed, latent = squeeze.split(packed, channels // factor)
            latents, channels, factor = (*latents, latent), channels - channels // factor, factor - 1
    return (*latents, packed)


def is_squeezed(config: FlowConfig, i: int) -> bool:
    return config.kind == "glow" or i > 0
