"""TFDS folders against the known figures of the data sets, TFDS's own reader, and small damaged copies.

Not here: folders of TFRecord files (`test_tfrecord.py`).
"""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from bitsperdim import data
from bitsperdim.errors import InputError


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def open_split(tfds_dir, cache_dir):
    def open_it(name, split, **values):
        values = {"data_dir": str(tfds_dir), "cache_dir": str(cache_dir)} | values
        return data.open_source(data.DataConfig("tfds", name=name, **values), split)

    return open_it


@pytest.fixture
def small(tfds_dir, tmp_path):
    """A data directory with `small/1.0.0`: the first records of CIFAR-10 test, changed as asked."""
    # Imported here: the tests of other sources run without it.
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    def make(change=lambda index, record: record, version="1.0.0", info=None, features=None):
        origin, folder = tfds_dir / "cifar10" / "3.0.2", tmp_path / "small" / version
        folder.mkdir(parents=True)
        reader = ArrayRecordReader(str(origin / "cifar10-test.array_record-00000-of-00001"))
        writer = ArrayRecordWriter(str(folder / "small-test.array_record-00000-of-00001"), "group_size:1")
        for index, record in enumerate(reader.read(list(range(4)))):
            writer.write(change(index, record))
        writer.close()
        reader.close()
        split = json.loads((origin / "dataset_info.json").read_text())["splits"][1] | {"shardLengths": ["4"]}
        content = {"name": "small", "version": version, "fileFormat": "array_record", "splits": [split]} | (info or {})
        (folder / "dataset_info.json").write_text(json.dumps(content))
        names = features or ["id", "image", "label"]
        described = json.loads((origin / "features.json").read_text())
        kept = {name: described["featuresDict"]["features"][name] for name in names}
        (folder / "features.json").write_text(json.dumps(described | {"featuresDict": {"features": kept}}))
        return tmp_path

    return make


def test_cifar10_has_its_known_moments_and_labels(open_split):
    source = open_split("cifar10", "evaluation")
    assert source[:5] == ("cifar10:3.0.2 test", 10000, (32, 32, 3), 256, 10)
    examples = source.read(np.arange(10000))
    pixels = examples["image"].reshape(-1, 3) / 255
    np.testing.assert_allclose(pixels.mean(axis=0), [0.4942, 0.4851, 0.4504], atol=5e-5)
    np.testing.assert_allclose(pixels.std(axis=0), [0.2467, 0.2429, 0.2616], atol=5e-5)
    np.testing.assert_array_equal(np.bincount(examples["label"]), [1000] * 10)
    assert examples["image"].dtype == np.uint8 and examples["label"].dtype == np.int32


def test_records_are_those_of_tfds_in_its_order(open_split, tfds_dir):
    import tensorflow_datasets as tfds

    records = tfds.data_source("cifar10", data_dir=tfds_dir, split="test[:3%]")
    examples = open_split("cifar10:3.0.2", "test[:3%]").read(np.arange(300))
    for index in (0, 1, 299):
        np.testing.assert_array_equal(examples["image"][index], records[index]["image"])
        assert examples["label"][index] == records[index]["label"]


def test_sub_splits_have_the_sizes_of_tfds_and_share_no_cache(open_split):
    assert open_split("cifar10", "train", train_split="train[99%:]").size == 500
    assert open_split("cifar10", "test[:3]+train[:2]").size == 5
    head, tail = (open_split("cifar10", split).read(np.arange(2))["image"] for split in ("test[:2]", "test[2:4]"))
    assert (head != tail).any()


def test_binarized_mnist_has_two_levels_and_no_labels(open_split):
    source = open_split("binarized_mnist", "validation[:100]")
    examples = source.read(np.arange(100))
    assert (source.levels, source.num_classes, list(examples)) == (2, 0, ["image"])
    np.testing.assert_array_equal(np.unique(examples["image"]), [0, 1])
    with pytest.raises(InputError, match="has 2 levels and bits reduces from 256 only"):
        open_split("binarized_mnist", "validation[:100]", bits=5)


