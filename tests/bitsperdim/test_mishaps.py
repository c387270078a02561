"""What is said, and with which exit code, when a value is out of its range, a file damaged or a disk full."""

import errno
import os
import pathlib
import sys

import pytest
import toy_family

from bitsperdim import cli, lock, manifest, metrics

TOY = pathlib.Path(toy_family.__file__).with_name("toy.py")


@pytest.fixture
def train(monkeypatch, capfd, tmp_path):
    """`train(*flags)` -> exit code and stderr of train.py on the toy, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, config=TOY):
        monkeypatch.setattr(sys, "argv", ["train.py", f"--config={config}", "--workdir=run", *flags])
        capfd.readouterr()
        try:
            code = cli.train() or 0
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr().err

    return call


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.bits", 9, "must lie in 1..8, not 9"),
        ("data.image_size", -1, "must be 0 (as stored) or an edge in pixels, not -1"),
        ("data.source", "cifar10", "must be one of photos, digits, synthetic, tfds, folder, not 'cifar10'"),
        ("mesh.rules", "(('(', ('fsdp',)),)", "must begin with regular expressions, not '('"),
        ("top.train.clip_norm", "nan", "must be a number, not nan"),
        ("top.train.profile", "(10,15)", "must begin within the 6 steps of the stage, not (10, 15)"),
        ("autoencoder.model.commitment", "-1", "must be finite and at least 0, not -1.0"),
        ("autoencoder.model.codebook_epsilon", "0", "must be finite and positive, not 0.0"),
        ("mesh.fsdp", 0, "must be a number of devices or -1 (all that remain), not 0"),
        ("autoencoder.model.hidden", 0, "must be at least 1, not 0"),
        ("autoencoder.model.num_codes", 1, "must lie in 2..65536, not 1"),
        ("autoencoder.model.codebook_decay", 1.0, "must lie in (0, 1), not 1.0"),
        ("autoencoder.model.revival_threshold", -0.1, "must lie in [0, 1), not -0.1"),
        ("autoencoder.model.dtype", "float16", "must be one of float32, bfloat16, not 'float16'"),
        ("autoencoder.model.strides", "(4,3)", "must be powers of two, not (4, 3)"),
        ("autoencoder.optim.learning_rate", -1.0, "must be "),
        ("autoencoder.optim.schedule", "linear", "must be one of "),
        ("autoencoder.train.batch_size", 0, "must be at least 1, not 0"),
        ("autoencoder.train.ema_decay", 1.5, "must lie in [0, 1), not 1.5"),
        ("codes.batch_size", 0, "must be at least 1, not 0"),
        ("top.model.dropout", 1.0, "must lie in [0, 1), not 1.0"),
        ("top.model.attention_every", -1, "must be at least 0, not -1"),
        ("top.train.profile", "(5,3)", "must be (first, last) step or (), not (5, 3)"),
        ("top.train.skip_norm", -1.0, "must be positive, or 0 for none, not -1.0"),
        ("bottom.model.conditioning.blocks", 0, "must be at least 1, not 0"),
        ("bottom.model.conditioning.widths", "(8,8)", "must match bottlenecks=(8,) one to one, not (8, 8)"),
        ("bottom.optim.b1", 1.5, "must "),
    ],
)
def test_a_value_out_of_its_range_is_named_with_its_whole_key(train, tmp_path, key, value, message):
    code, said = train(f"--config.{key}={value}", config="vqvae2_photos:tiny")
    assert code == 2
    [line] = said.splitlines()
    assert line.startswith(f"error: config value {key} {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"train": {"na', "Expecting|Unterminated"),
        ("", "Expecting value"),
        ("[]", "it holds no object"),
        ('{"train": {}}', "it lacks evaluation"),
        ('{"train": 5, "evaluation": {}}', "train is 5"),
    ],
)
def test_a_damaged_record_of_the_images_is_named(train, tmp_path, content, what):
    assert train("--config.train.steps=4")[0] == 0
    (tmp_path / "run/model/sources.json").write_text(content)
    code, said = train("--config.train.steps=8")
    assert code == 2
    assert said.splitlines()[-1].startswith("error: run/model/sources.json is damaged (")
    assert any(part in said for part in what.split("|"))
    assert (tmp_path / "run/model/sources.json").read_text() == content


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "run/.model.lock")


NO_SPACE = "No space left on device"


def test_no_space_for_a_checkpoint_ends_the_run_in_one_line_and_leaves_the_one_before(train, tmp_path, monkeypatch):
    write = manifest.write
    monkeypatch.setattr(
        manifest, "write", lambda folder, content: full_disk() if content.step > 4 else write(folder, content)
    )
    code, said = train()
    assert code == 2
    assert said.splitlines()[-1] == (
        f"error: cannot write the checkpoint {tmp_path / 'run/model/checkpoints/00000008'}: {NO_SPACE}; "
        "make room there or use another --workdir (the checkpoints before it are whole)"
    )
    assert said.count("error") == 1 and "Traceback" not in said
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, said = train()
    assert code == 0 and "going on from step 4" in said
    steps = [line["step"] for line in metrics.read(tmp_path / "run/model" / metrics.FILE) if line["kind"] == "train"]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("where", ["write", "images"])
def test_no_space_for_figures_or_pictures_ends_the_run_in_one_line(train, monkeypatch, where):
    if where == "write":
        monkeypatch.setattr(metrics.Writer, "write", full_disk)
    else:
        monkeypatch.setattr(cli.images, "save_png", full_disk)
    code, said = train()
    assert code == 2
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and NO_SPACE in last and "make room" in last
    assert "Traceback" not in said


def test_a_run_that_cannot_be_written_to_ends_in_one_line(train, monkeypatch):
    assert train("--config.train.steps=4")[0] == 0
    monkeypatch.setattr(lock, "alone", read_only)
    code, said = train("--config.train.steps=8")
    assert code == 2 and "Traceback" not in said
    assert said.splitlines()[-1] == (
        "error: Read-only file system for run/.model.lock; "
        "give yourself access to it, or use another folder (--workdir, --out)"
    )
