"""Latents without a quantiser: their bins, the law of their prior, its sampler, and a whole run (table 5)."""

import io
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitsperdim
from bitsperdim import cli, config_files, data, trainer
from bitsperdim import config as config_lib
from bitsperdim.errors import InputError
from vqvae2 import codes, comparison, latents, quantizers, sampling
from vqvae2.config import AutoencoderConfig
from vqvae2.prior import PixelSnail, Prior, incremental

BINS, DIM, MIXTURES = 5, 2, 3


@pytest.fixture
def kind():
    return quantizers.make(AutoencoderConfig(strides=(4,), quantizer="none", code_dim=3, num_codes=256))


def test_the_decoder_is_given_the_vectors_themselves_in_training_and_the_centres_of_bins_afterwards(kind):
    z = 3.0 + 0.2 * jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
    codebook = kind.init(jax.random.key(1))
    for step in range(3):
        quantized = kind.quantize(codebook.embedding, z)
        named = {"num_codes": 256, "key": jax.random.key(step), "position": jnp.arange(8), "global_batch": 8}
        codebook = kind.update(codebook, kind.statistics(z, quantized.codes, **named))
    vectors = np.asarray(z, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(codebook.embedding[0], vectors.mean(0), rtol=1e-5)
    np.testing.assert_allclose(codebook.embedding[1], vectors.std(0), rtol=1e-2)
    quantized = kind.quantize(codebook.embedding, z)
    np.testing.assert_array_equal(quantized.straight_through, z)
    # A bin reaches 8 deviations / 255 / 2 to either side of its centre, save the outermost two.
    width = 8.0 * np.asarray(codebook.embedding[1]) / 255
    inside = np.abs(z - codebook.embedding[0]) <= 4.0 * codebook.embedding[1]
    error = np.abs(kind.lookup(codebook.embedding, quantized.codes) - z)
    assert (error <= 0.5001 * width)[inside].all()
    assert error.max() > 0.4 * width.max()
    np.testing.assert_allclose(latents.beyond(codebook.embedding, z).mean(), 1.0 - inside.mean(), atol=1e-6)
    gradient = jax.grad(lambda z: kind.quantize(codebook.embedding, z).straight_through.sum())(z)
    np.testing.assert_array_equal(gradient, 1.0)


@pytest.fixture(scope="module")
def prior():
    """A prior over grids of 2x2 cells with two channels of five bins, and random weights that matter."""
    snail = PixelSnail(
        BINS, 6, 8, 8, 1, attention_every=1, attention_heads=2, attention_features=4, channels=DIM, mixtures=MIXTURES
    )
    net = Prior(snail)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 2, 2, DIM), jnp.int32)))
    generator = np.random.default_rng(0)
    scale = lambda leaf: max(np.prod(leaf.shape[:-1]), 1) ** -0.5
    draw = lambda leaf: (scale(leaf) * generator.standard_normal(leaf.shape)).astype(np.float32)
    return net, jax.tree.map(draw, shapes)


def test_the_probabilities_of_all_latents_of_a_grid_sum_to_one(prior):
    net, variables = prior
    # Two cells of the first row, the rest fixed: 5^4 grids.
    every = np.array(list(itertools.product(range(BINS), repeat=2 * DIM))).reshape(-1, 1, 2, DIM)
    raw = jax.jit(net.apply)(variables, jnp.asarray(every))
    log_probs = -np.float64(latents.nll(raw, jnp.asarray(every), BINS))
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, rtol=1e-5)
    assert np.exp(log_probs).max() < 0.5  # no certainty that would hide the rest


def test_a_channel_depends_on_every_value_before_it_and_on_none_after(prior):
    """Order: cells by rows, then channels. The log-pmf of each channel, perturbed at each other one."""
    net, variables = prior
    rng = np.random.default_rng(1)
    grid = rng.integers(0, BINS, size=(1, 2, 2, DIM))
    places = list(np.ndindex(2, 2, DIM))
    others = np.repeat(grid, len(places), 0)
    for row, place in enumerate(places):
        others[(row, *place)] = (others[(row, *place)] + 2) % BINS
    log_pmf = latents.distributions.discretized_logistic_mixture_log_pmf

    def every(grids):
        raw = net.apply(variables, grids)
        return jnp.stack([log_pmf(raw, grids, BINS, channel) for channel in range(DIM)], 3)

    of_grid = np.asarray(jax.jit(every)(jnp.asarray(np.concatenate([grid, others]))))
    change = np.abs(of_grid[1:] - of_grid[:1]).max(-1)  # [perturbed, h, w, d]
    for row, place in enumerate(places):
        for other, place_of in enumerate(places):
            if other <= row:
                assert change[(row, *place_of)] < 1e-6, (place, place_of)
            else:
                assert change[(row, *place_of)] > 1e-6, (place, place_of)


