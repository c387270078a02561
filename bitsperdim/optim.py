"""Optimisers: one `optax.chain` from one section of a config; learning-rate schedules; Polyak averages of parameters.

t is the number of updates taken so far, as optax counts; s = t + 1 is the number of the update being taken.
Not here: clipping by norm and the rule that skips a step, which need the norm that the step measures (`step.py`).
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from bitsperdim.config import one_of
from bitsperdim.errors import InputError

NAMES = ("adam", "adamw", "adamax")
SCHEDULES = ("constant", "sqrt", "cosine", "exponential")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The section `optim` of a config. Raises ValueError("<key> must ..., not <value>") for a value out of range."""

    name: str  # one of NAMES
    learning_rate: float  # the peak; for 'sqrt' the coefficient c of its formula
    schedule: str = "constant"  # one of SCHEDULES
    warmup_steps: int = 0  # updates of linear warm-up; for 'sqrt' the update at which the rate peaks
    hidden_units: int = 0  # 'sqrt': the width h of the network
    cosine_start: int = 0  # 'cosine': updates at the peak, warm-up included, before the descent
    cosine_steps: int = 0  # 'cosine': updates of the descent; 0: as many as are left
    final_fraction: float = 0.0  # 'cosine': the last learning rate over the peak
    exponential_rate: float = 1.0  # 'exponential': the factor of each update
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled: multiplied by the learning rate, never part of the moments
    l2: float = 0.0  # times every parameter, added to its gradient before the moments: PyTorch's decay in Adam
    decay_mask: str = r"(^|/)kernel$"  # regex, searched in paths such as 'encoder/conv_0/kernel': what decays

    def __post_init__(self):
        one_of(self, name=NAMES, schedule=SCHEDULES)
        # Zero is allowed: it freezes the parameters while statistics (codebooks, BatchNorm) still move.
        _require(0.0 <= self.learning_rate < math.inf, "learning_rate", "be finite and >= 0", self.learning_rate)
        for key in ("warmup_steps", "hidden_units", "cosine_start", "cosine_steps"):
            _require(getattr(self, key) >= 0, key, "be >= 0", getattr(self, key))
        _require(0.0 <= self.final_fraction <= 1.0, "final_fraction", "lie in [0, 1]", self.final_fraction)
        _require(0.0 < self.exponential_rate <= 1.0, "exponential_rate", "lie in (0, 1]", self.exponential_rate)
        _require(0.0 <= self.b1 < 1.0, "b1", "lie in [0, 1)", self.b1)
        _require(0.0 <= self.b2 < 1.0, "b2", "lie in [0, 1)", self.b2)
        _require(0.0 < self.eps < math.inf, "eps", "be finite and > 0", self.eps)
        _require(0.0 <= self.weight_decay < math.inf, "weight_decay", "be finite and >= 0", self.weight_decay)
        _require(0.0 <= self.l2 < math.inf, "l2", "be finite and >= 0", self.l2)
        if self.name == "adam":
            must = "be 0 for 'adam' ('adamw' decays so, l2 enters the moments)"
            _require(self.weight_decay == 0.0, "weight_decay", must, self.weight_decay)
        _require(_is_regex(self.decay_mask), "decay_mask", "be a regular expression", self.decay_mask)
        if self.schedule == "sqrt":
            _require(self.warmup_steps > 0, "warmup_steps", "be > 0 for the schedule 'sqrt'", self.warmup_steps)
            _require(self.hidden_units > 0, "hidden_units", "be > 0 for the schedule 'sqrt'", self.hidden_units)


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of t. `steps` is the length of the run.

    With w = warmup_steps, and every schedule but 'sqrt' multiplied by the warm-up min(1, s / w), so that the first
    update already moves:

    * constant: the peak.
    * sqrt: c h^-1/2 min(s^-1/2, s w^-3/2), the schedule of the VQ-VAE-2 priors (supplement, Tables 1 and 2).
    * cosine: the peak until t0 = max(cosine_start, w), then low + (peak - low) (1 + cos(pi (t - t0) / T)) / 2 for T
      updates, then low = final_fraction * peak. This is the released JAX code of Efficient-VDVAE; its PyTorch code
      forgets the offset t0, so that the rate reaches its low too early and rises again.
    * exponential: peak * exponential_rate^(s - w) after the warm-up (Glow and MaCow: 0.999997 an update).

    Raises InputError where a cosine without cosine_steps would have no update left for its descent.
    """
    if config.schedule == "sqrt":
        return lambda count: _sqrt(config, _real(count) + 1.0)
    if config.schedule == "cosine":
        start, length = _cosine_span(config, steps)
        decay = lambda t: _cosine((t - start) / length, config.final_fraction)
    elif config.schedule == "exponential":
        # rate^n as exp(n log rate), the logarithm taken in double: float32 knows 1 - 0.999997 to two digits only, and
        # the schedule of MaCow would end 3% too high.
        log_rate, first = math.log(config.exponential_rate), max(config.warmup_steps, 1)
        decay = lambda t: jnp.exp(log_rate * jnp.maximum(t + 1.0 - first, 0.0))
    else:
        decay = jnp.ones_like
    return lambda count: config.learning_rate * _warmup(config, _real(count)) * decay(_real(count))


def depends_on_steps(config: OptimConfig) -> bool:
    """Whether a longer run would have had other learning rates from its start: a cosine that ends with the run."""
    return config.schedule == "cosine" and config.cosine_steps == 0


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Gradients to updates: l2, scaling by moments, then decoupled weight decay, then the learning rate.

    optax's own transformations are right as they are: `scale_by_adam` adds eps outside the root and debiases both
    moments, as Kingma & Ba 2015; `scale_by_adamax` keeps u <- max(b2 u, |g| + eps) and debiases only m, as PyTorch and
    Efficient-VDVAE. Its alias `optax.adamax` lacks weight decay, hence the chain.
    """
    scale = optax.scale_by_adamax if config.name == "adamax" else optax.scale_by_adam
    parts = [optax.add_decayed_weights(config.l2)] if config.l2 > 0.0 else []
    parts.append(scale(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay > 0.0:
        parts.append(optax.add_decayed_weights(config.weight_decay, lambda params: decayed(params, config.decay_mask)))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule(config, steps)))


