"""Whole runs of autoregressive models: trained, measured, sampled by every sampler, opened in a notebook."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import bitsperdim
from arm_forecast import codes as arm_codes
from arm_forecast import comparison, facts, gumbel, modules, modules_stage, pixelcnn, samplers, sampling
from arm_forecast.pixelcnn import Grid
from bitsperdim import cli, config_files, data, images, sampler_table, sharding, trainer
from bitsperdim.errors import InputError
from bitsperdim.metrics import read

SAMPLERS = ("ancestral", "zeros", "last", "fixed_point", "fixed_point_without_noise", "modules", "cached")
WINDOWED = ("fixed_point:4", "modules:4", "last:4")


def digits_config():
    config = config_files.load("arm_digits:tiny")
    config.arm.train.steps = 30
    config.arm.train.log_every = 10
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trainer.train(digits_config(), str(tmp_path_factory.mktemp("digits") / "run"))


@pytest.fixture(scope="module")
def loaded(run):
    return bitsperdim.load(str(run.workdir))


@pytest.fixture(scope="module")
def drawn(loaded):
    return loaded.draw(jax.random.key(10), 5, sampler="fixed_point", batch_size=8)


def test_the_likelihood_of_the_run_is_the_mean_over_every_held_out_image(run, loaded):
    source = data.open_source(run.config.data, "evaluation")
    measured = trainer.evaluate(run, "evaluation")
    log_prob = loaded.log_prob(source.read(np.arange(source.size))["image"])
    assert log_prob.shape == (source.size,) and measured["arm"]["images"] == source.size == 360
    assert measured["nats"] == pytest.approx(-log_prob.astype(np.float64).mean(), rel=1e-5)
    assert measured["bits_per_dim"] == pytest.approx(measured["nats"] / (64 * math.log(2.0)), rel=1e-6)
    error = log_prob.astype(np.float64).std(ddof=1) / math.sqrt(source.size)
    assert measured["arm"]["nats_standard_error"] == pytest.approx(error, rel=1e-4)
    assert measured["bits_per_dim"] < math.log2(17)  # it has learned something


@pytest.mark.parametrize("sampler", SAMPLERS + WINDOWED)
def test_every_sampler_draws_the_same_images(loaded, drawn, sampler):
    images, about = loaded.draw(jax.random.key(10), 5, sampler=sampler, batch_size=8)
    assert min(about["smallest_margin"], drawn[1]["smallest_margin"]) > 1e-4
    np.testing.assert_array_equal(images, drawn[0])
    assert about["sampler"] == sampler
    assert about["calls_per_image"] <= 64
    if sampler in ("ancestral", "cached"):
        assert about["calls_per_image"] == 64
    assert len(np.unique(images)) > 5


def test_an_image_depends_on_its_number_alone(loaded, drawn):
    for count, batch in ((2, 8), (11, 8), (5, 16)):
        images = loaded.sample(jax.random.key(10), count, sampler="fixed_point", batch_size=batch)
        np.testing.assert_array_equal(images[:5], drawn[0][:count])
    other = loaded.sample(jax.random.key(11), 5, sampler="fixed_point")
    assert (other != drawn[0]).mean() > 0.3


def test_one_device_draws_what_eight_draw(run, drawn):
    arm = sampling.restore(run, sharding.make_mesh(run.config.mesh))
    alone = jax.device_put(arm.params, jax.devices()[0])
    for name in ("fixed_point", "cached"):
        samples = samplers.draw(arm._replace(params=alone), samplers.Sampler(name), jax.random.key(10), 5, 5)
        np.testing.assert_array_equal(samples.x.reshape(5, 8, 8, 1), drawn[0])


def test_the_log_probability_of_a_sample_is_that_of_the_model(loaded, drawn):
    expected = loaded.log_prob(drawn[0]).mean()
    assert drawn[1]["mean_log_prob_nats"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sampler", ["fixed_point", "fixed_point:4", "cached", "modules"])
def test_given_pixels_stay_and_the_rest_is_drawn(loaded, drawn, sampler):
    given = np.full((8, 8, 1), -1)
    given[:3] = drawn[0][0][:3]
    completed = loaded.sample(jax.random.key(10), 4, sampler=sampler, given=given, batch_size=8)
    np.testing.assert_array_equal(completed[:, :3], np.broadcast_to(given[:3], (4, 3, 8, 1)))
    # Sample 0 was drawn with this noise and has this beginning, so it is found again.
    np.testing.assert_array_equal(completed[0], drawn[0][0])
    assert (completed[1, 3:] != drawn[0][0][3:]).any()


def test_temperature_zero_is_greedy(loaded):
    greedy = loaded.sample(jax.random.key(0), 2, temperature=0.0)
    np.testing.assert_array_equal(greedy[0], greedy[1])
    images, about = loaded.draw(jax.random.key(1), 1, top_k=1, sampler="fixed_point")
    np.testing.assert_array_equal(images, greedy[:1])
    predicted = loaded.sample(jax.random.key(0), 5, temperature=0.0, sampler="fixed_point", batch_size=8)
    np.testing.assert_array_equal(predicted, np.broadcast_to(greedy[:1], predicted.shape))
    assert 0 < about["smallest_margin"] < 1  # that of the likeliest value before the next


def test_no_call_waits_for_what_a_last_chunk_has_too_much(loaded, run, drawn, monkeypatch):
    monkeypatch.setattr(samplers, "CHUNK", 1)
    arm = sampling.restore(run, sharding.make_mesh(run.config.mesh))
    samples = samplers.draw(arm, samplers.Sampler("fixed_point"), jax.random.key(10), 9, 8)
    np.testing.assert_array_equal(samples.x[:5].reshape(5, 8, 8, 1), drawn[0])
    assert samples.network_calls == samples.calls[:8].max() + samples.calls[8:].max()


def test_a_lane_that_has_finished_takes_the_next_image(loaded, run):
    """The calls are those of handing each image to the lane that is free first."""
    arm = sampling.restore(run, sharding.make_mesh(run.config.mesh))
    samples = samplers.draw(arm, samplers.Sampler("fixed_point"), jax.random.key(10), 19, 2)
    expected = 0
    for chunk in (samples.calls[:16], samples.calls[16:]):
        busy_until = [0, 0]
        for calls in chunk:
            busy_until[np.argmin(busy_until)] += calls
        expected += max(busy_until)
    lockstep = sum(samples.calls[i : i + 2].max() for i in range(0, 19, 2))
    assert samples.network_calls == expected < lockstep


def test_one_given_image_serves_all_samples(loaded, drawn):
    given = np.where(np.arange(8)[:, None, None] < 3, drawn[0][:1].astype(int), -1)
    whole = loaded.sample(jax.random.key(10), 2, given=given)
    np.testing.assert_array_equal(whole, loaded.sample(jax.random.key(10), 2, given=given[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "fastest"}, r"there is no sampler 'fastest' here; there are auto, ancestral.* NAME:4$"),
        ({"sampler": "fixed_point:3"}, r"'fixed_point' takes 4 rows here"),
        ({"sampler": "fixed_point:"}, r"sampler 'fixed_point:' cannot be: 'fixed_point' takes 4 rows here"),
        ({"batch_size": -1}, r"batch_size must be at least 1, not -1"),
        ({"sampler": "cached:4"}, r"'cached' takes no windows here"),
        ({"given": np.zeros((7, 8, 1), int)}, r"given must be integers \[8, 8, 1\] or \[2, 8, 8, 1\]"),
        ({"given": np.full((8, 8, 1), 17)}, r"given must hold levels 0\.\.16, or -1; found 17\.\.17"),
        ({"top_p": 0.0}, r"top_p must be above 0"),
        ({"temperature": -1.0}, r"temperature must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(loaded, options, message):
    with pytest.raises(InputError, match=message):
        loaded.draw(jax.random.key(0), 2, **options)


def test_no_image_at_all_is_refused(loaded):
    with pytest.raises(InputError, match="n must be at least 1, not 0"):
        loaded.draw(jax.random.key(0), 0)


def test_a_sampler_that_the_config_names_wrongly_is_refused_before_it_trains_and_may_be_changed_later(run, loaded):
    config = digits_config()
    config.sampling = {"sampler": "fixedpoint"}
    with pytest.raises(InputError, match=r"config value sampling\.sampler must be one of auto, cached, .*'fixedpoint'"):
        trainer.train(config, str(run.workdir))
    config.sampling = {"sampler": "fixed_point:16", "batch_size": 3}
    again = trainer.train(config, str(run.workdir))  # complete as it is, but no other config
    with pytest.raises(InputError, match=r"config value sampling\.sampler: sampler 'fixed_point:16' cannot be"):
        bitsperdim.load(str(again.workdir)).draw(jax.random.key(0), 1)
    trainer.train(digits_config(), str(run.workdir))


def test_the_script_tells_the_calls_of_each_image_and_how_they_came_along(run, monkeypatch):
    out = run.workdir / "traced"
    flags = [f"--workdir={run.workdir}", f"--out={out}", "--num=3", "--seed=10", "--sampler=fixed_point"]
    monkeypatch.setattr("sys.argv", ["sample.py", *flags])
    cli.sample()
    about, by_image = json.loads((out / "sampling.json").read_text()), np.load(out / "sampling.npz")
    calls, accepted = by_image["calls"], by_image["accepted"]
    assert calls.mean() == pytest.approx(about["calls_per_image"]) and accepted.shape == (3, calls.max())
    for count, row in zip(calls, accepted, strict=True):
        assert row[count - 1] == 64 and (np.diff(row[:count]) > 0).all() and (row[count:] == -1).all()


@pytest.mark.parametrize("seed", [2**63, -(2**70)])
def test_a_seed_that_is_too_large_is_refused(run, monkeypatch, capsys, seed):
    monkeypatch.setattr("sys.argv", ["sample.py", f"--workdir={run.workdir}", f"--seed={seed}"])
    with pytest.raises(SystemExit) as ended:
        cli.sample()
    assert ended.value.code == 2 and "seed" in capsys.readouterr().err


def test_a_model_of_pixels_has_no_codes(loaded, drawn):
    with pytest.raises(InputError, match="a model of pixels has no codes to encode"):
        loaded.encode(drawn[0])
    with pytest.raises(InputError, match=r"images must be uint8 \['n', 8, 8, 1\] with levels below 17"):
        loaded.log_prob(drawn[0] + np.uint8(17))


def test_pictures_drawn_while_it_trains_are_those_of_seed_10(run, drawn):
    folder = run.workdir / "arm" / "images"
    names = {path.name for path in folder.iterdir()}
    assert {"samples-00000030.png", "mistakes_fixed_point-00000030.png", "curves.png"} <= names
    picture = np.asarray(PIL.Image.open(folder / "samples-00000030.png"))
    first_row = images.grid(drawn[0][:4], columns=4, levels=17)
    np.testing.assert_array_equal(picture[: len(first_row)], first_row)
    np.testing.assert_array_equal(picture.shape[:2], 4 * np.array(first_row.shape[0] + images.SEPARATOR) - 2)


def test_the_script_measures_every_sampler_and_the_fastest_is_then_chosen(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "BATCHES", (1,))
    monkeypatch.setattr(comparison, "SEEDS", 2)
    monkeypatch.setattr("sys.argv", ["sample.py", f"--workdir={run.workdir}", "--compare_samplers"])
    cli.sample()
    found = json.loads((run.workdir / "samplers.json").read_text())
    others = ("fixed_point:4", "fixed_point_fresh_noise")
    assert found["complete"] and {row["sampler"] for row in found["rows"]} >= {*SAMPLERS, *others}
    assert {row["seeds"] for row in found["rows"]} == {2} and found["steps"] == {"arm": 30}
    # What is compared with is not compared with itself, nor with other noise.
    expected = {"fixed_point": None, "fixed_point_fresh_noise": None}
    assert {row["sampler"]: row["exact"] for row in found["rows"] if not row["exact"]} == expected
    assert {row["calls_percent"] for row in found["rows"] if row["sampler"] in ("ancestral", "cached")} == {100.0}
    for name in ("samplers", "mistakes_fixed_point", "mistakes_modules"):
        assert (run.workdir / f"{name}.png").stat().length > 1000
    assert "fixed_point:4" in capsys.readouterr().out


def test_the_fastest_sampler_of_the_nearest_batch_is_chosen_if_it_can_be_drawn_with(run):
    grid, path = Grid(8, 8, 1, 17), run.workdir / "samplers.json"
    row = lambda sampler, batch, seconds, exact=True: dict(
        sampler=sampler, batch=batch, seconds_per_image=seconds, exact=exact
    )
    rows = [row("fixed_point", 1, 3.0, None), row("last", 1, 2.0), row("modules:4", 1, 1.0), row("cached", 8, 1.5)]
    # Neither what is not exact, nor other noise, nor what this version has not.
    rows += [row("zeros", 1, 0.1, False), row("fixed_point_fresh_noise", 1, 0.1, None), row("oracle", 1, 0.1)]
    table = sampler_table.Table(sampler_table.conditions(run, 7), rows, True)
    chosen = lambda batch, has_modules: str(samplers.choose(run, batch, grid, has_modules))
    by_rule = str(samplers.default(1, grid))
    try:
        sampler_table.write(path, table)
        # Pairs for modules that are yet to be trained are drawn without any, whatever was fastest with them.
        assert (chosen(1, True), chosen(2, False), chosen(30, True)) == ("modules:4", "last", "cached")
        for unfit in (
            table._replace(complete=False),
            table._replace(conditions=table.conditions | {"steps": {"arm": 29}}),
            table._replace(conditions=table.conditions | {"device": "TPU v9"}),
            table._replace(rows=[row("oracle", 1, 0.1)]),
        ):
            sampler_table.write(path, unfit)
            assert chosen(1, True) == by_rule == "cached"
        path.write_text(path.read_text()[:50])
        with pytest.raises(InputError, match="remove it, or measure again"):
            chosen(1, True)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("backend", "batch", "expected"),
    [("cpu", 1, "cached"), ("tpu", 1, "fixed_point:4"), ("gpu", 32, "fixed_point:4"), ("gpu", 64, "cached")],
)
def test_without_measurements_the_kind_of_device_and_the_batch_decide(monkeypatch, backend, batch, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert str(samplers.default(batch, Grid(32, 32, 3, 256))) == expected


def test_flags_that_mean_nothing_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sample.py", f"--workdir={run.workdir}", "--label=3"])
    with pytest.raises(SystemExit) as ended:
        cli.sample()
    assert ended.value.code == 2
    assert "--label means nothing for a run of arm_forecast; it knows --temperature" in capsys.readouterr().err
    # Hours could pass before it would be seen that the table is of another temperature.
    monkeypatch.setattr("sys.argv", ["sample.py", f"--workdir={run.workdir}", "--compare_samplers", "--temperature=2"])
    with pytest.raises(SystemExit) as ended:
        cli.sample()
    assert ended.value.code == 2
    assert "--temperature means nothing beside --compare_samplers" in capsys.readouterr().err


@pytest.mark.slow
def test_modules_are_trained_afterwards_on_pairs_of_the_sampler(tmp_path, assert_example):
    config = digits_config()
    config.arm.train.steps, config.arm.forecast.modules = 10, 0
    config.modules = {
        "model": {"modules": 2, "filters": 6, "inputs": ("x", "noise")},
        "optim": {"name": "adam", "learning_rate": 3e-3},
        "train": {"batch_size": 16, "steps": 40, "ema_decay": 0.0},
        "pairs": 64,
    }
    run = trainer.train(config, str(tmp_path / "run"))
    arm = sampling.restore(run, sharding.make_mesh(run.config.mesh))
    assert_example(run, "modules")
    sources = {split: run.stage("modules").source(run, split) for split in ("train", "evaluation")}
    pairs = {split: source.read(np.arange(source.size))["x"] for split, source in sources.items()}
    assert [len(x) for x in pairs.values()] == [64, 6]
    # The first pair of the evaluation split is sample 64 of the stage's noise.
    key = jax.random.key(run.seed("pairs"))
    samples = samplers.draw(arm, samplers.Sampler("fixed_point"), key, 65, 65)
    np.testing.assert_array_equal(samples.x[64], pairs["evaluation"][0].ravel())
    _check_divergence_of_pairs(run)
    losses = [line["forecast_kl_nats"] for line in read(run.folder("modules") / "metrics.jsonl")]
    assert losses[-1] < 0.95 * losses[0]
    drawn = [samplers.draw(arm, samplers.Sampler(name), key, 4, 4) for name in ("modules", "fixed_point")]
    np.testing.assert_array_equal(drawn[0].x, drawn[1].x)
    # The ARM has not moved.
    trained = trainer.restore(run, "modules", sharding.make_mesh(run.config.mesh))[1]["extra"]["arm"]
    frozen = trainer.restore(run, "arm", sharding.make_mesh(run.config.mesh))[1]["ema"]["arm"]
    jax.tree.map(np.testing.assert_array_equal, trained, frozen)


def _check_divergence_of_pairs(run):
    """The stage's own figure on stored pairs, from the noise that belongs to them: with it each is argmax again."""
    config, arm_config, grid = run.config.modules.model, run.config.arm.model, facts.grid(run)
    pairs = run.stage("modules").source(run, "evaluation").read(np.arange(4))
    mesh = sharding.make_mesh(run.config.mesh)
    params, arm = (trainer.restore(run, name, mesh)[1]["ema"] for name in ("modules", "arm"))
    x = jnp.asarray(pairs["x"], jnp.int32)

    @jax.jit
    def by_hand(arm, params, x, ids):
        h = pixelcnn.hidden(arm, arm_config, grid, x)
        noise = gumbel.noise(jax.random.key(run.seed("pairs")), grid.values)(ids, jnp.arange(64)).reshape(*x.shape, -1)
        logits = pixelcnn.logits(arm, arm_config, grid, h)
        forecast = modules.whole(params, grid, h, modules.module_inputs(config, x, noise, grid.values))
        return (logits + noise).argmax(-1), modules.divergence(logits, forecast)

    drawn, expected = by_hand(arm["arm"], params, x, pairs["id"])
    np.testing.assert_array_equal(drawn, x)
    measured = modules_stage.make(run).measure(params, {"arm": arm["arm"]}, pairs, jax.random.key(0))
    np.testing.assert_allclose(measured.parts["forecast_kl_nats"], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    config = config_files.load("arm_latent_cifar10:tiny")
    config.data = {"source": "photos", "image_size": 16}
    return trainer.train(config, str(tmp_path_factory.mktemp("latent") / "run"))


def test_a_latent_run_decodes_what_its_model_of_codes_draws(latent):
    loaded = bitsperdim.load(str(latent.workdir))
    images = data.open_source(latent.config.data, "evaluation").read(np.arange(5))["image"]
    codes = loaded.encode(images)
    assert codes.shape == (5, 4, 4, 4) and codes.max() < 16
    np.testing.assert_array_equal(codes, arm_codes.open_codes(latent, "evaluation").read(np.arange(5))["codes"])
    np.testing.assert_array_equal(loaded.decode(codes), loaded.reconstruct(images))
    drawn, about = loaded.draw(jax.random.key(0), 3)
    assert drawn.shape == (3, 16, 16, 3) and about["sampler"] == "cached"
    np.testing.assert_array_equal(drawn, loaded.sample(jax.random.key(0), 3, sampler="fixed_point"))
    with pytest.raises(InputError, match="a latent run gives no likelihood of an image"):
        loaded.log_prob(images)
    with pytest.raises(InputError, match="given pixels mean nothing to a model of codes"):
        loaded.draw(jax.random.key(0), 1, given=images[0])


def test_examples_of_codes_are_known_before_there_are_any(latent, assert_example):
    assert_example(latent, "arm")


def test_a_latent_run_reports_a_rate_and_a_distortion(latent):
    measured = trainer.evaluate(latent, "evaluation")
    assert measured["rate_bits_per_image"] == pytest.approx(measured["nats_per_code"] * 64 / math.log(2.0), rel=1e-6)
    assert not [key for key in measured if "bits_per_dim" in key]
    source = data.open_source(latent.config.data, "evaluation")
    originals = source.read(np.arange(source.size))["image"]
    x, again = (
        image / 127.5 - 1.0 for image in (originals, bitsperdim.load(str(latent.workdir)).reconstruct(originals))
    )
    # A reconstruction is rounded to levels, the error is measured before.
    assert measured["mse"] == pytest.approx(np.square(again - x).mean(), abs=1e-4)
    assert measured["mse_over_variance"] == pytest.approx(measured["mse"] / x.var(), rel=1e-4)


def test_the_maps_of_a_latent_run_lie_over_the_decoded_images(latent):
    names = {path.name for path in (latent.workdir / "arm" / "images").iterdir()}
    assert {"samples-00000006.png", "mistakes_fixed_point-00000006.png"} <= names


@pytest.mark.slow
def test_published_weights_become_a_run(golden, tmp_path, monkeypatch):
    arrays = golden("arm/pcnnpp_tiny_rgb")
    file = tmp_path / "weights.npz"
    np.savez(file, **{name[3:]: value for name, value in arrays.items() if name.startswith("sd/")})
    workdir = tmp_path / "run"
    flags = ["--family=arm_forecast", f"--checkpoint={file}", f"--workdir={workdir}", "--image_size=8"]
    monkeypatch.setattr("sys.argv", ["convert.py", *flags])
    cli.convert()
    loaded = bitsperdim.load(str(workdir))
    log_prob = loaded.log_prob(np.moveaxis(arrays["x_int"], 1, -1))
    np.testing.assert_allclose(-log_prob, [arrays["loss_nats_sample0"], arrays["loss_nats_sample1"]], rtol=1e-5)
    drawn = [loaded.sample(jax.random.key(0), 2, sampler=name) for name in ("fixed_point", "fixed_point:4", "cached")]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    with pytest.raises(SystemExit) as ended:
        cli.convert()  # the folder is taken
    assert ended.value.code == 2