def test_grey_digits_are_binarised_by_a_threshold_or_by_tosses(open_split):
    grey = open_split("mnist", "test[:2000]").read(np.arange(2000))["image"]
    sharp, tossed = (open_split("mnist", "test[:2000]", binarize=how) for how in ("threshold", "dynamic"))
    np.testing.assert_array_equal(sharp.read(np.arange(2000))["image"], grey > 127)
    drawn = tossed.read_drawn(np.arange(2000), np.arange(2000, dtype=np.uint64))["image"]
    assert (tossed.levels, tossed.num_classes, np.unique(drawn).tolist()) == (2, 10, [0, 1])
    assert drawn.mean() == pytest.approx(grey.mean() / 255, rel=0.01)
    np.testing.assert_array_equal(drawn[grey % 255 == 0], grey[grey % 255 == 0] // 255)
    assert "has 2 levels already" in failure(lambda: open_split("binarized_mnist", "test[:7]", binarize="dynamic"))


def test_a_configuration_is_found_by_its_name(open_split):
    source = open_split("celeb_a_hq/64", "train[:3]", image_size=64)
    assert source[:4] == ("celeb_a_hq/64:2.0.0 train[:3]", 3, (64, 64, 3), 256)


def test_folders_not_given_come_from_the_environment(small, tmp_path, monkeypatch):
    small()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("BITSPERDIM_CACHE", str(tmp_path / "here"))
    assert data.open_source(data.DataConfig("tfds", name="small"), "evaluation").size == 4
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_the_newest_version_is_taken_by_number_not_by_letter(small, tmp_path):
    for version in ("1.9.0", "1.10.0"):
        small(version=version)
    values = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    assert data.open_source(data.DataConfig("tfds", name="small", **values), "test").name == "small:1.10.0 test"
    assert data.open_source(data.DataConfig("tfds", name="small:1.9.0", **values), "test").name == "small:1.9.0 test"


OPEN = """
import sys
from bitsperdim import data

config = data.DataConfig("tfds", name="cifar10", data_dir=sys.argv[1], cache_dir=sys.argv[2])
source = data.open_source(config, "test[:1500]")
print(source.read(range(1500))["image"].sum(), "tensorflow_datasets" in sys.modules)
"""


def test_two_processes_may_make_one_cache_and_the_next_needs_no_tfds(tfds_dir, tmp_path):
    command = [sys.executable, "-c", OPEN, str(tfds_dir), str(tmp_path)]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0].split() for process in racing]
    assert [process.returncode for process in racing] == [0, 0]
    (folder,) = tmp_path.iterdir()
    total = str(np.load(folder / "images.npy").sum())
    assert [output[0] for output in outputs] == [total, total]
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert again.stdout.split() == [total, "False"]


def failure(open_it):
    with pytest.raises(InputError) as caught:
        open_it()
    return str(caught.value)


def test_what_is_missing_is_named_with_what_is_there(open_split, tfds_dir, tmp_path):
    prepare = 'download=False forbids to fetch it:\n  pip install "bitsperdim[prepare]" && python -m bitsperdim.prepare'
    present = "binarized_mnist, celeb_a_hq, cifar10, kodak, mnist, tiny_imagenet"
    assert failure(lambda: open_split("svhn", "train", download=False)) == (
        f"data set 'svhn' is not in {tfds_dir} (there: {present}) and data.{prepare} svhn --data_dir={tfds_dir}"
    )
    assert failure(lambda: open_split("svhn", "train", download=False, data_dir=str(tmp_path / "none"))) == (
        f"data set 'svhn' is not in {tmp_path}/none and data.{prepare} svhn --data_dir={tmp_path}/none"
    )
    assert failure(lambda: open_split("celeb_a_hq", "train")) == (
        f"data set 'celeb_a_hq' in {tfds_dir} has the configurations 1024, 64; set data.name='celeb_a_hq/1024'"
    )
    assert failure(lambda: open_split("cifar10:2.0.0", "train")) == (
        f"version 2.0.0 of 'cifar10' is not in {tfds_dir}; present: 3.0.2"
    )
    assert failure(lambda: open_split("cifar10", "validation[:10]")) == (
        f"cifar10:3.0.2 in {tfds_dir}/cifar10/3.0.2 has no split 'validation'; present: train (50,000), test (10,000)"
    )


def test_ranges_and_sizes_that_cannot_be_read_are_named(open_split):
    assert failure(lambda: open_split("cifar10", "test[:x]")).startswith(
        "split 'test[:x]' of cifar10:3.0.2: Error parsing split"
    )
    assert failure(lambda: open_split("cifar10", "evaluation", evaluation_split="test[:0]")) == (
        "split 'test[:0]' of cifar10:3.0.2 is empty; choose another range"
    )
    assert failure(lambda: open_split("cifar10", "test[:7]", image_size=64)) == (
        "record 0 of cifar10:3.0.2 test[:7] is 32x32, smaller than 64x64; set data.upscale=true or a smaller size"
    )
    assert failure(lambda: open_split("binarized_mnist", "test[:7]", image_size=16)) == (
        "images of binarized_mnist:1.0.0 hold only 0 and 1 and cannot be resized to 16x16; set data.image_size=0"
    )


