"""Folders of images: splits, labels, changes, crops, and an error for everything that can be wrong with them."""

import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from bitsperdim import cache, data, folder_scan, folder_source
from bitsperdim.errors import InputError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path):
    """Forty images of 20 x 30 in two sub-folders."""
    for index in range(40):
        save(tmp_path / "pictures" / "ab"[index % 2] / f"{index:02}.png", noise(20, 30, 3, seed=index))
    return tmp_path / "pictures"


@pytest.fixture
def open_split(tmp_path):
    def open_it(path, split="train", **values):
        values = {"cache_dir": str(tmp_path / "cache"), "image_size": 16, "resize": "none"} | values
        return data.open_source(data.DataConfig("folder", path=str(path), **values), split)

    return open_it


def failure(call):
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def all_images(source):
    return source.read(np.arange(source.size))["image"]


def as_set(images):
    return {image.tobytes() for image in images}


def test_the_splits_are_disjoint_and_complete_and_stay_as_images_are_added(pictures, open_split):
    before = {split: as_set(all_images(open_split(pictures, split))) for split in ("train", "evaluation")}
    whole = {noise(20, 30, 3, seed=index)[2:18, 7:23].tobytes() for index in range(40)}
    assert before["train"] | before["evaluation"] == whole and not before["train"] & before["evaluation"]
    for index in range(40, 60):
        save(pictures / f"{index}.png", noise(20, 30, 3, seed=index))
    for split, images in before.items():
        assert images < as_set(all_images(open_split(pictures, split)))


def test_three_splits_are_disjoint_and_complete_and_neither_share_moves_the_images_of_the_other(pictures, open_split):
    values = {"evaluation_fraction": 0.3, "test_fraction": 0.3}
    found = {split: as_set(all_images(open_split(pictures, split, **values))) for split in folder_source.SPLITS}
    assert len(set.union(*found.values())) == 40 == sum(len(images) for images in found.values())
    without = as_set(all_images(open_split(pictures, "evaluation", evaluation_fraction=0.3)))
    fewer = as_set(all_images(open_split(pictures, "test", evaluation_fraction=0.1, test_fraction=0.3)))
    assert found["evaluation"] == without and found["test"] == fewer


def test_a_test_split_is_held_out_beside_a_folder_for_evaluation(pictures, open_split, tmp_path):
    shutil.move(pictures / "b", tmp_path / "held out")
    values = {"evaluation_path": str(tmp_path / "held out"), "test_fraction": 0.4}
    train, test = (as_set(all_images(open_split(pictures, split, **values))) for split in ("train", "test"))
    assert test and not train & test and len(train | test) == 20
    assert open_split(pictures, "evaluation", **values).size == 20


def test_the_shares_are_those_asked_and_never_change():
    chosen = [folder_source.split_of(f"image {index}.png", 0.05, 0.05) for index in range(20_000)]
    for split in ("evaluation", "test"):
        assert abs(np.mean([name == split for name in chosen]) - 0.05) < 0.006  # four standard deviations
    assert [folder_source.split_of(name, 0.5, 0.25)[:2] for name in "abcdefgh"] == [*["ev"] * 5, "te", "tr", "ev"]
    # One accent, as one character and as two.
    names = [
        (f"{index} \N{LATIN SMALL LETTER E WITH ACUTE}", f"{index} e\N{COMBINING ACUTE ACCENT}") for index in range(50)
    ]
    assert all(len({folder_source.split_of(name, 0.5) for name in pair}) == 1 for pair in names)


def test_a_folder_of_its_own_for_evaluation(pictures, open_split, tmp_path):
    shutil.move(pictures / "b", tmp_path / "held out")
    values = {"evaluation_path": str(tmp_path / "held out")}
    assert [open_split(pictures, split, **values).size for split in ("train", "evaluation")] == [20, 20]
    assert failure(lambda: open_split(pictures, evaluation_path=str(pictures / "a"))) == (
        f"data.evaluation_path {pictures}/a and data.path {pictures} hold the same files; "
        "set data.evaluation_path to a folder apart, or to '' for a split by evaluation_fraction"
    )


def test_labels_are_the_sorted_sub_folders(pictures, open_split):
    for split in ("train", "evaluation"):
        source = open_split(pictures, split, labels=True)
        assert (source.class_names, source.num_classes) == (("a", "b"), 2)
        truth = {noise(20, 30, 3, seed=index)[2:18, 7:23].tobytes(): index % 2 for index in range(40)}
        examples = source.read(np.arange(source.size))
        assert [truth[image.tobytes()] for image in examples["image"]] == examples["label"].tolist()
    assert "label" not in open_split(pictures).read(np.arange(2))


