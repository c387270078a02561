"""The autoencoder against a whole golden run of the two-level network: intermediates, gradients, one Adam step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqvae2 import convert, quantizer
from vqvae2.autoencoder import Autoencoder, level_names

GOLDEN = {"strides": (4, 2), "hidden": 16, "residual": 8, "layers": 2, "code_dim": 8}


@pytest.fixture
def data(golden):
    return golden("vqvae2/vqvae2_two_level")


def under(data, prefix):
    return {name.removeprefix(prefix): array for name, array in data.items() if name.startswith(prefix)}


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def load(data):
    """The network, its parameters and codebooks, and the images, all of the golden file."""
    state = under(data, "param/")
    params = jax.tree.map(jnp.asarray, convert.params_from_torch(state))
    return Autoencoder(**GOLDEN), params, convert.embeddings_from_torch(state), nhwc(data["input"])


def test_converted_parameters_are_those_of_the_network(data):
    net, params, embeddings, images = load(data)
    expected = jax.eval_shape(net.init, jax.random.key(0), images, embeddings)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)


def test_every_golden_intermediate(data):
    net, params, embeddings, images = load(data)
    (image, z, quantized), captured = net.apply({"params": params}, images, embeddings, capture_intermediates=True)
    names = {"enc_b": "encoder_bottom", "enc_t": "encoder_top", "dec_t": "decoder_top"}
    names |= {"z_t": "to_code_top", "z_b": "to_code_bottom", "upsample_t": "upsample_top_to_bottom"}
    for theirs, ours in names.items():
        found = captured["intermediates"][ours]["__call__"][0]
        np.testing.assert_allclose(found, nhwc(data[f"eval/{theirs}"]), atol=1e-5, err_msg=ours)
    for letter, level in (("t", "top"), ("b", "bottom")):
        np.testing.assert_array_equal(quantized[level].codes, data[f"eval/code_{letter}"])
        np.testing.assert_allclose(quantized[level].straight_through, nhwc(data[f"eval/quant_{letter}"]), atol=1e-5)
        np.testing.assert_allclose(quantized[level].squared_error.mean(), data[f"eval/diff_{letter}"], rtol=1e-5)
        np.testing.assert_allclose(z[level], nhwc(data[f"eval/z_{letter}"]), atol=1e-5)
    np.testing.assert_allclose(image, nhwc(data["eval/recon"]), atol=1e-5)


def test_encode_and_decode_go_through_the_golden_codes(data):
    net, params, embeddings, images = load(data)
    codes = net.apply({"params": params}, images, embeddings, method="encode")
    np.testing.assert_array_equal(codes["top"], data["eval/code_t"])
    np.testing.assert_array_equal(codes["bottom"], data["eval/code_b"])
    image = net.apply({"params": params}, codes, embeddings, method="decode")
    np.testing.assert_allclose(image, nhwc(data["eval/recon_from_codes"]), atol=1e-5)


def test_golden_gradients_and_adam_step(data):
    net, params, embeddings, images = load(data)

    @jax.jit
    def step(params):
        def loss(params):
            image, _, quantized = net.apply({"params": params}, images, embeddings)
            latent = sum(level.squared_error.mean() for level in quantized.values())
            return jnp.square(image - images).mean() + 0.25 * latent

        value, gradients = jax.value_and_grad(loss)(params)
        optimizer = optax.adam(2e-4)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return value, gradients, optax.apply_updates(params, updates)

    value, gradients, after = step(params)
    np.testing.assert_allclose(value, data["train/loss"], rtol=1e-5)
    assert_trees_close(gradients, convert.params_from_torch(under(data, "grad/")), rtol=1e-3, atol=1e-6)
    # Adam's first step divides each gradient by its own size: where that is rounding error, so is the step.
    assert_trees_close(after, convert.params_from_torch(under(data, "after_step/")), rtol=1e-4, atol=1e-6)


def assert_trees_close(found, expected, **tolerance):
    expected = dict(jax.tree_util.tree_leaves_with_path(expected))
    found = dict(jax.tree_util.tree_leaves_with_path(found))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.parametrize("strides, count", [((4, 2), 1_716_803), ((8, 2, 2), 3_270_787)], ids=["two", "three"])
def test_the_papers_networks_have_the_derived_number_of_parameters(strides, count):
    net = Autoencoder(strides)
    embeddings = {level: jax.ShapeDtypeStruct((512, 64), jnp.float32) for level in net.levels}
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), images, embeddings)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("strides", [(4, 2), (2, 4, 2)], ids=["two", "three"])
def test_the_reconstruction_alone_reaches_every_parameter(strides, random_variables):
    """Through the top decoder and the 1x1 before the bottom quantiser too, which one port cuts off."""
    net = Autoencoder(strides, hidden=8, residual=4, layers=1, code_dim=4)
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)
    embeddings = {name: quantizer.init(jax.random.key(1), 6, 4).embedding for name in net.levels}
    params = random_variables(net, images, embeddings)["params"]
    loss = lambda params: jnp.square(net.apply({"params": params}, images, embeddings)[0] - images).mean()
    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_three_levels_decode_what_they_encode(random_variables):
    net = Autoencoder((4, 2, 2), hidden=8, residual=4, layers=1, code_dim=4)
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1.0)
    keys = dict(zip(net.levels, jax.random.split(jax.random.key(1), 3), strict=True))
    embeddings = {name: quantizer.init(key, 6, 4).embedding for name, key in keys.items()}
    variables = random_variables(net, images, embeddings)
    image, _, quantized = jax.jit(net.apply)(variables, images, embeddings)
    codes = jax.jit(lambda images: net.apply(variables, images, embeddings, method="encode"))(images)
    decode = jax.jit(lambda codes: net.apply(variables, codes, embeddings, method="decode"))
    assert {name: grid.shape[1:] for name, grid in codes.items()} == {"top": (2, 2), "middle": (4, 4), "bottom": (8, 8)}
    np.testing.assert_array_equal(codes["middle"], quantized["middle"].codes)
    np.testing.assert_allclose(decode(codes), image, atol=1e-5)
    # The top codes reach the image by way of both finer grids.
    other = codes | {"top": (codes["top"] + 1) % 6}
    assert jnp.abs(decode(other) - image).max() > 1e-3


def test_computing_in_bfloat16_keeps_parameters_and_image_in_float32(random_variables):
    net = Autoencoder((4, 2), hidden=8, residual=4, layers=1, code_dim=4, dtype=jnp.bfloat16)
    images = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-1.0)
    embeddings = {name: quantizer.init(jax.random.key(1), 6, 4).embedding for name in net.levels}
    variables = jax.eval_shape(net.init, jax.random.key(2), images, embeddings)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    apply = jax.jit(lambda variables: net.apply(variables, images, embeddings, capture_intermediates=True))
    (image, z, _), captured = apply(random_variables(net, images, embeddings))
    assert z["top"].dtype == captured["intermediates"]["decoder_top"]["__call__"][0].dtype == jnp.bfloat16
    assert image.dtype == jnp.float32


def test_levels_are_named_from_the_top():
    assert level_names(2) == ("top", "bottom")
    assert level_names(3) == ("top", "middle", "bottom")
    assert level_names(4) == ("top", "middle_1", "middle_2", "bottom")


def test_a_stride_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="not 3"):
        Autoencoder((4, 3)).init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)), {})
