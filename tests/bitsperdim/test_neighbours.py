"""Nearest images against a search through all pairs in exact integers."""

import numpy as np
import pytest

from bitsperdim import neighbours, sources
from bitsperdim.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return sources.digits("train")


@pytest.fixture(scope="module")
def samples():
    return sources.digits("evaluation").read(np.arange(4))["image"]


@pytest.fixture(params=[1, 100, 1024])
def batches(request, monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_IMAGES", request.param)


def everything(source):
    return source.read(np.arange(source.size))["image"]


def test_the_nearest_of_all_are_found_whatever_the_batches(digits, samples, batches):
    pairs = samples[:, None].astype(np.int64) - everything(digits)[None].astype(np.int64)
    squared = (pairs**2).sum((2, 3, 4))
    expected = np.argsort(squared, axis=1, kind="stable")[:, :5]
    done = []
    found = neighbours.nearest(samples, digits, 5, progress=done.append)
    np.testing.assert_array_equal(found.index, expected)
    np.testing.assert_array_equal(found.distance, np.sqrt(np.take_along_axis(squared, expected, 1)))
    np.testing.assert_array_equal(found.images, everything(digits)[expected])
    assert done == sorted(done) and done[-1] == digits.size


def test_large_images_that_differ_in_one_level_are_told_apart():
    # float32 holds no integers beyond 2**24; |a|**2 is 3e9 here.
    bright = np.full((3, 128, 128, 3), 255, np.uint8)
    bright[0, 0, 0, 0], bright[1, 5, 5, 1] = 253, 254
    source = sources.Source("bright", 3, (128, 128, 3), 256, 0, lambda indices: {"image": bright[indices]})
    found = neighbours.nearest(bright[2:], source, 3)
    np.testing.assert_array_equal(found.index, [[2, 1, 0]])
    np.testing.assert_array_equal(found.distance, [[0.0, 1.0, 2.0]])


def test_features_decide_what_is_near(digits, samples):
    ink = lambda images: images.sum((1, 2, 3), dtype=np.float32)[:, None]
    found = neighbours.nearest(samples, digits, 3, features=ink)
    apart = np.abs(ink(samples) - ink(everything(digits)).T)
    np.testing.assert_allclose(found.distance, np.sort(apart, axis=1)[:, :3])


def test_a_row_shows_a_sample_then_its_neighbours(digits, samples):
    found = neighbours.nearest(samples, digits, 2)
    picture = neighbours.picture(samples, found, levels=17)
    size = 96 + 2  # a digit of 8 pixels is drawn on 96, then a line
    above = len(picture) - (4 * size - 2)  # headings
    assert picture.shape[1:] == (3 * size - 2, 3) and 0 < above < 24
    picture = picture[above:]
    spread = lambda image: np.rint(image[..., 0] * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(picture[size:, :96:12, 0][:96:12], spread(samples[1]))
    np.testing.assert_array_equal(picture[size:, size : size + 96 : 12, 0][:96:12], spread(found.images[1, 0]))


@pytest.mark.parametrize(
    ("k", "features", "message"),
    [
        (0, None, r"--nearest must lie in 1\.\.1437"),
        (1438, None, r"--nearest must lie in 1\.\.1437"),
        (1, lambda images: np.zeros(len(images)), "a row of numbers an image"),
        (1, lambda images: np.zeros((2, 3)), "a row of numbers an image"),
        (1, lambda images: np.full((len(images), 1), np.nan), "not finite"),
        (1, lambda images: np.zeros((len(images), len(images))), "as many numbers for every image, not 4 and 1024"),
        (1, lambda images: images.nothing, "failed: AttributeError"),
    ],
)
def test_what_cannot_be_looked_for_is_named(digits, samples, k, features, message):
    with pytest.raises(InputError, match=message):
        neighbours.nearest(samples, digits, k, features)


def test_samples_of_another_size_are_refused(digits):
    with pytest.raises(InputError, match=r"samples are \(4, 4, 1\), images of digits train are \(8, 8, 1\)"):
        neighbours.nearest(np.zeros((1, 4, 4, 1), np.uint8), digits, 1)
