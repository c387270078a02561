"""TFRecord shards: bytes that TensorFlow wrote, the splits of TFDS, and every way in which a shard can be broken."""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
from etils import epath

from bitsperdim import data, tfrecord
from bitsperdim.errors import InputError

# Five records of texts, as TensorFlow wrote them (the test data of grain 0.2.18).
WRITTEN_BY_TENSORFLOW = bytes.fromhex(
    "01000000000000000175de4131c30c4ad60300000000000000b099490e31203159bed8de0300000000000000b099490e322031b4f2345f"
    "0700000000000000bbd79f11312032203120319886ebb80b000000000000008615f504312031203120322032203161692698"
)
TEXTS = [b"1", b"1 1", b"2 1", b"1 2 1 1", b"1 1 1 2 2 1"]


class Part:
    """What TFDS calls a FileInstruction."""

    def __init__(self, path, skip, take, examples_in_shard=5):
        self.filename, self.skip, self.take, self.examples_in_shard = str(path), skip, take, examples_in_shard


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "texts-train.tfrecord-00000-of-00001"
    path.write_bytes(WRITTEN_BY_TENSORFLOW)
    return path


def failure(call):
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_records_that_tensorflow_wrote_are_read_in_any_order(shard, tmp_path):
    read = tfrecord.open_records([Part(shard, 0, 5)], tmp_path / "index", threads=2)
    assert [read(number) for number in (3, 0, 4, 1, 2)] == [TEXTS[number] for number in (3, 0, 4, 1, 2)]


def test_parts_of_several_shards_follow_each_other(shard, tmp_path):
    other = shutil.copy(shard, tmp_path / "other")
    read = tfrecord.open_records([Part(shard, 3, 2), Part(other, 0, 1), Part(shard, 1, 1)], tmp_path / "i", threads=1)
    assert [read(number) for number in range(4)] == [TEXTS[number] for number in (3, 4, 0, 1)]


def test_an_index_is_made_once_and_again_where_its_shard_has_grown(shard, tmp_path, monkeypatch):
    walked = []
    walk = tfrecord.boundaries
    monkeypatch.setattr(tfrecord, "boundaries", lambda path: walked.append(path) or walk(path))
    for _ in range(2):
        tfrecord.open_records([Part(shard, 0, 5)], tmp_path / "index", threads=1)
    assert len(walked) == 1
    shard.write_bytes(2 * WRITTEN_BY_TENSORFLOW)
    read = tfrecord.open_records([Part(shard, 0, 10, examples_in_shard=10)], tmp_path / "index", threads=1)
    assert len(walked) == 2 and read(9) == TEXTS[4]
    (tmp_path / "index" / f"{shard.name}.boundaries").write_bytes(b"broken")
    assert tfrecord.open_records([Part(shard, 0, 5, 10)], tmp_path / "index", threads=1)(1) == TEXTS[1]


@pytest.mark.parametrize(
    "content",
    [b"", bytes(48), np.array([0, 17, 36, 55, 54, 105], "<i8").tobytes(), np.array([0, 105], "<i8").tobytes()],
    ids=["empty", "zeros", "backwards", "fewer"],
)
def test_a_damaged_index_is_made_again(shard, tmp_path, content, capsys):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / f"{shard.name}.boundaries").write_bytes(content)
    for told in (["damaged"] if len(content) != 16 else [], []):
        read = tfrecord.open_records([Part(shard, 0, 5)], tmp_path / "index", threads=1)
        assert [read(number) for number in range(5)] == TEXTS
        assert [word for word in told if word not in capsys.readouterr().err] == []


def test_a_flipped_byte_of_a_record_is_named_with_its_place(shard, tmp_path):
    content = bytearray(WRITTEN_BY_TENSORFLOW)
    content[17 + 19 + 12 + 1] ^= 1  # in the third record
    shard.write_bytes(content)
    read = tfrecord.open_records([Part(shard, 1, 4)], tmp_path / "index", threads=1)
    assert [read(number) for number in (0, 2, 3)] == [TEXTS[1], TEXTS[3], TEXTS[4]]
    for _ in range(2):
        assert failure(lambda: read(1)) == (
            f"record 2 of {shard} is damaged (the checksum of its data); prepare the data set again"
        )


@pytest.mark.parametrize("size, needed", [(104, 105), (79, 94), (60, 71), (54, 55)])
def test_a_truncated_shard_is_named_with_its_bytes(shard, size, needed):
    shard.write_bytes(WRITTEN_BY_TENSORFLOW[:size])
    assert failure(lambda: tfrecord.boundaries(epath.Path(shard))) == (
        f"{shard} is truncated (read {size} of at least {needed} bytes); prepare the data set again"
    )


def test_a_flipped_length_is_named_with_its_place(shard):
    shard.write_bytes(WRITTEN_BY_TENSORFLOW[:17] + b"\x04" + WRITTEN_BY_TENSORFLOW[18:])
    assert failure(lambda: tfrecord.boundaries(epath.Path(shard))) == (
        f"{shard} is damaged at byte 17 (the checksum of a record's length); prepare the data set again"
    )


