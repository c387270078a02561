"""A whole tiny run of VQ-VAE-2, held against direct calls of its networks and numpy over whole splits."""

import errno
import io
import json
import math
import os
import pathlib
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from bitsperdim import (
    cli,
    config_files,
    data,
    evaluation,
    extracted,
    lock,
    metrics,
    optim,
    records,
    sharding,
    state,
    trainer,
)
from bitsperdim import config as config_lib
from bitsperdim import run as run_lib
from bitsperdim import step as step_lib
from bitsperdim.checkpoint import Checkpoints
from bitsperdim.errors import InputError, Interrupted
from vqvae2 import autoencoder_stage, chain, codes, facts, prior_stage

NUM_CODES = 32
GRIDS = {"top": (2, 2), "bottom": (4, 4)}


def tiny_config():
    config = config_files.load("vqvae2_photos:tiny")
    config.data.image_size = 16
    config.codes.batch_size = 250  # divides neither split
    return config


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every stage complete; not to be changed."""
    return trainer.train(tiny_config(), str(tmp_path_factory.mktemp("vqvae2") / "run"))


@pytest.fixture(scope="module")
def trained(run, mesh):
    """The Polyak weights and the codebooks."""
    _, saved = trainer.restore(run, "autoencoder", mesh)
    return jax.device_get(saved["ema"]), jax.device_get(saved["extra"]["codebooks"])


@pytest.fixture
def autoencoder_only(run, tmp_path):
    """A copy of the run in which nothing is complete but the autoencoder."""
    for name in ("config.json", "environment.json"):
        shutil.copy(run.workdir / name, tmp_path / name)
    shutil.copytree(run.folder("autoencoder"), tmp_path / "autoencoder")
    return run_lib.open_run(tmp_path)


def pixels(split):
    """Images of a split in [-1, 1), in order, in double; the middle of each cell of 256 levels."""
    source = data.open_source(data.DataConfig(source="photos", image_size=16), split)
    images = source.read(np.arange(source.size))["image"]
    return (images.astype(np.float64) + 0.5) / 128.0 - 1.0


def contents(folder):
    """Every file below a folder by its path in it."""
    files = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("split", codes.SPLITS)
def test_codes_are_those_of_a_direct_encode_with_the_polyak_weights_in_the_order_of_the_split(run, trained, split):
    ema, codebooks = trained
    net = autoencoder_stage.network(run.config.autoencoder.model, facts.of_run(run))
    encode = jax.jit(lambda x: net.apply({"params": ema}, x, {k: v.embedding for k, v in codebooks.items()})[1:])
    x = pixels(split)
    kept = codes.open_codes(run, split)
    assert kept.size == len(x)
    chosen = np.random.default_rng(0).choice(len(x), 400, replace=False)
    z, quantized = encode(jnp.asarray(x[chosen], jnp.float32))
    stored = kept.read(chosen)
    for level, grid in GRIDS.items():
        assert stored[level].shape == (400, *grid)
        np.testing.assert_array_equal(stored[level], quantized[level].codes)
        # And the nearest vectors, by every distance in double.
        vectors = np.asarray(z[level], np.float64).reshape(-1, 1, 8)
        distances = np.square(vectors - np.asarray(codebooks[level].embedding, np.float64)).sum(-1)
        rows = np.arange(len(distances))
        np.testing.assert_allclose(distances[rows, stored[level].ravel()], distances.min(1), atol=1e-6)
    assert len(np.unique(stored["bottom"])) > 5  # the comparison is not one of constants


def test_the_figures_of_the_run_are_those_of_numpy_over_every_held_out_image(run, trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", f"--workdir={run.workdir}"])
    before = contents(run.workdir)
    cli.evaluate()
    found = json.loads((run.workdir / "evaluation.json").read_text())
    # Evaluating changes nothing but its own file: no codebook, no checkpoint.
    after = contents(run.workdir)
    del after["evaluation.json"]
    assert after == before

    ema, codebooks = trained
    net = autoencoder_stage.network(run.config.autoencoder.model, facts.of_run(run))
    x = pixels("evaluation")
    tables = {level: codebook.embedding for level, codebook in codebooks.items()}
    stored = codes.open_codes(run, "evaluation").read(np.arange(len(x)))
    given = {level: jnp.asarray(stored[level]) for level in GRIDS}
    decoded = np.asarray(jax.jit(lambda given: net.apply({"params": ema}, given, tables, method="decode"))(given))
    errors = np.square(decoded - x).mean((1, 2, 3))

    measured = found["autoencoder"]
    assert (found["split"], measured["images"], measured["step"]) == ("evaluation", len(x), 6)
    assert measured["mse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert measured["mse_standard_error"] == pytest.approx(errors.std(ddof=1) / math.sqrt(len(x)), rel=1e-4)
    assert measured["mse_over_variance"] == pytest.approx(errors.mean() / x.var(), rel=1e-4)
    assert measured["psnr_db"] == pytest.approx(20.0 * math.log10(2.0 / math.sqrt(errors.mean())), rel=1e-5)
    for level, (height, width) in GRIDS.items():
        counts = np.bincount(stored[level].ravel(), minlength=NUM_CODES)
        share = counts[counts > 0] / counts.sum()
        assert measured[f"used_codes_{level}"] == len(share)
        assert measured[f"perplexity_codes_{level}"] == pytest.approx(
            math.exp(-(share * np.log(share)).sum()), rel=1e-4
        )
        rate = found[level]["nats_per_code"] * height * width / math.log(2.0)
        assert found[level]["rate_bits_per_image"] == pytest.approx(rate, rel=1e-9)
        assert found[f"nats_per_code_{level}"] == found[level]["nats_per_code"]
    assert found["rate_bits_per_image"] == pytest.approx(
        found["top"]["rate_bits_per_image"] + found["bottom"]["rate_bits_per_image"], rel=1e-12
    )
    assert (found["mse"], found["mse_over_variance"]) == (measured["mse"], measured["mse_over_variance"])
    assert not [key for key in found if "bits_per_dim" in key]  # a rate and a distortion are no likelihood
    assert f"{found['rate_bits_per_image']:.6g}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["autoencoder", "top", "bottom"])
def test_the_names_of_the_figures_are_known_before_anything_is_measured(run, mesh, name):
    stage = run.stage(name)
    model, source = stage.model(run), stage.source(run, "evaluation")
    like = trainer.abstract_state(run, stage, model, mesh)
    names = evaluation.figure_names(model, like["ema"], like["extra"], source, stage.settings.batch_size)
    [*_, last] = metrics.read(run.folder(name) / metrics.FILE)
    assert {*names, "step", "kind"} == set(last)


@pytest.mark.parametrize("level", GRIDS)
def test_an_untrained_prior_with_a_silent_head_pays_the_logarithm_of_the_number_of_codes(run, level):
    model = prior_stage.make(run, level)
    generator = np.random.default_rng(0)
    draw = lambda leaf: generator.standard_normal(leaf.shape, np.float32)
    params, extra = jax.tree.map(draw, jax.eval_shape(lambda: model.init(jax.random.key(0))))
    params["network"]["head"] = jax.tree.map(np.zeros_like, params["network"]["head"])
    batch = codes.open_codes(run, "evaluation").read(np.arange(16)) | {"mask": np.ones(16, bool)}
    nats = jax.jit(model.measure)(params, extra, batch, jax.random.key(0)).parts["nats_per_code"]
    np.testing.assert_allclose(nats, math.log(NUM_CODES), rtol=1e-6)


def test_training_a_prior_drops_for_each_example_and_step_what_these_alone_decide(run):
    model, config = prior_stage.make(run, "top"), run.config.top.model
    assert config.dropout == 0.1
    generator = np.random.default_rng(0)
    draw = lambda leaf: generator.standard_normal(leaf.shape, np.float32)
    params, extra = jax.tree.map(draw, jax.eval_shape(lambda: model.init(jax.random.key(0))))
    batch = {"top": np.zeros((8, *GRIDS["top"]), np.int32), "position": np.arange(8)}
    loss = jax.jit(lambda order, key: model.loss(params, extra, batch | {"position": order}, key, 0)[1].parts)
    nats, turned, later = (
        np.asarray(loss(order, jax.random.key(seed))["nats_per_code"])
        for order, seed in ((np.arange(8), 0), (np.arange(8)[::-1], 0), (np.arange(8), 1))
    )
    np.testing.assert_allclose(turned, nats[::-1], rtol=1e-5)
    assert len(np.unique(nats)) > 5 and (later != nats).sum() > 5


def test_the_variance_that_scales_the_loss_is_that_of_the_training_images(run):
    about = facts.of_run(run)
    assert about.variance == pytest.approx(pixels("train").var(), rel=0.01)  # of 4,096 of the images
    assert (about.shape, about.levels, about.num_classes) == ((16, 16, 3), 256, 0)


def interrupt_after(batches):
    """A check for signals that finds one after so many calls."""
    left = iter(range(batches))

    def check():
        if next(left, None) is None:
            raise Interrupted("stopped by SIGTERM")

    return check


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(records, "SHARD_BATCHES", 2)


@pytest.fixture
def unbroken(small_shards, autoencoder_only, mesh):
    """The files of an extraction that nothing interrupts; the run has none afterwards."""
    codes.extract(autoencoder_only, mesh, lambda: None)
    assert codes.is_extracted(autoencoder_only)
    expected = contents(autoencoder_only.folder("codes"))
    assert len([name for name in expected if "train" in name]) > 3
    autoencoder_only.folder("codes").rmtree()
    return expected


def test_an_interrupted_extraction_goes_on_and_is_never_mistaken_for_codes(
    unbroken, autoencoder_only, mesh, monkeypatch
):
    written, add = [], extracted.Writer.add
    monkeypatch.setattr(extracted.Writer, "add", lambda self, rows: written.append(self) or add(self, rows))
    num_train = -(-len(pixels("train")) // 256)
    for batches in (0, 3, num_train):  # before the first batch, within the first split, within the second
        with pytest.raises(Interrupted):
            codes.extract(autoencoder_only, mesh, interrupt_after(batches))
        assert not codes.is_extracted(autoencoder_only)
        with pytest.raises(InputError, match=r"stage 'top' needs 'codes', which is not complete"):
            trainer.train(tiny_config(), str(autoencoder_only.workdir), "top")
    codes.extract(autoencoder_only, mesh, lambda: None)
    assert contents(autoencoder_only.folder("codes")) == unbroken
    # Of the three batches the third was in no whole shard: it alone was made twice.
    total = num_train + -(-len(pixels("evaluation")) // 256)
    assert total < len(written) <= total + 2


def test_an_extraction_killed_within_a_shard_goes_on_to_the_same_bytes(unbroken, autoencoder_only, mesh, monkeypatch):
    write = extracted.atomic.write_bytes

    def killed(path, content):
        if "-00002-of-" not in path.name:
            return write(path, content)
        path.with_name(f"{path.name}.tmp").write_bytes(content[: len(content) // 2])
        raise Interrupted("nothing of ours is called when a process is killed")

    with monkeypatch.context() as patch:
        patch.setattr(extracted.atomic, "write_bytes", killed)
        with pytest.raises(Interrupted):
            codes.extract(autoencoder_only, mesh, lambda: None)
    folder = autoencoder_only.folder("codes")
    before = {path: os.stat(path).st_ino for path in folder.glob("codes-train.*") if path.suffix != ".tmp"}
    assert len(before) == 2
    codes.extract(autoencoder_only, mesh, lambda: None)
    assert contents(folder) == unbroken
    assert {path: os.stat(path).st_ino for path in before} == before  # these were not made again


def test_what_another_autoencoder_began_is_made_anew(unbroken, autoencoder_only, mesh, capsys):
    folder = autoencoder_only.folder("codes")
    with pytest.raises(Interrupted):
        codes.extract(autoencoder_only, mesh, interrupt_after(3))
    values = json.loads((folder / "unfinished.json").read_text())
    (folder / "unfinished.json").write_text(json.dumps(values | {"fingerprint": "another"}))
    [shard] = folder.glob("*.tfrecord-*")
    shard.write_bytes(b"codes of another autoencoder")
    codes.extract(autoencoder_only, mesh, lambda: None)
    assert "codes: begins anew, for its first part was made by another autoencoder" in capsys.readouterr().err
    assert contents(folder) == unbroken


def test_codes_for_which_there_is_no_room_leave_no_half_file_and_name_the_remedy(
    unbroken, autoencoder_only, mesh, monkeypatch
):
    folder = autoencoder_only.folder("codes")
    first = min(name for name in unbroken if "-train." in name)
    write = extracted.atomic.write_bytes

    def with_little_room(path, content):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(unbroken[first]) // 2, hard))
        try:
            write(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with monkeypatch.context() as patch:
        patch.setattr(extracted.atomic, "write_bytes", with_little_room)
        with pytest.raises(InputError) as caught:
            codes.extract(autoencoder_only, mesh, lambda: None)
    assert str(caught.value) == (
        f"cannot write {folder / first} (File too large); make room, then the same command goes on"
    )
    assert [path.name for path in folder.iterdir()] == ["unfinished.json"]
    # When what is buffered goes to the disk.
    with monkeypatch.context() as patch:
        patch.setattr(extracted.atomic, "flush", full_disk)
        with pytest.raises(InputError, match=r"cannot write .*train.* \(No space left on device\); make room"):
            codes.extract(autoencoder_only, mesh, lambda: None)
    assert [path.name for path in folder.iterdir()] == ["unfinished.json"]
    codes.extract(autoencoder_only, mesh, lambda: None)
    assert contents(folder) == unbroken


def full_disk(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_prior_refuses_the_codes_of_another_autoencoder(run, autoencoder_only, mesh):
    shutil.copytree(run.folder("codes"), autoencoder_only.folder("codes"))
    assert codes.autoencoder(autoencoder_only, mesh)["step"] == 6
    stage = autoencoder_only.stage("autoencoder")
    like = trainer.abstract_state(autoencoder_only, stage, stage.model(autoencoder_only), mesh)
    with Checkpoints(autoencoder_only.folder("autoencoder") / "checkpoints") as checkpoints:
        _, saved = checkpoints.restore(like)
        saved["extra"]["codebooks"]["top"] = jax.tree.map(
            lambda leaf: leaf.at[(3,) * leaf.ndim].add(1) if leaf.ndim == 2 else leaf,
            saved["extra"]["codebooks"]["top"],
        )
        checkpoints.save(6, saved)
    with pytest.raises(InputError, match=r"codes was made by another autoencoder .*remove the folders"):
        trainer.train(tiny_config(), str(autoencoder_only.workdir), "top")
    assert not autoencoder_only.folder("top").exists()
    # Nor is a prior measured on them, though the autoencoder is of the same step.
    shutil.copytree(run.folder("top"), autoencoder_only.folder("top"))
    with pytest.raises(InputError, match=r"codes was made by another autoencoder \(other weights of step 6\); remove"):
        trainer.evaluate(autoencoder_only, "evaluation")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("autoencoder/data.json", {"shape": "16x16x3"}, 'shape is "16x16x3"'),
        ("autoencoder/data.json", {"shape": [16, 16]}, "shape is [16, 16]"),
        ("autoencoder/data.json", {"variance": None}, "variance is null"),
        ("autoencoder/sources.json", {"train": ["photos"]}, 'train is ["photos"]'),
        ("codes/info.json", {"step": "6"}, 'step is "6"'),
        ("codes/info.json", {"files": [1]}, "files is [1]"),
        ("codes/info.json", {"files": {"evaluation": {}}}, "it lacks files.train"),
        ("codes/info.json", {"files": {"train": 3, "evaluation": {}}}, "files.train is 3"),
    ],
)
def test_a_record_with_a_value_of_another_type_is_named(run, autoencoder_only, mesh, file, values, message):
    shutil.copytree(run.folder("codes"), autoencoder_only.folder("codes"))
    path = autoencoder_only.workdir / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(InputError) as caught:
        if file.endswith("sources.json"):
            codes.extract(autoencoder_only, mesh, lambda: None)
        trainer.train(tiny_config(), str(autoencoder_only.workdir), "top")
    assert str(caught.value) == f"{path} is damaged ({message}); restore it, or use a new --workdir"


def test_a_sample_depends_on_its_seed_and_not_on_the_number_drawn(run, mesh):
    loaded = chain.load(run, mesh)
    many = loaded.sample(jax.random.key(1), 6)
    few = loaded.sample(jax.random.key(1), 2)
    np.testing.assert_array_equal(few, many[:2])
    assert len(np.unique(many.reshape(6, -1), axis=0)) == 6
    assert loaded.draw(jax.random.key(1), 2)[1]["calls_per_image"] == {"top": 4, "bottom": 16}
    greedy = loaded.sample(jax.random.key(2), 2, temperature=0.0)
    np.testing.assert_array_equal(greedy[0], greedy[1])  # without noise there is but one sample


def test_every_sampler_draws_the_same_images(run, mesh):
    loaded = chain.load(run, mesh)
    options = {"temperature": {"top": 1.0, "bottom": 0.8}, "top_k": {"top": 0, "bottom": 3}, "top_p": 0.9}
    drawn = {name: loaded.sample(jax.random.key(1), 3, sampler=name, **options) for name in chain.SAMPLERS}
    for name in ("fixed_point", "ancestral"):
        np.testing.assert_array_equal(drawn["cached"], drawn[name])
    calls = loaded.draw(jax.random.key(1), 3, sampler="fixed_point", **options)[1]["calls_per_image"]
    assert 1 <= calls["top"] <= 4 and 1 <= calls["bottom"] < 16
    assert (drawn["cached"] != loaded.sample(jax.random.key(1), 3, temperature=0.8)).any()
    # The single likeliest code is the greedy one, whatever the noise.
    likeliest = loaded.sample(jax.random.key(1), 2, top_k=1)
    np.testing.assert_array_equal(likeliest, loaded.sample(jax.random.key(2), 2, temperature=0.0))


def test_the_samplers_are_measured(run, mesh, monkeypatch):
    monkeypatch.setattr(chain.comparison, "BATCHES", (2,))
    rows, shown = chain.load(run, mesh).compare_samplers(jax.random.key(0), io.StringIO())
    assert [row["sampler"] for row in rows] == ["cached", "fixed_point", "ancestral"]
    assert [row["exact"] for row in rows] == [None, True, True]
    assert rows[0]["calls_percent"] == rows[2]["calls_percent"] == 100.0 > rows[1]["calls_percent"]
    assert (rows[0]["calls_top"], rows[0]["calls_bottom"]) == (4, 16)
    assert shown["samplers"].ndim == 3
    monkeypatch.setattr(chain.comparison, "BUDGET", 0.0)
    estimate = chain.load(run, mesh).compare_samplers(jax.random.key(0), io.StringIO())[0][2]
    assert (estimate["seeds"], estimate["calls_bottom"], estimate["exact"]) == (0, 16, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampler": "fast"}, "there is no sampler 'fast' here; there are cached, fixed_point, ancestral"),
        ({"temperature": {"top": 1.0}}, "temperature must be a number, or a dict for top, bottom, not for ['top']"),
        ({"top_k": {"top": 1, "middle": 2}}, "top_k must be a number, or a dict for top, bottom, not for ['top', 'mi"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_wrong_options_of_sampling_are_named(run, mesh, wrong, message):
    with pytest.raises(InputError, match=re.escape(message)):
        chain.load(run, mesh).sample(jax.random.key(0), 2, **wrong)


def test_a_label_is_refused_where_the_priors_know_no_classes(run, mesh):
    with pytest.raises(InputError, match=r"label=3, but the priors of .* were trained without classes"):
        chain.load(run, mesh).sample(jax.random.key(0), 2, label=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder.model.strides": (4, 8)}, r"are 16x16, not divisible by the product 32 of .*strides=\(4, 8\)"),
        ({"autoencoder.model.strides": (3, 2)}, r"autoencoder\.model\.strides must be powers of two, not \(3, 2\)"),
        ({"autoencoder.model.strides": (4, "2")}, r"'autoencoder\.model\.strides\[1\]' must be of type int, not str"),
        ({"top.model.activation": "relu"}, r"top\.model\.activation must be one of elu, concat_elu, not 'relu'"),
        ({"bottom.model.conditioning.norm": "layer"}, r"bottom\.model\.conditioning\.norm must be one of batch"),
        ({"bottom.optim.warmup_steps": 6}, "bottom: the cosine schedule starts at update 6"),
        (
            {"bottom.optim.name": "adamw", "bottom.optim.weight_decay": 0.1, "bottom.optim.decay_mask": "zzz"},
            "bottom: optim.decay_mask 'zzz' matches no parameter",
        ),
        (
            {"top.model.class_conditional": True},
            r"top\.model\.class_conditional=True, but the images have no labels; set it to False, or use images with",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(tmp_path, changes, message):
    values = config_lib.to_plain(tiny_config().to_dict())
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    with pytest.raises(InputError, match=message):
        trainer.train(values, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def train_autoencoder(num_devices, accumulation):
    """Codebooks and losses of four steps with flips and revival, on so many devices."""
    values = config_lib.to_plain(tiny_config().to_dict())
    values["autoencoder"]["train"]["accumulation"] = accumulation
    # Every code with less than nine tenths of its share dies, so every step revives many of them.
    values["autoencoder"]["model"] |= {"revival_threshold": 0.9, "residual_layers": 1}
    _, config = run_lib.parse(values)
    source = data.open_source(config.data, "train")
    about = facts.measure(source, config.autoencoder.model.strides)
    settings, optim_config = config.autoencoder.train, config.autoencoder.optim
    model = autoencoder_stage.make(config.autoencoder.model, about, settings.batch_size)
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    optimizer = optim.optimizer(optim_config, settings.steps)
    like = state.abstract(model, optimizer, jax.random.key(0), mesh, config.mesh)
    step = step_lib.compiled(model, optim_config, settings, 0, mesh, like)
    current, losses = state.create(model, optimizer, jax.random.key(0), like), []
    for index in range(4):
        batch = data.train_batch(source, 0, index, settings.batch_size, sharding.over_batch(mesh))
        current, report = step(current, batch)
        losses.append(float(report.figures["objective"][0]))
    return jax.device_get(current["extra"]["codebooks"]), losses


def test_eight_devices_and_micro_batches_learn_the_codebooks_of_one_device():
    codebooks, losses = train_autoencoder(1, accumulation=1)
    others, other_losses = train_autoencoder(8, accumulation=2)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
    for level, codebook in codebooks.items():
        np.testing.assert_allclose(others[level].ema_counts, codebook.ema_counts, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(others[level].embedding, codebook.embedding, rtol=1e-3, atol=1e-4)


def test_a_stage_that_stands_on_another_refuses_its_further_training(run):
    config = tiny_config()
    config.autoencoder.optim.schedule = "constant"
    values = config_lib.to_plain(config.to_dict())
    (folder := run.workdir.parent / "constant").mkdir()
    for name in ("autoencoder", "codes"):
        shutil.copytree(run.folder(name), folder / name)
    run_lib.create(run_lib.Run(folder, run_lib.parse(values)[1], run.family))
    values["autoencoder"]["train"]["steps"] = 8
    with pytest.raises(InputError, match=r"at step 6, now 8\); remove the folders codes, top and bottom"):
        trainer.train(values, str(folder))


def test_a_damaged_last_checkpoint_is_trained_again_and_the_codes_still_fit(run, tmp_path):
    values = config_lib.to_plain(tiny_config().to_dict())
    values["autoencoder"]["train"]["save_every"] = 3
    trainer.train(values, str(tmp_path))
    for path in (tmp_path / "autoencoder/checkpoints/00000006/state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = trainer.train(values, str(tmp_path))
    assert all(trainer.is_complete(again, stage) for stage in again.stages())
    assert contents(again.folder("codes")) == contents(run.folder("codes"))


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_codes_that_are_not_what_was_written_are_refused(autoencoder_only, run, damage):
    shutil.copytree(run.folder("codes"), autoencoder_only.folder("codes"))
    path = min(autoencoder_only.folder("codes").glob("codes-train.*"))
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        InputError,
        match=r"00000-of-\d+ (is missing|has changed since it was written); remove the folder",
    ):
        trainer.train(tiny_config(), str(autoencoder_only.workdir), "top")
    assert not autoencoder_only.folder("top").exists()


def test_two_processes_do_not_work_in_one_stage(run):
    with (
        lock.alone(run.folder("top")),
        pytest.raises(InputError, match=r"another process is working on .*top"),
        lock.alone(run.folder("top")),
    ):
        pass


def test_codes_are_not_made_of_other_images_than_the_autoencoder_saw(autoencoder_only, mesh):
    path = autoencoder_only.folder("autoencoder") / "sources.json"
    values = json.loads(path.read_text())
    values["evaluation"]["size"] -= 1
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"the evaluation images of .*autoencoder have changed since it began \(size"):
        codes.extract(autoencoder_only, mesh, lambda: None)
    assert not codes.is_extracted(autoencoder_only)


def test_a_prior_does_not_go_on_with_codes_of_another_autoencoder(run, tmp_path):
    shutil.copytree(run.workdir, tmp_path / "run")
    copy = run_lib.open_run(tmp_path / "run")
    path = copy.folder("top") / "sources.json"
    values = json.loads(path.read_text())
    made_by = json.loads((copy.folder("codes") / "info.json").read_text())["fingerprint"]
    assert {values[split]["fingerprint"] for split in codes.SPLITS} == {made_by}
    values["train"]["fingerprint"] = values["evaluation"]["fingerprint"] = "of another one"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"top have changed since it began \(fingerprint of another one ->"):
        trainer.evaluate(copy, "evaluation")
