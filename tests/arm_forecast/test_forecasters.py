"""Learned forecasts land on their dimensions, and bad ones are given up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import engine, forecasters
from tests.arm_forecast import toys

COUNT, NUM_DIMS, NUM_VALUES = 24, 24, 4
MODEL = toys.table(4, NUM_DIMS, NUM_VALUES, strength=0.4)
NOISE = np.random.default_rng(5).gumbel(size=(COUNT, NUM_DIMS, NUM_VALUES))
GRID = (2, 4, 3)  # rows, columns, channels


@pytest.fixture(scope="module")
def truth():
    return toys.ancestral(jax.jit(lambda x: toys.table_logits(MODEL, x)), NOISE, NUM_DIMS)


def from_table(table, num_modules):
    """Modules that forecast `table(params, call)` [b d], whatever the noise, for the pixels from the anchor on."""

    def predict(params, call, pixel):
        dims = pixel[:, None] * GRID[2] + jnp.arange(num_modules * GRID[2])
        values = jnp.take_along_axis(table(params, call), jnp.minimum(dims, NUM_DIMS - 1), 1)
        return 100.0 * jax.nn.one_hot(values, NUM_VALUES).reshape(len(values), num_modules, GRID[2], NUM_VALUES)

    return predict


def off_by(error):
    """Three modules that are right plus `error(call)`."""
    return from_table(lambda params, call: (params["truth"][call.ids] + error(call)) % NUM_VALUES, 3)


def exact_logits(params, call):
    return toys.table_logits(params, params["truth"][call.ids])


RIGHT, WRONG = off_by(lambda call: 0), off_by(lambda call: 1)
TURNING_BAD = off_by(lambda call: jnp.arange(NUM_DIMS) >= 9)
RIGHT_FOR_EVEN = off_by(lambda call: (call.ids % 2)[:, None])
FORECASTERS = {
    "fixed point": forecasters.fixed_point(),
    "right": forecasters.modules(RIGHT, 3, GRID),
    "right, kept": forecasters.modules(RIGHT, 3, GRID, fallback=False),
    "wrong": forecasters.modules(WRONG, 3, GRID),
    "wrong, kept": forecasters.modules(WRONG, 3, GRID, fallback=False),
    "turning bad": forecasters.modules(TURNING_BAD, 3, GRID),
    "turning bad, kept": forecasters.modules(TURNING_BAD, 3, GRID, fallback=False),
    "right for even": forecasters.modules(RIGHT_FOR_EVEN, 3, GRID),
    "exact logits": toys.next_dims(exact_logits, NUM_DIMS, with_noise=True),
    "exact logits without noise": toys.next_dims(exact_logits, NUM_DIMS, with_noise=False),
}


@pytest.fixture(scope="module")
def calls(truth):
    """`calls(name, batch)` of a forecaster, for every sample."""
    network, forecaster = toys.table_network(MODEL), toys.one_of(list(FORECASTERS.values()))
    draws = {batch: engine.sampler(network, forecaster, COUNT, batch, noise=toys.golden_noise) for batch in (8, 5)}

    def count(name, batch=8):
        params = MODEL | {"truth": jnp.asarray(truth), "mode": list(FORECASTERS).index(name)}
        samples = draws[batch](params, NOISE)
        np.testing.assert_array_equal(samples.x, truth)
        return np.asarray(samples.calls)

    return count


def a_call(frontier, start=0, window=NUM_DIMS):
    """A call of one lane whose outputs are all 1 and whose draws are argmaxima without noise."""
    inputs = jnp.zeros((1, NUM_DIMS), jnp.int32)
    return forecasters.Call(
        ids=jnp.array([0]),
        inputs=inputs,
        outputs=inputs + 1,
        accepted=inputs == 1,
        frontier=jnp.array([frontier]),
        start=jnp.array([start]),
        logits=jnp.zeros((1, window, NUM_VALUES)),
        hidden=(),
        noise=lambda dims: jnp.zeros((*dims.shape, NUM_VALUES)),
        draw=lambda logits, dims: logits.argmax(-1),
    )


def predict_3_then_2(params, call, pixel):
    """Module 0 forecasts 3, module 1 forecasts 2, in every channel."""
    return jax.nn.one_hot(jnp.array([[[3] * 3, [2] * 3]]), NUM_VALUES)


@pytest.mark.parametrize(
    "frontier, start, window, expected",
    [
        (0, 0, 24, [3] * 3 + [2] * 3 + [1] * 18),
        # The anchor is the pixel of the frontier, here its second channel: offsets are whole pixels.
        (7, 0, 24, [1] * 7 + [3] * 2 + [2] * 3 + [1] * 12),
        # Modules may look beyond the window, and past the last pixel there is nothing.
        (7, 6, 3, [1] * 7 + [3] * 2 + [2] * 3 + [1] * 12),
        (22, 0, 24, [1] * 22 + [3] * 2),
        # The whole window was accepted: nothing was evaluated at the anchor.
        (9, 6, 3, [1] * 24),
    ],
)
def test_modules_forecast_the_pixels_from_the_frontier_on(frontier, start, window, expected):
    forecaster = forecasters.modules(predict_3_then_2, 2, GRID, fallback=False)
    forecast, _ = forecaster.forecast({}, a_call(frontier, start, window), forecaster.init(1))
    np.testing.assert_array_equal(forecast[0, frontier:], expected[frontier:])


@pytest.mark.parametrize(
    "calls, accepted, followed",
    [
        # Two calls after the fixed point, two after the modules; then the better mean of a call.
        ([1, 0], [5, 0], False),
        ([2, 0], [9, 0], True),
        ([2, 1], [9, 1], True),
        ([2, 2], [9, 8], False),
        ([2, 2], [8, 9], True),
        ([4, 3], [12, 10], True),
        ([4, 3], [16, 11], False),
        ([9, 3], [27, 10], True),
        ([3, 3], [4, 27], True),
        # Never more than every second call: a few long runs by chance must not keep the fixed point out.
        ([2, 3], [4, 27], False),
    ],
)
def test_the_better_mean_of_a_call_decides_after_a_trial_of_both(calls, accepted, followed):
    forecaster = forecasters.modules(predict_3_then_2, 2, GRID)
    state = forecasters.ModulesState(jnp.array([-1]), jnp.array([calls]), jnp.array([accepted]))
    forecast, _ = forecaster.forecast({}, a_call(9), state)
    assert forecast[0, 9] == (3 if followed else 1)


def test_right_modules_save_calls(calls):
    # The first call knows nothing; then at least two pixels and what is left of the anchor are right.
    assert calls("right, kept").max() <= 1 + -(-(NUM_DIMS - 1) // 7)
    assert calls("right, kept").mean() < 0.8 * calls("fixed point").mean()
    # With a choice the fixed point is tried first.
    assert calls("right").mean() < 0.95 * calls("fixed point").mean()


def test_wrong_modules_are_hardly_ever_followed(calls):
    # Zeros, before the first call, may be right a few times.
    assert calls("wrong, kept").min() >= NUM_DIMS - 3
    more = calls("wrong") - calls("fixed point")
    assert more.max() <= 4 and more.mean() < 2.5


def test_modules_that_turn_bad_are_given_up_once_their_lead_is_used_up(calls):
    assert calls("turning bad").mean() < 0.75 * calls("turning bad, kept").mean()


def test_the_record_is_each_samples_own(calls):
    # Neither the even nor the odd samples' calls depend on who shares the batch.
    np.testing.assert_array_equal(calls("right for even", 8), calls("right for even", 5))
    np.testing.assert_array_equal(calls("right for even")[::2], calls("right")[::2])
    np.testing.assert_array_equal(calls("right for even")[1::2], calls("wrong")[1::2])


def test_modules_work_in_windows(truth):
    network = toys.windowed_network(MODEL, 12, 6)
    draw = engine.sampler(network, FORECASTERS["right"], COUNT, 8, noise=toys.golden_noise)
    samples = draw(MODEL | {"truth": jnp.asarray(truth)}, NOISE)
    np.testing.assert_array_equal(samples.x, truth)
    assert samples.calls.max() <= 7


def test_forecasts_use_the_noise_of_the_dimension_they_forecast(calls):
    # The exact logits of the true sample, drawn with its noise, are the true sample.
    assert calls("exact logits").max() <= 2
    assert calls("exact logits without noise").mean() > 6
