"""Data sets that are fetched by the run that misses them, where that works without TensorFlow, and why where not."""

import hashlib
import http.server
import importlib.util
import io
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bitsperdim import data, prepare, trainer
from bitsperdim.errors import InputError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
COMMAND = '  pip install "bitsperdim[prepare]" && python -m bitsperdim.prepare {} --data_dir={}'
ABSENT = "https://absent.invalid/images.zip"


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)


class PlainShapes(tfds.core.GeneratorBasedBuilder):
    """Images that are encoded already."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(20)), "test": self._generate_examples(range(20, 26))}

    def _generate_examples(self, indices):
        for index in indices:
            with io.BytesIO() as file:
                Image.fromarray(pixels(index)).save(file, "PNG")
                yield index, {"image": file.getvalue(), "label": index % 3}


class WithTensorflow(PlainShapes):
    def _generate_examples(self, indices):
        import tensorflow

        raise AssertionError(tensorflow)


class WithArchive(PlainShapes):
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.download_and_extract(ABSENT))}


class WithArrays(PlainShapes):
    """Its code does not show that TFDS encodes arrays with TensorFlow."""

    def _generate_examples(self, indices):
        for index in indices:
            yield index, {"image": pixels(index), "label": 0}


class BrokenHalfWay(PlainShapes):
    def _generate_examples(self, indices):
        for index, example in super()._generate_examples(indices):
            if index == 13:
                raise ValueError("the 13th image is cursed\n(really)")
            yield index, example


class FarAway(PlainShapes):
    url_infos: ClassVar = {
        ABSENT: tfds.download.checksums.UrlInfo(tfds.core.units.Size(3 * 2**20), "0" * 64, "images.zip")
    }

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(len(dl_manager.download(ABSENT).read_bytes())))}


class Line(http.server.BaseHTTPRequestHandler):
    """Answers every path with 'all of PATH', but loses the end of /b while the server is broken."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        content = f"all of {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:7] if self.path == "/b" and self.server.is_broken else content)
        self.server.sent.append(self.path)

    def log_message(self, *_):
        pass


class OverTheLine(PlainShapes):
    """As many images as two downloads have bytes."""

    def _split_generators(self, dl_manager):
        files = [dl_manager.download(url) for url in self.url_infos]
        return {"train": self._generate_examples(range(sum(len(file.read_bytes()) for file in files)))}


class Chosen(PlainShapes):
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="small", version="1.0.0"),
        tfds.core.BuilderConfig(name="large", version="1.0.0"),
    ]


@pytest.fixture
def open_split(tmp_path):
    def open_it(name, split="train", **values):
        values = {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")} | values
        return data.open_source(data.DataConfig("tfds", name=name, **values), split)

    return open_it


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("localhost", 0), Line) as serving:
        serving.is_broken, serving.sent = True, []
        place = f"http://localhost:{serving.server_address[1]}"
        info = lambda path: tfds.download.checksums.UrlInfo(
            tfds.core.units.Size(9), hashlib.sha256(f"all of {path}".encode()).hexdigest(), path[1:]
        )
        monkeypatch.setattr(
            OverTheLine, "url_infos", {f"{place}{path}": info(path) for path in ("/a", "/b")}, raising=False
        )
        monkeypatch.setenv("NO_PROXY", "localhost")
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def failure(open_it):
    with pytest.raises(InputError) as caught:
        open_it()
    return str(caught.value)


def test_what_needs_no_tensorflow_is_prepared_once_and_read(open_split, tmp_path, capfd):
    train, test = (open_split("plain_shapes", split).read(np.arange(6)) for split in ("train", "evaluation"))
    out, err = capfd.readouterr()
    assert f"downloading and preparing plain_shapes/1.2.0 in {tmp_path}/data (of unknown size)" in err
    assert err.count("downloading and preparing") == 1 and out == ""
    stored = {pixels(index).tobytes(): index for index in range(26)}
    indices = [stored[image.tobytes()] for image in [*train["image"], *test["image"]]]
    assert max(indices[:6]) < 20 <= min(indices[6:])
    np.testing.assert_array_equal(np.concatenate([train["label"], test["label"]]), np.array(indices) % 3)
    # Nothing is left beside the data set.
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["plain_shapes"]
    assert [path.name for path in (tmp_path / "data" / "plain_shapes").iterdir()] == ["1.2.0"]


