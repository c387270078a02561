"""Convolutions over blocks of pixels against those of flax: parameters, results, gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import sharding
from bitsperdim.strided import BlockConvTranspose, DoublingConv, HalvingConv


@pytest.mark.parametrize("num_spatial", [1, 2])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (HalvingConv(5), nn.Conv(5, (4, 4), (2, 2))),
        (DoublingConv(5), nn.ConvTranspose(5, (4, 4), (2, 2))),
        (BlockConvTranspose(5), nn.ConvTranspose(5, (2, 2), (2, 2))),
    ],
    ids=["halving", "doubling", "blocks"],
)
def test_equals_the_convolution_of_flax(ours, theirs, num_spatial, assert_same_bits, sub_mesh):
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    params = theirs.init(jax.random.key(1), x)
    assert_same_bits(ours.init(jax.random.key(1), x), params)
    params["params"]["bias"] += jnp.arange(5.0)

    def value(net):
        weights = jnp.cos(jnp.arange(net.apply(params, x).size))
        return jax.value_and_grad(lambda params, x: (net.apply(params, x).ravel() * weights).sum(), (0, 1))(params, x)

    with sharding.by_rows(sub_mesh(2, spatial=num_spatial)):  # where it is 2, without blocks between pixels
        result, gradients = ours.apply(params, x), value(ours)
    np.testing.assert_allclose(result, theirs.apply(params, x), rtol=1e-5, atol=1e-5)
    for got, expected in zip(*map(jax.tree.leaves, (gradients, value(theirs))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert ours.clone(dtype=jnp.bfloat16).apply(params, x).dtype == jnp.bfloat16