def decayed(params: PyTree[Array], decay_mask: str) -> PyTree[bool]:
    """Which parameters decay: those whose path, its names joined by '/', matches. Raises InputError if none does."""
    matches = lambda path, _: re.search(decay_mask, jax.tree_util.keystr(path, simple=True, separator="/")) is not None
    mask = jax.tree_util.tree_map_with_path(matches, params)
    if not any(jax.tree.leaves(mask)):
        raise InputError(
            f"optim.decay_mask '{decay_mask}' matches no parameter; correct it or set optim.weight_decay=0"
        )
    return mask


def polyak(
    ema: PyTree[Array], params: PyTree[Array], decay: float, step: Int[Array, ""] | int, ramp: bool
) -> PyTree[Array]:
    """ema <- d ema + (1 - d) params, with d = min(decay, (1 + t) / (10 + t)) if `ramp`, else d = decay. No debiasing.

    `step` is t, the updates taken before this one. The plain rule is that of the papers; with 0.9999 a run of 600
    updates would still evaluate 94% of its initial weights. Where the dtypes differ the average keeps its own.
    """
    # 1 - d is formed directly: as a difference of float32 numbers near one it would keep four digits. Moving by a share
    # of the distance leaves an average that has arrived exactly where it is.
    weight = 1.0 - decay if not ramp else jnp.maximum(1.0 - decay, 9.0 / (10.0 + _real(step)))
    return jax.tree.map(lambda old, new: (old + weight * (new.astype(old.dtype) - old)).astype(old.dtype), ema, params)


def _warmup(config: OptimConfig, t: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.minimum(1.0, (t + 1.0) / max(config.warmup_steps, 1))


def _sqrt(config: OptimConfig, s: Float[Array, ""]) -> Float[Array, ""]:
    scale = config.learning_rate * config.hidden_units**-0.5
    return scale * jnp.minimum(s**-0.5, s * config.warmup_steps**-1.5)


def _cosine(progress: Float[Array, ""], final: float) -> Float[Array, ""]:
    return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def _cosine_span(config: OptimConfig, steps: int) -> tuple[int, int]:
    """Start and length of the descent, in updates."""
    start = max(config.cosine_start, config.warmup_steps)
    length = config.cosine_steps or steps - start
    if length <= 0:
        raise InputError(
            f"the cosine schedule starts at update {start}, but the run has {steps} steps; "
            "set optim.cosine_steps, lower optim.cosine_start and optim.warmup_steps, or raise steps"
        )
    return start, length


def _real(count: jax.typing.ArrayLike) -> Float[Array, ""]:
    """A count as a float of the default precision: exact in float32 up to 2^24 updates."""
    return jnp.asarray(count, dtype=float)


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _require(holds: bool, key: str, must: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{key} must {must}, not {value!r}")
