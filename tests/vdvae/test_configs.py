"""The published configs have the published sizes, without making a single parameter."""

import jax
import numpy as np
import pytest

from bitsperdim import config_files, optim
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from vdvae import layers, levels, model_stage, vae

# Millions of parameters, of them in maps ('enter/bias_map') and bottom-up; latent dimensions; layers up and down.
EFFICIENT = {
    "vdvae_binary_mnist:released": (69.92, 0.06, 19.4, 72_352, 23, 23),
    "vdvae_cifar10:c1": (18.12, 0.09, 6.7, 413_744, 33, 47),
    "vdvae_cifar10:released": (56.60, 0.52, 16.5, 827_488, 33, 47),
    "vdvae_imagenet32:c1": (52.29, 0.12, 16.3, 1_157_664, 48, 73),
    "vdvae_imagenet32:released": (145.07, 0.70, 38.9, 771_776, 48, 73),
    "vdvae_imagenet32:compact": (19.56, 0.06, 7.1, 771_776, 48, 73),
    "vdvae_imagenet64:c1": (57.00, 0.42, 16.6, 4_427_136, 53, 84),
    "vdvae_imagenet64:released": (168.37, 2.79, 43.4, 2_213_568, 53, 84),
    "vdvae_imagenet64:compact": (42.55, 0.25, 14.8, 2_213_568, 53, 84),
    "vdvae_celeba64:released": (131.40, 2.79, 36.1, 3_514_432, 41, 62),
    "vdvae_celeba64:compact": (25.43, 0.25, 10.5, 3_514_432, 41, 62),
    "vdvae_celebahq256:released_5bit": (197.68, 44.74, 54.0, 8_941_632, 68, 66),
    "vdvae_ffhq256:released_5bit": (197.68, 44.74, 54.0, 8_941_632, 68, 66),
    "vdvae_ffhq256:c1": (67.03, 11.38, 22.3, 8_941_632, 68, 66),
    "vdvae_celebahq256:released_8bit": (208.87, 44.74, 55.0, 43_442_304, 68, 69),
    "vdvae_ffhq256:released_8bit": (208.87, 44.74, 55.0, 43_442_304, 68, 69),
    "vdvae_celebahq256:compact": (71.23, 4.10, 24.3, 43_442_304, 68, 69),
    "vdvae_ffhq256:compact": (71.23, 4.10, 24.3, 43_442_304, 68, 69),
    "vdvae_faces1024:celebahq": (75.87, 16.69, 22.0, 395_468_928, 49, 72),
    "vdvae_faces1024:ffhq": (75.87, 16.69, 22.0, 395_468_928, 49, 72),
}
# Millions of parameters, layers.
BASELINE = {
    "vdvae_cifar10:vdvae": (39.15, 43),
    "vdvae_imagenet32:vdvae": (119.28, 78),
    "vdvae_imagenet64:vdvae": (125.01, 75),
    "vdvae_ffhq256:vdvae": (114.87, 66),
    "vdvae_faces1024:vdvae": (109.37, 70),
}
# Of table 4: (latent and output beta), base and bound of the output's scale.
SMOOTHING = {
    "vdvae_cifar10:c1": (0.6931472, 0.6931472, "std", -250.0),
    "vdvae_imagenet32:c1": (0.6931472, 1.0, "log_std", -250.0),
    "vdvae_imagenet64:c1": (0.6931472, 1.0, "log_std", -250.0),
    "vdvae_ffhq256:c1": (0.6931472, 1.0, "log_std", -14.0),
    "vdvae_ffhq256:released_5bit": (0.6931472, 0.6931472, "std", -14.0),
    "vdvae_faces1024:ffhq": (0.4, 0.4, "std", -250.0),
}
SCHEDULES = {  # steps, start and length of the descent, last rate, clip, skip
    "vdvae_binary_mnist:released": (200_000, 5000, 195_000, 1e-4, 0.0, 800.0),
    "vdvae_cifar10:c1": (800_000, 50_000, 750_000, 2e-4, 0.0, 800.0),
    "vdvae_imagenet64:released": (800_000, 50_000, 750_000, 2e-4, 0.0, 800.0),
    "vdvae_celeba64:released": (800_000, 50_000, 750_000, 1e-4, 0.0, 800.0),
    "vdvae_celebahq256:released_5bit": (500_000, 50_000, 400_000, 1e-4, 15.0, 1000.0),
    "vdvae_celebahq256:released_8bit": (800_000, 50_000, 750_000, 1e-4, 300.0, 800.0),
    "vdvae_ffhq256:released_5bit": (900_000, 50_000, 750_000, 1e-4, 20.0, 1000.0),
    "vdvae_ffhq256:released_8bit": (900_000, 50_000, 850_000, 1e-4, 0.0, 500.0),
    "vdvae_faces1024:celebahq": (900_000, 50_000, 850_000, 1e-4, 300.0, 1200.0),
}


