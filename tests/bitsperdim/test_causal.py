"""Causal convolution and attention against plain loops over the cells they may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import causal


def seen_by_each_output(f, height, width):
    """seen[i, j, a, b]: does output (i, j) of f depend on input (a, b)?"""
    x = jax.random.normal(jax.random.key(0), (1, height, width, 1))
    jacobian = jax.jacrev(lambda x: f(x)[0, :, :, 0])(x)[..., 0, :, :, 0]
    return np.asarray(jacobian) != 0


@pytest.mark.parametrize(
    "f, offsets",
    [
        (causal.shift_down, {(-1, 0)}),
        (causal.shift_right, {(0, -1)}),
        (lambda x: causal.causal_conv(x, jnp.ones((2, 3, 1, 1))), {(a, b) for a in (-1, 0) for b in (-2, -1, 0)}),
        (lambda x: causal.causal_conv(x, jnp.ones((1, 3, 1, 1)), right=1), {(0, -1), (0, 0), (0, 1)}),
    ],
    ids=["shift_down", "shift_right", "quadrant", "row"],
)
def test_each_output_sees_exactly_its_window(f, offsets):
    seen = seen_by_each_output(f, 4, 5)
    for i, j, a, b in np.ndindex(seen.shape):
        assert seen[i, j, a, b] == ((a - i, b - j) in offsets), (i, j, a, b)


def test_causal_conv_is_the_sum_over_its_window():
    key_x, key_kernel = jax.random.split(jax.random.key(1))
    x = np.asarray(jax.random.normal(key_x, (2, 4, 4, 3)))
    kernel = np.asarray(jax.random.normal(key_kernel, (2, 2, 3, 5)))
    padded = np.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
    expected = np.zeros((2, 4, 4, 5))
    for a in range(2):
        for b in range(2):
            expected += padded[:, a : a + 4, b : b + 4] @ kernel[a, b]
    np.testing.assert_allclose(causal.causal_conv(x, kernel), expected, atol=1e-5)


def test_attention_weights_average_only_what_came_before():
    key_q, key_k = jax.random.split(jax.random.key(2))
    query, key = jax.random.normal(key_q, (2, 6, 3, 4)), jax.random.normal(key_k, (2, 6, 3, 4))
    weights = np.asarray(causal.attention_weights(query, key, causal.strictly_before(6)))
    for b, n, q in np.ndindex(2, 3, 6):
        scores = np.exp(np.asarray(key)[b, :q, n] @ np.asarray(query)[b, q, n] / 2.0)
        expected = np.concatenate([scores / scores.sum() if q else scores, np.zeros(6 - q)])
        np.testing.assert_allclose(weights[b, n, q], expected, atol=1e-6)


def test_gradient_of_the_position_that_sees_nothing_is_finite():
    ones = jnp.ones((1, 3, 1, 2))
    gradient = jax.grad(lambda q: (causal.attention_weights(q, ones, causal.strictly_before(3)) ** 2).sum())(ones)
    assert np.isfinite(gradient).all()
