"""The stage `pixels`: a PixelCNN decoder given the codes, and the bound on the image's likelihood that it makes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import cli, config_files, data, distributions, trainer
from bitsperdim import config as config_lib
from bitsperdim.errors import InputError
from vqvae2 import chain, codes
from vqvae2.stages import report

VALUES = 3  # levels of the images


def small():
    """Grey images of 8x8 pixels and three levels, with one map of 2x2 codes."""
    values = config_lib.to_plain(config_files.load("vqvae2_photos:tiny").to_dict())
    values["data"] = {"source": "synthetic", "image_size": 8, "synthetic_size": 32}
    values["data"] |= {"synthetic_channels": 1, "synthetic_levels": VALUES}
    values["autoencoder"]["model"] |= {"strides": (4,), "residual_layers": 1, "flip": False, "num_codes": 4}
    values["pixels"] = values.pop("bottom")
    values["pixels"]["model"]["mixtures"] = 2
    for name in ("autoencoder", "top", "pixels"):
        values[name]["train"] |= {"steps": 2, "batch_size": 8}
        values[name]["optim"]["warmup_steps"] = 1
    for name in ("top", "pixels"):
        values[name]["model"] |= {"dropout": 0.0, "embedding": 8}
    return values


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Every stage complete; not to be changed."""
    return trainer.train(small(), str(tmp_path_factory.mktemp("pixels") / "run"))


@pytest.fixture(scope="module")
def trained(run):
    """log P of each pixel by the network and its weights, as a function of images and codes."""
    mesh = trainer.sharding.mesh_at_hand(run.config.mesh)
    _, state = trainer.restore(run, "pixels", mesh)
    net = chain.network(run, "pixels")
    weights = jax.device_get({"params": state["ema"], **state["extra"]})
    # Nothing small: an untrained head says the same of every image.
    draw = np.random.default_rng(0)
    noisy = lambda leaf: leaf + 0.5 * max(np.prod(leaf.shape[:-1]), 1) ** -0.5 * draw.standard_normal(leaf.shape)
    weights = jax.tree.map(lambda leaf: noisy(leaf).astype(np.float32), weights)
    log_prob = distributions.discretized_logistic_mixture_log_prob
    return jax.jit(lambda image, top: log_prob(net.apply(weights, image, (top,)), image, VALUES))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["top", "pixels"])
def test_examples_of_codes_are_known_before_there_are_any(run, level, assert_example):
    assert_example(run, level)


def test_the_bound_is_the_bits_of_the_pixels_given_the_codes_and_of_the_codes(run):
    measured = trainer.evaluate(run, "evaluation")
    nats = 64 * measured["pixels"]["nats_per_pixel"] + 4 * measured["top"]["nats_per_code"]
    assert measured["bits_per_dim_bound"] == pytest.approx(nats / 64 / math.log(2.0), rel=1e-6)
    given = measured["pixels"]["bits_per_dim_given_codes"]
    assert given == pytest.approx(measured["pixels"]["nats_per_pixel"] / math.log(2.0), rel=1e-6)
    # Noise of three levels has log2 3 bits, which two steps of training do not come near to from below.
    assert math.log2(VALUES) < measured["bits_per_dim_bound"]
    assert measured["rate_bits_per_image"] == pytest.approx(4 * measured["top"]["nats_per_code"] / math.log(2.0))


@pytest.mark.slow
def test_images_stand_beside_their_own_codes(run):
    stage = run.stage("pixels")
    for split in ("train", "evaluation"):
        source, images = stage.source(run, split), data.open_source(run.config.data, split)
        indices = np.arange(source.size)[::-3]
        batch = source.read(indices)
        np.testing.assert_array_equal(batch["pixels"], images.read(indices)["image"])
        np.testing.assert_array_equal(batch["top"], codes.open_codes(run, split).read(indices)["top"])


@pytest.mark.slow
def test_the_last_pixels_sum_to_one_given_those_before_them_and_every_code_matters(trained):
    every = np.array(list(itertools.product(range(VALUES), repeat=3)))
    grids = np.repeat(np.random.default_rng(1).integers(0, VALUES, (1, 8, 8)), len(every), 0)
    grids.reshape(len(every), -1)[:, -3:] = every
    of_pixels = np.float64(trained(jnp.asarray(grids[..., None]), jnp.ones((len(every), 2, 2), jnp.int32)))
    log_probs = of_pixels.reshape(len(every), -1)
    # Whatever the last three are, they change nothing before them, and all their values together are certain.
    np.testing.assert_allclose(log_probs[:, :-3], log_probs[:1, :-3].repeat(len(every), 0), atol=1e-5)
    np.testing.assert_allclose(np.exp(log_probs[:, -3:].sum(1)).sum(), 1.0, rtol=1e-5)
    # Any code changes what is said of some pixel.
    top = np.ones((5, 2, 2), np.int32)
    for index, place in enumerate(np.ndindex(2, 2)):
        top[(index + 1, *place)] = 2
    under = np.asarray(trained(jnp.asarray(grids[:1, ..., None].repeat(5, 0)), jnp.asarray(top)))
    assert (np.abs(under[1:] - under[:1]).max((1, 2)) > 1e-5).all()


@pytest.mark.slow
def test_a_picture_shows_images_decoded_and_drawn(run):
    names = {path.stem.split("-")[0] for path in run.folder("pixels").glob("images/*.png")}
    assert "pixels_given_codes" in names


def test_a_report_bounds_the_bits_of_the_image_by_those_of_its_codes_and_of_its_pixels_given_them():
    _, config = cli.run_lib.parse(small())
    measured = {"autoencoder": {"mse": 0.1}, "top": {"rate_bits_per_image": 20.0, "nats_per_code": 3.0}}
    measured["pixels"] = {"bits_per_image_given_codes": 100.0, "bits_per_dim_given_codes": 100.0 / 64}
    found = report(config, measured)
    assert found["bits_per_dim_bound"] == pytest.approx((20.0 + 100.0) / 64)
    assert found["rate_bits_per_image"] == 20.0  # of the codes alone: it names a reconstruction
    del measured["top"]
    assert "bits_per_dim_bound" not in report(config, measured)


def test_pixels_without_codes_are_refused():
    values = small()
    values["autoencoder"]["model"]["quantizer"] = "none"
    with pytest.raises(InputError, match=r"pixels must be None where autoencoder\.model\.quantizer is 'none'"):
        cli.run_lib.parse(values)