def test_labels_that_do_not_exist_are_named(pictures, open_split, tmp_path):
    save(tmp_path / "more" / "c" / "0.png", noise(20, 30, 3))
    assert failure(lambda: open_split(pictures, "evaluation", labels=True, evaluation_path=str(tmp_path / "more"))) == (
        f"{tmp_path}/more/c/0.png is of no class of the training images (a, b); remove it or set data.labels=false"
    )
    save(pictures / "loose.png", noise(20, 30, 3))
    assert failure(lambda: open_split(pictures, labels=True)) == (
        f"{pictures}/loose.png has no label, since it lies in no sub-folder (1 such images); "
        "move them or set data.labels=false"
    )
    photos = data.DataConfig("photos", image_size=8, labels=True)
    assert failure(lambda: data.open_source(photos, "train")) == "photos train has no labels; set data.labels=false"


def test_only_new_and_changed_files_are_looked_at_again(pictures, open_split, monkeypatch):
    looked = []
    inspect = folder_scan.inspect
    monkeypatch.setattr(folder_scan, "inspect", lambda content: looked.append(content) or inspect(content))
    first = open_split(pictures)
    assert len(looked) == 40
    open_split(pictures, "evaluation")
    assert open_split(pictures, image_size=8).fingerprint == first.fingerprint and len(looked) == 40
    save(pictures / "new.png", noise(20, 30, 3, seed=99))
    changed = pictures / "a" / "00.png"
    save(changed, noise(20, 30, 3, seed=100))
    (pictures / "b" / "01.png").unlink()
    sources = [open_split(pictures, split) for split in ("train", "evaluation")]
    assert len(looked) == 42 and sum(source.size for source in sources) == 40
    images = as_set(np.concatenate([all_images(source) for source in sources]))
    assert noise(20, 30, 3, seed=100)[2:18, 7:23].tobytes() in images
    assert noise(20, 30, 3, seed=0)[2:18, 7:23].tobytes() not in images


