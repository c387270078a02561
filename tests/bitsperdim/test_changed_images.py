"""A folder of images that changes under a run is refused; the same images in another place are not."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from bitsperdim import run as run_lib
from bitsperdim import trainer
from bitsperdim.errors import InputError

SHORT = {"train.steps": 2, "train.evaluate_every": 2, "train.pictures_every": 2, "train.save_every": 2}


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path):
    """Grey images, thirty to train with and ten apart."""
    for index in range(40):
        save(tmp_path / "pictures" / ("train" if index < 30 else "held_out") / f"{index:02}.png", index)
    return tmp_path / "pictures"


@pytest.fixture
def train(toy_config, tmp_path):
    """`train(pictures, steps)`: begins the run, or goes on with it."""

    def begin(pictures, steps=2, **values):
        values = {
            "source": "folder",
            "path": str(pictures / "train"),
            "evaluation_path": str(pictures / "held_out"),
            "image_size": 8,
            "channels": 1,
            "cache_dir": str(tmp_path / "cache"),
            **values,
        }
        config = toy_config()
        with config.unlocked():
            data = {f"data.{name}": value for name, value in values.items()}
            config.update_from_flattened_dict({**SHORT, "train.steps": steps, **data})
        return trainer.train(config, str(tmp_path / "run"))

    return begin


def refusal(train, pictures):
    with pytest.raises(InputError) as caught:
        train(pictures, steps=4)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "split", "named"),
    [
        (lambda pictures: save(pictures / "train" / "new.png", 99), "train", "size 30 -> 31, fingerprint "),
        (lambda pictures: (pictures / "train" / "03.png").unlink(), "train", "size 30 -> 29, fingerprint "),
        (lambda pictures: save(pictures / "train" / "03.png", 99), "train", "(fingerprint "),
        (
            lambda pictures: (pictures / "held_out" / "33.png").rename(pictures / "held_out" / "z.png"),
            "evaluation",
            "(fingerprint ",
        ),
    ],
    ids=["added", "removed", "other pixels", "renamed"],
)
def test_changed_images_are_refused_with_what_changed(train, pictures, tmp_path, change, split, named):
    train(pictures)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    change(pictures)
    message = refusal(train, pictures)
    assert message.startswith(f"the {split} images of {tmp_path / 'run/model'} have changed since it began (")
    assert named in message
    assert message.endswith("; restore them, or use a new --workdir")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_complete_run_is_neither_measured_nor_called_complete_on_changed_images(train, pictures):
    run = train(pictures)
    save(pictures / "held_out" / "33.png", 99)
    with pytest.raises(InputError, match=r"the evaluation images of .*run/model have changed since it began"):
        trainer.evaluate(run, "evaluation")
    with pytest.raises(InputError, match=r"the evaluation images of .*run/model have changed since it began"):
        train(pictures)
    assert trainer.evaluate(run, "train")["model"]["images"] == 30  # which are the same


def test_a_third_part_of_the_folder_can_be_measured(train, pictures):
    run = train(pictures, test_fraction=0.3)
    sizes = {split: trainer.evaluate(run, split)["model"]["images"] for split in ("train", "test")}
    assert sizes["test"] > 0 and sum(sizes.values()) == 30
    with pytest.raises(InputError, match="'dev'"):
        trainer.evaluate(run, "dev")


def test_a_run_is_measured_from_any_folder_and_where_its_images_have_moved(train, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(pictures.relative_to(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    kept = trainer.evaluate(run_lib.open_run(tmp_path / "run"), "evaluation")
    shutil.move(pictures, tmp_path / "moved")
    paths = {"path": "../moved/train", "evaluation_path": "../moved/held_out"}
    assert trainer.evaluate(run_lib.open_run(tmp_path / "run", paths), "evaluation")["model"] == {
        **kept["model"],
        "split": kept["model"]["split"].replace("pictures", "moved"),
    }


def test_restored_images_are_welcome_again(train, pictures):
    train(pictures)
    kept = (pictures / "train" / "03.png").read_bytes()
    save(pictures / "train" / "03.png", 99)
    refusal(train, pictures)
    (pictures / "train" / "03.png").write_bytes(kept)
    train(pictures, steps=4)


def test_the_same_images_in_another_place_are_welcome(train, pictures, tmp_path, saved_state):
    train(pictures)
    shutil.move(pictures, tmp_path / "elsewhere")
    train(tmp_path / "elsewhere", steps=4)
    assert saved_state(tmp_path / "run")["step"] == 4
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["data"]["path"] == str(tmp_path / "elsewhere" / "train")


def test_the_place_of_other_images_does_not_make_them_the_same(train, pictures, tmp_path):
    train(pictures)
    shutil.copytree(pictures, tmp_path / "elsewhere")
    save(tmp_path / "elsewhere" / "train" / "03.png", 99)
    assert "have changed since it began (" in refusal(train, tmp_path / "elsewhere")
