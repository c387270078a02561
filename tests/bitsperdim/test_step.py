"""The compiled step on a model whose gradient is known: objective w . mean(c), so the gradient is the mean of c."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import optim, sharding, state
from bitsperdim import step as step_lib
from bitsperdim.model import Aux, Model
from bitsperdim.optim import OptimConfig
from bitsperdim.sharding import MeshConfig
from bitsperdim.step import TrainConfig

BATCH = 8
START = np.array([1.0, -2.0], np.float32)


def _loss(params, extra, batch, key, step):
    values = batch["c"] @ params["w"]
    tallies = {"positive": (values > 0).sum()}
    return values.mean(), Aux({"nats": values}, tallies, {"sum": batch["c"].sum(0)})


def _update_extra(extra, statistics, key, step):
    return {"seen": extra["seen"] + statistics["sum"]}


LINEAR = Model(
    init=lambda key: ({"w": jnp.asarray(START)}, {"seen": jnp.zeros(2)}),
    loss=_loss,
    measure=lambda *_: None,
    summarize=lambda means, tallies: means,
    update_extra=_update_extra,
)


@functools.cache
def _compiled(mesh, config, optim_config):
    optimizer = optim.optimizer(optim_config, config.steps)
    like = state.abstract(LINEAR, optimizer, jax.random.key(0), mesh, MeshConfig())
    return step_lib.compiled(LINEAR, optim_config, config, seed=0, mesh=mesh, like=like), optimizer


class Stepper:
    """Steps a state with gradients of our choice; hands out numpy copies, for the state itself is donated."""

    def __init__(self, mesh, config, optim_config):
        self._step, optimizer = _compiled(mesh, config, optim_config)
        initial = state.initial(LINEAR, optimizer, jax.random.key(0))
        self._state = jax.device_put(initial, sharding.replicated(mesh))
        self._over_batch = sharding.over_batch(mesh)

    def __call__(self, gradient):
        """A step on a batch whose rows scatter around `gradient`."""
        scatter = np.array([[1.0, -1.0]]) * np.linspace(-1, 1, BATCH)[:, None]
        return self.on_rows(np.asarray(gradient) + scatter)

    def on_rows(self, rows):
        batch = {"c": jax.device_put(np.asarray(rows, np.float32), self._over_batch)}
        self._state, report = self._step(self._state, batch)
        return self.state, jax.tree.map(lambda leaf: np.array(leaf)[0], report)

    @property
    def state(self):
        return jax.tree.map(np.array, self._state)


@pytest.fixture
def stepper(sub_mesh):
    def make(learning_rate=0.1, optim=(), **settings):
        optim_config = OptimConfig("adam", learning_rate, **dict(optim))
        return Stepper(sub_mesh(1), TrainConfig(batch_size=BATCH, steps=100, **settings), optim_config)

    return make


# With eps this large Adam's first update is -lr g / eps to four digits: the gradient itself can be read off.
PLAIN = {"eps": 1e4}


def first_update(stepper, gradient, **settings):
    after, report = stepper(learning_rate=1e4, optim=PLAIN, **settings)(gradient)
    return START - after["params"]["w"], report


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4)), ((-30.0, 40.0), (-0.6, 0.8)), ((0.0, 0.0), (0.0, 0.0))],
)
def test_clipping_shortens_long_gradients_to_the_norm_and_leaves_short_ones(stepper, gradient, expected):
    update, report = first_update(stepper, gradient, clip_norm=1.0)
    np.testing.assert_allclose(update, expected, rtol=2e-3, atol=1e-6)
    # What is logged is the norm before clipping.
    np.testing.assert_allclose(report.figures["gradient_norm"], np.hypot(*gradient), rtol=1e-6, atol=1e-6)


def test_without_a_clip_norm_the_gradient_is_taken_as_it_is(stepper):
    update, _ = first_update(stepper, (30.0, 40.0))
    np.testing.assert_allclose(update, (30.0, 40.0), rtol=1e-2)


@pytest.mark.parametrize("ramp", [True, False])
def test_the_polyak_average_is_the_formula_and_its_ramp_counts_updates_taken(stepper, ramp):
    step = stepper(ema_decay=0.5, ema_ramp=ramp, skip_norm=10.0)
    ema, taken = START.astype(np.float64), 0
    for gradient in [(1, 2), (3, 4), (30, 40), (1, 2), (-5, 1), (30, 40), (2, 2)]:
        after, _ = step(gradient)
        if np.hypot(*gradient) <= 10:
            decay = min(0.5, (1 + taken) / (10 + taken)) if ramp else 0.5
            ema = decay * ema + (1 - decay) * after["params"]["w"]
            taken += 1
        np.testing.assert_allclose(after["ema"]["w"], ema, rtol=1e-6)
    assert taken == 5


def test_the_logged_learning_rate_is_the_schedule_at_the_updates_taken(stepper):
    step = stepper(learning_rate=0.4, optim={"warmup_steps": 4}, skip_norm=10.0)
    gradients = [(1, 1), (30, 40), (1, 1), (1, 1), (30, 40), (1, 1), (1, 1)]
    rates = [float(step(gradient)[1].figures["learning_rate"]) for gradient in gradients]
    # A skipped step would have been taken with the rate of the next one that is.
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)


def test_the_logged_learning_rate_is_the_one_that_the_update_had(stepper):
    # Adam under a constant gradient moves by exactly its learning rate (eps aside), whatever the step.
    step = stepper(learning_rate=0.4, optim={"warmup_steps": 4, "eps": 1e-20}, skip_norm=10.0)
    for gradient in [(1, 1), (1, 1), (30, 40), (1, 1), (1, 1), (1, 1)]:
        before = step.state["params"]["w"]
        after, report = step(gradient)
        expected = 0.0 if gradient == (30, 40) else report.figures["learning_rate"]
        np.testing.assert_allclose(before - after["params"]["w"], expected, rtol=1e-4)


NAN, HUGE = (np.nan, 1.0), (np.inf, 1.0)
KEPT = ("params", "ema", "opt", "extra")


@pytest.mark.parametrize("gradient", [NAN, HUGE, (30.0, 40.0)], ids=["nan", "inf", "above skip_norm"])
def test_a_skipped_step_leaves_every_bit_and_is_counted(stepper, assert_same_bits, gradient):
    step = stepper(skip_norm=10.0, clip_norm=1.0)
    before, _ = step((1.0, 2.0))
    after, report = step(gradient)
    assert_same_bits({name: after[name] for name in KEPT}, {name: before[name] for name in KEPT})
    assert after["step"] == before["step"] + 1
    assert report.figures["skipped_steps"] == 1
    finite = gradient == (30.0, 40.0)
    assert after["skips"] == {"total": 1, "in_a_row": 1, "non_finite_in_a_row": 0 if finite else 1}
    # The run goes on from there as if the step had not been.
    again, _ = step((1.0, 2.0))
    assert again["skips"] == {"total": 1, "in_a_row": 0, "non_finite_in_a_row": 0}
    assert not np.array_equal(again["params"]["w"], after["params"]["w"])


def test_one_bad_example_in_the_batch_is_enough_to_skip(stepper, assert_same_bits):
    step = stepper()
    before = step.state
    rows = np.ones((BATCH, 2))
    rows[5, 1] = np.nan
    after, _ = step.on_rows(rows)
    assert_same_bits({name: after[name] for name in KEPT}, {name: before[name] for name in KEPT})


def test_a_norm_of_exactly_the_threshold_is_taken(stepper):
    after, _ = stepper(skip_norm=5.0).on_rows(np.tile([3.0, 4.0], (BATCH, 1)))
    assert after["skips"]["total"] == 0


def test_patience_ends_after_so_many_skips_and_begins_anew(stepper):
    step = stepper(skip_norm=10.0, skip_patience=3)
    taken = []
    for _ in range(9):
        before = step.state["params"]["w"]
        taken.append(not np.array_equal(step((30.0, 40.0))[0]["params"]["w"], before))
    assert taken == [False, False, False, True, False, False, False, True, False]


def test_patience_never_lets_a_non_finite_step_through(stepper, assert_same_bits):
    step = stepper(skip_norm=10.0, skip_patience=2)
    before = step.state
    for _ in range(6):
        after, report = step(NAN)
    assert_same_bits({name: after[name] for name in KEPT}, {name: before[name] for name in KEPT})
    assert report.figures["non_finite_in_a_row"] == 6


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_objective_parts_and_statistics_run_over_all_micro_batches(stepper, accumulation):
    rows = np.random.default_rng(0).normal(size=(BATCH, 2)).astype(np.float32)
    step = stepper(learning_rate=1e4, optim=PLAIN, accumulation=accumulation)
    after, report = step.on_rows(rows)
    values = rows @ START
    np.testing.assert_allclose(report.figures["objective"], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(report.parts["nats"], values.mean(), rtol=1e-5)
    assert report.tallies["positive"] == (values > 0).sum()
    np.testing.assert_allclose(report.figures["gradient_norm"], np.linalg.norm(rows.mean(0)), rtol=1e-5)
    np.testing.assert_allclose(START - after["params"]["w"], rows.mean(0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(after["extra"]["seen"], rows.sum(0), rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_a_loss_knows_means_over_all_micro_batches(accumulation):
    def loss(params, extra, batch, key, step):
        values = batch["c"] @ params["w"]
        weight = batch["whole_batch"] if "whole_batch" in batch else values.mean()
        return jax.lax.stop_gradient(weight) * values.mean(), Aux({}, (), ())

    model = LINEAR._replace(loss=loss, whole_batch=lambda params, extra, batch, *_: (batch["c"] @ params["w"]).mean())
    rows = np.random.default_rng(0).normal(size=(BATCH, 2)).astype(np.float32)
    state = {"params": {"w": jnp.asarray(START)}, "extra": {}, "step": 0}
    places = {"w": sharding.replicated(sharding.make_mesh(MeshConfig()))}
    objective, _, gradients = step_lib._gradients(model, accumulation, state, {"c": jnp.asarray(rows)}, None, places)
    mean = (rows @ START).mean()
    np.testing.assert_allclose(objective, mean**2, rtol=1e-5)
    np.testing.assert_allclose(gradients["w"], mean * rows.mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"log_every": 0}, "log_every must be at least 1, not 0"),
        ({"clip_norm": -1.0}, "clip_norm must be positive, or 0 for none, not -1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), not 1.0"),
        ({"accumulation": 3}, "batch_size must be divisible by accumulation, not 8 by 3"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"batch_size": 8, "steps": 1, **settings})
