"""Augmentation: every result is one of the allowed ones, in the allowed proportions, from the example's key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import augment, rng


@pytest.fixture
def case():
    images = jax.random.randint(jax.random.key(1), (400, 3, 5, 2), 0, 256).astype(jnp.uint8)
    return rng.per_example(jax.random.key(0), jnp.arange(400)), images


def test_flip_gives_the_image_or_its_mirror_half_of_the_time_each(case):
    keys, images = case
    flipped = np.asarray(augment.flip(keys, images))
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == np.flip(images, axis=2)).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 200) < 5 * 10  # five deviations of a fair coin
    assert flipped.dtype == np.uint8


def test_flip_of_an_example_does_not_depend_on_its_batch(case):
    keys, images = case
    np.testing.assert_array_equal(augment.flip(keys[7:9], images[7:9]), augment.flip(keys, images)[7:9])
