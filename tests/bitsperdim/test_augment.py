"""Augmentation: every result is one of the allowed ones, in the allowed proportions, from the example's key alone."""

import colorsys
import dataclasses

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


@pytest.fixture(scope="module")
def pictures():
    """Random colours, with black, white, grey and pure ones among them."""
    values = np.random.default_rng(0).uniform(size=(4, 3, 5, 3)).astype(np.float32)
    values[0, 0] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 0, 1]]
    return values


def column(values):
    return jnp.array(values, jnp.float32)[:, None, None, None]


def test_hue_and_saturation_are_those_of_colorsys(pictures):
    turns, factors = [0.0, 0.3, -0.45, 0.02], [1.0, 0.9, 1.1, 3.0]
    found = augment.hue_and_saturation(pictures, column(turns), column(factors))

    def expected(pixel, turn, factor):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        return colorsys.hsv_to_rgb((hue + turn) % 1.0, min(saturation * factor, 1.0), value)

    for image, result, turn, factor in zip(pictures, found, turns, factors, strict=True):
        wanted = [expected(pixel, turn, factor) for pixel in image.reshape(-1, 3)]
        np.testing.assert_allclose(result.reshape(-1, 3), wanted, atol=2e-6)


def test_brightness_and_contrast_are_those_of_numpy(pictures):
    x, deltas = pictures.astype(np.float64), np.array([0.08, -0.08, 0.0, 0.5])
    wanted = np.clip(x + deltas[:, None, None, None], 0, 1)
    np.testing.assert_allclose(augment.brightness(pictures, column(deltas)), wanted, atol=1e-6)
    for image, result, factor in zip(x, augment.contrast(pictures, column(1 + deltas)), 1 + deltas, strict=True):
        mean = image.reshape(-1, 3).mean(0)
        np.testing.assert_allclose(result, np.clip(mean + factor * (image - mean), 0, 1), atol=1e-6)


def test_noise_comes_to_half_of_the_images_with_its_deviation():
    keys = rng.per_example(jax.random.key(3), jnp.arange(400))
    images = jnp.full((400, 8, 8, 3), 0.5)
    change = np.asarray(augment.noise(keys, images, 0.02, 0.5)) - 0.5
    noisy = change.any((1, 2, 3))
    assert abs(int(noisy.sum()) - 200) < 5 * 10  # five deviations of a fair coin
    assert change[noisy].std() == pytest.approx(0.02, rel=0.03)
    assert abs(change[noisy].mean()) < 5e-4


def test_colours_are_drawn_within_their_bounds_for_each_image_alone():
    config = augment.ColourConfig(brightness=0.08)
    images, key = jnp.full((300, 1, 1, 3), 0.5), jax.random.key(4)
    deltas = np.asarray(augment.colour(config, key, jnp.arange(300), images))[:, 0, 0, 0] - 0.5
    assert -0.08 <= deltas.min() < -0.07 and 0.07 < deltas.max() <= 0.08
    assert len(np.unique(deltas)) > 290
    part = augment.colour(config, key, jnp.arange(7, 9), images[7:9])
    np.testing.assert_allclose(np.asarray(part)[:, 0, 0, 0] - 0.5, deltas[7:9], atol=1e-7)


def test_every_change_takes_part_in_its_turn_and_stays_within_the_range(pictures):
    names = ("brightness", "hue", "saturation", "contrast", "noise")
    whole = augment.ColourConfig(*(0.1,) * 5, noise_probability=1.0)
    run = lambda config: np.asarray(augment.colour(config, jax.random.key(0), jnp.arange(4), jnp.asarray(pictures)))
    changed = run(whole)
    assert 0.0 <= changed.min() and changed.max() <= 1.0
    for name in names:
        assert np.abs(run(dataclasses.replace(whole, **{name: 0.0})) - changed).max() > 1e-3, name
    in_turn = pictures  # in the order of the paper
    for name in names:
        alone = dataclasses.replace(augment.ColourConfig(noise_probability=1.0), **{name: 0.1})
        in_turn = np.asarray(augment.colour(alone, jax.random.key(0), jnp.arange(4), jnp.asarray(in_turn)))
    np.testing.assert_allclose(changed, in_turn, atol=1e-5)
    np.testing.assert_array_equal(run(augment.ColourConfig()), pictures)


@pytest.mark.parametrize("name", ["brightness", "hue", "saturation", "contrast", "noise_probability"])
def test_a_change_out_of_range_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} must be at most 1, not 1\.5"):
        augment.ColourConfig(**{name: 1.5})
    with pytest.raises(ValueError, match=r"brightness must be at least 0, not -0\.1"):
        augment.ColourConfig(brightness=-0.1)


def test_a_shift_is_a_window_of_the_mirrored_image_and_every_place_occurs():
    image = np.arange(5 * 6 * 2, dtype=np.uint8).reshape(1, 5, 6, 2)
    padded = np.pad(image[0], ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = {padded[i : i + 5, j : j + 6].tobytes(): (i, j) for i in range(5) for j in range(5)}
    keys = rng.per_example(jax.random.key(0), jnp.arange(300))
    moved = np.asarray(augment.shift(keys, jnp.repeat(jnp.asarray(image), 300, 0), 2))
    assert moved.dtype == np.uint8
    assert {windows[one.tobytes()] for one in moved} == set(windows.values())
