"""A run in an object store: everything is written there, but for checkpoint arrays, which another library writes."""

import json

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

import bitsperdim
from bitsperdim import cli, config_files, metrics, trained, trainer
from bitsperdim import run as run_lib
from bitsperdim.checkpoint import Checkpoints


class Store(DirFileSystem):
    """s3:// on a folder; like the real one it cannot append."""

    protocol = "s3"
    root = ""

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))

    def _join(self, path):
        if isinstance(path, str):
            return super()._join(path.removeprefix("s3://"))
        return super()._join(path)

    def open(self, path, mode="rb", **options):
        assert "a" not in mode, f"{path}: an object store cannot append"
        return super().open(path, mode, **options)


@pytest.fixture
def store(tmp_path, monkeypatch):
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setattr(Store, "root", str(root))
    Store.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation("s3", Store, clobber=True)
    yield root
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation("s3", "s3fs.S3FileSystem", clobber=True)


@pytest.fixture
def local_checkpoints(tmp_path, monkeypatch):
    folder = lambda run, stage: tmp_path / "arrays" / run.workdir.name / stage.name
    for module in (trainer, trained):
        monkeypatch.setattr(
            module, "checkpoints_of", lambda run, stage, *_: Checkpoints(epath.Path(folder(run, stage)))
        )


def tiny_config(cache_dir):
    config = config_files.load("vqvae2_photos:tiny")
    config.data.image_size, config.data.cache_dir = 16, str(cache_dir)
    for stage in (config.autoencoder, config.top, config.bottom):
        stage.train.log_every = 2
    return config


def test_a_whole_run_in_an_object_store_equals_a_local_one(store, local_checkpoints, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "cache")
    trainer.train(config, "s3://bucket/remote")
    trainer.train(config, str(tmp_path / "local"))
    remote, local = store / "bucket" / "remote", tmp_path / "local"
    files = lambda root: [path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    names = lambda root: sorted(str(path.relative_to(root)) for path in files(root))
    assert names(remote) == names(local)
    shards = [name for name in names(local) if ".tfrecord-" in name]
    assert len(shards) >= 2
    for name in (*shards, "codes/info.json", "config.json"):
        assert (remote / name).read_bytes() == (local / name).read_bytes(), name
    for stage in ("autoencoder", "top", "bottom"):
        lines = [metrics.read(folder / stage / metrics.FILE) for folder in (remote, local)]
        assert [line["step"] for line in lines[0]] == [2, 4, 6, 6]
        assert [line.get("objective") for line in lines[0]] == [line.get("objective") for line in lines[1]]
    for script, flags in ((cli.evaluate, []), (cli.sample, ["--num=2"])):
        monkeypatch.setattr("sys.argv", ["script", "--workdir=s3://bucket/remote", *flags])
        script()
    measured = trainer.evaluate(run_lib.open_run(local), "evaluation")
    assert json.loads((remote / "evaluation.json").read_text()) == measured
    np.testing.assert_array_equal(np.load(remote / "samples.npy"), bitsperdim.load(local).sample(jax.random.key(0), 2))
