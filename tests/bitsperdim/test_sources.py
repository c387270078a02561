"""Embedded and synthetic sources, against the arrays and the geometry that they are cut from."""

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_images

from bitsperdim import sources
from bitsperdim.errors import InputError


def test_digits_are_those_of_scikit_learn_in_order():
    truth = load_digits()
    train, evaluation = sources.digits("train"), sources.digits("evaluation")
    assert (train.size, evaluation.size, train.levels, train.num_classes) == (1437, 360, 17, 10)
    parts = [source.read(np.arange(source.size)) for source in (train, evaluation)]
    images = np.concatenate([part["image"] for part in parts])
    np.testing.assert_array_equal(images[..., 0], truth.images)
    np.testing.assert_array_equal(np.concatenate([part["label"] for part in parts]), truth.target)
    assert images.dtype == np.uint8 and images.max() == 16


@pytest.mark.parametrize("size", [8, 32, 64, 80])
def test_photo_areas_lie_at_least_one_crop_apart(size):
    corners = {split: sources.photo_corners((2, 427, 640, 3), size, split) for split in sources.PHOTO_STRIDES}
    train, evaluation = (np.unique(corners[split][:, 2]) for split in ("train", "evaluation"))
    assert np.abs(train[:, None] - evaluation).min() >= 2 * size
    for grid in corners.values():
        assert (grid.min(axis=0) >= 0).all()
        assert (grid.max(axis=0) <= [1, 427 - size, 640 - size]).all()
        assert len(np.unique(grid, axis=0)) == len(grid)


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_photo_crops_are_the_pixels_at_their_corners(split):
    photographs = load_sample_images().images
    source = sources.photos(32, split)
    assert source.size >= 1024
    indices = np.array([0, source.size - 1, source.size // 2, 17])
    corners = sources.photo_corners((2, 427, 640, 3), 32, split)
    images = source.read(indices)["image"]
    assert images.dtype == np.uint8
    for image, (photo, top, left) in zip(images, corners[indices], strict=True):
        np.testing.assert_array_equal(image, photographs[photo][top : top + 32, left : left + 32])


def test_synthetic_is_a_function_of_the_index_and_fills_its_levels():
    make = lambda split: sources.synthetic(split, size=1000, shape=(4, 4, 3), levels=5, num_classes=7)
    source = make("train")
    all_examples = source.read(np.arange(1000))
    some = make("train").read(np.array([999, 3, 3]))
    np.testing.assert_array_equal(some["image"], all_examples["image"][[999, 3, 3]])
    np.testing.assert_array_equal(some["label"], [999 % 7, 3, 3])
    np.testing.assert_array_equal(np.unique(all_examples["image"]), np.arange(5))
    assert len(np.unique(all_examples["image"].reshape(1000, -1), axis=0)) == 1000
    assert (make("evaluation").read(np.arange(1000))["image"] != all_examples["image"]).any()


def test_synthetic_repeats_rather_than_grow_without_bound():
    source = sources.synthetic("train", size=10**9, shape=(2, 2, 1), levels=256, num_classes=0)
    examples = source.read(np.array([5, 5 + 2**16, 10**9 - 1]))
    np.testing.assert_array_equal(examples["image"][0], examples["image"][1])
    assert list(examples) == ["image"]


def test_fewer_bits_keep_the_high_ones():
    full = sources.photos(32, "train")
    reduced = sources.reduce_bits(full, 5)
    indices = np.arange(50)
    np.testing.assert_array_equal(reduced.read(indices)["image"], full.read(indices)["image"] // 8)
    assert reduced.levels == 32 and reduced.name == "photos train, 5 bits"


def grey_ramp():
    """256 examples of 60 x 50 pixels, the i-th of them all of level i."""
    read = lambda indices: {"image": np.tile(indices.astype(np.uint8)[:, None, None, None], (60, 50, 1))}
    return sources.Source("ramp", 256, (60, 50, 1), 256, 0, read)


def test_a_threshold_lies_in_the_middle_of_the_levels():
    values = sources.binarize(grey_ramp(), "threshold").read(np.arange(256))["image"]
    np.testing.assert_array_equal(values[:, 0, 0, 0], np.arange(256) > 127)
    binary, grey = sources.binarize(sources.digits("train"), "threshold"), sources.digits("train")
    indices = np.arange(200)
    np.testing.assert_array_equal(binary.read(indices)["image"], grey.read(indices)["image"] > 8)
    assert (binary.levels, binary.name, values.dtype) == (2, "digits train, threshold binarisation", np.uint8)
    np.testing.assert_array_equal(binary.read(indices)["label"], grey.read(indices)["label"])


def test_a_value_is_tossed_with_its_own_probability_and_the_ends_are_certain():
    source, words = sources.binarize(grey_ramp(), "dynamic"), np.arange(256, dtype=np.uint64) << 40
    for values in (source.read(np.arange(256))["image"], source.read_drawn(np.arange(256), words)["image"]):
        shares = values.reshape(256, -1).mean(axis=1)
        expected = np.arange(256) / 255
        deviation = np.sqrt(expected * (1 - expected) / 3000)
        assert (np.abs(shares - expected) <= 4.5 * deviation).all()
        assert values[0].max() == 0 and values[255].min() == 1
        assert values.dtype == np.uint8 and source.levels == 2
        # The second half of each 64-bit word is no copy of the first, nor is one row of the next.
        half = values[128].ravel().astype(float)
        assert abs(np.corrcoef(half[::2], half[1::2])[0, 1]) < 0.1
        assert abs(np.corrcoef(half[:-50], half[50:])[0, 1]) < 0.1


def test_the_tosses_are_the_same_with_every_version_of_numpy():
    # Runs resume on machines with another NumPy; these values must never change.
    image = sources.binarize(grey_ramp(), "dynamic").read(np.array([128]))["image"]
    np.testing.assert_array_equal(image.ravel()[:16], [0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize(
    "open_it, message",
    [
        (lambda: sources.digits("validation"), "source 'digits' has the splits train and evaluation, not 'validation'"),
        (lambda: sources.photos(81, "train"), "data.image_size of photos must lie in 1..80, not 81"),
        (
            lambda: sources.reduce_bits(sources.digits("train"), 5),
            "digits train has 17 levels and bits reduces from 256 only; leave data.bits at 8, not 5",
        ),
        (
            lambda: sources.binarize(sources.synthetic("train", 4, (2, 2, 1), 2, 0), "dynamic"),
            "synthetic train has 2 levels already; leave data.binarize at ''",
        ),
    ],
)
def test_what_cannot_be_opened_says_why(open_it, message):
    with pytest.raises(InputError) as caught:
        open_it()
    assert str(caught.value) == message