def parsed(name):
    return run_lib.parse(config_files.load(name))[1]


def model_of(name):
    config = parsed(name)
    edge = config.data.image_size or 28
    if config.model.output == "bernoulli":
        return config, vae.make(config.model, Facts((edge, edge, 1), 2))
    return config, vae.make(config.model, Facts((edge, edge, 3), 2**config.data.bits))


def shapes(model):
    return jax.eval_shape(lambda: vae.init(model, jax.random.key(0)))


def millions(table):
    return round(layers.size(table) / 1e6, 2)


@pytest.mark.parametrize("name", EFFICIENT)
def test_published_sizes(name):
    total, maps, bottom_up, latent_dims, up, down = EFFICIENT[name]
    _, model = model_of(name)
    table = model.net.table
    assert millions(table) == total
    of_maps = [level["enter"]["bias_map"] for level in table["top_down"].values() if "enter" in level]
    assert millions(of_maps) == maps
    found = layers.size([table["bottom_up"], table["ends"]["input"]]) / 1e6
    assert found == pytest.approx(bottom_up, abs=0.051)
    assert sum(np.prod(shape) for shape in levels.latent_shapes(model.net.levels)) == latent_dims
    # Skip connections, of which the released code has one for each of its bottom-up layers but plain blocks.
    assert sum(level.skips for level in model.net.levels) <= up == sum(level.blocks for level in model.net.levels)
    assert model.num_layers == down


@pytest.mark.parametrize("name", BASELINE)
def test_published_sizes_of_the_baseline(name):
    total, count = BASELINE[name]
    config, model = model_of(name)
    assert (millions(model.net.table), model.num_layers) == (total, count)
    assert all(jax.tree.leaves(optim.decayed(shapes(model), config.optim.decay_mask)))


@pytest.mark.parametrize("name", SMOOTHING)
def test_published_smoothing(name):
    model = parsed(name).model
    beta, output_beta, base, bound = SMOOTHING[name]
    assert (model.latent, model.output_scale, model.min_log_scale) == ("std", base, bound)
    assert (model.latent_beta, model.output_beta) == pytest.approx((beta, output_beta))


@pytest.mark.parametrize("name", SCHEDULES)
def test_published_schedules(name):
    config = parsed(name)
    steps, start, length, last, clip, skip = SCHEDULES[name]
    assert (config.train.steps, config.train.clip_norm, config.train.skip_norm) == (steps, clip, skip)
    rate = optim.schedule(config.optim, steps)
    assert rate(0) == pytest.approx(1e-5) and rate(99) == pytest.approx(1e-3)
    assert rate(start) == pytest.approx(1e-3) and rate(start + length // 2) == pytest.approx(
        (1e-3 + last) / 2, rel=1e-3
    )
    assert rate(start + length) == pytest.approx(last) and rate(start + length + 10_000) == pytest.approx(last)


def test_the_divergence_is_whole_from_update_5042():
    config = parsed("vdvae_cifar10:c1").objective
    assert model_stage.beta(config, 1) == pytest.approx(1e-4)
    assert model_stage.beta(config, 2500) == pytest.approx((2500 - 21) / 5021)
    assert model_stage.beta(config, 5041) < 1.0 and model_stage.beta(config, 5042) == 1.0
    assert model_stage.beta(parsed("vdvae_binary_mnist:released").objective, 542) == 1.0
    assert model_stage.beta(parsed("vdvae_cifar10:vdvae").objective, 1) == 1.0


