"""Structural similarity against its definition, window by window, and where its value is known."""

import jax
import numpy as np
import pytest

from bitsperdim.ssim import ssim


def by_definition(a, b, levels, width=11):
    """Equation 13 of Wang et al. 2004 for one image, in float64."""
    grid = np.arange(width) - width // 2
    window = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))[..., None]
    window /= window.sum()
    c1, c2 = (0.01 * (levels - 1)) ** 2, (0.03 * (levels - 1)) ** 2
    values = []
    for i in range(a.shape[0] - width + 1):
        for j in range(a.shape[1] - width + 1):
            x, y = (image[i : i + width, j : j + width].astype(np.float64) for image in (a, b))
            mean_x, mean_y = ((window * part).sum((0, 1)) for part in (x, y))
            var_x, var_y = (window * (x - mean_x) ** 2).sum((0, 1)), (window * (y - mean_y) ** 2).sum((0, 1))
            covariance = (window * (x - mean_x) * (y - mean_y)).sum((0, 1))
            over = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
            values.append((2 * mean_x * mean_y + c1) * (2 * covariance + c2) / over)
    return np.mean(values)


@pytest.mark.parametrize(
    ("shape", "levels", "width"), [((14, 16, 3), 256, 11), ((8, 9, 1), 17, 7), ((12, 11, 1), 2, 11)]
)
def test_it_is_the_mean_over_windows_of_the_definition(shape, levels, width):
    generator = np.random.default_rng(0)
    a = generator.integers(0, levels, (3, *shape), np.uint8)
    b = np.where(generator.random(a.shape) < 0.7, a, generator.integers(0, levels, a.shape, np.uint8))
    expected = [by_definition(x, y, levels, width) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(ssim, static_argnums=2)(a, b, levels), expected, rtol=1e-4)


def test_equal_images_are_alike_and_flat_ones_by_their_means():
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(ssim(image, image, 256), 1.0, rtol=1e-6)
    black, white = np.zeros((1, 12, 12, 1), np.uint8), np.full((1, 12, 12, 1), 255, np.uint8)
    np.testing.assert_allclose(ssim(black, white, 256), 1e-4 / (1.0 + 1e-4), rtol=1e-4)