def test_the_fingerprint_is_of_names_and_contents(pictures, open_split, tmp_path):
    fingerprint = lambda path, **values: open_split(path, **values).fingerprint
    original = fingerprint(pictures)
    copied = pathlib.Path(shutil.copytree(pictures, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    assert fingerprint(copied) == original != fingerprint(pictures, labels=True)
    (name,) = [path for path in copied.rglob("04.png")]
    save(name, noise(20, 30, 3, seed=1000))
    assert fingerprint(copied) != original
    assert data.open_source(data.DataConfig("digits"), "train").fingerprint == ""


def test_a_file_that_goes_away_under_a_run_is_named(pictures, open_split):
    source = open_split(pictures, train_crop="random")
    shutil.rmtree(pictures)
    assert failure(lambda: source.read(np.arange(1))) == (
        f"{pictures}/a/04.png was there and cannot be read now (No such file or directory); start again"
    )


def test_decoded_when_read_or_kept_the_images_are_the_same(tmp_path, open_split):
    for index in range(6):
        save(tmp_path / "large" / f"{index}.jpg", np.kron(noise(10, 14, 3, seed=index), np.ones((9, 9, 1), np.uint8)))
    values = {"image_size": 0, "image_height": 72, "image_width": 80, "resize": "cover", "evaluation_fraction": 1e-9}
    kept = open_split(tmp_path / "large", **values)
    everything = {"cache_limit_gib": float("inf"), "cache_dir": str(tmp_path / "c3")}
    assert open_split(tmp_path / "large", **values, **everything).size == 6
    assert len(list((tmp_path / "c3").iterdir())) == 2  # the images, and what was found in the folder
    read = [open_split(tmp_path / "large", cache_limit_gib=0.0, decode_threads=n, **values) for n in (1, 3)]
    indices = np.array([5, 0, 3, 3])
    expected = kept.read(indices)["image"]
    assert kept.shape == (72, 80, 3) == expected.shape[1:]
    # The kept split was found in the cache; one that is too large for it is made in another place.
    fresh = [
        open_split(tmp_path / "large", cache_limit_gib=0.0, cache_dir=str(tmp_path / "c2"), **values) for _ in range(2)
    ]
    assert len(list((tmp_path / "c2").iterdir())) == 1  # what was found in the folder, and no images
    for source in (*read, *fresh):
        np.testing.assert_array_equal(source.read(indices)["image"], expected)


def over(num_devices):
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.fixture
def coordinates(tmp_path):
    """Images whose pixels are (row, column, number of the image)."""
    rows, columns = np.mgrid[:20, :30]
    for index in range(10):
        save(tmp_path / "grid" / f"{index}.png", np.stack([rows, columns, 0 * rows + index], axis=-1).astype(np.uint8))
    return tmp_path / "grid"


def test_random_crops_are_a_function_of_seed_and_step_and_cover_the_image(coordinates, open_split):
    source = open_split(coordinates, train_crop="random", evaluation_fraction=1e-9)
    batches = [np.asarray(data.train_batch(source, 3, step, 16, over(8))["image"]) for step in range(40)]
    for num_devices in (1, 4):
        again = data.train_batch(source, 3, 7, 16, over(num_devices))["image"]
        np.testing.assert_array_equal(again, batches[7])
    assert (np.asarray(data.train_batch(source, 4, 7, 16, over(1))["image"]) != batches[7]).any()
    images = np.concatenate(batches)
    corners = images[:, 0, 0, :2].astype(int)
    for image, (top, left) in zip(images, corners, strict=True):
        np.testing.assert_array_equal(image[..., 0], np.tile(np.arange(top, top + 16)[:, None], 16))
        np.testing.assert_array_equal(image[..., 1], np.tile(np.arange(left, left + 16), (16, 1)))
    assert len(np.unique(corners, axis=0)) == 5 * 15  # all of them, in 640 draws
    # The crops of one image differ from epoch to epoch, and the order of the images is that of any source.
    assert len(np.unique(corners[images[:, 0, 0, 2] == 4], axis=0)) > 30
    np.testing.assert_array_equal(batches[0][:, 0, 0, 2], data.train_indices(10, 3, 0, 16))


def test_evaluation_and_plain_reading_are_at_the_centre(coordinates, open_split):
    open_split(coordinates, evaluation_fraction=0.3)  # keeps the centres, which random crops must not be taken from
    train = open_split(coordinates, train_crop="random", evaluation_fraction=0.3)
    evaluation = open_split(coordinates, "evaluation", train_crop="random", evaluation_fraction=0.3)
    assert evaluation.read_drawn is None and train.read_drawn is not None
    for source in (train, evaluation):
        assert (source.read(np.arange(source.size))["image"][:, 0, 0, :2] == [2, 7]).all()


def test_fewer_bits_reach_random_crops(coordinates, open_split):
    values = {"train_crop": "random", "evaluation_fraction": 1e-9}
    full, reduced = (open_split(coordinates, bits=bits, **values) for bits in (8, 3))
    arguments = np.arange(4), data.train_draws(0, 0, 4)
    np.testing.assert_array_equal(reduced.read_drawn(*arguments)["image"], full.read_drawn(*arguments)["image"] // 32)


def test_binarisation_reaches_random_crops(coordinates, open_split):
    values = {"train_crop": "random", "evaluation_fraction": 1e-9}
    full, sharp, tossed = (open_split(coordinates, binarize=how, **values) for how in ("", "threshold", "dynamic"))
    draws = np.tile(data.train_draws(0, 0, 4), 200)
    grey, binary, drawn = (source.read_drawn(np.arange(800) % 4, draws)["image"] for source in (full, sharp, tossed))
    np.testing.assert_array_equal(binary, grey > 127)
    np.testing.assert_array_equal(drawn[:4], drawn[4:8])
    assert drawn[:4].mean() == pytest.approx(grey[:4].mean() / 255, abs=0.01)


def test_the_random_words_of_a_position_are_the_same_in_every_batch_and_with_every_numpy():
    whole = data.train_draws(3, 0, 64)
    for start, count in ((0, 5), (3, 7), (17, 30), (63, 1)):
        np.testing.assert_array_equal(data.train_draws(3, start, count), whole[start : start + count])
    assert whole[:2].tolist() == [18256547566816697462, 3079977157179002716]


def test_missing_empty_and_strange_folders_are_named(tmp_path, open_split, pictures):
    assert failure(lambda: open_split(tmp_path / "none")) == (
        f"{tmp_path}/none is not a folder; set data.path (and data.evaluation_path) to a folder of images"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    assert failure(lambda: open_split(tmp_path / "empty")) == (
        f"there are no images in {tmp_path}/empty (1 other files); "
        "they end in .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff"
    )
    assert failure(lambda: open_split(pictures, "test")) == (
        "source 'folder' has no split 'test' where data.test_fraction is 0; set it, to 0.1 say"
    )
    assert failure(lambda: open_split(pictures, "extra")) == (
        "source 'folder' has the splits train, evaluation, test, not 'extra'"
    )
    assert failure(lambda: open_split(pictures, "test", test_fraction=1e-9)) == (
        f"none of the 40 images in {pictures} is in the split test; change data.test_fraction=1e-09"
    )
    assert failure(lambda: open_split(pictures, "evaluation", evaluation_fraction=1e-9)) == (
        f"none of the 40 images in {pictures} is in the split evaluation; "
        "change data.evaluation_fraction=1e-09 or set data.evaluation_path"
    )
    save(pictures / "a" / "zz.png", noise(20, 31, 3))
    assert failure(lambda: open_split(pictures, image_size=0, evaluation_fraction=1e-9)) == (
        f"{pictures}/a/zz.png is 20x31x3 where those before it are 20x30x3; "
        "set data.image_size (or image_height and image_width) to resize them"
    )


def test_links_are_followed_and_circles_are_not(pictures, open_split):
    (pictures / "b" / "up").symlink_to(pictures)
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    assert failure(lambda: open_split(pictures)) == (
        f"{pictures}/gone.png cannot be read (No such file or directory); remove it or set data.skip_unreadable=true"
    )
    assert sum(open_split(pictures, split, skip_unreadable=True).size for split in ("train", "evaluation")) == 40


def test_nothing_counts_twice_by_way_of_links(tmp_path, open_split, capsys):
    root, store = tmp_path / "pictures", tmp_path / "store"
    for index in range(4):
        save(root / "b" / f"{index}.png", noise(20, 30, 3, seed=index))
        save(store / f"{index + 4}.png", noise(20, 30, 3, seed=index + 4))
        save(root / ".annex" / f"{index + 8}.png", noise(20, 30, 3, seed=index + 8))
    (root / "a0").symlink_to(root / "b")  # comes first, and is not taken for the class
    (root / "b" / "again.png").symlink_to(root / "b" / "0.png")
    (root / "c").symlink_to(store)
    (root / "d").symlink_to(store)  # as the one before
    (root / "e").symlink_to(root / ".annex")  # which nothing else leads to
    source = open_split(root, labels=True, evaluation_fraction=1e-9)
    assert source.class_names == ("b", "c", "e")
    assert as_set(all_images(source)) == {noise(20, 30, 3, seed=index)[2:18, 7:23].tobytes() for index in range(12)}
    assert source.size == 12
    assert "3 links to what counts under its own name ignored (a0, b/again.png, d)\n" in capsys.readouterr().err


def test_a_pipe_is_named_and_not_waited_for(pictures, open_split):
    os.mkfifo(pictures / "x.png")
    os.mkfifo(pictures / "x.txt")
    assert failure(lambda: open_split(pictures)) == (
        f"{pictures}/x.png is a pipe, a socket or a device and no file; remove it or set data.skip_unreadable=true"
    )
    assert sum(open_split(pictures, split, skip_unreadable=True).size for split in ("train", "evaluation")) == 40


def test_names_of_several_lines_make_messages_of_one(pictures, open_split):
    (pictures / "a\nb").mkdir()
    (pictures / "a\nb" / "\udcff.png").write_bytes(b"")
    assert failure(lambda: open_split(pictures)) == (
        f"{pictures}/a\\nb/\\udcff.png is empty (0 bytes); remove it or set data.skip_unreadable=true"
    )


def test_a_remedy_is_told_once(pictures, open_split):
    head, *lines = failure(lambda: open_split(pictures, image_size=25)).split("\n  ")
    assert head.endswith(f"files of {pictures} do not fit; set data.upscale=true or a smaller size:")
    assert len(lines) > 30 and all(line.endswith(".png is 20x30, smaller than 25x25") for line in lines)


@pytest.mark.parametrize("content", [b"", b"[[]]", b"{}", b"[1]", b"\xff", None])
def test_a_damaged_scan_is_made_again(pictures, open_split, tmp_path, content, capsys):
    before = open_split(pictures).fingerprint
    (place,) = (tmp_path / "cache").glob("scan-of-*.json")
    known = json.loads(place.read_text())
    known[3][4] = "q"  # a height
    place.write_bytes(json.dumps(known).encode() if content is None else content)
    assert open_split(pictures).fingerprint == before
    assert content == b"{}" or f"{place} in the cache is damaged (" in capsys.readouterr().err
    assert json.loads(place.read_text())[3][4] == 20


@pytest.mark.parametrize(
    "number, text", [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_a_cache_that_cannot_be_written_is_named(pictures, open_split, tmp_path, monkeypatch, number, text):
    def refuse(*arguments, **values):
        raise OSError(number, os.strerror(number))

    where = {errno.ENOSPC: (cache, "_write_images"), errno.EROFS: (pathlib.Path, "replace")}[number]
    monkeypatch.setattr(*where, refuse)
    message = failure(lambda: open_split(pictures))
    assert message.startswith(f"cannot write the cache {tmp_path}/cache/")
    assert message.endswith(
        f" ({text}); set data.cache_dir or BITSPERDIM_CACHE to a folder that can be written and has space"
    )
    kept = [path.name for path in (tmp_path / "cache").iterdir()]
    assert all(name.startswith("scan-of-pictures-") for name in kept)
