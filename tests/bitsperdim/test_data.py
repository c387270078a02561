"""Batches as a pure function of (seed, step), complete epochs and splits, and the prefetching thread."""

import itertools
import math
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bitsperdim import data, sources
from bitsperdim.errors import InputError

FOLDER = {"source": "folder", "path": "pictures"}


def over(num_devices, replicas=1):
    """A sharding of the leading axis over `num_devices` shards, each held by `replicas` devices."""
    devices = jax.devices()[: num_devices * replicas]
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((num_devices, replicas), ("data", "replica"), axis_types=axes, devices=devices)
    return NamedSharding(mesh, PartitionSpec("data"))


def toy(size):
    """A source of codes, not of images: the example is its own index."""

    def read(indices):
        return {"top": np.repeat(indices[:, None, None], 4, axis=1).astype(np.int32), "label": indices.astype(np.int32)}

    return sources.Source("toy", size, (4, 1, 1), 512, size, read)


@pytest.mark.parametrize("size, batch_size", [(1, 4), (10, 4), (12, 4), (7, 20), (1000, 128)])
def test_every_epoch_holds_each_example_once_though_batches_cross_its_end(size, batch_size):
    num_batches = -(-3 * size // batch_size)
    stream = [data.train_indices(size, 5, step * batch_size, batch_size) for step in range(num_batches)]
    epochs = np.concatenate(stream)[: 3 * size].reshape(3, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (3, 1)))


def test_epochs_and_seeds_differ():
    first, second = data.train_indices(1000, 0, 0, 2000).reshape(2, 1000)
    other = data.train_indices(1000, 1, 0, 1000)
    for left, right in itertools.combinations((first, second, other, np.arange(1000)), 2):
        assert (left == right).mean() < 0.02  # one agreement in a thousand is what chance gives


def test_the_order_is_the_same_with_every_version_of_numpy():
    # Runs resume on machines with another NumPy; these values must never change.
    np.testing.assert_array_equal(data.train_indices(8, 3, 0, 10), [6, 1, 5, 2, 7, 4, 3, 0, 7, 3])


def test_a_batch_is_the_same_on_any_number_of_devices_and_in_any_order():
    source = sources.photos(8, "train")
    expected = source.read(data.train_indices(source.size, 1, 3 * 16, 16))["image"]
    for sharding in (over(8), over(1), over(4, replicas=2), over(2)):
        batch = data.train_batch(source, 1, 3, 16, sharding)
        np.testing.assert_array_equal(batch["image"], expected)
        np.testing.assert_array_equal(batch["position"], np.arange(16))
        assert batch["image"].sharding.is_equivalent_to(sharding, 4) and batch["image"].dtype == np.uint8


def test_dynamic_binarisation_draws_anew_in_each_epoch_and_the_same_wherever_it_is_read():
    config = data.DataConfig("digits", binarize="dynamic")
    source, grey = data.open_source(config, "train"), data.open_source(data.DataConfig("digits"), "train")
    size = source.size
    batches = [np.asarray(data.train_batch(source, 1, step, size, over(1))["image"]) for step in range(2)]
    again = data.train_batch(data.open_source(config, "train"), 1, 1, size, over(1))["image"]
    np.testing.assert_array_equal(batches[1], again)
    by_index = [np.argsort(data.train_indices(size, 1, step * size, size)) for step in range(2)]
    first, second = (batch[order] for batch, order in zip(batches, by_index, strict=True))
    shares = grey.read(np.arange(size))["image"] / 16
    # Two tosses of one coin differ with probability 2 p (1 - p).
    assert np.mean(first != second) == pytest.approx(np.mean(2 * shares * (1 - shares)), rel=0.03)
    assert np.mean(first) == pytest.approx(np.mean(shares), rel=0.01)
    half = data.train_batch(source, 1, 0, 1024, over(8))["image"]
    np.testing.assert_array_equal(half, batches[0][:1024])
    assert (np.asarray(data.train_batch(source, 2, 0, size, over(1))["image"]) != batches[0]).any()


def test_dynamic_binarisation_is_drawn_once_for_evaluation():
    source = data.open_source(data.DataConfig("digits", binarize="dynamic"), "evaluation")
    gather = lambda size: np.concatenate(
        [np.asarray(batch["image"])[batch["mask"]] for batch in data.evaluation_batches(source, size, over(8))]
    )
    np.testing.assert_array_equal(gather(16), gather(200))
    np.testing.assert_array_equal(gather(16), source.read(np.arange(360))["image"])


def test_each_row_is_read_once_however_many_devices_hold_it():
    asked = []
    source = toy(100)
    watched = source._replace(read=lambda indices: asked.append(len(indices)) or source.read(indices))
    data.train_batch(watched, 0, 0, 16, over(2, replicas=4))
    assert asked == [16]


