"""What each level contributes: the error without it, and the dropout over levels that keeps all of them in use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import rng
from vqvae2 import autoencoder_stage, quantizer
from vqvae2.config import AutoencoderConfig
from vqvae2.facts import Facts
from vqvae2.quantizer import Codebook

ABOUT = Facts((16, 16, 3), 256, 0, 0.3)
SMALL = {"hidden": 8, "residual": 4, "residual_layers": 1, "code_dim": 4, "num_codes": 6}


def codebook(seed):
    """With averages, so that there is a mean vector."""
    draw = np.random.default_rng(seed)
    counts, embedding = draw.uniform(1, 2, 6).astype(np.float32), draw.normal(size=(6, 4)).astype(np.float32)
    return Codebook(embedding, counts, counts[:, None] * embedding, np.int32(5))


@pytest.fixture(scope="module")
def two():
    """A model of two levels with random weights, its codebooks and a batch of which the last example is padding."""
    config = AutoencoderConfig(strides=(4, 2), **SMALL)
    model = autoencoder_stage.make(config, ABOUT, 4)
    draw = np.random.default_rng(0)
    scale = lambda leaf: max(np.prod(leaf.shape[:-1]), 1) ** -0.5
    normal = lambda leaf: (scale(leaf) * draw.standard_normal(leaf.shape)).astype(np.float32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    batch = {"image": draw.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8), "position": np.arange(4)}
    books, params = {"top": codebook(1), "bottom": codebook(2)}, jax.tree.map(normal, params)
    encode = jax.jit(autoencoder_stage.network(config, ABOUT).apply)
    x = jnp.asarray(batch["image"] / 128.0 - 1.0, jnp.float32)
    for level in books:  # codes are vectors of some cells, so that several are in use
        _, z, _ = encode({"params": params}, x, {name: book.embedding for name, book in books.items()})
        embedding = np.asarray(z[level]).reshape(-1, 4)[: 6 * 2 : 2]
        books[level] = books[level]._replace(embedding=embedding, ema_sums=books[level].ema_counts[:, None] * embedding)
    extra = {"codebooks": books}
    return config, model, params, extra, batch | {"mask": np.arange(4) < 3}


def test_the_error_without_a_level_is_that_of_its_mean_vector(two):
    config, model, params, extra, batch = two
    parts = jax.jit(model.measure)(params, extra, batch, jax.random.key(0)).parts
    net = autoencoder_stage.network(config, ABOUT)
    x = (batch["image"] + 0.5) / 128.0 - 1.0
    tables = {level: jnp.asarray(book.embedding) for level, book in extra["codebooks"].items()}
    codes = jax.jit(lambda x: net.apply({"params": params}, x, tables, method="encode"))(jnp.asarray(x, jnp.float32))
    decode = jax.jit(lambda tables: net.apply({"params": params}, codes, tables, method="decode"))
    error = lambda tables: np.square(np.asarray(decode(tables)) - x).mean((1, 2, 3))
    np.testing.assert_allclose(parts["mse"], error(tables), rtol=1e-5)
    for level, book in extra["codebooks"].items():
        mean = (book.ema_counts[:, None] * book.embedding).sum(0) / book.ema_counts.sum()
        without = error(tables | {level: jnp.broadcast_to(mean, (6, 4))})
        np.testing.assert_allclose(parts[f"mse_without_{level}"], without, rtol=1e-4)
        assert np.abs(without - parts["mse"]).max() > 5e-5


def test_a_level_that_the_decoder_does_not_look_at_shows_although_its_codes_are_in_use(two):
    _, model, params, extra, batch = two
    params = jax.tree.map(np.copy, params)
    # The decoder's first convolution takes [top brought down, bottom].
    params["decoder_bottom"]["conv"]["kernel"][:, :, :4] = 0.0
    aux = jax.jit(model.measure)(params, extra, batch, jax.random.key(0))
    means = {name: float(values[:3].mean()) for name, values in aux.parts.items()}
    figures = model.summarize(means, jax.device_get(aux.tallies))
    assert figures["mse_without_top"] == pytest.approx(figures["mse"], rel=1e-6)
    assert figures["mse_without_bottom"] > 1.0003 * figures["mse"]
    assert figures["perplexity_codes_top"] > 1.5
    # Three examples of 2x2 cells: padding counts in no tally.
    assert aux.tallies["top"].sum() == 12


@pytest.fixture
def absent():
    keys = rng.per_example(jax.random.key(3), jnp.arange(20_000))
    books = {level: codebook(seed) for seed, level in enumerate(("top", "middle", "bottom"))}
    return autoencoder_stage.absent_levels(keys, 0.3, books, tuple(books)), books


def test_finer_levels_are_absent_as_often_as_asked_and_never_below_one_that_is_present(absent):
    absent, _ = absent
    assert set(absent) == {"middle", "bottom"}  # the top never is
    middle, bottom = (np.asarray(absent[level][0]) for level in ("middle", "bottom"))
    np.testing.assert_allclose(bottom.mean(), 0.3, atol=0.015)
    np.testing.assert_allclose(middle.mean(), 0.15, atol=0.015)
    assert not (middle & ~bottom).any()


def test_what_stands_for_an_absent_level_is_its_mean_vector(absent):
    absent, books = absent
    for level, (_, vector) in absent.items():
        mean = np.average(books[level].embedding, axis=0, weights=books[level].ema_counts)
        np.testing.assert_allclose(vector, mean, rtol=1e-5)


def test_no_level_is_ever_absent_without_the_option_nor_of_one_level():
    keys = rng.per_example(jax.random.key(0), jnp.arange(10))
    assert (
        autoencoder_stage.absent_levels(keys, 0.0, {"top": codebook(0), "bottom": codebook(1)}, ("top", "bottom")) == {}
    )
    assert autoencoder_stage.absent_levels(keys, 0.5, {"top": codebook(0)}, ("top",)) == {}


def test_training_decodes_some_images_without_their_bottom_codes(two):
    config, model, params, extra, batch = two
    parts = jax.jit(model.measure)(params, extra, batch, jax.random.key(0)).parts
    model = autoencoder_stage.make(dataclasses.replace(config, level_dropout=0.5), ABOUT, 4)
    found = jax.jit(model.loss)(params, extra, batch, jax.random.key(1), 0)[1].parts["mse"]
    whole, without = (np.isclose(found, parts[name], rtol=1e-5) for name in ("mse", "mse_without_bottom"))
    assert (whole ^ without).all() and 0 < without.sum() < 4


def test_an_image_without_its_bottom_codes_trains_the_top_as_if_there_were_none(two):
    """Its reconstruction is what decoding the top alone gives; no gradient of it reaches the bottom's encoder path."""
    config, _, params, extra, batch = two
    net = autoencoder_stage.network(config, ABOUT)
    x = jnp.asarray((batch["image"] + 0.5) / 128.0 - 1.0, jnp.float32)
    tables = autoencoder_stage.embeddings(extra["codebooks"])
    is_absent = jnp.array([True, False, True, False])
    mean = quantizer.mean_vector(extra["codebooks"]["bottom"])

    def reconstruct(params, x):
        return net.apply({"params": params}, x, tables, {"bottom": (is_absent, mean)})

    image, _, quantized = jax.jit(reconstruct)(params, x)
    codes = {level: quantized[level].codes for level in ("top", "bottom")}
    alone = autoencoder_stage.tables_given(extra["codebooks"], {"top": True, "bottom": False})
    decode = jax.jit(lambda tables: net.apply({"params": params}, codes, tables, method="decode"))
    np.testing.assert_allclose(image[::2], decode(alone)[::2], atol=1e-5)
    np.testing.assert_allclose(image[1::2], decode(tables)[1::2], atol=1e-5)
    error = lambda params, chosen: jnp.square(reconstruct(params, x)[0] - x)[chosen].mean()
    of_absent = jax.jit(jax.grad(lambda params: error(params, slice(0, None, 2))))(params)
    assert jnp.abs(of_absent["to_code_bottom"]["kernel"]).max() == 0
    assert jnp.abs(of_absent["to_code_top"]["kernel"]).max() > 0
