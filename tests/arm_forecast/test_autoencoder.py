"""The quantisation of a latent ARM's autoencoder: its value and its gradient."""

import jax
import numpy as np

from arm_forecast import autoencoder


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
