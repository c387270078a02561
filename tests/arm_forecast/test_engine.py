"""The predictive sampler against ancestral sampling, recorded call counts and exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import engine, forecasters, gumbel
from bitsperdim import sharding
from bitsperdim.errors import InputError
from tests.arm_forecast import toys

TOYS = ("toy_arm_easy", "toy_arm_chw")


def next_from_table(params, call, pixel):
    """A context-free module: the table's row of each of the next 3 dimensions."""
    dims = jnp.minimum(pixel[:, None] + jnp.arange(3), len(params["fc"]) - 1)
    return params["fc"][dims][:, :, None]


def every_dim_from_table(params, call):
    return jnp.broadcast_to(params["fc"], call.logits.shape)


MODES = {
    "zeros": lambda num_dims: forecasters.zeros(),
    "last": lambda num_dims: forecasters.last(),
    "fpi": lambda num_dims: forecasters.fixed_point(),
    "fpi_noreparam_mode": lambda num_dims: forecasters.fixed_point_without_noise(),
    "module": lambda num_dims: forecasters.modules(next_from_table, 3, (1, num_dims, 1), fallback=False),
    "module_noeps": lambda num_dims: toys.next_dims(every_dim_from_table, 3, with_noise=False),
}


def parameters(g):
    return {"W": jnp.float32(g["W"]), "b": jnp.float32(g["b"]), "fc": jnp.float32(g["fc_table"])}


@pytest.fixture(scope="module", params=TOYS)
def recorded(golden, request):
    """The arrays of a toy, and draw(mode) in batches that do not divide its 16 samples."""
    g = golden(f"arm/{request.param}")
    params = parameters(g)
    network = toys.table_network(params)
    forecaster = toys.one_of([make(network.num_dims) for make in MODES.values()])
    draw = engine.sampler(network, forecaster, 16, 5, noise=toys.golden_noise)
    return g, lambda mode: draw(params | {"mode": list(MODES).index(mode)}, g["eps"])


@pytest.mark.parametrize("mode", MODES)
def test_golden_samples_calls_and_traces(recorded, mode):
    g, draw = recorded
    samples = draw(mode)
    np.testing.assert_array_equal(samples.x, g["x_ancestral"])
    np.testing.assert_array_equal(samples.calls, g[f"calls_{mode}"])
    accepted = g[f"accepted_{mode}"]
    trace = engine.trace(samples.call_of)
    np.testing.assert_array_equal(trace, accepted[:, : trace.shape[1]])
    assert trace.shape[1] == samples.calls.max() and (accepted[:, trace.shape[1] :] == -1).all()
    np.testing.assert_allclose(samples.margin, g["argmax_margin"], atol=2e-6)
    np.testing.assert_allclose(samples.log_prob, g["logp"], rtol=1e-5)


@pytest.mark.parametrize("toy", TOYS)
def test_golden_iteration_until_equality_needs_a_verifying_call(golden, toy):
    g = golden(f"arm/{toy}")
    logits_fn = jax.jit(lambda x: toys.table_logits(parameters(g), x))
    for sample in range(16):
        iterates, calls = toys.jacobi(logits_fn, g["eps"][sample], g["eps"].shape[1])
        assert calls == g["calls_jacobi_equal"][sample]
        np.testing.assert_array_equal(iterates, g["jacobi_trace"][sample, : len(iterates)])
        # Never fewer than the engine's, which verifies nothing.
        assert g["calls_fpi"][sample] <= calls


@pytest.mark.parametrize("toy", TOYS)
def test_fresh_noise_takes_about_the_recorded_number_of_calls(golden, toy):
    g = golden(f"arm/{toy}")
    generator, num_dims = np.random.default_rng(0), len(g["b"])
    eps = jnp.float32(generator.gumbel(size=(num_dims, 400, *g["b"].shape)))  # [call, sample, d, k]
    network = toys.table_network(parameters(g))
    draw = engine.sampler(network, forecasters.fixed_point(), 400, 100, noise=fresh_table, fresh_noise=True)
    calls = np.asarray(draw(parameters(g), eps).calls)
    assert calls.max() <= num_dims
    # The recorded mean comes from few draws too.
    assert abs(calls.mean() - g["calls_freshnoise_mean"]) < 0.6
    assert calls.mean() > 1.3 * g["calls_fpi"].mean()