def test_a_configuration_is_prepared_by_its_name_and_none_by_chance(open_split, tmp_path):
    message = failure(lambda: open_split("chosen"))
    assert message == (
        f"data set 'chosen' is not in {tmp_path}/data and it has the configurations small, large; set another data.name"
    )
    assert open_split("chosen/large").name == "chosen/large:1.0.0 train"


@pytest.mark.parametrize("name", ["with_tensorflow", "with_archive", "with_arrays", "cifar10", "mnist", "celeb_a"])
def test_what_needs_tensorflow_names_the_command_and_leaves_nothing(open_split, tmp_path, capfd, name):
    assert failure(lambda: open_split(name)) == (
        f"data set '{name}' is not in {tmp_path}/data and preparing it needs TensorFlow:\n"
        + COMMAND.format(name, f"{tmp_path}/data")
    )
    out, err = capfd.readouterr()
    # Only where the code does not tell is it tried.
    assert ("downloading" in err) == (name == "with_arrays") and out == ""
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_fetched_where_that_is_forbidden(open_split, tmp_path):
    assert failure(lambda: open_split("plain_shapes:1.2.0", download=False)) == (
        f"data set 'plain_shapes' is not in {tmp_path}/data and data.download=False forbids to fetch it:\n"
        + COMMAND.format("plain_shapes:1.2.0", f"{tmp_path}/data")
    )
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_half_way_is_named_and_leaves_nothing(open_split, tmp_path):
    (tmp_path / "data" / "other" / "1.0.0").mkdir(parents=True)
    assert failure(lambda: open_split("broken_half_way")) == (
        f"data set 'broken_half_way' is not in {tmp_path}/data (there: other) and preparing it failed "
        "(the 13th image is cursed):\n" + COMMAND.format("broken_half_way", f"{tmp_path}/data")
    )
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["other"]


def test_without_a_network_it_says_so_at_once(open_split, tmp_path):
    message = failure(lambda: open_split("far_away"))
    assert message.startswith(
        f"data set 'far_away' is not in {tmp_path}/data and absent.invalid, where it is downloaded from, cannot be "
        "reached:\n  pip install "
    )
    assert list(tmp_path.iterdir()) == []


def test_half_a_download_is_removed_and_a_whole_one_is_not_fetched_again(open_split, tmp_path, server, capfd):
    message = failure(lambda: open_split("over_the_line"))
    assert "and preparing it failed (" in message and "7 bytes read" in message
    assert "(up to 0.0 MiB to download)" in capfd.readouterr().err
    kept = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {path.parent for path in kept} == {tmp_path / "data" / "downloads" / "over_the_line"}
    assert sorted(path.read_bytes() for path in kept if path.suffix != ".INFO") == [b"all of /a"]
    server.is_broken = False
    assert open_split("over_the_line").size == 18
    assert server.sent.count("/a") == 1


def test_a_name_that_tfds_does_not_know_is_named(open_split, tmp_path):
    assert failure(lambda: open_split("svhn")) == (
        f"data set 'svhn' is not in {tmp_path}/data and TFDS knows none of this name; set another data.name"
    )
    assert "and TFDS has no builder for it (" in failure(lambda: open_split("cifar10:1.0.0"))


def test_the_other_processes_wait_for_the_first(open_split, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LOOKS", 0.01)
    builder = tfds.builder("plain_shapes", data_dir=tmp_path / "data", file_format="array_record")
    first = threading.Thread(target=lambda: (time.sleep(0.3), prepare._prepare(builder, builder.data_path.parents[1])))
    first.start()
    with monkeypatch.context() as patch:
        patch.setattr(prepare.jax, "process_index", lambda: 1)
        assert open_split("plain_shapes").size == 20
    first.join()


def test_a_wrong_batch_size_is_found_before_anything_is_fetched(toy_config, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(prepare, "fetch", lambda name, root: fetched.append(name))
    config = toy_config({"train.batch_size": 12})
    with config.unlocked():
        config.data.update({"source": "tfds", "name": "plain_shapes", "data_dir": str(tmp_path / "none")})
    with pytest.raises(InputError, match="batch_size=12"):
        trainer.train(config, str(tmp_path / "run"))
    assert fetched == []


def test_preparing_by_hand_without_tensorflow_says_what_to_install():
    program = "import sys; sys.modules['tensorflow'] = None\nfrom bitsperdim import prepare; sys.exit(prepare.main())"
    result = subprocess.run([sys.executable, "-c", program, "cifar10"], stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == 'error: preparing data needs TensorFlow: pip install "bitsperdim[prepare]"\n'
