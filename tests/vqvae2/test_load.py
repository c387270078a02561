"""`bitsperdim.load` as in a notebook: what a run gives back to whoever has its folder and nothing else."""

import shutil

import jax
import numpy as np
import pytest
from etils import epath

import bitsperdim
from bitsperdim import cli, config_files, data, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from vqvae2 import autoencoder_stage, codes, facts

GRIDS = {"top": (2, 2), "bottom": (4, 4)}
CHOSEN = 37 * np.arange(40)


@pytest.fixture(scope="module")
def run(tmp_path_factory, untrained):
    """A complete run of random weights; not to be changed. Its data set is at hand while it is made and no longer."""
    config = config_files.load("vqvae2_photos:tiny")
    config.data.image_size = 16
    return untrained(tmp_path_factory.mktemp("load") / "run", config)


@pytest.fixture(autouse=True)
def no_data(run, monkeypatch):
    def lost(*_):
        raise AssertionError("the data set was opened")

    monkeypatch.setattr(data, "open_source", lost)


@pytest.fixture(scope="module")
def images():
    """Forty held-out crops from all over the photographs."""
    return data.open_source(data.DataConfig("photos", image_size=16), "evaluation").read(CHOSEN)["image"]


@pytest.fixture(scope="module")
def loaded(images, run):
    return bitsperdim.load(str(run.workdir))


@pytest.fixture(scope="module")
def encoded(loaded, images):
    return loaded.encode(images)


def test_encode_gives_the_codes_of_the_run(run, encoded):
    for level in GRIDS:
        stored = codes.open_codes(run, "evaluation").read(CHOSEN)[level]
        np.testing.assert_array_equal(encoded[level], stored)
        assert len(np.unique(stored)) > 3  # the comparison is not one of constants


def test_decode_of_the_codes_is_the_reconstruction_of_the_network(run, loaded, images, encoded):
    _, state = trainer.restore(run, "autoencoder", sharding.make_mesh(run.config.mesh))
    net = autoencoder_stage.network(run.config.autoencoder.model, facts.of_run(run))
    tables = {level: book.embedding for level, book in state["extra"]["codebooks"].items()}
    x = (images.astype(np.float32) + 0.5) / 128.0 - 1.0
    reconstruction = np.asarray(jax.jit(lambda x: net.apply({"params": state["ema"]}, x, tables)[0])(x), np.float64)
    # The nearest of the levels 0 ... 255, whose middles lie at (i + 1/2) / 128 - 1.
    expected = np.clip(np.rint((reconstruction + 1.0) * 128.0 - 0.5), 0, 255)
    decoded = loaded.decode(encoded)
    assert (decoded.dtype, decoded.shape) == (np.uint8, images.shape)
    assert decoded.std() > 5
    # Two programs may round a value on the border between two levels to either side.
    difference = np.abs(decoded.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    np.testing.assert_array_equal(loaded.reconstruct(images), decoded)


def test_a_level_that_is_not_given_is_the_mean_of_its_codebook(run, loaded, encoded):
    _, state = trainer.restore(run, "autoencoder", sharding.make_mesh(run.config.mesh))
    book = jax.device_get(state["extra"]["codebooks"]["bottom"])
    mean = np.asarray(book.ema_sums, np.float64).sum(0) / np.asarray(book.ema_counts, np.float64).sum()
    net = autoencoder_stage.network(run.config.autoencoder.model, facts.of_run(run))
    tables = {"top": state["extra"]["codebooks"]["top"].embedding, "bottom": mean[None].astype(np.float32)}
    given = {"top": encoded["top"], "bottom": np.zeros((40, 4, 4), np.int32)}
    x = jax.jit(lambda given: net.apply({"params": state["ema"]}, given, tables, method="decode"))(given)
    expected = np.clip(np.rint((np.asarray(x, np.float64) + 1.0) * 128.0 - 0.5), 0, 255)
    alone = loaded.decode({"top": encoded["top"]})
    assert np.abs(alone.astype(int) - expected).max() <= 1
    assert (alone != loaded.decode(encoded)).any()


def test_samples_are_those_of_the_script(run, loaded, tmp_path, monkeypatch):
    flags = [f"--workdir={run.workdir}", f"--out={tmp_path}", "--num=3", "--seed=5", "--temperature=0.7"]
    monkeypatch.setattr("sys.argv", ["sample.py", *flags])
    cli.sample()
    drawn = loaded.sample(jax.random.key(5), 3, temperature=0.7)
    np.testing.assert_array_equal(drawn, np.load(tmp_path / "samples.npy", allow_pickle=False))
    assert (drawn != loaded.sample(jax.random.key(6), 3, temperature=0.7)).any()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda x: x.astype(np.float32), r"not float32 \[40, 16, 16, 3\]"),
        (lambda x: x.astype(np.int64), r"not int64 \[40, 16, 16, 3\]"),
        (lambda x: x[0], r"not uint8 \[16, 16, 3\]"),
        (lambda x: x[:, :8], r"not uint8 \[40, 8, 16, 3\]"),
        (lambda x: x[..., :1], r"not uint8 \[40, 16, 16, 1\]"),
        (lambda x: x.transpose(0, 3, 1, 2), r"not uint8 \[40, 3, 16, 16\]"),
    ],
    ids=["float", "wide integers", "one image", "cut", "grey", "channels first"],
)
def test_images_of_another_kind_are_refused_with_their_shape(loaded, images, wrong, named):
    for function in (loaded.encode, loaded.reconstruct):
        with pytest.raises(
            InputError, match=r"images must be uint8 \['n', 16, 16, 3\] with levels below 256, " + named
        ):
            function(wrong(images))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: {}, r"codes must be given for one or more of top, bottom, not for \[\]"),
        (lambda c: c | {"middle": c["top"]}, r"one or more of top, bottom, not for \[.*'middle'\]"),
        (lambda c: c | {"bottom": c["top"]}, r"codes of 'bottom' must be .*\['n', 4, 4\].*, not int32 \[40, 2, 2\]"),
        (lambda c: c | {"top": c["top"][0]}, r"codes of 'top' must be .*\['n', 2, 2\].*, not int32 \[2, 2\]"),
        (lambda c: c | {"top": c["top"] / 2}, r"codes of 'top' must be integers .*, not float64 \[40, 2, 2\]"),
        (
            lambda c: c | {"top": c["top"] + 32},
            r"codes of 'top' must be integers .* in 0\.\.31, not int32 .* in [3-6]\d\.\.",
        ),
        (lambda c: c | {"top": c["top"] - 32}, r"codes of 'top' must be integers .* in 0\.\.31, not int32 .* in -"),
        (lambda c: c | {"top": c["top"][:3]}, r"as many codes of each level, not (bottom 40, top 3|top 3, bottom 40)"),
    ],
    ids=["none", "no such level", "of another level", "one grid", "fractions", "too large", "negative", "fewer"],
)
def test_codes_of_another_kind_are_refused_with_their_shape(loaded, encoded, wrong, message):
    with pytest.raises(InputError, match=message):
        loaded.decode(wrong(dict(encoded)))