def fresh_table(eps):
    def noise(ids, dims, call=None):
        assert call is not None
        return eps[call[:, None], ids[:, None], dims]

    return noise


# --- The law ----------------------------------------------------------------------------------------------------------


def deviation(x, expected):
    """How many standard deviations the chi-square of samples x [n d] over all grids is too large; rare ones pooled."""
    num_values = round(len(expected) ** (1 / x.shape[1]))
    index = np.asarray(x) @ num_values ** np.arange(x.shape[1])[::-1]
    counts = np.bincount(index, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    rare = expected * len(x) < 5
    counts, means = (np.append(values[~rare], values[rare].sum()) for values in (counts, expected * len(x)))
    counts, means = counts[means > 0], means[means > 0]
    # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal.
    variance = 2 / (9 * (len(means) - 1))
    return (np.cbrt(((counts - means) ** 2 / means).sum() / (len(means) - 1)) - 1 + variance) / variance**0.5


SMALL = toys.table(3, 4, 3)


def test_samples_come_as_often_as_they_are_likely():
    draw = engine.sampler(toys.table_network(SMALL), forecasters.fixed_point(), 20_000, 1_000)
    expected = toys.probabilities(lambda x: toys.table_logits(SMALL, x), 4, 3)
    assert deviation(draw(SMALL, jax.random.key(0)).x, expected) < 3
    # The test can fail: another temperature is another law.
    assert deviation(draw(SMALL, jax.random.key(0), temperature=1.1).x, expected) > 3


def test_fresh_noise_has_the_same_law():
    eps = jnp.float32(np.random.default_rng(1).gumbel(size=(4, 20_000, 4, 3)))
    network = toys.table_network(SMALL)
    draw = engine.sampler(network, forecasters.fixed_point(), 20_000, 1_000, noise=fresh_table, fresh_noise=True)
    expected = toys.probabilities(lambda x: toys.table_logits(SMALL, x), 4, 3)
    assert deviation(draw(SMALL, eps).x, expected) < 3


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.8}])
def test_restricted_samples_follow_the_restricted_law(options):
    temperature = 1.5

    def restricted(x):
        logits = np.asarray(toys.table_logits(SMALL, x), np.float64) / temperature
        order = np.argsort(-logits, -1)
        mass = np.exp(np.take_along_axis(logits, order, -1))
        mass = np.cumsum(mass / mass.sum(-1, keepdims=True), -1)
        count = options["top_k"] if "top_k" in options else 1 + (mass < options["top_p"]).sum(-1, keepdims=True)
        return np.where(np.argsort(order, -1) < count, logits, -np.inf)

    eps = np.random.default_rng(2).gumbel(size=(20_000, 4, 3))
    draw = engine.sampler(
        toys.table_network(SMALL), forecasters.fixed_point(), 20_000, 1_000, noise=toys.golden_noise, **options
    )
    samples = draw(SMALL, eps, temperature=temperature)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(toys.probabilities(restricted, 4, 3))
    np.testing.assert_allclose(expected.sum(), 1, rtol=1e-5)
    assert deviation(samples.x, expected) < 3


# --- What a sample does not depend on ---------------------------------------------------------------------------------

MODEL = toys.table(4, 12, 4, strength=0.7)
NOISE = np.random.default_rng(5).gumbel(size=(10, 12, 4))


logits_of = jax.jit(lambda x: toys.table_logits(MODEL, x))


@pytest.fixture(scope="module")
def truth():
    return toys.ancestral(logits_of, NOISE, 12)


def by_hand(window=None, stride=None, given=None):
    given = np.full((10, 12), -1) if given is None else given
    each = [toys.fixed_point_by_hand(logits_of, NOISE[n], window, stride, given[n]) for n in range(10)]
    return tuple(np.stack(values) for values in zip(*each, strict=True))


