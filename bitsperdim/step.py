"""The compiled training step: gradients over micro-batches, clipping, the skip rule, the Polyak average, statistics.

Everything here happens on the devices, in one program that is given the state and gives it back (donated).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Shaped

from bitsperdim import optim, rng, sharding
from bitsperdim.model import Aux, Batch, Model
from bitsperdim.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of one training stage."""

    batch_size: int  # global, over all hosts and devices
    steps: int
    accumulation: int = 1  # micro-batches a step; less memory; BatchNorm alone sees a difference
    steps_per_dispatch: int = 1  # steps in one compiled program; more of them hide a slow host
    clip_norm: float = 0.0  # global gradient norm; 0: no clipping
    skip_norm: float = 0.0  # a step whose norm exceeds it is not taken; 0: only non-finite ones are not
    skip_patience: int = 100  # after so many skips in a row a finite step is taken all the same
    max_non_finite: int = 50  # so many non-finite steps in a row end the run
    ema_decay: float = 0.9999
    ema_ramp: bool = True  # decay min(ema_decay, (1 + t) / (10 + t)); False: the plain rule of the papers
    log_every: int = 100
    evaluate_every: int = 1000
    pictures_every: int = 1000
    save_every: int = 1000
    keep_checkpoints: int = 2
    tensorboard: bool = False  # event files beside metrics.jsonl
    profile: tuple[int, ...] = ()  # (first, last) step of a profiler trace, in STAGE/profile; (): none
    milestones: tuple[tuple[str, int], ...] = ()  # (name, step): its evaluation is logged as FIGURE_at_NAME too
    best_metric: str = ""  # evaluation figure, smaller is better, whose best step is kept too and used after training

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value}")
            if field.name.endswith("_norm") and value < 0:
                raise ValueError(f"{field.name} must be positive, or 0 for none, not {value}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        if self.best_metric and self.save_every % self.evaluate_every:
            raise ValueError(
                f"save_every must be a multiple of evaluate_every={self.evaluate_every} where best_metric is set, "
                f"not {self.save_every}"
            )
        if self.profile and (len(self.profile) != 2 or not 0 < self.profile[0] <= self.profile[1]):
            raise ValueError(f"profile must be (first, last) step or (), not {self.profile}")
        if self.profile and self.profile[0] > self.steps:
            raise ValueError(f"profile must begin within the {self.steps} steps of the stage, not {self.profile}")
        for name, step in self.milestones:
            if not 0 < step <= self.steps:
                raise ValueError(
                    f"milestones must lie within the {self.steps} steps of the stage, not '{name}' at {step}"
                )
        every = ("steps", "log_every", "evaluate_every", "pictures_every", "save_every")
        for name, step in (*((name, getattr(self, name)) for name in every), *self.milestones):
            if step % self.steps_per_dispatch:
                where = name if name in every else f"milestones '{name}'"
                raise ValueError(
                    f"{where} must be a multiple of steps_per_dispatch={self.steps_per_dispatch}, not {step}"
                )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be divisible by accumulation, not {self.batch_size} by {self.accumulation}"
            )


class Report(NamedTuple):
    """What the `n` steps of a dispatch tell the loop; stays on the devices until the loop asks for it."""

    parts: dict[str, Float[Array, " n"]]  # means over the batch
    tallies: PyTree
    figures: dict[str, Shaped[Array, " n"]]  # objective, gradient norm, learning rate, skip counters


def compiled(
    model: Model, optim_config: OptimConfig, config: TrainConfig, seed: int, mesh: Mesh, like: PyTree
) -> Callable[..., tuple[PyTree, Report]]:
    """`step(state, *batches) -> state, report`, one step for each batch; the state is donated.

    The state is laid out as `like` (from `state.abstract`).
    """
    optimizer = optim.optimizer(optim_config, config.steps)
    learning_rate = optim.schedule(optim_config, config.steps)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)

    def step(state: PyTree, batch: Batch) -> tuple[PyTree, Report]:
        key = rng.step_key(seed, state["step"])
        objective, aux, gradients = _gradients(model, config.accumulation, state, batch, key, places["params"])
        norm = optax.tree.norm(gradients)
        taken, skips = _skip_rule(config, state["skips"], objective, norm)
        if config.clip_norm:
            scale = jnp.minimum(1.0, config.clip_norm / norm)
            gradients = jax.tree.map(lambda leaf: leaf * scale, gradients)
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        num_taken = state["step"] - state["skips"]["total"]
        new = {
            "params": params,
            "ema": optim.polyak(state["ema"], params, config.ema_decay, num_taken, config.ema_ramp),
            "opt": opt,
            "extra": model.update_extra(state["extra"], aux.statistics, key, state["step"]),
        }
        kept = {name: state[name] for name in new}
        new = jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, kept)
        figures = {"objective": objective, "gradient_norm": norm, "learning_rate": learning_rate(num_taken)}
        figures |= {"skipped_steps": skips["total"], "non_finite_in_a_row": skips["non_finite_in_a_row"]}
        parts = {name: values.mean() for name, values in aux.parts.items()}
        return {"step": state["step"] + 1, **new, "skips": skips}, Report(parts, aux.tallies, figures)

    def steps(state: PyTree, *batches: Batch) -> tuple[PyTree, Report]:
        with sharding.by_rows(mesh):
            return jax.lax.scan(step, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))

    return jax.jit(steps, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))