def test_images_of_unequal_sizes_are_named(open_split):
    assert failure(lambda: open_split("kodak", "evaluation")) == (
        "record 2 of kodak:1.0.0 test is 768x512x3 where those before it are 512x768x3; "
        "set data.image_size (or image_height and image_width) to resize them"
    )


def test_images_of_unequal_sizes_are_brought_to_one(open_split, tfds_dir):
    import tensorflow_datasets as tfds

    stored = [record["image"] for record in tfds.data_source("kodak", data_dir=tfds_dir, split="test")]
    cropped = open_split("kodak", "evaluation", image_size=500, resize="none").read(np.arange(24))["image"]
    for image, crop in zip(stored, cropped, strict=True):
        top, left = (image.shape[0] - 500) // 2, (image.shape[1] - 500) // 2
        np.testing.assert_array_equal(crop, image[top : top + 500, left : left + 500])
    source = open_split("kodak", "evaluation", image_height=64, image_width=128, resampling="area")
    assert source.shape == (64, 128, 3)
    # 768 x 512 is shrunk by four, of which the middle quarter of the height remains.
    tall = next(index for index, image in enumerate(stored) if image.shape[0] == 768)
    blocks = stored[tall][256:512].reshape(64, 4, 128, 4, 3).mean((1, 3))
    np.testing.assert_array_equal(source.read(np.array([tall]))["image"][0], np.floor(blocks + 0.5))


def test_large_jpegs_shrink_to_the_smaller_edition_of_the_same_data_set(open_split):
    # `celeb_a_hq/64` holds the means of 16 x 16 pixels of `celeb_a_hq/1024`, in another order of the records.
    small = open_split("celeb_a_hq/64", "train").read(np.arange(56))["image"]
    for values in ({}, {"train_crop": "random"}):
        source = open_split("celeb_a_hq/1024", "train", image_size=64, resampling="area", **values)
        shrunk = source.read(np.arange(6))["image"]
        distances = np.abs(shrunk[:, None].astype(int) - small).max((2, 3, 4))
        np.testing.assert_array_equal(distances.min(axis=1), 0)
    np.testing.assert_array_equal(source.read_drawn(np.arange(6), np.arange(6, dtype=np.uint64))["image"], shrunk)


def test_colours_can_be_made_grey_and_labels_demanded(open_split):
    colour, grey = (open_split("cifar10", "test[:5]", channels=channels) for channels in (0, 1))
    read = lambda source: source.read(np.arange(5))["image"]
    np.testing.assert_allclose(read(grey)[..., 0], read(colour) @ [0.299, 0.587, 0.114], atol=0.51)
    assert failure(lambda: open_split("kodak", "test", image_size=16, labels=True)) == (
        "kodak:1.0.0 test has no labels; set data.labels=false"
    )


def open_small(root):
    config = data.DataConfig("tfds", name="small", data_dir=str(root), cache_dir=str(root / "cache"))
    return data.open_source(config, "evaluation")


def test_an_undecodable_record_is_named_and_leaves_no_cache(small):
    root = small(lambda index, record: record.replace(b"\x89PNG", b"\x89XYZ") if index == 2 else record)
    assert failure(lambda: open_small(root)) == (
        "record 2 of small:1.0.0 test is not an image in PNG, JPEG, WebP, BMP or TIFF format; "
        "prepare the data set again"
    )
    assert not list((root / "cache").iterdir())


def test_a_value_beyond_the_levels_is_named(tfds_dir, tmp_path, open_split):
    # Grey digits where the binary ones should be.
    (tmp_path / "binarized_mnist").mkdir()
    (tmp_path / "binarized_mnist" / "3.0.1").symlink_to(tfds_dir / "mnist" / "3.0.1")
    message = failure(lambda: open_split("binarized_mnist", "test[:3]", data_dir=str(tmp_path)))
    assert message == "record 0 of binarized_mnist:3.0.1 test[:3] holds the value 255 where values must be below 2"


def test_other_formats_and_damaged_descriptions_are_named(small, tmp_path):
    root = small(info={"fileFormat": "riegeli"})
    assert failure(lambda: open_small(root)) == (
        f"{root}/small/1.0.0 holds riegeli files and only array_record and tfrecord can be read; "
        "prepare a copy elsewhere:\n"
        '  pip install "bitsperdim[prepare]" && python -m bitsperdim.prepare small --data_dir=FOLDER'
    )
    (root / "small" / "1.0.0" / "dataset_info.json").write_text("{")
    assert failure(lambda: open_small(root)).startswith(f"{root}/small/1.0.0/dataset_info.json is damaged (")


