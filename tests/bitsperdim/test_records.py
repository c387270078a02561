"""Shards of equal records: what TFDS and a plain reader of TFRecord make of them is what was written."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from bitsperdim import records, tfrecord

FIELDS = {
    "bottom": np.dtype((np.uint16, (16, 9))),  # 288 bytes: lengths of two bytes
    "label": np.dtype(np.int32),
    "top": np.dtype((np.uint8, (2, 3))),
}
LENGTHS = {"train": [5, 5, 3], "evaluation": [4]}


@pytest.fixture(scope="module")
def values():
    generator = np.random.default_rng(0)
    draw = lambda dtype, count: generator.integers(0, np.iinfo(dtype.base).max, (count, *dtype.shape), dtype.base)
    return {
        split: {name: draw(dtype, sum(counts)) for name, dtype in FIELDS.items()} for split, counts in LENGTHS.items()
    }


@pytest.fixture(scope="module")
def folder(values, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("records"))
    for split, counts in LENGTHS.items():
        for index, count in enumerate(counts):
            start = sum(counts[:index])
            rows = {name: array[start : start + count] for name, array in values[split].items()}
            (folder / records.shard_name("codes", split, index, len(counts))).write_bytes(records.shard(rows, FIELDS))
    records.describe(folder, "codes", "Made for a test.", FIELDS, LENGTHS)
    return folder


@pytest.mark.parametrize("split", LENGTHS)
def test_tfds_reads_the_folder_without_tensorflow(folder, values, split, tmp_path):
    info = tfds.builder_from_directory(folder).info
    size = sum(LENGTHS[split])
    assert info.splits[split].num_examples == size
    read = tfrecord.open_records(info.splits[split].file_instructions, tmp_path, threads=1)  # checks every checksum
    for index in range(size):
        example = info.features.deserialize_example_np(read(index))
        assert example.keys() == FIELDS.keys()
        for name, array in values[split].items():
            np.testing.assert_array_equal(example[name], array[index])
            assert example[name].dtype == array.dtype


@pytest.mark.parametrize("split", LENGTHS)
def test_columns_give_any_rows_of_any_shards(folder, values, split):
    paths = sorted(folder.glob(f"codes-{split}.*"))
    found = records.columns(paths, FIELDS)
    size = sum(LENGTHS[split])
    for indices in (np.arange(size), np.array([size - 1, 0, 2, 2]), np.array([], np.int64)):
        for name, array in values[split].items():
            np.testing.assert_array_equal(found[name][indices], array[indices])
            assert (len(found[name]), found[name].shape) == (size, array.shape)


def test_shards_end_with_batches_and_stay_small(monkeypatch):
    assert records.lengths(1000, 128, FIELDS) == [1000]
    assert records.lengths(20_000, 128, FIELDS) == [8192, 8192, 3616]
    monkeypatch.setattr(records, "SHARD_BYTES", 3 * 128 * 400)
    assert records.lengths(1000, 128, FIELDS) == [384, 384, 232]
    assert records.lengths(1000, 600, FIELDS) == [600, 400]  # never less than a batch
