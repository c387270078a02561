"""Structural similarity of two images (SSIM): how alike they look, where the squared error says how far they are apart.

Source: Wang, Bovik, Sheikh & Simoncelli 2004, eq. 13, with the Gaussian window and constants of its section III-C.
Channels are compared one by one. Images smaller than the window take the largest odd window that fits.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

WINDOW, SIGMA = 11, 1.5  # pixels
K1, K2 = 0.01, 0.03


def ssim(a: Integer[Array, "b h w c"], b: Integer[Array, "b h w c"], levels: int) -> Float[Array, " b"]:
    """Mean over windows and channels of (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2)).

    Means m, variances s^2 and covariance s_ab are those in a window, C = (K L)^2 with the range L = levels - 1 of the
    values 0 ... levels - 1. Windows lie within the image. 1: equal.
    """
    # In units of L about the middle, so that the differences of squares keep their digits.
    a, b = (x.astype(jnp.float32) / (levels - 1) - 0.5 for x in (a, b))
    rows, columns = (jnp.asarray(_windows(size, min(a.shape[1:3]))) for size in a.shape[1:3])
    mean = lambda x: jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    m_a, m_b, c1, c2 = mean_a + 0.5, mean_b + 0.5, K1**2, K2**2
    quality = (2.0 * m_a * m_b + c1) * (2.0 * covariance + c2) / ((m_a**2 + m_b**2 + c1) * (variances + c2))
    return quality.mean((1, 2, 3))


def _windows(size: int, least: int) -> Float[np.ndarray, "windows size"]:
    """A row for each place of the window along an edge of this size."""
    width = min(WINDOW, least - 1 + least % 2)
    weights = np.exp(-0.5 * np.square((np.arange(width) - width // 2) / SIGMA))
    places = np.zeros((size - width + 1, size), np.float32)
    for place, row in enumerate(places):
        row[place : place + width] = weights / weights.sum()
    return places
