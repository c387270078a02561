"""Quantisers that a config may name: finite scalars, codes of unit length, and the k-means start."""

import functools
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bitsperdim
from bitsperdim import cli, config_files, trainer
from bitsperdim import config as config_lib
from bitsperdim.errors import InputError
from vqvae2 import fsq, quantizer, quantizers
from vqvae2.config import AutoencoderConfig

LEVELS = [(8, 8, 8), (3,), (5, 4, 3), (7, 5, 6)]


def statistics(kind, z, codes, num_codes, key=0, position=None, global_batch=None):
    position = jnp.arange(len(z)) if position is None else position
    named = {"num_codes": num_codes, "key": jax.random.key(key), "position": position}
    return kind.statistics(z, codes, global_batch=global_batch or len(z), **named)


# Finite scalars.


@pytest.mark.parametrize("levels", LEVELS)
def test_a_channel_of_finite_scalars_takes_exactly_its_number_of_values(levels):
    z = jnp.linspace(-9.0, 9.0, 4001)[:, None] * jnp.ones(len(levels))
    found = np.asarray(fsq.quantize(levels, z[None, None]).straight_through)[0, 0]
    for channel, count in enumerate(levels):
        values = np.unique(found[:, channel].round(5))
        # Evenly spaced by 1 / floor(L / 2), 0 among them; of an even number the one below -1 + ... is the extra one.
        np.testing.assert_allclose(values, (np.arange(count) - count // 2) / (count // 2), atol=1e-5)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_code_of_finite_scalars_is_looked_up_as_what_the_decoder_was_given(levels):
    z = 2.5 * jax.random.normal(jax.random.key(0), (4, 16, 16, len(levels)))
    quantized, table = fsq.quantize(levels, z), fsq.table(levels)
    assert len(np.unique(table, axis=0)) == len(table) == math.prod(levels)
    np.testing.assert_allclose(table[np.asarray(quantized.codes)], quantized.straight_through, atol=1e-6)
    np.testing.assert_array_equal(quantized.squared_error, 0.0)
    if len(levels) < 3:
        assert len(np.unique(quantized.codes)) == len(table)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_gradient_through_finite_scalars_is_the_derivative_of_their_bound(levels):
    z = np.asarray(jax.random.normal(jax.random.key(1), (1, 2, 3, len(levels))), np.float64)
    gradient = jax.grad(lambda z: fsq.quantize(levels, z).straight_through.sum())(jnp.asarray(z, jnp.float32))
    count = np.array(levels)
    shift = np.arctanh(np.where(count % 2, 0.0, 1.0 / (count - 1)))
    slope = (count - 1) / 2 * (1.0 - np.tanh(z + shift) ** 2) / (count // 2)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)
    np.testing.assert_allclose(fsq.bound(levels, jnp.zeros(len(levels))), 0.0, atol=1e-6)


def test_finite_scalars_learn_no_codebook():
    kind = quantizers.make(AutoencoderConfig(quantizer="fsq", fsq_levels=(5, 4), code_dim=2, num_codes=20))
    before = kind.init(jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (4, 3, 3, 2))
    codes = kind.quantize(before.embedding, z).codes
    found = statistics(kind, z, codes, 20)
    np.testing.assert_array_equal(found.counts, np.bincount(np.asarray(codes).ravel(), minlength=20))
    after = kind.update(before, found)
    jax.tree.map(np.testing.assert_array_equal, after, before)


# Codes of unit length.


@pytest.fixture
def cosine():
    return quantizers.make(AutoencoderConfig(quantizer="cosine", code_dim=4, num_codes=12))


def test_codes_of_unit_length_stay_so_and_the_nearest_is_that_of_the_largest_cosine(cosine):
    codebook = cosine.init(jax.random.key(0))
    for step in range(6):
        # Lengths that differ a hundredfold, which a Euclidean codebook would spend its codes on.
        lengths = jnp.exp(3.0 * jax.random.normal(jax.random.key(100 + step), (16, 3, 3, 1)))
        z = lengths * jax.random.normal(jax.random.key(step), (16, 3, 3, 4))
        np.testing.assert_allclose(jnp.linalg.norm(codebook.embedding, axis=-1), 1.0, rtol=1e-5)
        quantized = cosine.quantize(codebook.embedding, z)
        table, vectors = np.asarray(codebook.embedding, np.float64), np.asarray(z, np.float64)
        cosines = vectors @ table.T / np.linalg.norm(vectors, axis=-1, keepdims=True)
        chosen = np.take_along_axis(cosines, np.asarray(quantized.codes)[..., None], -1)[..., 0]
        np.testing.assert_allclose(chosen, cosines.max(-1), atol=1e-6)
        np.testing.assert_allclose(quantized.straight_through, table[np.asarray(quantized.codes)], atol=1e-5)
        codebook = cosine.update(codebook, statistics(cosine, z, quantized.codes, 12, step))


def test_a_code_of_unit_length_is_the_direction_of_its_hits(cosine):
    codebook = cosine.init(jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (32, 4, 4, 4))
    codes = np.asarray(cosine.quantize(codebook.embedding, z).codes)
    after = cosine.update(codebook, statistics(cosine, z, jnp.asarray(codes), 12))
    units = np.asarray(z, np.float64) / np.linalg.norm(z, axis=-1, keepdims=True)
    for code in range(12):
        total = units[codes == code].sum(0)
        np.testing.assert_allclose(after.embedding[code], total / np.linalg.norm(total), atol=1e-5)


@pytest.mark.parametrize("length", [0.0, 1e-9, 1e-3, 10.0])
def test_gradients_through_unit_length_are_bounded(length):
    z = jnp.array([length, 0.0, 0.0])
    jacobian = np.asarray(jax.jacrev(quantizer.unit)(z))
    assert np.isfinite(jacobian).all() and np.abs(jacobian).max() <= 1.01e6
    if length >= 1e-3:
        np.testing.assert_allclose(jacobian, np.diag([0.0, 1.0, 1.0]) / length, rtol=1e-4, atol=1e-4)


# The k-means start.


@pytest.fixture(scope="module")
def clusters():
    """Vectors around 16 centres that lie far from the unit scale of a fresh codebook."""
    generator = np.random.default_rng(0)
    centres = 5.0 * generator.normal(size=(16, 4))
    chosen = centres[generator.integers(0, 16, size=(64, 6, 6))]
    return jnp.asarray(chosen + 0.1 * generator.normal(size=chosen.shape), jnp.float32)


def kind_of(init, revival_threshold=0.0, iterations=10):
    config = AutoencoderConfig(
        code_dim=4, num_codes=16, codebook_init=init, revival_threshold=revival_threshold, kmeans_iterations=iterations
    )
    return quantizers.make(config)


def learn(kind, z, updates, codebook=None, start=0):
    codebook = kind.init(jax.random.key(0)) if codebook is None else codebook
    quantize, update = jax.jit(kind.quantize), jax.jit(kind.update)
    for step in range(start, updates):
        codes = quantize(codebook.embedding, z).codes
        codebook = update(codebook, statistics(kind, z, codes, 16, step))
    return codebook


def test_a_kmeans_start_finds_clusters_that_a_uniform_one_misses(clusters):
    distortion = lambda kind, codebook: float(kind.quantize(codebook.embedding, clusters).squared_error.mean())
    uniform, kmeans = kind_of("uniform"), kind_of("kmeans")
    plain, started = (distortion(kind, learn(kind, clusters, 12)) for kind in (uniform, kmeans))
    assert started < 0.5 * plain
    # Each of its iterations is one of Lloyd's: the error never rises.
    errors = [distortion(kmeans, learn(kmeans, clusters, count)) for count in range(1, 10)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))


def test_an_iteration_of_the_kmeans_start_is_lloyds_whatever_came_before(clusters):
    kind = kind_of("kmeans")
    for updates in (0, 4, 9):
        before = learn(kind, clusters, updates)
        codes = np.asarray(kind.quantize(before.embedding, clusters).codes)
        after = learn(kind, clusters, updates + 1, before, updates)
        for code in np.unique(codes):
            mean = np.asarray(clusters, np.float64)[codes == code].mean(0)
            np.testing.assert_allclose(after.embedding[code], mean, rtol=1e-3, atol=1e-3)


def test_a_kmeans_start_is_the_same_over_micro_batches_and_devices(clusters):
    kind = kind_of("kmeans", revival_threshold=0.05, iterations=3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = NamedSharding(mesh, PartitionSpec("data"))

    @jax.jit
    def of_part(codebook, z, position, key):
        codes = kind.quantize(codebook.embedding, z).codes
        named = {"num_codes": 16, "key": key, "position": position, "global_batch": 64}
        return kind.statistics(z, codes, **named)

    def step(codebook, parts, key):
        sums = [of_part(codebook, jax.device_put(clusters[part], over_batch), part, key) for part in parts]
        return jax.jit(kind.update)(codebook, functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), sums))

    single = learn(kind, clusters, 5)
    split = kind.init(jax.random.key(0))
    for index in range(5):
        split = step(split, [jnp.arange(0, 64, 2), jnp.arange(1, 64, 2)], jax.random.key(index))
    for name in quantizer.Codebook._fields:
        np.testing.assert_allclose(getattr(split, name), getattr(single, name), rtol=1e-4, atol=1e-4, err_msg=name)


# Whole runs.


def one_level(**model):
    """The smallest run with all its stages, of 4x4 codes."""
    config = config_files.load("vqvae2_photos:tiny")
    values = config_lib.to_plain(config.to_dict())
    del values["bottom"]
    values["data"] = {"source": "synthetic", "image_size": 16, "synthetic_size": 32}
    values["autoencoder"]["model"] |= {"strides": (4,), "residual_layers": 1, "flip": False} | model
    for name in ("autoencoder", "top"):
        values[name]["train"] |= {"steps": 4, "save_every": 2, "batch_size": 8}
        values[name]["optim"]["warmup_steps"] = 1
    values["top"]["model"]["dropout"] = 0.0
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"quantizer": "cosine", "code_dim": 4, "codebook_init": "kmeans", "kmeans_iterations": 3},
        {"quantizer": "fsq", "fsq_levels": (4, 4, 3), "code_dim": 3, "num_codes": 48},
    ],
    ids=["cosine, k-means", "fsq"],
)
def test_a_run_with_each_quantiser_trains_resumes_evaluates_and_samples(model, tmp_path):
    run = trainer.train(one_level(**model), str(tmp_path / "run"))
    measured = trainer.evaluate(run, "evaluation")
    assert measured["rate_bits_per_image"] == pytest.approx(16 * measured["nats_per_code_top"] / math.log(2.0))
    loaded = bitsperdim.load(run.workdir)
    pictures = loaded.sample(jax.random.key(0), 2)
    assert pictures.shape == (2, 16, 16, 3)
    codes = loaded.encode(pictures)
    assert codes["top"].max() < run.config.autoencoder.model.num_codes
    # Stopped after two steps, inside a k-means start, it comes to the same codebook.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for path in (tmp_path / "again" / "autoencoder" / "checkpoints").glob("*4*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = trainer.train(one_level(**model), str(tmp_path / "again"), "autoencoder")
    states = [
        trainer.restore(of, "autoencoder", trainer.sharding.mesh_at_hand(of.config.mesh))[1] for of in (run, again)
    ]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(state["extra"]) for state in states))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"quantizer": "lfq"}, "quantizer must be one of ema, cosine, fsq"),
        ({"codebook_init": "random"}, "codebook_init must be one of uniform, kmeans"),
        ({"kmeans_iterations": 0}, "kmeans_iterations must be at least 1"),
        ({"quantizer": "fsq", "fsq_levels": (2, 8)}, r"fsq_levels must be numbers from 3 on"),
        ({"quantizer": "fsq", "fsq_levels": ()}, r"fsq_levels must be numbers from 3 on"),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 8), "code_dim": 3, "num_codes": 64},
            r"makes code_dim=2 and num_codes=64",
        ),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 8), "code_dim": 2, "num_codes": 63},
            r"makes code_dim=2 and num_codes=64",
        ),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 8), "code_dim": 2, "num_codes": 64, "codebook_init": "kmeans"},
            "has no codebook to start",
        ),
    ],
)
def test_a_quantiser_that_cannot_be_is_refused_by_name(model, message):
    with pytest.raises(InputError, match=message):
        cli.run_lib.parse(one_level(**model))
