"""Noise and scores against recorded vectors, exact laws and what float32 can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import gumbel
from bitsperdim import rng
from bitsperdim.errors import InputError

# The Kolmogorov-Smirnov distance of n exact draws stays below 1.95 / sqrt(n) in 999 of 1000 trials.
KS_LIMIT = 1.95


def ks_to_gumbel(values):
    cdf = np.sort(np.exp(-np.exp(-np.asarray(values, np.float64))))
    steps = np.arange(len(cdf) + 1) / len(cdf)
    return max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())


# --- Noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_independent_standard_gumbel_with_a_whole_upper_tail():
    noise = np.asarray(jax.jit(gumbel.noise(jax.random.key(3), 256))(jnp.arange(16), jnp.arange(512)))
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    assert ks_to_gumbel(noise.ravel()[::7]) < KS_LIMIT / (noise.size / 7) ** 0.5
    # 23 bits end at 15.94 and have only a handful of values above 13.
    tail = noise[noise > 12]
    assert tail.max() > 15.95 and len(np.unique(tail)) == len(tail)
    expected = noise.size * -np.expm1(-np.exp(-12.0))
    assert abs(len(tail) - expected) < 4 * expected**0.5
    # Neighbours among samples, dimensions and values: exp(-noise) has mean 1 and variance 1.
    for axis in range(3):
        products = (np.exp(-noise) - 1) * (np.exp(-np.roll(noise, 1, axis)) - 1)
        assert abs(products.mean()) < 4 / noise.size**0.5


def test_noise_depends_on_sample_and_dimension_alone():
    draw = jax.jit(gumbel.noise(jax.random.key(2), 5))
    ids, dims = np.arange(6), np.arange(4)
    noise = np.asarray(draw(ids, np.tile(dims, (6, 1))))
    # Another batch, another order, and windows of each sample's own.
    others, own = np.array([4, 3, 9, 9, 9, 0]), np.arange(24).reshape(6, 4) % 7
    moved = np.asarray(draw(others, own))
    for row, column in [(0, 0), (0, 3), (1, 3), (5, 2)]:
        np.testing.assert_array_equal(moved[row, column], noise[others[row], own[row, column]])
    calls = [np.asarray(draw(ids, dims, np.full(6, call))) for call in (0, 1)]
    assert len(np.unique(np.stack([noise, *calls]))) == 3 * noise.size


def test_golden_samples(golden):
    g = golden("arm/gumbel")
    np.testing.assert_array_equal(gumbel.best(jnp.float32(g["mu"]), jnp.float32(g["eps"]))[0], g["x"])


# --- Posterior noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize(
    "posterior, name", [(gumbel.exact_posterior, "post"), (gumbel.literal_posterior, "post_literal")]
)
def test_golden_posterior_noise(golden, posterior, name, dtype, tolerance):
    g = golden("arm/gumbel")
    with jax.enable_x64(dtype == np.float64):
        standard, mu = jnp.asarray(-np.log(-np.log(g["v"])), dtype), jnp.asarray(g["mu"], dtype)
        eps = jax.jit(posterior)(standard, mu, jnp.asarray(g["x_data"]))
        assert eps.dtype == dtype
        np.testing.assert_allclose(eps, g[f"eps_{name}"], rtol=tolerance, atol=tolerance)
        maximum = g["max_post" if name == "post" else "max_post_literal"]
        np.testing.assert_allclose((mu + eps).max(-1), maximum, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal((mu + eps).argmax(-1), g["x_data"])


def test_exact_posterior_noise_does_not_depend_on_an_offset_of_the_logits(golden):
    g = golden("arm/gumbel")
    standard, x = jnp.float32(-np.log(-np.log(g["v"]))), jnp.asarray(g["x_data"])
    eps = jax.jit(gumbel.exact_posterior)(standard, jnp.float32(g["mu_raw"]) + 3, x)
    np.testing.assert_allclose(eps, g["eps_post"], atol=1e-5)


@pytest.fixture(scope="module")
def pairs():
    """(logits, x ~ softmax(logits), keys) for p = (.02, .08, .3, .6)."""
    count = 60_000
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.02, 0.08, 0.3, 0.6])), (count, 4))
    keys = rng.per_example(jax.random.key(4), jnp.arange(count))
    return logits, np.random.default_rng(5).choice(4, count, p=[0.02, 0.08, 0.3, 0.6]), keys


def test_posterior_noise_averaged_over_samples_is_the_prior(pairs):
    logits, x, keys = pairs
    eps = np.asarray(jax.jit(gumbel.posterior_noise)(keys, logits, x))
    for value in range(4):
        assert ks_to_gumbel(eps[:, value]) < KS_LIMIT / len(eps) ** 0.5
    # Marginals could be right and the joint law wrong: the components of a prior draw are independent.
    assert np.abs(np.corrcoef(np.exp(-eps.T)) - np.eye(4)).max() < 4 / len(eps) ** 0.5


def test_posterior_noise_as_printed_is_not(pairs):
    logits, x, keys = pairs
    eps = np.asarray(jax.jit(gumbel.posterior_noise_literal)(keys, logits, x))
    np.testing.assert_array_equal((logits + eps).argmax(-1), x)
    distances = [ks_to_gumbel(eps[:, value]) for value in range(4)]
    # The recorded distances of 200,000 draws: 0.043 to 0.221.
    assert min(distances) > 0.03 and max(distances) > 0.2


@pytest.mark.parametrize("posterior", [gumbel.posterior_noise, gumbel.posterior_noise_literal])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_posterior_noise_always_reproduces_its_sample_in_float32(posterior, scale):
    generator = np.random.default_rng(6)
    logits = (scale * generator.normal(size=(20_000, 16))).astype(np.float32)
    # Any value may be the data's, however unlikely; half of them share their logit with another value.
    x = generator.integers(0, 16, 20_000)
    logits[:10_000, 0] = logits[np.arange(10_000), x[:10_000]]
    eps = np.asarray(jax.jit(posterior)(rng.per_example(jax.random.key(6), jnp.arange(20_000)), logits, x))
    assert np.isfinite(eps).all()
    np.testing.assert_array_equal((logits + eps).argmax(-1), x)


def test_posterior_noise_of_bfloat16_logits_and_of_values_ruled_out():
    keys = rng.per_example(jax.random.key(7), jnp.arange(2))
    logits = jnp.array([[0.5, -jnp.inf, 1.0], [2.0, 0.0, -jnp.inf]], jnp.bfloat16)
    eps = jax.jit(gumbel.posterior_noise)(keys, logits, jnp.array([0, 1]))
    assert eps.dtype == jnp.float32 and np.isfinite(eps).all()
    np.testing.assert_array_equal((logits + eps).argmax(-1), [0, 1])


# --- Scores -----------------------------------------------------------------------------------------------------------


restrict = jax.jit(gumbel.restrict, static_argnames=("top_k", "top_p"))
scores = jax.jit(gumbel.scores, static_argnames=("top_k", "top_p"))


def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
    return np.isfinite(restrict(jnp.array(logits), temperature, top_k=top_k, top_p=top_p))


def test_without_restrictions_scores_are_logits_and_noise():
    logits, eps = np.random.default_rng(9).normal(size=(2, 50, 7)).astype(np.float32)
    for options in ({}, {"top_k": 0, "top_p": 1.0}, {"top_k": 7}, {"top_k": 99}):
        np.testing.assert_array_equal(gumbel.scores(logits, eps, **options), logits + eps)


def test_temperature_zero_is_greedy_under_every_restriction():
    logits, eps = np.random.default_rng(10).normal(size=(2, 50, 7)).astype(np.float32)
    for options in ({}, {"top_k": 3}, {"top_k": 3, "top_p": 0.9}):
        np.testing.assert_array_equal(scores(logits, eps, 0.0, **options).argmax(-1), logits.argmax(-1))


def test_restrictions_against_a_plain_reading():
    logits = 2 * np.random.default_rng(11).normal(size=(200, 9)).astype(np.float32)
    for temperature, top_k, top_p in [(1.0, 4, 1.0), (1.0, 0, 0.7), (2.0, 0, 0.7), (0.5, 5, 0.9)]:
        expected = np.zeros(logits.shape, bool)
        for row, mask in zip(logits, expected, strict=True):
            order = np.argsort(-row, kind="stable")[: top_k or 9]
            mass = np.exp(row[order].astype(np.float64) / temperature)
            mass = np.cumsum(mass / mass.sum())
            mask[order[: 1 + (mass < top_p).sum()]] = True
        np.testing.assert_array_equal(kept(logits, temperature, top_k, top_p), expected)


best = jax.jit(gumbel.best, static_argnames=("top_k", "top_p"))
RESTRICTIONS = [(1.0, 0, 1.0), (1.0, 3, 1.0), (0.7, 0, 0.8), (1.3, 4, 0.9), (0.0, 2, 0.9), (1.0, 1, 1.0)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), RESTRICTIONS)
def test_no_change_of_the_logits_within_half_the_margin_changes_the_value(temperature, top_k, top_p):
    """Neither a random change nor that which favours one value over all others."""
    generator = np.random.default_rng(20)
    logits = generator.normal(size=(4000, 6)).astype(np.float32)
    eps = generator.gumbel(size=logits.shape).astype(np.float32)
    value, margin = best(logits, eps, temperature, top_k=top_k, top_p=top_p)
    reach = 0.4999 * np.minimum(margin, 20.0)[:, None] - 1e-6
    signs = [np.where(np.arange(6) == k, 1.0, -1.0) for k in range(6)]
    signs += [-sign for sign in signs] + list(generator.choice([-1.0, 1.0], (40, *logits.shape)))
    signs += list(generator.uniform(-1.0, 1.0, (20, *logits.shape)))
    for sign in signs:
        moved = (logits + np.maximum(reach, 0.0) * sign).astype(np.float32)
        np.testing.assert_array_equal(best(moved, eps, temperature, top_k=top_k, top_p=top_p)[0], value)
    # It is no idle promise: a change of a few times as much does change some.
    changed = [best(logits + 4 * reach * sign, eps, temperature, top_k=top_k, top_p=top_p)[0] for sign in signs]
    assert (np.stack(changed) != np.asarray(value)).any(0).mean() > 0.5


def test_the_margin_knows_the_edge_of_what_is_kept():
    # The third value would win and misses the two that are kept by 0.01; then the choice itself is the last one kept.
    logits, eps = jnp.array([2.0, 1.0, 0.99]), jnp.array([0.0, 0.0, 5.0])
    np.testing.assert_allclose(best(logits, eps, top_k=2)[1], 0.01, rtol=1e-4)
    np.testing.assert_allclose(best(logits, jnp.array([0.0, 4.0, 0.0]), top_k=2)[1], 0.01, rtol=1e-4)
    # Where neither is so, the edge does not matter.
    np.testing.assert_allclose(best(logits, jnp.zeros(3), top_k=2)[1], 1.0)
    # A nucleus of 0.7 whose first value has 0.69 of the mass: the second is in by log-odds of 0.7 less those of 0.69.
    logits = jnp.log(jnp.array([0.69, 0.21, 0.1]))
    value, margin = best(logits, jnp.array([0.0, 6.0, 0.0]), top_p=0.7)
    assert value == 1
    np.testing.assert_allclose(margin, np.log(0.7 / 0.3) - np.log(0.69 / 0.31), rtol=1e-4)


def test_among_equal_logits_the_first_are_kept():
    np.testing.assert_array_equal(kept([1.0, 2.0, 1.0, 1.0], top_k=2), [True, True, False, False])
    np.testing.assert_array_equal(kept([0.0, 0.0, 0.0, 0.0], top_p=0.5), [True, True, False, False])
    np.testing.assert_array_equal(kept([0.0, 0.0, 0.0], top_k=1), [True, False, False])


def test_a_nucleus_holds_at_least_one_value_and_no_extreme_logit_is_undefined():
    np.testing.assert_array_equal(kept([0.0, 3.0, 1.0], top_p=1e-9), [False, True, False])
    np.testing.assert_array_equal(kept([-1e30, 1e30, -jnp.inf], temperature=0.0, top_p=0.9), [False, True, False])
    # Ruled out values are never brought back.
    np.testing.assert_array_equal(kept([-jnp.inf, 1.0, -jnp.inf], top_k=2, top_p=0.99), [False, True, False])


@pytest.mark.parametrize(
    "options, name",
    [
        ((-0.1, 0, 1.0), "temperature"),
        ((float("nan"), 0, 1.0), "temperature"),
        ((float("inf"), 0, 1.0), "temperature"),
        ((1.0, -1, 1.0), "top_k"),
        ((1.0, 2.5, 1.0), "top_k"),
        ((1.0, 0, 0.0), "top_p"),
        ((1.0, 0, 1.1), "top_p"),
        ((1.0, 0, float("nan")), "top_p"),
    ],
)
def test_options_that_no_distribution_has_are_refused(options, name):
    with pytest.raises(InputError, match=name):
        gumbel.check_options(*options)


# --- The loss of a forecast -------------------------------------------------------------------------------------------


def test_golden_divergence_and_its_gradients(golden):
    g = golden("arm/gumbel")
    arm, forecast = jnp.float32(g["kl_logits_arm"]), jnp.float32(g["kl_logits_fc"])
    np.testing.assert_allclose(gumbel.kl_divergence(arm, forecast), g["kl"], rtol=1e-5, atol=1e-6)
    total = lambda arm, forecast: gumbel.kl_divergence(arm, forecast).sum()
    of_arm, of_forecast = jax.jit(jax.grad(total, (0, 1)))(arm, forecast)
    np.testing.assert_allclose(of_forecast, g["dkl_dlogits_fc"], atol=1e-6)
    np.testing.assert_allclose(of_arm, g["dkl_dlogits_arm_if_not_detached"], atol=1e-6)


def test_divergence_is_finite_where_the_teacher_rules_values_out():
    arm, forecast = jnp.array([0.0, -jnp.inf, 0.0]), jnp.array([0.0, 1.0, 0.0])
    value, gradient = jax.jit(jax.value_and_grad(lambda forecast: gumbel.kl_divergence(arm, forecast)))(forecast)
    np.testing.assert_allclose(value, np.log(2 + np.e) - np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.nn.softmax(forecast) - jax.nn.softmax(arm), atol=1e-6)