@pytest.mark.parametrize("batch, refill", [(1, True), (3, True), (16, True), (7, False)])
def test_samples_and_calls_do_not_depend_on_batch_and_refilling(truth, batch, refill):
    draw = engine.sampler(
        toys.table_network(MODEL), forecasters.fixed_point(), 10, batch, refill=refill, noise=toys.golden_noise
    )
    samples = draw(MODEL, NOISE)
    np.testing.assert_array_equal(samples.x, truth)
    _, call_of, calls, _ = by_hand()
    np.testing.assert_array_equal(samples.calls, calls)
    np.testing.assert_array_equal(samples.call_of, call_of)
    lockstep = sum(calls[first : first + batch].max() for first in range(0, 10, batch))
    if batch == 1 or not refill:
        assert samples.network_calls == lockstep
    elif batch < 10:
        assert samples.network_calls < lockstep
    for count in (1, 5, 9):
        some = draw(MODEL, NOISE, count=count)
        np.testing.assert_array_equal(some.x[:count], truth[:count])
        np.testing.assert_array_equal(some.x[count:], 0)
        np.testing.assert_array_equal(some.calls, np.where(np.arange(10) < count, calls, 0))
        # No call waits for those that are not wanted.
        busy_until = [0] * batch
        for taken in calls[:count]:
            busy_until[np.argmin(busy_until)] += taken
        assert some.network_calls == max(busy_until) or not refill


@pytest.mark.parametrize("window, stride", [(1, 1), (3, 3), (4, 2), (8, 4)])
def test_windows_with_a_cache_draw_the_same_samples(truth, window, stride):
    network = toys.windowed_network(MODEL, window, stride)
    draw = engine.sampler(network, forecasters.fixed_point(), 10, 4, noise=toys.golden_noise)
    samples = draw(MODEL, NOISE)
    np.testing.assert_array_equal(samples.x, truth)
    _, call_of, calls, _ = by_hand(window, stride)
    np.testing.assert_array_equal(samples.calls, calls)
    np.testing.assert_array_equal(samples.call_of, call_of)
    log_probs = np.asarray(jax.nn.log_softmax(logits_of(truth)))
    expected = np.take_along_axis(log_probs, truth[..., None], -1).sum((1, 2))
    np.testing.assert_allclose(samples.log_prob, expected, rtol=1e-5)


def test_eight_devices_draw_what_one_draws():
    # The context of a window is that of all dimensions in this toy.
    context = np.random.default_rng(7).normal(size=(19, 1, 4)).astype(np.float32)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    assert mesh.size == 8
    draw = engine.sampler(toys.windowed_network(MODEL, 4, 2), forecasters.fixed_point(), 19, 5, mesh=mesh)
    samples = draw(MODEL, jax.random.key(6), context=context)
    assert len(samples.x.sharding.device_set) == 8
    eps = drawn_noise(jax.random.key(6))
    for n in range(19):
        with_context = lambda x, n=n: logits_of(x) + context[n]
        x, call_of, calls, _ = toys.fixed_point_by_hand(with_context, eps[n], 4, 2)
        np.testing.assert_array_equal(samples.x[n], x)
        np.testing.assert_array_equal(samples.call_of[n], call_of)
        assert samples.calls[n] == calls


@jax.jit
def drawn_noise(key):
    """What the sampler draws with this key for its first 19 samples of MODEL."""
    return gumbel.noise(key, 4)(jnp.arange(19), jnp.arange(12))


def test_first_id_continues_a_row_of_samples():
    key = jax.random.key(8)
    draw = engine.sampler(toys.table_network(MODEL), forecasters.fixed_point(), 6, 4)
    first, second, overlapping = (draw(MODEL, key, first_id=first).x for first in (0, 6, 3))
    np.testing.assert_array_equal(jnp.concatenate([first, second])[3:9], overlapping)
    expected = toys.ancestral(logits_of, np.asarray(drawn_noise(key))[:12], 12)
    np.testing.assert_array_equal(jnp.concatenate([first, second]), expected)
    assert (draw(MODEL, jax.random.key(9)).x != first).any()


# --- What decides the calls and not the sample ------------------------------------------------------------------------


def oracle(params, call):
    return params["truth"][call.ids]