def _gradients(
    model: Model, accumulation: int, state: PyTree, batch: Batch, key: Array, places: PyTree
) -> tuple[Array, Aux, PyTree]:
    """Objective and gradients are means, tallies and statistics sums, over the micro-batches; parts are joined.

    The compiler is told what FSDP is, for left to itself it keeps the sum of the micro-batches whole on every device,
    and sends activations around instead of weights, a hundred times as much: weights are gathered whole before they
    are used (but for the axis `model`, over which they are used as they lie), and gradients live where their
    parameters do.
    """
    value_and_grad = jax.value_and_grad(model.loss, has_aux=True)
    in_use = jax.tree.map(sharding.in_use, places)

    def of(micro: Batch) -> tuple[Array, Aux, PyTree]:
        # Also in every micro-batch, of which the compiler then gathers for the first.
        whole = jax.lax.with_sharding_constraint(state["params"], in_use)
        (objective, aux), gradients = value_and_grad(whole, state["extra"], micro, key, state["step"])
        gradients = jax.tree.map(lambda leaf: leaf / accumulation, gradients)
        return objective / accumulation, aux, jax.lax.with_sharding_constraint(gradients, places)

    if accumulation == 1:
        return of(batch)
    # A micro-batch takes every n-th example, so that each device cuts it from its own rows.
    micros = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulation, *leaf.shape[1:]).swapaxes(0, 1), batch)
    if (whole_batch := model.whole_batch) is not None:
        means = lambda micro: whole_batch(state["params"], state["extra"], micro, key, state["step"])
        whole = jax.tree.map(lambda leaf: leaf.mean(0), jax.lax.map(means, micros))
        micros["whole_batch"] = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (accumulation, *leaf.shape)), whole)
    shapes = jax.eval_shape(of, jax.tree.map(lambda leaf: leaf[0], micros))
    objective, aux, gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _without_parts(shapes))
    total = objective, aux, jax.lax.with_sharding_constraint(gradients, places)
    total, parts = jax.lax.scan(lambda total, micro: _add(total, of(micro)), total, micros)
    objective, aux, gradients = total
    return objective, aux._replace(parts=jax.tree.map(jnp.ravel, parts)), gradients


def _add(total: tuple[Array, Aux, PyTree], new: tuple[Array, Aux, PyTree]) -> tuple[tuple[Array, Aux, PyTree], PyTree]:
    """The sum but for the parts, which are handed on."""
    return jax.tree.map(jnp.add, total, _without_parts(new)), new[1].parts


def _without_parts(value: tuple[Array, Aux, PyTree]) -> tuple[Array, Aux, PyTree]:
    return value[0], value[1]._replace(parts={}), value[2]


def _skip_rule(config: TrainConfig, skips: PyTree, objective: Array, norm: Array) -> tuple[Array, PyTree]:
    """Is this step taken, and the counters after it.

    Never when it is not finite. When its norm exceeds `skip_norm`, only after `skip_patience` skips in a row:
    parameters that always give a larger norm would otherwise lock the run for ever.
    """
    finite = jnp.isfinite(objective) & jnp.isfinite(norm)
    taken = finite
    if config.skip_norm:
        taken &= (norm <= config.skip_norm) | (skips["in_a_row"] >= config.skip_patience)
    return taken, {
        "total": skips["total"] + ~taken,
        "in_a_row": jnp.where(taken, 0, skips["in_a_row"] + 1),
        "non_finite_in_a_row": jnp.where(finite, 0, skips["non_finite_in_a_row"] + 1),
    }
