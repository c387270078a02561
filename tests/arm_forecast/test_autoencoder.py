"""A latent ARM's autoencoder: its layers, the quantisation with its gradient, and images as numbers and back."""

import jax
import jax.numpy as jnp
import numpy as np

from arm_forecast import autoencoder, autoencoder_stage


def test_the_value_is_exactly_one_hot_however_the_softmax_rounds():
    logits = 30 * np.random.default_rng(0).normal(size=(500, 7)).astype(np.float32)
    one_hot, codes = jax.jit(autoencoder.quantize)(logits)
    np.testing.assert_array_equal(codes, logits.argmax(-1))
    np.testing.assert_array_equal(one_hot, np.eye(7, dtype=np.float32)[logits.argmax(-1)])


def test_the_gradient_is_that_of_the_softmax():
    logits = np.random.default_rng(1).normal(size=5).astype(np.float32)
    p = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
    jacobian = jax.jacobian(lambda mu: autoencoder.quantize(mu)[0])(logits)
    np.testing.assert_allclose(jacobian, np.diag(p) - np.outer(p, p), atol=1e-6)


def test_the_layers_are_those_of_the_supplement():
    """A.3, at its width of 512 with 4 latent channels of 128 categories: kernels as [height, width, in, out]."""
    net = autoencoder.Autoencoder(512, 4, 128, 3)
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]
    kernels = lambda half: {name: layer["kernel"].shape for name, layer in params[half].items() if "kernel" in layer}
    assert kernels("encoder") == {
        "conv_1": (3, 3, 3, 256),
        "conv_2": (3, 3, 256, 256),
        "down_1": (4, 4, 256, 256),
        "down_2": (4, 4, 256, 512),
        "to_codes": (1, 1, 512, 4 * 128),
    }
    assert kernels("decoder") == {
        "from_codes": (1, 1, 4 * 128, 512),
        "up_1": (4, 4, 512, 512),
        "up_2": (4, 4, 512, 256),
        "conv_1": (3, 3, 256, 256),
        "conv_2": (3, 3, 256, 3),
    }
    blocks = [params[half][f"block_{n}"] for half in ("encoder", "decoder") for n in (1, 2)]
    assert {block[f"conv_{n}"]["kernel"].shape for block in blocks for n in (1, 2)} == {(3, 3, 512, 512)}


def test_every_plain_convolution_but_the_last_of_either_half_is_rectified():
    """Where one gives -1 everywhere the rest sees zeros."""
    net = autoencoder.Autoencoder(4, 2, 3, 1)
    x = jax.random.uniform(jax.random.key(0), (1, 8, 8, 1))
    variables = jax.jit(net.init)(jax.random.key(1), x)
    logits = lambda module, x, codes: (module.encoder(x, False), module.decoder(codes, False))
    codes = jax.nn.one_hot(jnp.arange(8).reshape(1, 2, 2, 2) % 3, 3)
    outputs = jax.jit(lambda params: net.apply(variables | {"params": params}, x, codes, method=logits))

    def with_bias(half, name, value):
        layer = {"kernel": 0 * variables["params"][half][name]["kernel"], "bias": jnp.full_like(layer_bias, value)}
        return variables["params"] | {half: variables["params"][half] | {name: layer}}

    for half, layers in variables["params"].items():
        for name in [name for name, layer in layers.items() if "kernel" in layer]:
            layer_bias = layers[name]["bias"]
            zero, minus_one = (outputs(with_bias(half, name, value))[half == "decoder"] for value in (0.0, -1.0))
            last = {"encoder": "to_codes", "decoder": "conv_2"}[half]
            assert np.array_equal(zero, minus_one) == (name != last), (half, name)


def test_a_residual_block_whose_second_norm_is_scaled_to_nothing_passes_what_is_positive():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    block = autoencoder.BasicBlock()
    variables = block.init(jax.random.key(1), x, False)
    variables["params"]["norm_2"]["scale"] = jnp.zeros(3)
    np.testing.assert_array_equal(block.apply(variables, x, False), np.maximum(x, 0))


def test_images_are_numbers_in_minus_one_to_one_and_the_nearest_level_comes_back():
    levels = np.arange(17, dtype=np.uint8)
    x = autoencoder_stage.to_input(levels, 17)
    np.testing.assert_allclose(x, np.linspace(-1, 1, 17), atol=1e-6)
    for error in (-0.06, 0.0, 0.06):  # levels are 0.125 apart
        np.testing.assert_array_equal(autoencoder_stage.to_picture(x + error, 17), levels)


def test_the_entropy_of_the_codes_is_the_mean_of_each_latent_channels_own():
    usage = np.array([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0]])  # all four codes alike, and one alone
    means = {"mse": 0.1, "pixel_mean": 0.5, "pixel_square": 0.75}
    figures = autoencoder_stage._summarize(means, usage)
    np.testing.assert_allclose(figures["entropy_bits_per_code"], 1.0)
    np.testing.assert_allclose(figures["perplexity_codes"], 2.0)
    np.testing.assert_allclose(figures["mse_over_variance"], 0.2)
