"""The shared convolution against XLA's: values and both gradients; and why it exists, a gradient inside a scan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim.convolution import LAYOUT, Conv, convolve

CASES = [  # size of the input, of the kernel, strides, padding
    ((5, 6), (3, 3), (1, 1), "SAME"),
    ((5, 6), (2, 3), (1, 1), "VALID"),
    ((4, 7), (2, 3), (1, 1), ((1, 0), (1, 1))),
    ((5, 6), (2, 3), (1, 1), ((2, 0), (3, 1))),  # more than the kernel reaches
    ((5, 6), (1, 1), (1, 1), "VALID"),
    ((5, 6), (1, 1), (2, 2), "SAME"),
    ((8, 8), (4, 4), (2, 2), "SAME"),
    ((9, 8), (2, 3), (2, 2), ((1, 0), (1, 1))),
    ((9, 11), (3, 3), (2, 2), "SAME"),
    ((8, 8), (4, 4), (4, 4), "VALID"),
    ((7, 6), (2, 2), (3, 2), "VALID"),
    ((6, 6), (5, 2), (2, 1), "VALID"),
]


@pytest.mark.parametrize(
    "size, kernel_size, strides, padding, channels",
    [
        *((*case, (3, 4)) for case in CASES),
        *((*case, (5, 2)) for case in (CASES[2], CASES[3], CASES[6])),
        *((*case, (20, 2)) for case in CASES[:4]),
    ],  # to more, to fewer, to so few that it is one product
)
def test_values_and_gradients_are_those_of_xla(size, kernel_size, strides, padding, channels):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *size, channels[0]))
    kernel = jax.random.normal(keys[1], (*kernel_size, *channels))
    with jax.enable_x64(True):
        x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
        theirs = lambda x, k: jax.lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=LAYOUT)
        expected, pullback = jax.vjp(theirs, x, kernel)
        got, our_pullback = jax.vjp(lambda x, k: convolve(x, k, strides, padding), x, kernel)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
        dy = jnp.cos(jnp.arange(expected.size)).reshape(expected.shape)
        for ours, xla in zip(our_pullback(dy), pullback(dy), strict=True):
            np.testing.assert_allclose(ours, xla, rtol=1e-12, atol=1e-12)


def test_layer_of_linen_has_its_parameters_and_values():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    ours, theirs = Conv(4, (3, 3), (2, 2)), nn.Conv(4, (3, 3), (2, 2))
    params = theirs.init(jax.random.key(1), x)
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"kernel_dilation": 2}, {"input_dilation": 2}, {"feature_group_count": 3}])
def test_what_it_does_not_compute_is_refused(options):
    x = jnp.zeros((1, 6, 6, 3))
    with pytest.raises(ValueError, match="no dilation"):
        Conv(3, (3, 3), **options).init(jax.random.key(0), x)


def test_gradients_need_no_dilated_or_batched_convolution():
    """Those are what the CPU backend is slow at, by an order of magnitude inside a scan."""

    def loss(kernels, x):
        step = lambda x, kernel: (x + convolve(jnp.tanh(x), kernel, padding="SAME"), None)
        return jnp.square(jax.lax.scan(step, x, kernels)[0]).sum()

    args = jnp.ones((2, 3, 3, 4, 4)), jnp.ones((1, 5, 5, 4))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*args).as_text()
    lines = [line for line in text.splitlines() if "convolution" in line]
    assert len(lines) == 2  # forward, and the gradient by x
    for line in lines:
        assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line and "lhs_dilate = [1, 1], rhs_dilate = [1, 1]" in line