def test_an_array_in_the_place_of_codes_by_level_is_refused(loaded, encoded):
    with pytest.raises(InputError, match=r"codes must be a dict of arrays by level, \{'top': .*, not ndarray"):
        loaded.decode(encoded["top"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"n": -1}, "n must be at least 1, not -1"),
        ({"temperature": -1.0}, r"temperature must be a finite number of at least 0 \(0: greedy\), not -1.0"),
        ({"temperature": float("nan")}, "temperature must be a finite number .*, not nan"),
        ({"label": 3}, "^label=3, but the priors of .* were trained without classes"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words_of_the_call(loaded, wrong, message):
    with pytest.raises(InputError, match=message):
        loaded.sample(jax.random.key(0), **{"n": 2, **wrong})


def test_any_number_is_coded_a_few_at_a_time(run, loaded, images, encoded, monkeypatch):
    whole = loaded.decode(encoded)
    monkeypatch.setattr(autoencoder_stage.facts_lib, "MOST_IMAGES", 16)  # 40 are two chunks and a half
    seen = []
    convolve = autoencoder_stage.Autoencoder.apply

    def watched(self, variables, x, *arguments, **named):
        seen.append(len(jax.tree.leaves(x)[0]))
        return convolve(self, variables, x, *arguments, **named)

    monkeypatch.setattr(autoencoder_stage.Autoencoder, "apply", watched)
    again = bitsperdim.load(run.workdir)
    for level, grid in again.encode(images).items():
        np.testing.assert_array_equal(grid, encoded[level])
    np.testing.assert_array_equal(again.decode(encoded), whole)
    assert seen == [16, 16]  # one program each way
    assert again.encode(images[:3])["top"].shape == (3, 2, 2)


def test_codes_may_come_as_lists(loaded, encoded):
    lists = {level: grid[:2].tolist() for level, grid in encoded.items()}
    np.testing.assert_array_equal(loaded.decode(lists), loaded.decode(encoded)[:2])


def test_there_is_no_likelihood_and_it_says_why(loaded, images):
    with pytest.raises(InputError, match="gives no likelihood of an image: its priors rate the codes"):
        loaded.log_prob(images, jax.random.key(0), samples=2)


@pytest.mark.parametrize("missing", [["top", "bottom"], ["bottom"]])
def test_without_priors_it_encodes_and_names_what_sampling_lacks(run, tmp_path, images, encoded, missing):
    shutil.copytree(run.workdir, tmp_path / "run")
    for stage in missing:
        shutil.rmtree(tmp_path / "run" / stage)
    part = bitsperdim.load(tmp_path / "run")
    for level, grid in part.encode(images).items():
        np.testing.assert_array_equal(grid, encoded[level])
    with pytest.raises(InputError, match=rf"stage '{missing[0]}' of .*run has no checkpoint yet; train it first"):
        part.sample(jax.random.key(0), 2)


def test_weights_of_a_later_stage_that_do_not_fit_are_refused_before_the_first_is_trained(run, tmp_path, monkeypatch):
    monkeypatch.undo()  # a new run sees its data
    config = config_files.load("vqvae2_photos:tiny")
    config.data.image_size = 16
    config.bottom.model.hidden *= 2
    with pytest.raises(InputError, match=r"run/bottom/checkpoints/00000006, but should be .*; leave out --init_from"):
        trainer.train(config, str(tmp_path / "other"), init_from=str(run.workdir))
    assert list(tmp_path.iterdir()) == []


def test_without_codes_it_samples_and_measures_what_needs_none(run, tmp_path, loaded, monkeypatch, capsys):
    shutil.copytree(run.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "codes")
    part = bitsperdim.load(tmp_path / "run")
    np.testing.assert_array_equal(part.sample(jax.random.key(5), 2), loaded.sample(jax.random.key(5), 2))
    opened = run_lib.open_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"run/codes is missing; train\.py makes it again"):
        codes.open_codes(opened, "train")
    # The data set is lost here, so the figures are not measured but asked for.
    monkeypatch.setattr(trainer.evaluation, "evaluate", lambda *_: {"mse": 1.0, "mse_over_variance": 1.0})
    monkeypatch.setattr(data, "open_source", lambda *_: data.sources.photos(16, "evaluation"))
    for split, reason in (("evaluation", "run/codes is missing"), ("test", "'codes' has the splits train and eval")):
        assert list(trainer.evaluate(opened, split)) == ["split", "autoencoder", "mse", "mse_over_variance"]
        said = capsys.readouterr().err
        for stage in ("top", "bottom"):
            assert any(line.startswith(f"{stage}: not measured, for ") and reason in line for line in said.splitlines())