def test_a_missing_shard_and_a_wrong_number_of_records_are_named(shard, tmp_path):
    open_it = lambda path, number: tfrecord.open_records([Part(path, 0, 1, number)], tmp_path / "i", threads=1)
    assert failure(lambda: open_it(shard, 6)) == (
        f"{shard} holds 5 records where dataset_info.json says 6; prepare the data set again"
    )
    assert failure(lambda: open_it(tmp_path / "none", 5)) == (
        f"the shard {tmp_path}/none is missing; prepare the data set again"
    )
    (tmp_path / "folder").mkdir()
    assert failure(lambda: open_it(tmp_path / "folder", 5)) == (
        f"the shard {tmp_path}/folder cannot be read (Is a directory); prepare the data set again"
    )


def framed(content):
    length = struct.pack("<Q", len(content))
    checksum = lambda data: struct.pack("<I", tfrecord.masked_crc32c(data))
    return length + checksum(length) + content + checksum(content)


@pytest.fixture(scope="module")
def twins(tfds_dir, tmp_path_factory):
    """A data directory whose `tiny_imagenet` and `cifar10` hold the first records as TFRecord, in unequal shards."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfrecord")
    for name, lengths in (("tiny_imagenet/1.0.0", {"train": [7, 20, 13]}), ("cifar10/3.0.2", {"test": [50, 50]})):
        origin, folder = tfds_dir / name, root / name
        folder.mkdir(parents=True)
        for path in (*origin.glob("features.json"), *origin.glob("*.labels.txt")):
            shutil.copy(path, folder)
        info = json.loads((origin / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
        info["splits"] = [split for split in info["splits"] if split["name"] in lengths]
        for split in info["splits"]:
            shards = lengths[split["name"]]
            split["shardLengths"] = [str(length) for length in shards]
            builder = tfds.builder_from_directory(origin)
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            records = iter(builder.as_data_source(f"{split['name']}[:{sum(shards)}]", deserialize_method=raw))
            for number, length in enumerate(shards):
                file = f"{folder.parent.name}-{split['name']}.tfrecord-{number:05}-of-{len(shards):05}"
                (folder / file).write_bytes(b"".join(framed(next(records)) for _ in range(length)))
        (folder / "dataset_info.json").write_text(json.dumps(info))
    return root


def read_all(name, split, root, cache_dir, **values):
    config = data.DataConfig("tfds", name=name, data_dir=str(root), cache_dir=str(cache_dir), **values)
    source = data.open_source(config, split)
    return source, source.read(np.arange(source.size))


@pytest.mark.parametrize(
    "split, rows",
    [("test[:100]", slice(100)), ("test[30:80]", slice(30, 80)), ("test[:2]+test[98:100]", [0, 1, 98, 99])],
)
def test_both_formats_hold_the_same_images_and_labels(twins, tfds_dir, tmp_path, split, rows):
    source, examples = read_all("cifar10", split, twins, tmp_path / "a")
    _, expected = read_all("cifar10", "test[:100]", tfds_dir, tmp_path / "b")
    assert source.num_classes == 10 and list(examples) == ["image", "label"]
    for name, values in expected.items():
        np.testing.assert_array_equal(examples[name], values[rows])


def test_percentages_are_those_of_tfds(twins, tmp_path):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(twins / "tiny_imagenet" / "1.0.0")
    for split in ("train[:90%]", "train[33%:67%]", "train[-10%:]", "train[10:20]"):
        source, _ = read_all("tiny_imagenet", split, twins, tmp_path)
        assert source.size == builder.info.splits[split].num_examples


def test_images_that_are_not_kept_decoded_are_the_same(twins, tfds_dir, tmp_path):
    source, images = read_all("tiny_imagenet", "train[:40]", twins, tmp_path, image_size=48, train_crop="random")
    assert source.read_drawn is None  # by its own name a split is not for training
    values = {"train_split": "train[:40]", "image_size": 48, "train_crop": "random"}
    read = [read_all("tiny_imagenet", "train", root, tmp_path, **values) for root in (twins, tfds_dir)]
    draws = np.arange(40, dtype=np.uint64) << np.uint64(59)
    crops = [source.read_drawn(np.arange(40), draws) for source, _ in read]
    for (_, whole), cropped in zip(read, crops, strict=True):
        np.testing.assert_array_equal(whole["image"], images["image"])
        np.testing.assert_array_equal(cropped["label"], images["label"])
        np.testing.assert_array_equal(cropped["image"], crops[0]["image"])


def test_a_truncated_shard_of_a_data_set_is_named(twins, tmp_path):
    root = pathlib.Path(shutil.copytree(twins, tmp_path / "copy"))
    (shard,) = (root / "cifar10" / "3.0.2").glob("*00001-of-00002")
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    message = failure(lambda: read_all("cifar10", "test", root, tmp_path / "cache"))
    assert message == (
        f"{shard} is truncated (read {len(content) - 100:,} of at least {len(content):,} bytes); "
        "prepare the data set again"
    )


def test_a_flipped_byte_of_a_data_set_is_named(twins, tmp_path):
    root = pathlib.Path(shutil.copytree(twins, tmp_path / "copy"))
    (shard,) = (root / "cifar10" / "3.0.2").glob("*00001-of-00002")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 16
    shard.write_bytes(content)
    assert failure(lambda: read_all("cifar10", "test", root, tmp_path / "cache")) == (
        f"record 49 of {shard} is damaged (the checksum of its data); prepare the data set again"
    )