def test_a_damaged_or_missing_shard_is_named(small):
    root = small()
    (shard,) = (root / "small" / "1.0.0").glob("*array_record*")
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert failure(lambda: open_small(root)).startswith("record 0 of small:1.0.0 test cannot be read (")
    shard.unlink()
    missing = f"the shard {shard} is missing; prepare the data set again"
    assert failure(lambda: open_small(root)) == missing
    shard.mkdir()
    assert failure(lambda: open_small(root)) == missing


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"\xff\xfe\xff", "utf"),
        (b"null", "it has no list of splits"),
        (b"[]", "it has no list of splits"),
        (b"{}", "it has no list of splits"),
        (b'{"splits": {"test": 4}}', "it has no list of splits"),
        (b'{"splits": [{"shardLengths": ["4"]}]}', "one of its splits has no name"),
        (b'{"splits": [{"name": "test", "shardLengths": ["x"]}]}', "the shardLengths of its split 'test' are no num"),
        (b'{"splits": [{"name": "test", "shardLengths": 4}]}', "the shardLengths of its split 'test' are no num"),
    ],
)
def test_a_damaged_dataset_info_is_named_with_its_reason(small, content, reason):
    file = small() / "small" / "1.0.0" / "dataset_info.json"
    file.write_bytes(content)
    message = failure(lambda: open_small(file.parents[2]))
    assert message.startswith(f"{file} is damaged (") and message.endswith("; prepare the data set again")
    assert reason in message and "\n" not in message


@pytest.mark.parametrize(
    "content, state",
    [
        (None, "missing or damaged ([Errno 2]"),
        (b"", "missing or damaged ("),
        (b"\xff\xfe\xff", "missing or damaged ("),
        (b"{}", "missing or damaged (it is empty)"),
        (b"[1]", "or dataset_info.json beside it is damaged ("),
        (b'{"pythonClassName": "nonsense"}', "or dataset_info.json beside it is damaged ("),
    ],
)
def test_damaged_features_are_named(small, content, state):
    file = small() / "small" / "1.0.0" / "features.json"
    file.unlink() if content is None else file.write_bytes(content)
    message = failure(lambda: open_small(file.parents[2]))
    assert message.startswith(f"{file} ") and state in message and "\n" not in message


def test_a_data_dir_that_is_no_folder_of_data_sets_is_told_what_to_give(small, tmp_path):
    root = small()
    opened_in = lambda place: (
        lambda: data.open_source(data.DataConfig("tfds", name="small", data_dir=str(place)), "test")
    )
    for inside in (root / "small", root / "small" / "1.0.0"):
        assert failure(opened_in(inside)) == (
            f"data.data_dir {inside} is the data set 'small' itself; give the folder above, {root}"
        )
    file = root / "small" / "1.0.0" / "features.json"
    assert failure(opened_in(file)) == (
        f"data.data_dir {file} is a file; set it to the folder that holds the data sets"
    )


def test_a_configuration_that_does_not_exist_is_told_which_do(open_split, small, tfds_dir):
    for download in (False, True):
        open_it = functools.partial(open_split, "tiny_imagenet/64", "train", download=download)
        assert failure(open_it) == (
            f"data set 'tiny_imagenet' in {tfds_dir} has no configurations, so no '64'; set data.name='tiny_imagenet'"
        )
    root = small()
    assert failure(lambda: open_split("small/1.0.0", "test", data_dir=str(root))) == (
        f"data set 'small' in {root} has no configurations, so no '1.0.0'; set data.name='small:1.0.0'"
    )
    assert failure(lambda: open_split("celeb_a_hq/33", "train", download=False)) == (
        f"data set 'celeb_a_hq' in {tfds_dir} has the configurations 1024, 64 and no '33'; "
        "set data.name='celeb_a_hq/1024'"
    )
    message = failure(lambda: open_split("celeb_a_hq/33", "train"))
    assert message.startswith(
        f"data set 'celeb_a_hq/33' is not in {tfds_dir} (there: celeb_a_hq/1024, celeb_a_hq/64) and TFDS has no builder"
    )
    assert "pip install" not in message


def test_a_data_set_without_images_is_named(small):
    root = small(features=["id", "label"])
    assert failure(lambda: open_small(root)) == "small:1.0.0 has no feature 'image'; its features: id, label"
