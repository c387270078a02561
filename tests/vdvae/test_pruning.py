"""Which channels are kept, and the bound without the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim.facts import Facts
from vdvae import levels, network, pruning, vae
from vdvae.config import ModelConfig
from vdvae.layers import Initial
from vdvae.network import Source

LN2 = np.log(2.0)


def test_statistics_and_mask_are_the_published_ones(efficient):
    noise = [Source(noise=eps) for eps in efficient.layers("eps")]
    infer = lambda params: vae.infer(efficient.model, params, efficient.image, noise, pruning.kl_of_channels)[1]
    bits = [np.asarray(kl).mean(0) / LN2 for kl in jax.jit(infer)(efficient.params)]
    np.testing.assert_allclose(bits, efficient.arrays["div_stats_layers_x_variates"], rtol=1e-4)
    kept = pruning.channels(efficient.model, bits, float(efficient.arrays["variate_mask_quantile"]))
    np.testing.assert_array_equal(kept, efficient.arrays["variate_mask"])
    assert pruning.shares(efficient.model, kept)["share_of_channels"] == pytest.approx(0.25)


@pytest.fixture(scope="module")
def small():
    """A pixel with 2 channels, then 4x4 with 3 in two layers; parameters that are nowhere zero."""
    config = ModelConfig(
        strides=(1, 4), layers=(1, 2), skips=(1, 1), blocks=(1, 1), widths=(4, 4), bottlenecks=(0.5, 0.5),
        kernels=(1, 3), latents=(2, 3), mixtures=1,
    )  # fmt: skip
    model = vae.make(config, Facts((4, 4, 1), 17))
    generator = np.random.default_rng(0)
    normal = lambda leaf: (0.4 * generator.normal(size=leaf.shape)).astype(np.float32)
    return model, jax.tree.map(normal, model.net.table, is_leaf=lambda leaf: isinstance(leaf, Initial))


KL = [np.array([0.3, 0.0]), np.array([0.5, 0.2, 0.01]), np.array([0.4, 0.1, 0.0])]


@pytest.mark.parametrize(
    ("share", "count", "expected", "of_dimensions"),
    [
        (1.0, "channels", [[0, 1], [0, 1, 2], [0, 1, 2]], 1.0),
        (1.0, "dimensions", [[0, 1], [0, 1, 2], [0, 1, 2]], 1.0),
        (0.5, "channels", [[0], [0, 1], [0]], 49 / 98),
        (0.33, "dimensions", [[], [0], [0]], 32 / 98),
        (0.34, "dimensions", [[0], [0], [0]], 33 / 98),
        (0.001, "channels", [[], [0], []], 16 / 98),
        (0.001, "dimensions", [[], [0], []], 16 / 98),
    ],
)
def test_shares_count_channels_or_dimensions(small, share, count, expected, of_dimensions):
    kept = pruning.channels(small[0], KL, share, count)
    assert [np.flatnonzero(of_layer).tolist() for of_layer in kept] == expected
    found = pruning.shares(small[0], kept)
    assert found["share_of_dimensions"] == pytest.approx(of_dimensions)
    assert found["share_of_channels"] == pytest.approx(sum(map(len, expected)) / 8)
    assert pruning.num_dims(small[0], kept) == round(98 * of_dimensions)


def test_channels_that_are_all_alike_leave_one():
    model = vae.make(ModelConfig((1,), (1,), (1,), (1,), (2,), (1.0,), (1,), (2,)), Facts((1, 1, 1), 17))
    assert np.concatenate(pruning.channels(model, [np.zeros(2)], 0.5)).sum() == 1


def test_with_every_channel_the_bound_is_that_without_pruning(small):
    model, params = small
    image = np.random.default_rng(2).integers(0, 17, (6, 4, 4, 1), np.uint8)
    keys = jax.random.split(jax.random.key(3), 6)
    bound = jax.jit(lambda kept: pruning.bound(model, params, image, keys, kept)[:2])
    everything = [np.ones(z, bool) for *_, z in levels.latent_shapes(model.net.levels)]
    reconstruction, kl = bound(everything)
    expected, kl_of_layers = jax.jit(lambda: vae.bound(model, params, image, keys))()
    np.testing.assert_allclose(reconstruction, expected, rtol=1e-5)
    np.testing.assert_allclose(kl, kl_of_layers.sum(0), rtol=1e-5)
    # Without any, z comes from the prior, nothing is paid for it, and the image does not matter.
    pruned, nothing = bound([~of_layer for of_layer in everything])
    np.testing.assert_array_equal(nothing, 0.0)
    assert np.abs(pruned - expected).min() > 1e-3
    some = bound([*everything[:2], ~everything[2]])[1]
    np.testing.assert_allclose(some, kl_of_layers[:2].sum(0), rtol=1e-5)


def test_noise_of_prior_and_posterior_is_independent(small):
    model, _ = small
    keys = jax.random.split(jax.random.key(0), 64)
    sources = pruning.sources(model, keys, [np.ones(z, bool) for *_, z in levels.latent_shapes(model.net.levels)])
    draw = lambda keys: np.asarray(jax.vmap(lambda key: model.net.latent.noise(key, (4, 4, 3)))(keys)).ravel()
    noise = np.stack([draw(of) for source in sources for of in (source.noise, source.prior_noise)])
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(correlation).max() < 5.0 / np.sqrt(noise.shape[1])
    np.testing.assert_allclose(noise.std(1), 1.0, atol=0.1)
    as_trained = network.posterior_sources(keys, model.num_layers)
    assert all((ours.noise == theirs.noise).all() for ours, theirs in zip(sources, as_trained, strict=True))


def test_packed_distributions_say_all_of_them(small):
    latent = small[0].net.latent
    numbers = [jnp.asarray(np.random.default_rng(i).normal(size=(2, 3)) * 5, jnp.float32) for i in range(2)]
    distribution = latent.prior(numbers)
    back = latent.unpacked(latent.packed(distribution))
    for ours, theirs in zip(back, distribution, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    noise = np.float32([[0.5, -1.0, 2.0], [0.0, 3.0, -0.1]])
    np.testing.assert_allclose(latent.noise_of(distribution, latent.draw(distribution, noise, 1.0)), noise, atol=1e-3)