# Forecaster, fewest calls, most calls; the first forecasts are all wrong.
ADVERSARIES = {
    "wrong": (toys.stateless(lambda params, call: (oracle(params, call) + 1) % 4), 12, 12),
    "random": (toys.stateless(lambda params, call: (call.outputs * 7 + call.frontier[:, None] * 5) % 4), 3, 12),
    "reversed": (toys.stateless(lambda params, call: call.outputs[:, ::-1]), 3, 12),
    "right": (toys.stateless(oracle), 2, 2),
}


def test_forecasters_change_calls_and_never_samples(truth):
    forecaster = toys.one_of([forecaster for forecaster, _, _ in ADVERSARIES.values()])
    draw = engine.sampler(toys.table_network(MODEL), forecaster, 10, 4, noise=toys.golden_noise)
    for mode, (name, (_, fewest, most)) in enumerate(ADVERSARIES.items()):
        samples = draw(MODEL | {"truth": jnp.asarray(truth), "mode": mode}, NOISE, init=(truth + 1) % 4)
        np.testing.assert_array_equal(samples.x, truth, err_msg=name)
        assert fewest <= samples.calls.min() and samples.calls.max() <= most, name
    # Right from the start: one call.
    samples = draw(MODEL | {"truth": jnp.asarray(truth), "mode": 0}, NOISE, init=truth)
    np.testing.assert_array_equal(samples.call_of, 1)


def test_the_sampler_is_compiled_once_and_params_are_no_constants(truth):
    traced = []

    def logits(params, x, context):
        traced.append(None)
        return toys.table_logits(params, x), ()

    draw = engine.sampler(engine.whole(logits, 12, 4), forecasters.fixed_point(), 10, 4, noise=toys.golden_noise)
    draw(MODEL, NOISE)
    count = len(traced)
    other = toys.table(10, 12, 4)
    samples = draw(other, NOISE, temperature=0.7, first_id=jnp.int32(0))
    assert len(traced) == count
    logits_fn = lambda x: toys.table_logits(other, x)
    np.testing.assert_array_equal(samples.x, toys.ancestral(logits_fn, 0.7 * NOISE, 12))
    # The model's probability of the sample, whatever the temperature that it was drawn at.
    log_probs = np.asarray(jax.nn.log_softmax(logits_fn(samples.x)))
    expected = np.take_along_axis(log_probs, np.asarray(samples.x)[..., None], -1).sum((1, 2))
    np.testing.assert_allclose(samples.log_prob, expected, rtol=1e-5)


def test_first_forecasts_for_all_samples_and_temperature_zero(truth):
    draw = engine.sampler(toys.table_network(MODEL), forecasters.fixed_point(), 10, 7, noise=toys.golden_noise)
    samples = draw(MODEL, NOISE, init=truth[3])
    np.testing.assert_array_equal(samples.x, truth)
    assert samples.calls[3] == 1 and samples.calls.max() > 1
    greedy = draw(MODEL, NOISE, temperature=0.0).x
    np.testing.assert_array_equal(greedy, toys.ancestral(logits_of, 0 * NOISE, 12))


def test_every_sample_is_drawn_under_its_own_context_whatever_lane_it_is_in():
    context = np.float32(np.random.default_rng(11).normal(size=(10, 12, 4)))
    draw = engine.sampler(toys.table_network(MODEL), forecasters.fixed_point(), 10, 3, noise=toys.golden_noise)
    expected = toys.ancestral(lambda x: toys.table_logits(MODEL, x, context), NOISE, 12)
    np.testing.assert_array_equal(draw(MODEL, NOISE, context=context).x, expected)


# --- Given dimensions -------------------------------------------------------------------------------------------------


def clamped_ancestral(given):
    x = np.zeros((10, 12), int)
    for dim in range(12):
        drawn = (np.asarray(logits_of(x)) + NOISE)[:, dim].argmax(-1)
        x[:, dim] = np.where(given[:, dim] < 0, drawn, given[:, dim])
    return x


def givens():
    generator = np.random.default_rng(12)
    values = generator.integers(0, 4, (10, 12))
    prefix = np.where(np.arange(12) < 7, values, -1)
    holes = np.where(generator.random((10, 12)) < 0.4, values, -1)
    # Nothing is given, everything is, and a prefix of another length, beside each other.
    holes[0], holes[1], holes[2] = -1, values[1], np.where(np.arange(12) < 10, values[2], -1)
    return {"prefix": prefix, "holes": holes}


