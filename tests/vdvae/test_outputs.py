"""Likelihoods of images: masses that sum to one, the published arithmetic where it is asked for, images drawn."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import distributions
from bitsperdim.errors import InputError
from vdvae import outputs
from vdvae.config import ModelConfig

HIERARCHY = {name: (1,) for name in ("strides", "layers", "skips", "blocks", "widths", "bottlenecks", "kernels")}
PUBLISHED = (
    *("openai_8bit", "openai_5bit", "ev_std_ln2_unbounded_8bit", "ev_std_ln2_bound-3_8bit"),
    *("ev_std_ln2_bound-14_5bit", "ev_std_0.4_unbounded_8bit", "ev_logstd_1.0_bound-7_8bit"),
    *("ev_logstd_1.0_unbounded_8bit", "ev_logstd_ln2_bound-7_5bit"),
)


def config(**changes):
    return ModelConfig(**HIERARCHY, latents=(1,), **changes)


def published_config(arrays, name):
    if name.startswith("openai"):
        exponential = {"output_scale": "log_std", "output_beta": 1.0, "min_log_scale": -7.0}
        return config(bins="published_vdvae", **exponential), 5 if "5bit" in name else 8
    variant = json.loads(str(arrays["variants_json"]))[name]
    assert np.exp(variant["mn"]) == pytest.approx(float(arrays[f"{name}/scale_bound_exp"]))
    scale = {"output_scale": {"std": "std", "logstd": "log_std"}[variant["b"]], "output_beta": variant["beta"]}
    return config(bins="published_efficient", min_log_scale=variant["mn"], **scale), int(variant["bits"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_likelihoods_and_their_gradients(golden, name):
    arrays = golden("vdvae/mol_logprob")
    settings, bits = published_config(arrays, name)
    output = outputs.make(settings, 3, 2**bits)
    x = arrays["images_uint8_nhwc"] >> (8 - bits)
    np.testing.assert_allclose(output.values(x), arrays[f"{name}/target_nhwc"], atol=2e-7)
    nats = lambda raw: output.nats(raw, x.astype(np.int32))
    found, gradient = jax.jit(lambda raw: (nats(raw), jax.grad(lambda raw: nats(raw).sum())(raw)))(
        arrays["logits_nhwc"]
    )
    dims = 8 * 8 * 3
    np.testing.assert_allclose(found / dims, arrays[f"{name}/nll_nats_per_dim_per_image"], rtol=1e-4)
    per_pixel = jax.vmap(jax.vmap(lambda raw, x: output.nats(raw[None, None, None], x[None, None, None])[0]))
    pixels = per_pixel(arrays["logits_nhwc"].reshape(2, 64, 100), x.reshape(2, 64, 3).astype(np.int32))
    expected = arrays[f"{name}/neg_log_prob_per_pixel_bhw"].reshape(2, 64)
    np.testing.assert_allclose(pixels, expected, rtol=1e-4, atol=2e-3)
    key = f"{name}/grad_logits_of_sum" + ("_nhwc" if name.startswith("ev") else "")
    # The recorded one is of the mean over dimensions.
    assert np.linalg.norm(gradient / dims - arrays[key]) < 2e-3 * np.linalg.norm(arrays[key])


def test_every_recorded_likelihood_is_compared(golden):
    recorded = {name.partition("/")[0] for name in golden("vdvae/mol_logprob") if name.startswith(("ev_", "openai_"))}
    assert recorded == set(PUBLISHED)


def test_outputs_are_read_as_the_parameters_that_they_were_made_of(golden):
    arrays = golden("vdvae/mol_logprob")
    mixture = distributions.logistic_mixture(arrays["logits_nhwc"], 3, lambda u: u)
    np.testing.assert_allclose(mixture.log_weights, jax.nn.log_softmax(arrays["raw/mix_logits_bhwm"]), atol=1e-6)
    np.testing.assert_array_equal(mixture.means, arrays["raw/means_bhwcm"])
    np.testing.assert_array_equal(mixture.log_scales, arrays["raw/scale_pre_bhwcm"])
    np.testing.assert_allclose(mixture.coefs, np.tanh(arrays["raw/coeff_pre_bhwcm"]), atol=1e-6)


@pytest.mark.parametrize("name", ["openai_8bit", "openai_5bit"])
def test_in_double_precision_the_published_likelihoods_are_exact(golden, name):
    arrays = golden("vdvae/mol_logprob")
    settings, bits = published_config(arrays, name)
    with jax.enable_x64(True):
        output = outputs.make(settings, 3, 2**bits)
        x = (arrays["images_uint8_nhwc"] >> (8 - bits)).astype(np.int32)
        found = np.asarray(output.nats(arrays["logits_nhwc"].astype(np.float64), x)) / (8 * 8 * 3)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, arrays[f"{name}/f64_nll_nats_per_dim_per_image"], rtol=1e-6)


@pytest.mark.parametrize("bins, bits", [("normalised", 8), ("normalised", 5), ("normalised", 2)])
def test_the_safe_form_differs_from_the_published_one_in_tails_alone(golden, bins, bits):
    arrays = golden("vdvae/mol_logprob")
    output = outputs.make(config(bins=bins), 3, 2**bits)
    x = (arrays["images_uint8_nhwc"] >> (8 - bits)).astype(np.int32)
    found = np.asarray(output.nats(arrays["logits_nhwc"], x)) / (8 * 8 * 3)
    assert np.isfinite(found).all()
    if bits == 8:
        expected = arrays["ev_std_ln2_unbounded_8bit/nll_nats_per_dim_per_image"]
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_published_masses_are_those_of_the_table(golden):
    with jax.enable_x64(True):
        for bits, convention, mean, scale, mass in golden("vdvae/mol_mass_check")["mass_table"]:
            bins = distributions.published_bins(2 ** int(bits), convention == 0)._replace(least_mass=0.0)
            raw = np.array([0.0, mean, np.log(scale)])
            mixture = distributions.logistic_mixture(raw, 1, lambda u: u)
            log_probs = distributions.mixture_log_prob(mixture, jnp.arange(bins.levels)[:, None], bins)
            np.testing.assert_allclose(np.exp(np.asarray(log_probs)).sum(), mass, atol=1e-9)


ADVERSARIAL = {  # outputs for scale and mean
    "narrow": (-40.0, 0.1),
    "wide": (40.0, 0.0),
    "beyond the edge": (-3.0, 5.0),
    "on a level": (-9.0, 1.0),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("scale", ["std", "log_std"])
@pytest.mark.parametrize("channels, bits", [*((1, bits) for bits in range(2, 9)), (3, 2), (3, 3), (3, 4), (2, 3)])
def test_probabilities_of_all_images_of_one_pixel_sum_to_one(channels, bits, scale, kind):
    output = outputs.make(config(output_scale=scale, mixtures=2), channels, 2**bits)
    u, mean = ADVERSARIAL[kind]
    raw = np.random.default_rng(0).normal(size=output.numbers).astype(np.float32)
    kinds = 3 if channels == 3 else 2
    by_channel = raw[2 : 2 + kinds * channels * 2].reshape(channels, kinds, 2)
    by_channel[:, 0], by_channel[:, 1] = mean, u  # a view: raw changes
    every = np.array(list(itertools.product(range(2**bits), repeat=channels)))
    nats = output.nats(jnp.broadcast_to(raw, (len(every), 1, 1, len(raw))), every[:, None, None])
    assert np.isfinite(nats).all()
    np.testing.assert_allclose(np.exp(-np.asarray(nats, np.float64)).sum(), 1.0, atol=2e-5)


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("bits", range(5, 9))
def test_probabilities_of_each_channel_given_those_before_it_sum_to_one(bits, kind):
    """Of images that are too many to enumerate: sum_b P(r, g, b) = P(r, g), sum_g P(r, g) = P(r), sum_r P(r) = 1."""
    u, mean = ADVERSARIAL[kind]
    generator, levels = np.random.default_rng(0), 2**bits
    raw = generator.normal(size=20).astype(np.float32)
    raw[2:].reshape(3, 3, 2)[:, 0] += mean
    raw[2:].reshape(3, 3, 2)[:, 1] += u
    settings, of_levels = config(mixtures=2), distributions.bins(levels)
    mixture = distributions.logistic_mixture(raw, 3, outputs.log_scale(settings))

    def mass(x):
        """P of the first channels of a pixel, by the model of all three or, of fewer, of these alone."""
        count = x.shape[-1]
        first = mixture._replace(
            means=mixture.means[:count],
            log_scales=mixture.log_scales[:count],
            coefs=mixture.coefs[: count * (count - 1) // 2],
        )
        return np.exp(np.asarray(distributions.mixture_log_prob(first, x, of_levels), np.float64))

    whole = lambda x: np.exp(-np.asarray(output.nats(np.broadcast_to(raw, (len(x), 1, 1, 20)), x[:, None, None])))
    output = outputs.make(settings, 3, levels)
    every = np.arange(levels)
    behind = lambda *values: np.stack([*(np.full(levels, value) for value in values), every], -1)
    np.testing.assert_allclose(mass(behind()).sum(), 1.0, atol=2e-5)
    red = mass(behind()).argmax()
    likely = red, mass(behind(red)).argmax()
    for red, green in (likely, (0, 0), (levels - 1, levels // 2), *generator.integers(0, levels, (2, 2))):
        of_green, of_blue = behind(red), behind(red, green)
        np.testing.assert_allclose(whole(of_blue).sum(), mass(of_blue[:1, :2])[0], rtol=2e-5, atol=1e-12)
        np.testing.assert_allclose(mass(of_green).sum(), mass(of_green[:1, :1])[0], rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(
    "bins, bound, u, low, high",
    [
        ("published_efficient", -250.0, -3.0, 1.02, 1.03),  # wider than the bins
        ("published_efficient", -7.0, -300.0, 1.44, 1.46),
        ("published_efficient", -250.0, -300.0, 1.999, 2.001),  # narrower than what two bins share: each has all of it
        ("normalised", -7.0, -300.0, 0.9999, 1.0001),
        ("normalised", -250.0, -300.0, 0.9999, 1.0001),
    ],
)
def test_published_bins_of_five_bits_sum_to_more_than_one(bins, bound, u, low, high):
    output = outputs.make(config(bins=bins, mixtures=1, min_log_scale=bound), 1, 32)
    every = np.arange(32)[:, None, None, None]
    between = np.asarray(output.values(np.arange(15, 17))).mean()
    raw = np.tile(np.float32([0.0, between, u]), (32, 1, 1, 1))
    mass = np.exp(-np.asarray(output.nats(raw, every), np.float64)).sum()
    assert low < mass < high


@pytest.mark.parametrize("settings, levels", [({}, 256), ({"bins": "published_efficient"}, 32), ({}, 17)])
def test_drawn_images_follow_the_likelihood(settings, levels):
    """For one channel: the share of each level is its probability, up to the noise of counting."""
    output = outputs.make(config(mixtures=2, **settings), 1, levels)
    raw = np.array([0.3, -0.2, -0.5, 0.6, -3.0, -2.0], np.float32)
    count, keys = 64, jax.random.split(jax.random.key(0), 64)
    images = np.asarray(output.draw(jnp.broadcast_to(raw, (count, 20, 20, 6)), keys, 1.0))
    assert images.dtype == np.uint8
    every = np.arange(levels)[:, None, None, None]
    expected = np.exp(-np.asarray(output.nats(jnp.broadcast_to(raw, (levels, 1, 1, 6)), every)))
    found = np.bincount(images.ravel(), minlength=levels) / images.size
    limit = 0.04 if settings else 0.02  # the published masses of 5 bits sum to 1.03
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() < limit


def test_temperature_zero_is_the_mean_of_the_likeliest_component():
    output = outputs.make(config(mixtures=2), 1, 256)
    raw = np.array([0.3, 0.2, -0.5, 0.6, 1.0, 1.0], np.float32)
    images = np.asarray(output.draw(jnp.broadcast_to(raw, (2, 3, 3, 6)), jax.random.split(jax.random.key(0), 2), 0.0))
    assert (images == round((-0.5 + 1.0) * 127.5)).all()


def test_bernoulli_pixels():
    output = outputs.make(config(output="bernoulli"), 1, 2)
    raw, x = np.float32([[[[2.0], [-3.0]]]]), np.array([[[[1], [1]]]])
    expected = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(3.0))
    np.testing.assert_allclose(output.nats(raw, x), [expected], rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 4000)
    ones = np.asarray(output.draw(jnp.broadcast_to(raw, (4000, 1, 2, 1)), keys, 1.0)).mean((0, 1, 3))
    np.testing.assert_allclose(ones, 1.0 / (1.0 + np.exp([-2.0, 3.0])), atol=0.025)
    hard = np.asarray(output.draw(raw, keys[:1], 0.0)).ravel()
    np.testing.assert_array_equal(hard, [1, 0])


@pytest.mark.parametrize(
    "settings, levels, message",
    [
        ({"output": "bernoulli"}, 256, "needs images of 2 levels, not 256"),
        ({"bins": "published_vdvae"}, 17, "knows 2, 4, ... 256 levels, not 17"),
        ({"target_bits": 5}, 32, "needs images of 256 levels, not 32"),
    ],
)
def test_outputs_that_do_not_fit_the_images_are_refused(settings, levels, message):
    with pytest.raises(InputError, match=message):
        outputs.make(config(**settings), 1, levels)