def test_fields_other_than_images_travel_too():
    batch = data.train_batch(toy(10), 0, 0, 8, over(8))
    np.testing.assert_array_equal(batch["top"][:, 0, 0], batch["label"])
    assert sorted(batch) == ["label", "position", "top"] and batch["top"].shape == (8, 4, 1)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 16, 37])
def test_evaluation_counts_every_example_once(size, num_devices):
    batches = list(data.evaluation_batches(toy(size), 16, over(num_devices)))
    gather = lambda key: np.concatenate([np.asarray(batch[key]) for batch in batches])
    mask = gather("mask")
    np.testing.assert_array_equal(gather("label")[mask], np.arange(size))
    np.testing.assert_array_equal(gather("position")[mask], np.arange(size))
    assert len(mask) == -(-size // 16) * 16 and len(np.unique(gather("position"))) == len(mask)


def test_batches_are_made_under_a_transfer_guard():
    with jax.transfer_guard("disallow"):
        data.train_batch(toy(10), 0, 0, 8, over(8))
        list(data.evaluation_batches(toy(10), 8, over(8)))


@pytest.mark.parametrize("batch_size", [0, 12])
def test_a_batch_that_cannot_be_divided_is_refused(batch_size):
    message = f"batch_size {batch_size} cannot be divided over 8 devices; use a multiple of 8"
    with pytest.raises(InputError, match=message):
        data.train_batch(toy(10), 0, 0, batch_size, over(8))
    with pytest.raises(InputError, match=message):
        next(data.evaluation_batches(toy(10), batch_size, over(8)))


def test_two_processes_read_their_own_halves():
    program = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from bitsperdim import data, sources

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
asked = []
whole = sources.digits("evaluation")
source = whole._replace(size=13, read=lambda indices: asked.append(indices) or whole.read(indices))
batch = data.train_batch(source, 0, 1, 8, sharding)
own = np.arange(8)[4 * jax.process_index() :][:4]
assert batch["image"].shape == (8, 8, 8, 1)
np.testing.assert_array_equal(asked.pop(), data.train_indices(13, 0, 8, 8)[own])
shards = sorted(batch["position"].addressable_shards, key=lambda shard: shard.index[0].start)
np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), own)
last = list(data.evaluation_batches(source, 8, sharding))[-1]
kept = sum(int(np.asarray(shard.data).sum()) for shard in last["mask"].addressable_shards)
assert kept == (4, 1)[jax.process_index()], kept
"""
    port = str(free_port())
    arguments = [sys.executable, "-c", program, port]
    # Without the eight devices that the tests ask for: each process shall have two.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    processes = [
        subprocess.Popen([*arguments, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_prefetch_keeps_the_order_and_runs_ahead_in_another_thread():
    made = []

    def make(step):
        made.append((step, threading.current_thread()))
        return step * step

    results = data.prefetch(make, 3, 9, depth=2)
    assert next(results) == 9
    wait_until(lambda: len(made) == 3)
    time.sleep(0.05)
    assert [step for step, _ in made] == [3, 4, 5]  # the one in use and two ahead, no more
    assert list(results) == [16, 25, 36, 49, 64]
    assert all(thread is not threading.main_thread() for _, thread in made)
    assert not prefetch_threads()


@pytest.mark.parametrize("start, stop", [(0, 0), (4, 4), (0, 1), (5, 6)])
def test_prefetch_of_a_short_range_ends(start, stop):
    assert list(data.prefetch(lambda step: step, start, stop, depth=4)) == list(range(start, stop))


def test_prefetch_raises_where_the_result_would_have_come():
    def make(step):
        if step == 2:
            raise InputError("record 2 is unreadable")
        return step

    results = data.prefetch(make, 0, 10)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InputError, match="record 2 is unreadable"):
        next(results)
    assert not prefetch_threads()


def test_closing_prefetch_early_ends_its_thread():
    results = data.prefetch(lambda step: time.sleep(0.01) or step, 0, 10**6, depth=8)
    next(results)
    results.close()
    assert not prefetch_threads()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"source": "cifar10"}, "source must be one of photos, digits, synthetic, tfds, folder, not 'cifar10'"),
        ({"source": "tfds"}, "name must look like 'cifar10', 'celeb_a_hq/64' or 'cifar10:3.0.2', not ''"),
        (
            {"source": "tfds", "name": "cifar10:3"},
            "name must look like 'cifar10', 'celeb_a_hq/64' or 'cifar10:3.0.2', not 'cifar10:3'",
        ),
        (
            {"source": "photos", "image_size": 8, "channels": 1},
            "channels must be 0 where the source is 'photos', not 1",
        ),
        (
            {"source": "photos", "image_size": 8, "train_crop": "random"},
            "train_crop must be 'centre' where the source is 'photos', not 'random'",
        ),
        ({"source": "digits", "resize": "none"}, "resize must be 'cover' where the source is 'digits', not 'none'"),
        ({"source": "digits", "upscale": True}, "upscale must be False where the source is 'digits', not True"),
        (
            {"source": "synthetic", "image_size": 8, "crop_box": (0, 0, 4, 4)},
            "crop_box must be () where the source is 'synthetic', not (0, 0, 4, 4)",
        ),
        (
            {"source": "tfds", "name": "cifar10", "test_fraction": 0.1},
            "test_fraction must be 0.0 where the source is 'tfds', not 0.1",
        ),
        ({"source": "digits", "evaluation_fraction": math.nan}, "evaluation_fraction must be a number, not nan"),
        ({"source": "digits", "cache_limit_gib": math.nan}, "cache_limit_gib must be a number, not nan"),
        (FOLDER | {"test_fraction": math.nan}, "test_fraction must be a number, not nan"),
        (FOLDER | {"test_fraction": 0.9}, "test_fraction must be at least 0 and below 0.9, not 0.9"),
        (
            FOLDER | {"test_fraction": 1.0, "evaluation_path": "others"},
            "test_fraction must be at least 0 and below 1, not 1.0",
        ),
        ({"source": "digits", "image_size": -1}, "image_size must be 0 (as stored) or an edge in pixels, not -1"),
        ({"source": "photos"}, "image_size must be given for the source 'photos', not 0"),
        ({"source": "digits", "image_size": 32}, "image_size must be 0 or 8 for the source 'digits', not 32"),
        ({"source": "digits", "bits": 9}, "bits must lie in 1..8, not 9"),
        ({"source": "digits", "binarize": "static"}, "binarize must be one of '', threshold, dynamic, not 'static'"),
        ({"source": "digits", "binarize": "dynamic", "bits": 1}, "bits must be 8 where binarize is 'dynamic', not 1"),
        (
            {"source": "synthetic", "image_size": 8, "synthetic_levels": 257},
            "synthetic_levels must lie in 2..256, not 257",
        ),
        (
            {"source": "synthetic", "image_size": 8, "synthetic_size": 0},
            "synthetic_size must be at least 1, not 0",
        ),
        ({"source": "folder"}, "path must name a folder of images for the source 'folder', not ''"),
        (FOLDER | {"evaluation_fraction": 1.0}, "evaluation_fraction must lie between 0 and 1, not 1.0"),
        (FOLDER | {"image_height": 32}, "image_width must be given in pixels together with the other edge, not 0"),
        (
            FOLDER | {"image_height": 32, "image_width": -1},
            "image_width must be given in pixels together with the other edge, not -1",
        ),
        (
            FOLDER | {"image_height": 32, "image_width": 16, "image_size": 8},
            "image_height must be 0 where image_size is 8, not 32",
        ),
        (
            {"source": "photos", "image_size": 8, "image_height": 32, "image_width": 16},
            "image_height must be 0 where the source is 'photos', not 32",
        ),
        (FOLDER | {"channels": 4}, "channels must be 0 (as declared), 1 or 3, not 4"),
        (FOLDER | {"resize": "fit"}, "resize must be one of cover, none, not 'fit'"),
        (FOLDER | {"resampling": "cubic"}, "resampling must be one of lanczos, area, not 'cubic'"),
        (FOLDER | {"train_crop": "left"}, "train_crop must be one of centre, random, not 'left'"),
        (FOLDER | {"train_crop": "random"}, "train_crop must be 'centre' where no image_size is given, not 'random'"),
        (FOLDER | {"decode_threads": -1}, "decode_threads must be at least 0, not -1"),
        (FOLDER | {"cache_limit_gib": -1.0}, "cache_limit_gib must be at least 0, not -1.0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(values, message):
    with pytest.raises(ValueError) as caught:
        data.DataConfig(**values)
    assert str(caught.value) == message


def test_open_source_takes_what_the_config_says():
    config = data.DataConfig("synthetic", image_size=4, synthetic_size=9, synthetic_channels=1, synthetic_classes=3)
    source = data.open_source(config, "train")
    assert source[:5] == ("synthetic train", 9, (4, 4, 1), 256, 3)
    assert data.open_source(data.DataConfig("photos", image_size=32, bits=5), "evaluation").levels == 32
    with pytest.raises(InputError, match="digits train has 17 levels"):
        data.open_source(data.DataConfig("digits", bits=4), "train")