@pytest.mark.parametrize("window, stride", [(12, 12), (4, 2)])
def test_given_dimensions_stay_and_the_rest_is_drawn_after_them(window, stride):
    network = toys.windowed_network(MODEL, window, stride)
    draw = engine.sampler(network, forecasters.fixed_point(), 10, 3, noise=toys.golden_noise)
    for given in givens().values():
        samples = draw(MODEL, NOISE, given=given)
        expected, free = clamped_ancestral(given), given < 0
        np.testing.assert_array_equal(samples.x, expected)
        _, call_of, calls, wrong = by_hand(window, stride, given)
        np.testing.assert_array_equal(samples.call_of, call_of)
        np.testing.assert_array_equal(samples.calls, calls)
        logits = np.asarray(logits_of(expected))
        log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), expected[..., None], -1)[..., 0]
        np.testing.assert_allclose(samples.log_prob, (log_probs * free).sum(1), rtol=1e-5)
        ordered = np.sort(logits + NOISE, -1)
        gaps = np.where(free, ordered[..., -1] - ordered[..., -2], np.inf)
        np.testing.assert_allclose(samples.margin, gaps.min(1), atol=1e-5)
        if window == 12:
            last_free = np.where(free.any(1), 11 - free[:, ::-1].argmax(1), -1)
            wrong &= np.arange(12) != last_free[:, None]
            np.testing.assert_array_equal(engine.mistakes(samples.call_of, given), wrong)


def test_given_dimensions_cost_no_calls_even_without_forecasts():
    draw = engine.sampler(toys.table_network(MODEL), forecasters.none(), 10, 3, noise=toys.golden_noise)
    np.testing.assert_array_equal(draw(MODEL, NOISE, given=np.full((10, 12), -1)).calls, 12)
    for given in givens().values():
        samples = draw(MODEL, NOISE, given=given)
        np.testing.assert_array_equal(samples.x, clamped_ancestral(given))
        np.testing.assert_array_equal(samples.calls, (given < 0).sum(1))


def test_mistakes_are_where_forecasts_were_wrong(golden):
    g = golden("arm/toy_arm_easy")
    trace = g["accepted_fpi"]
    # Acceptance stopped after dimension i - 1 because its forecast was wrong.
    expected = np.zeros((16, 12), bool)
    for sample, accepted in enumerate(trace):
        expected[sample, accepted[(accepted > 0) & (accepted < 12)] - 1] = True
    call_of = 1 + (trace[:, None, :] <= np.arange(12)[None, :, None]).sum(-1, where=trace[:, None, :] >= 0)
    np.testing.assert_array_equal(engine.mistakes(jnp.asarray(call_of)), expected)
    found = engine.trace(call_of)
    np.testing.assert_array_equal(found, trace[:, : found.shape[1]])


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_sampled_is_refused():
    network, fixed_point = toys.table_network(MODEL), forecasters.fixed_point()
    for options, name in [((0, 1), "num_samples"), ((1, 0), "batch")]:
        with pytest.raises(InputError, match=name):
            engine.sampler(network, fixed_point, *options)
    with pytest.raises(InputError, match="top_p"):
        engine.sampler(network, fixed_point, 1, 1, top_p=0)
    for window, stride in [(3, 4), (5, 2), (13, 1)]:
        with pytest.raises(ValueError, match="windows must"):
            engine.sampler(toys.windowed_network(MODEL, window, stride), fixed_point, 1, 1)
    draw = engine.sampler(network, fixed_point, 3, 2)
    for named, message in [
        ({"temperature": -1}, "temperature"),
        ({"given": np.zeros((2, 12))}, r"given must have the shape \[3, 12\]"),
        ({"given": np.full(12, 4)}, "given must hold whole numbers from -1 to 3"),
        ({"given": np.zeros(12)}, "not float64"),
        ({"init": -1}, "init must hold whole numbers from 0 to 3"),
        ({"context": np.zeros((2, 5))}, "context must hold 3 rows"),
    ]:
        with pytest.raises(InputError, match=message):
            draw(MODEL, jax.random.key(0), **named)