def test_the_gradient_of_the_likelihood_reaches_every_parameter_and_is_the_numeric_one(prior):
    net, variables = prior
    grids = jnp.asarray(np.random.default_rng(2).integers(0, BINS, size=(4, 2, 2, DIM)))
    value_and_grad = jax.jit(jax.value_and_grad(lambda v: latents.nll(net.apply(v, grids), grids, BINS).mean()))
    gradient = value_and_grad(variables)[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    # Along itself its slope is its length.
    length = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    moved = lambda size: value_and_grad(jax.tree.map(lambda a, b: a + size / length * b, variables, gradient))[0]
    np.testing.assert_allclose((moved(3e-4) - moved(-3e-4)) / 6e-4, length, rtol=1e-2)


@pytest.fixture(scope="module")
def samplers(prior):
    """(temperature) -> three grids from whole passes, and from cells one after another."""
    net, variables = prior
    shape, choose = (3, 2, 2, DIM), latents.choose(BINS)
    noise = latents.uniforms(jax.random.key(0), jnp.arange(3), MIXTURES, DIM)
    draw = lambda network: jax.jit(lambda t: sampling.sample_codes(network, noise, shape, t, choose=choose))
    return draw(sampling.whole(lambda grid: net.apply(variables, grid))), draw(incremental(net, variables))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_cached_sampling_draws_what_whole_passes_draw(samplers, temperature):
    whole, cached = (np.asarray(sampler(temperature)) for sampler in samplers)
    np.testing.assert_array_equal(cached, whole)
    assert len(np.unique(whole.reshape(3, -1), axis=0)) == (3 if temperature else 1)


def test_sampled_cells_follow_the_pmf():
    raw = jax.random.normal(jax.random.key(3), (MIXTURES * (1 + 2 * DIM + 1),)).at[MIXTURES + MIXTURES :].add(-0.5)
    noise = latents.uniforms(jax.random.key(0), jnp.arange(40_000), MIXTURES, DIM)(jnp.int32(5))
    drawn = np.asarray(latents.choose(BINS)(jnp.broadcast_to(raw, (40_000, raw.size)), noise, 1.0))
    every = np.array(list(itertools.product(range(BINS), repeat=DIM)))
    expected = 40_000 * np.exp(
        -np.asarray(latents.nll(jnp.broadcast_to(raw, (25, 1, 1, raw.size)), every[:, None, None], BINS))
    )
    counts = np.bincount(drawn @ [BINS, 1], minlength=25)
    seen = expected > 5
    assert ((counts - expected) ** 2 / expected)[seen].sum() < seen.sum() + 4 * np.sqrt(2 * seen.sum())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole chain of the tiny variant; not to be changed."""
    values = config_lib.to_plain(config_files.load("vqvae2_imagenet:table5_tiny").to_dict())
    values["data"] = {"source": "synthetic", "image_size": 16, "synthetic_size": 32}
    values["autoencoder"]["model"] |= {"dtype": "float32", "residual_layers": 1, "flip": False}
    values["top"]["model"] |= {"dtype": "float32", "remat": False, "layers": 1, "attention_every": 0, "dropout": 0.0}
    values["top"]["model"] |= {"output_layers": 0, "class_conditional": False}
    return trainer.train(values, str(tmp_path_factory.mktemp("latents") / "run"))


def test_a_run_reports_the_bits_of_its_bins_beside_the_distortion_of_what_they_decode_to(run):
    measured = trainer.evaluate(run, "evaluation")
    nats = 16 * measured["nats_per_code_top"]
    assert measured["rate_bits_per_image"] == pytest.approx(nats / math.log(2.0))
    assert measured["bins_per_channel"] == 256
    source = data.open_source(run.config.data, "evaluation")
    images = source.read(np.arange(source.size))["image"]
    stored = codes.open_codes(run, "evaluation").read(np.arange(source.size))
    assert stored["top"].shape == (source.size, 4, 4, 3) and stored["top"].max() < 256
    loaded = bitsperdim.load(run.workdir)
    np.testing.assert_array_equal(loaded.encode(images)["top"], stored["top"])
    decoded = loaded.decode(stored)
    # Levels are rounded, so a little off the error of the floats.
    mse = np.square((decoded.astype(np.float64) - images) / 128.0).mean()
    assert measured["mse"] == pytest.approx(mse, rel=0.02)
    assert measured["psnr_db"] == pytest.approx(10 * math.log10(4.0 / measured["mse"]))
    assert 0.0 <= measured["autoencoder"]["beyond_bins_top"] < 0.05


def test_a_run_of_latents_samples_and_refuses_what_is_for_codes(run, monkeypatch):
    loaded = bitsperdim.load(run.workdir)
    cached, ancestral = (loaded.draw(jax.random.key(0), 2, sampler=name)[0] for name in ("cached", "ancestral"))
    np.testing.assert_array_equal(cached, ancestral)
    for options in ({"sampler": "fixed_point"}, {"top_k": 3}, {"top_p": 0.5}):
        with pytest.raises(InputError, match="are sampled by 'cached' or 'ancestral', without top_k and top_p"):
            loaded.draw(jax.random.key(0), 2, **options)
    monkeypatch.setattr(comparison, "BATCHES", (2,))
    monkeypatch.setattr(comparison, "SEEDS", 1)
    rows, _ = loaded.compare_samplers(jax.random.key(0), io.StringIO())
    assert [(row["sampler"], row["exact"]) for row in rows] == [("cached", None), ("ancestral", True)]


def test_latents_of_two_levels_are_refused():
    values = config_lib.to_plain(config_files.load("vqvae2_photos:tiny").to_dict())
    values["autoencoder"]["model"]["quantizer"] = "none"
    with pytest.raises(InputError, match=r"quantizer 'none' is for one level .* not \(4, 2\)"):
        cli.run_lib.parse(values)
