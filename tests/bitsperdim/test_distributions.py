"""Distributions over levels: they sum to one, agree with the published code, and are sampled by their own law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import distributions


@pytest.fixture(scope="session")
def published(golden):
    """Outputs, images and samples of the published PixelCNN++, NHWC."""
    arrays = golden("arm/pcnnpp_tiny_rgb")
    keys = ("logits", "x_int", "dmol_sample_cont", "dmol_sample_snap")
    return arrays | {key: np.moveaxis(arrays[key], 1, -1) for key in keys}


def raw_outputs(channels, mixtures=3, log_scale=-1.0):
    """Outputs for one pixel whose components lie apart, with coefficients that matter."""
    kinds = 2 if channels == 1 else 3
    key_weights, key_rest = jax.random.split(jax.random.key(0))
    rest = jax.random.normal(key_rest, (channels, kinds, mixtures)).at[:, 1].add(log_scale)
    return jnp.concatenate([jax.random.normal(key_weights, (mixtures,)), rest.ravel()])


log_prob = jax.jit(distributions.discretized_logistic_mixture_log_prob, static_argnums=2)
log_pmf = jax.jit(distributions.discretized_logistic_mixture_log_pmf, static_argnums=(2, 3))
sample = jax.jit(distributions.sample_discretized_logistic_mixture, static_argnums=3)


def every_image(channels, levels):
    return np.array(list(itertools.product(range(levels), repeat=channels)))


def test_likelihood_is_the_published_one(published):
    log_probs = log_prob(published["logits"], published["x_int"], 256)
    expected = [published["loss_nats_sample0"], published["loss_nats_sample1"]]
    np.testing.assert_allclose(-log_probs.sum((1, 2)), expected, atol=1e-3)


@pytest.mark.parametrize("levels, name", [(None, "dmol_sample_cont"), (256, "dmol_sample_snap")])
def test_samples_are_the_published_ones(published, levels, name):
    u_mix, u_log = published["u_mix"], published["u_log"]
    found = sample(published["logits"], u_mix, u_log, levels)
    np.testing.assert_allclose(found, published[name], atol=1e-5)


@pytest.mark.parametrize("channels, levels", [(3, 2), (3, 7), (1, 2), (1, 32), (1, 256)])
@pytest.mark.parametrize("log_scale", [-8.0, -1.0, 3.0])
def test_probabilities_of_all_values_of_a_pixel_sum_to_one(channels, levels, log_scale):
    raw, x = raw_outputs(channels, log_scale=log_scale), every_image(channels, levels)
    log_probs = log_prob(raw, x, levels)
    assert np.isfinite(log_probs).all()
    np.testing.assert_allclose(np.exp(np.float64(log_probs)).sum(), 1.0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_conditional_pmfs_are_the_ratios_of_the_joint_one(channels):
    levels, raw = 5, raw_outputs(channels)
    x = every_image(channels, levels)
    joint = np.exp(log_prob(raw, x, levels)).reshape((levels,) * channels)
    for channel in range(channels):
        pmf = np.exp(log_pmf(raw, x, levels, channel))
        marginal = joint.sum(tuple(range(channel + 1, channels)))
        conditional = marginal / marginal.sum(-1, keepdims=True)
        np.testing.assert_allclose(pmf, conditional[tuple(x[:, :channel].T)], rtol=1e-4, atol=1e-6)


def test_samples_follow_the_pmf():
    levels, draws, raw = 3, 100_000, raw_outputs(3)
    key_mix, key_log = jax.random.split(jax.random.key(1))
    uniform = lambda key, last: jax.random.uniform(key, (draws, last), minval=1e-5, maxval=1 - 1e-5)
    values = sample(raw, uniform(key_mix, 3), uniform(key_log, 3), levels)
    x = np.asarray(distributions.value_to_level(values, levels))
    counts = np.bincount(x @ [9, 3, 1], minlength=27)
    log_probs = log_prob(raw, every_image(3, levels), levels)
    expected = draws * np.exp(log_probs)
    seen = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[seen].sum()
    assert seen.sum() > 15
    assert chi_square < seen.sum() + 4 * np.sqrt(2 * seen.sum())


def test_levels_and_values_are_inverse():
    for levels in (2, 17, 256):
        x = np.arange(levels)
        values = distributions.level_to_value(x, levels)
        np.testing.assert_allclose(values, np.linspace(-1, 1, levels), atol=1e-6)
        np.testing.assert_array_equal(distributions.value_to_level(values, levels), x)


def test_likelihood_and_its_gradient_stay_finite_far_from_every_component():
    """The published code floors such masses at 1e-12, where they are far smaller and have a gradient."""
    raw = jnp.array([0.0, 0.9, -7.0])
    of_level_3 = lambda raw: log_prob(raw, jnp.array([3]), 256)
    # log sigmoid'(z) ~ -|z| with z = (x - mean) / s, and the bin's nearer edge counts.
    z = (0.9 - (2 * 3.5 / 255 - 1)) * np.exp(7.0)
    np.testing.assert_allclose(of_level_3(raw), -z, rtol=1e-4)
    gradient = jax.grad(of_level_3)(raw)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[1], -np.exp(7.0), rtol=1e-4)


@pytest.mark.parametrize(
    "size, channels, message", [(14, 4, "14 outputs"), (31, 3, "31 outputs"), (10, 1, "10 outputs")]
)
def test_outputs_that_are_no_mixture_are_refused(size, channels):
    with pytest.raises(ValueError, match=f"{size} outputs do not divide"):
        distributions.logistic_mixture(jnp.zeros(size), channels)


def test_categorical_log_prob_is_the_normalised_logit():
    logits = np.asarray(10 * jax.random.normal(jax.random.key(0), (2, 3, 4)), np.float64)
    x = np.array([[0, 1, 2], [3, 3, 0]], np.uint8)
    expected = np.take_along_axis(logits, x[..., None].astype(int), -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    assert distributions.categorical_log_prob(jnp.asarray(logits, jnp.bfloat16), x).dtype == jnp.float32
    np.testing.assert_allclose(distributions.categorical_log_prob(jnp.asarray(logits), x), expected, atol=1e-5)