def test_balancing_ends_behind_its_last_update():
    config = parsed("vdvae_cifar10:c1").objective
    kl, sizes = np.float32([4.0, 1.0]), np.float32([2.0, 1.0])
    np.testing.assert_allclose(model_stage.gamma(config, 10_000, kl, sizes), [4 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(model_stage.gamma(config, 10_001, kl, sizes), [1.0, 1.0])
    assert np.isfinite(model_stage.gamma(config, 1, 0.0 * kl, sizes)).all()


def test_decay_spares_heads_projections_maps_and_biases():
    config, model = model_of("vdvae_cifar10:c1")
    mask = optim.decayed(shapes(model), config.optim.decay_mask)
    level = mask["top_down"]["level_1"]
    decays = lambda tree: any(jax.tree.leaves(tree))
    assert decays(level["layers"]["prior"]["conv_3"]["kernel"]) and decays(
        mask["bottom_up"]["level_1"]["pool"]["kernel"]
    )
    for spared in ("prior_projection", "posterior_projection", "z_projection"):
        assert not decays(level["layers"][spared])
    assert not decays(mask["ends"]) and not decays(mask["bottom_up"]["level_1"]["skips"])
    assert not decays(level["enter"]["bias_map"]) and not decays(level["layers"]["cell_0"]["conv_0"]["bias"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strides": (2, 4, 2, 2, 2)}, "model.strides must begin with 1"),
        ({"layers": (3, 4, 7, 11)}, "model.layers must have 5 elements"),
        ({"skips": (3, 4, 7, 12, 12)}, r"model.skips must lie in 1..layers"),
        ({"blocks": (3, 4, 7, 6, 12)}, "model.blocks must be at least skips"),
        ({"kernels": (1, 5, 3, 3, 3)}, "model.kernels must be 1 or 3"),
        ({"widths": (384, 384, 192, 96, 0)}, "model.widths must be at least 1"),
        ({"bottlenecks": (0.25, 0.25, 0.25, 0.5, 0.01)}, "model.bottlenecks must leave a channel"),
        ({"strides": (1, 4, 2, 2, 1)}, "model.strides must exceed 1 behind the first where widths change"),
        ({"latent": "gaussian"}, "model.latent must be one of std, log_std"),
        ({"bins": "exact"}, "model.bins must be one of normalised"),
        ({"whiten": (1.0,)}, "model.whiten must be"),
        ({"min_log_scale": float("-inf")}, "model.min_log_scale must be finite"),
        ({"latent_beta": 0.0}, "model.latent_beta must be positive"),
        ({"style": "vdvae"}, "model.skips must be 1"),
    ],
)
def test_values_that_make_no_hierarchy_are_refused_by_name(changes, message):
    config = config_files.load("vdvae_cifar10:c1")
    for key, value in changes.items():
        config.model[key] = value
    with pytest.raises(InputError, match=message):
        run_lib.parse(config)


def test_temperatures_are_as_many_as_levels():
    config = config_files.load("vdvae_cifar10:c1")
    config.sampling.temperatures = (1.0, 0.9)
    with pytest.raises(InputError, match=r"sampling.temperatures must have 1 or 5 elements"):
        run_lib.parse(config)


def test_block_strings_say_what_their_grammar_says():
    found = levels.from_block_strings("1x1,4m1,4x2,8m4", "8x3,8d2,4d4,1x2", width=32, latent=4, widths={8: 16})
    assert found["strides"] == (1, 4, 2) and found["layers"] == (1, 3, 1) and found["blocks"] == (2, 0, 3)
    assert found["widths"] == (32, 32, 16) and found["kernels"] == (1, 3, 3) and found["skips"] == (1, 1, 1)


@pytest.mark.parametrize(
    "decoder, encoder, message",
    [
        ("1x1,4m1,8m4", "8d2,4d2,1x1", "edge 4 must mix in and be pooled to 1"),
        ("1x1,4m1,8x2", "8d2,4d4", "edge 8 must mix in and be pooled to 4"),
        ("4m1,1x1", "4d4", "must begin with the smallest edge"),
        ("1x1,4m1", "4d4,2x1", "encoder blocks must have the edges"),
        ("1x1,4y1", "4d4", "'4y1' in '1x1,4y1' must be"),
    ],
)
def test_block_strings_that_are_no_hierarchy_are_refused(decoder, encoder, message):
    with pytest.raises(InputError, match=message):
        levels.from_block_strings(decoder, encoder, 8, 2)