def test_without_an_autoencoder_it_names_that(run, tmp_path, images):
    shutil.copytree(run.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "autoencoder" / "checkpoints")
    part = bitsperdim.load(tmp_path / "run")
    with pytest.raises(InputError, match=r"stage 'autoencoder' of .*run has no checkpoint yet; train it first"):
        part.encode(images)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is no run: it has no config\.json"):
        bitsperdim.load(tmp_path)


def test_what_was_loaded_tells_its_config_and_its_levels(run, loaded):
    assert (loaded.config, loaded.levels) == (run.config, 256)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("autoencoder/data.json", '{"shape": [16, 16', "Expecting"),
        ("autoencoder/data.json", "[]", "it holds no object"),
        ("autoencoder/data.json", '{"shape": [16, 16, 3]}', "it lacks levels, num_classes, variance"),
        ("autoencoder/data.json", '{"shape": 5, "levels": 256, "num_classes": 0, "variance": 1.0}', "shape is 5"),
        ("codes/info.json", "", "Expecting value"),
        (
            "codes/info.json",
            '{"fingerprint": "", "step": 6, "steps": 6, "fields": {}, "shard_lengths": {}, "files": 3}',
            "files is 3",
        ),
        ("codes/info.json", '{"autoencoder_step": 6}', "it lacks fingerprint"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, tmp_path, name, content, what):
    shutil.copytree(run.workdir, tmp_path / "run")
    (epath.Path(tmp_path) / "run" / name).write_text(content)
    with pytest.raises(InputError, match=rf"run/{name} is damaged \({what}.*\); restore it, or use a new --workdir"):
        if name.startswith("codes"):
            codes.open_codes(run_lib.open_run(tmp_path / "run"), "train")
        else:
            bitsperdim.load(tmp_path / "run")
