"""Levels and the real line: held to exact arithmetic, numeric Jacobians and known distribution functions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import dequantize, rng

GRID = np.arange(2**16, dtype=np.float32) / 2**16
RANGES = ("unit", "symmetric")


@pytest.fixture
def keys():
    return rng.per_example(jax.random.key(0), jnp.arange(8))


def test_every_noise_value_keeps_the_top_level_in_its_cell():
    y = dequantize.dequantize(jnp.full(2**16, 255, jnp.uint8), GRID)
    np.testing.assert_array_equal(np.floor(y), 255)
    np.testing.assert_array_equal(np.asarray(y, np.float64), 255 + GRID.astype(np.float64))


def test_noise_is_uniform_on_the_grid_of_sixteen_bits(keys):
    u = np.asarray(dequantize.uniform_noise(keys, (64, 64, 8)), np.float64)
    np.testing.assert_array_equal(u * 2**16, np.floor(u * 2**16))
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    chi_squared = ((counts - u.size / 64) ** 2 / (u.size / 64)).sum()
    assert chi_squared < 63 + 5 * np.sqrt(2 * 63)


def test_noise_of_an_example_does_not_depend_on_its_batch(keys):
    whole = dequantize.uniform_noise(keys, (2, 2, 1))
    np.testing.assert_array_equal(dequantize.uniform_noise(keys[5:7], (2, 2, 1)), whole[5:7])
    assert len(np.unique(np.asarray(whole).reshape(8, -1), axis=0)) == 8


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_log_jacobian_is_that_of_the_numeric_jacobian(levels, range):
    y = jnp.linspace(0.1, levels - 0.1, 6)
    jacobian = jax.jacfwd(lambda v: dequantize.scale(v, levels, range))(y)
    np.testing.assert_allclose(
        dequantize.log_jacobian(6, levels, range), np.linalg.slogdet(np.asarray(jacobian, np.float64))[1], rtol=1e-6
    )


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_a_known_density_gives_every_level_its_known_probability(levels, range):
    low, width = {"unit": (0.0, 1.0), "symmetric": (-1.0, 2.0)}[range]
    density = lambda z: 6 * (z - low) * (width - z + low) / width**3  # Beta(2, 2) stretched over the range
    cumulative = lambda t: 3 * t**2 - 2 * t**3  # its distribution function on [0, 1]
    offsets = (np.arange(200) + 0.5) / 200
    y = np.arange(levels)[:, None] + offsets
    log_prob = np.log(density(dequantize.scale(y, levels, range))) + dequantize.log_jacobian(1, levels, range)
    probabilities = np.exp(log_prob).mean(axis=1)
    np.testing.assert_allclose(probabilities, np.diff(cumulative(np.arange(levels + 1) / levels)), rtol=1e-4)
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-4)


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("levels", [2, 3, 17, 32, 49, 63, 64, 128, 256])
def test_the_top_of_the_range_is_out_of_reach(levels, range):
    scale = jax.jit(dequantize.scale, static_argnums=(1, 2))
    assert scale(jnp.float32(levels - 1) + GRID, levels, range).max() < 1


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_every_level_survives_centre_scale_unscale(levels, range):
    x = jnp.arange(levels, dtype=jnp.uint8)
    z = dequantize.scale(dequantize.centre(x), levels, range)
    np.testing.assert_array_equal(dequantize.to_levels(dequantize.unscale(z, levels, range), levels), x)


def test_to_levels_clips_what_a_model_puts_outside():
    y = jnp.array([-3.0, -1e-6, 16.999, 17.0, 1e9])
    np.testing.assert_array_equal(dequantize.to_levels(y, 17), [0, 0, 16, 16, 16])


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_pictures_are_stretched_as_exact_rational_rounding_says(levels):
    expected = [int(Fraction(255 * x, levels - 1) + Fraction(1, 2)) for x in range(levels)]
    for kind in (np, jnp):
        picture = dequantize.to_uint8(kind.arange(levels, dtype=kind.uint8), levels)
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, expected)
    assert (expected[0], expected[-1]) == (0, 255)
