"""Whole runs: trained, measured, sampled, opened in a notebook; and what makes a deep hierarchy stable."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import PIL.Image
import pytest

import bitsperdim
from bitsperdim import cli, config_files, data, extracted, rng, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim import step as step_lib
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from bitsperdim.metrics import read
from vdvae import coding, latent_store, levels, model_stage, network, pruning, run_plots, vae
from vdvae.config import EncodingConfig, ModelConfig, ObjectiveConfig

DIGITS = Facts((8, 8, 1), 17)


def digits_config():
    config = config_files.load("vdvae_digits:tiny")
    config.train.update({"steps": 60, "log_every": 20})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trainer.train(digits_config(), str(tmp_path_factory.mktemp("digits") / "run"))


@pytest.fixture(scope="module")
def loaded(run):
    return bitsperdim.load(str(run.workdir))


@pytest.fixture(scope="module")
def held_out(run):
    return data.open_source(run.config.data, "evaluation").read(np.arange(9))["image"]


@pytest.fixture(scope="module")
def measured(run):
    return trainer.evaluate(run_lib.with_evaluation(run, samples=4), "evaluation")


def test_the_bars_of_the_layers_have_the_colours_of_their_resolutions(run, measured):
    pixels = run_plots.plots(run, measured)["kl_by_layer"].reshape(-1, 3).astype(int)
    resolutions = {shape[:2] for shape in levels.latent_shapes(vae.make(run.config.model, DIGITS).net.levels)}
    assert len(resolutions) > 1
    for end in matplotlib.colormaps["viridis"]([0.0, 0.9])[:, :3] * 255.0:
        assert np.abs(pixels - end).max(-1).min() < 2.0


def test_a_run_learns_and_reports_a_bound_and_its_parts(run, measured):
    lines = read(run.folder("model") / "metrics.jsonl")
    assert 0.0 < next(line["ssim"] for line in lines if line["kind"] == "evaluation") < 1.0
    lines = [line for line in lines if line["kind"] == "train"]
    assert lines[-1]["bits_per_dim"] < lines[0]["bits_per_dim"] < math.log2(17) + 0.5
    assert not run.folder("latents").exists()  # a stage on request
    assert measured["model"]["images"] == 360
    assert measured["nats"] == pytest.approx(measured["reconstruction_nats"] + measured["kl_nats"], rel=1e-6)
    assert measured["bits_per_dim"] == pytest.approx(measured["nats"] / (64 * math.log(2.0)), rel=1e-6)
    by_level = sum(measured["model"][f"kl_nats_{edge}x{edge}"] for edge in (1, 8))
    assert by_level == pytest.approx(measured["kl_nats"], rel=1e-5)
    of_layers = [measured["model"][f"kl_nats_layer_{layer:02d}"] for layer in range(3)]
    np.testing.assert_allclose(
        [of_layers[0], sum(of_layers[1:])], [measured["kl_nats_1x1"], measured["kl_nats_8x8"]], rtol=1e-5
    )
    weighted = measured["model"]["bits_per_dim_importance_weighted_4"]
    assert 0.9 * measured["bits_per_dim"] < weighted < measured["bits_per_dim"]
    assert 0.0 < measured["ssim"] < 1.0


def test_a_resolution_that_says_nothing_is_named_once_the_warm_up_is_over():
    objective = ObjectiveConfig(kl_steps=200, gamma_steps=400)
    figures = {"kl_nats": 9.0, "kl_nats_1x1": 0.001, "kl_nats_4x4": 9.0, "kl_nats_layer_00": 0.001}
    (line,) = model_stage.remarks(objective, 401, figures)
    assert "latents of 1x1 say nothing" in line and "objective.kl_steps" in line
    assert not model_stage.remarks(objective, 400, figures)
    assert not model_stage.remarks(objective, 401, figures | {"kl_nats_1x1": 1.0})


def test_more_samples_give_a_tighter_bound(loaded, held_out):
    one = loaded.log_prob(held_out)
    many = loaded.log_prob(held_out, samples=16)
    assert one.shape == many.shape == (9,) and many.mean() > one.mean()
    np.testing.assert_array_equal(loaded.log_prob(held_out[3:4], jax.random.key(0)).shape, (1,))
    np.testing.assert_allclose(loaded.log_prob(held_out)[:4], loaded.log_prob(held_out[:4]), rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 7])
def test_samples_of_equal_weight_give_the_bound_of_one(samples, run, held_out, monkeypatch):
    """-log (1 / K sum_k w) = -log w, in full: log K is a small part of the nats of an image."""
    model, keys = vae.make(run.config.model, DIGITS), jax.random.split(jax.random.key(0), len(held_out))
    raw = jnp.zeros((*held_out.shape[:3], model.output.numbers))
    monkeypatch.setattr(vae, "infer", lambda *given: (raw, [jnp.full(len(raw), 2.5), jnp.full(len(raw), -1.0)]))
    found = coding.importance_weighted(model, {}, held_out, keys, samples)
    expected = model.output.nats(raw, vae.target(model, held_out)) + 2.5 - 1.0
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_latents_go_and_come_back(loaded, held_out):
    latents = loaded.encode(held_out)
    assert [z.shape for z in latents] == [(9, 1, 1, 2), (9, 8, 8, 2), (9, 8, 8, 2)]
    decoded = loaded.decode(latents)
    assert decoded.dtype == np.uint8 and decoded.max() <= 16
    assert (decoded == loaded.reconstruct(held_out)).mean() > 0.99
    drawn = loaded.encode(held_out, jax.random.key(1))
    assert all((z != mean).any() for z, mean in zip(drawn, latents, strict=True))
    with pytest.raises(InputError, match="must be a list of 3 arrays, one a layer, not of 2"):
        loaded.decode(latents[1:])
    with pytest.raises(InputError, match=r"latents of layer 1 must be \['n', 8, 8, 2\]"):
        loaded.decode([latents[0], latents[0], latents[2]])
    with pytest.raises(InputError, match="levels below 17"):
        loaded.encode(held_out + 10)


def test_an_image_depends_on_its_number_alone(loaded):
    five, about = loaded.draw(jax.random.key(1), 5)
    assert about["temperatures"] == [0.9] * 2 and five.shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(loaded.sample(jax.random.key(1), 3), five[:3])
    assert (loaded.sample(jax.random.key(2), 5) != five).mean() > 0.2


def test_temperatures_are_those_of_levels(loaded):
    key = jax.random.key(0)
    coldest = loaded.sample(key, 2, temperature=0.0, output_temperature=0.0)
    np.testing.assert_array_equal(coldest[0], coldest[1])
    by_name, about = loaded.draw(key, 2, temperature={"8": 0.3})
    assert about["temperatures"] == [0.9, 0.3]
    np.testing.assert_array_equal(by_name, loaded.sample(key, 2, temperature=(0.9, 0.3)))
    three, negative = (1.0, 0.5, 0.5), {"8": -1.0}
    for wrong, message in (({"16": 1.0}, "levels are 1, 8"), (three, "each of 2 levels"), (negative, "at least 0")):
        with pytest.raises(InputError, match=message):
            loaded.draw(key, 1, temperature=wrong)
    with pytest.raises(InputError, match="output_temperature must be at least 0, not -1"):
        loaded.draw(key, 1, output_temperature=-1.0)


def test_the_pixels_have_a_temperature_of_their_own(run, loaded, tmp_path, monkeypatch, capsys):
    where = [f"--workdir={run.workdir}", f"--out={tmp_path}", "--num=2"]
    assert sample(monkeypatch, *where, "--temperature=0.9", "--output_temperature=0") == 0
    likeliest = loaded.sample(jax.random.key(0), 2, temperature=0.9, output_temperature=0.0)
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), likeliest)
    assert json.loads((tmp_path / "sampling.json").read_text())["output_temperature"] == 0.0
    assert (loaded.sample(jax.random.key(0), 2, temperature=0.9) != likeliest).any()
    assert sample(monkeypatch, *where, "--output_temperature=warm") == 2
    assert "--output_temperature must be a number, not 'warm'" in capsys.readouterr().err


def test_layers_left_open_are_drawn_from_the_prior_and_swapped_ones_are_kept(loaded, held_out):
    latents, key = loaded.encode(held_out), jax.random.key(3)
    open_behind = loaded.decode([latents[0], None, None], key)
    assert (loaded.decode([latents[0], None, None], jax.random.key(4)) != open_behind).mean() > 0.05
    cold = loaded.decode([latents[0], None, None], key, temperature=0.0)
    np.testing.assert_array_equal(cold, loaded.decode([latents[0], None, None], jax.random.key(4), temperature=0.0))
    nearly = loaded.decode([*latents[:2], None], key, temperature={"8": 0.0})
    assert (nearly == loaded.reconstruct(held_out)).mean() > (open_behind == loaded.reconstruct(held_out)).mean()
    swapped = loaded.decode([latents[0], *(np.roll(z, 1, 0) for z in latents[1:])])
    assert swapped.shape == held_out.shape
    with pytest.raises(InputError, match="must be given for a layer at least"):
        loaded.decode([None] * 3)


def test_an_interpolation_begins_and_ends_with_reconstructions(loaded, held_out):
    one, other = held_out, held_out[::-1]
    for share, end in ((0.0, one), (1.0, other)):
        assert (loaded.interpolate(one, other, share) == loaded.reconstruct(end)).mean() > 0.98
    middle = loaded.interpolate(one, other, 0.5)
    assert (middle != loaded.reconstruct(one)).any() and (middle != loaded.reconstruct(other)).any()
    np.testing.assert_array_equal(loaded.interpolate(one, one, 0.5), loaded.interpolate(one, one, 0.0))


def sample(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    try:
        cli.sample()
    except SystemExit as end:
        return end.code
    return 0


def test_figures_are_drawn_from_the_command_line(run, measured, tmp_path, monkeypatch, capsys):
    where = [f"--workdir={run.workdir}", f"--out={tmp_path}", "--num=9"]  # as many as above: compiled once
    for name in ("reconstruction", "progressive", "swap", "interpolation"):
        assert sample(monkeypatch, *where, f"--figure={name}") == 0
        assert len(np.asarray(PIL.Image.open(tmp_path / f"{name}.png"))) > 9 * 96
    assert json.loads((tmp_path / "progressive.json").read_text())["layers_from_posterior"] == [0, 1, 3]
    assert 0.0 < json.loads((tmp_path / "reconstruction.json").read_text())["ssim"] < 1.0
    assert sample(monkeypatch, *where, "--figure=pruning", "--keep=1,0.5") == 0
    whole, half = json.loads((tmp_path / "pruning.json").read_text())["rows"]
    assert (whole["keep"], whole["share_of_channels"], whole["share_of_dimensions"]) == (1.0, 1.0, 1.0)
    assert (half["share_of_channels"], whole["bytes_per_image"]) == (0.5, (2 + 2 * 2 * 64) * 8)
    assert whole["bits_per_dim"] == pytest.approx(measured["bits_per_dim"], rel=0.02)
    assert half["kl_bits_per_dim"] < whole["kl_bits_per_dim"]
    for flags, message in (
        (["--figure=nonsense"], "there are reconstruction, progressive, swap, interpolation, pruning"),
        (["--figure=swap", "--num=257"], "--num=257: a figure shows at most 256 images"),
        (["--figure=swap", "--keep=0.5"], "--keep means nothing for the figure 'swap'; it knows none of its kind"),
        (["--keep=0.5"], "--keep means nothing for a run of vdvae"),
        (["--decode=evaluation"], "latents is missing; train.py --stage=latents makes it"),
    ):
        capsys.readouterr()
        assert sample(monkeypatch, *where, *flags) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def stored(run):
    """The run with half of its channels stored, in batches of 64, a shard each."""
    config = digits_config()
    config.encoding = {"keep": 0.5, "images": 200}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extracted.records, "SHARD_BATCHES", 1)
        write, written = extracted.Writer._write, []

        def killed_once(self):
            if len(written) == 3:
                written.append(self)
                raise KeyboardInterrupt
            written.append(write(self))

        patch.setattr(extracted.Writer, "_write", killed_once)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(config, str(run.workdir), only="latents")
        return trainer.train(config, str(run.workdir), only="latents")


def test_a_data_set_goes_into_latents_and_back_with_its_likelihood(stored, monkeypatch, tmp_path):
    """The bound of the stored latents is that of the images, noise for noise, also behind an interruption."""
    mesh, about = sharding.mesh_at_hand(stored.config.mesh), Facts((8, 8, 1), 17)
    model, (_, state) = vae.make(stored.config.model, about), trainer.restore(stored, "model", mesh)
    kept = pruning.channels(model, pruning.kl_by_channel(stored, mesh), 0.5)
    for split in ("train", "evaluation"):
        images = data.open_source(stored.config.data, split).read(np.arange(300))["image"]
        keys = latent_store._keys(stored, jnp.arange(300))
        bound = jax.jit(lambda image, keys: pruning.bound(model, state["ema"], image, keys, kept))
        reconstruction, kl, likeliest = bound(images, keys)
        size, batches = latent_store.decode(stored, mesh, split)
        decoded, parts = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        assert size == len(decoded) == {"train": 1437, "evaluation": 360}[split]
        np.testing.assert_allclose(parts["reconstruction_nats"][:300], reconstruction, rtol=1e-4)
        np.testing.assert_allclose(parts["kl_nats"][:300], kl, rtol=1e-4)
        assert (decoded[:300] == likeliest).mean() > 0.99
    assert sample(monkeypatch, f"--workdir={stored.workdir}", "--decode=evaluation", f"--out={tmp_path}") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "decoded-evaluation.npy"), decoded)
    figures = json.loads((tmp_path / "decoded-evaluation.json").read_text())
    assert figures["nats"] == pytest.approx(float(parts["nats"].mean()), rel=1e-6) and figures["images"] == 360


def test_divergences_of_channels_are_of_the_images_alone(run):
    """Nine images in a batch of sixteen: what fills it up does not count."""
    few = dataclasses.replace(run.config.encoding, images=9)
    mesh = sharding.make_mesh(run.config.mesh)
    found = pruning.kl_by_channel(run._replace(config=dataclasses.replace(run.config, encoding=few)), mesh)
    source = data.open_source(run.config.data, "train")
    images = source.read(np.linspace(0, source.size - 1, 9).astype(np.int64))["image"]
    model, key = vae.make(run.config.model, DIGITS), jax.random.key(run.seed("kl_by_channel"))
    noise = network.posterior_sources(rng.per_example(key, jnp.arange(9)), model.num_layers)
    params = trainer.restore(run, "model", mesh)[1]["ema"]
    _, kl = jax.jit(lambda params: vae.infer(model, params, images, noise, pruning.kl_of_channels))(params)
    for ours, of_layer in zip(found, kl, strict=True):
        np.testing.assert_allclose(ours, of_layer.mean(0) / math.log(2.0), rtol=1e-4, atol=1e-6)


def test_a_store_is_refused_to_another_model_and_with_other_settings(stored):
    mesh = sharding.mesh_at_hand(stored.config.mesh)
    other = stored._replace(
        config=dataclasses.replace(stored.config, encoding=EncodingConfig(keep=0.5, dtype="float16"))
    )
    with pytest.raises(InputError, match=r"other settings \(images 200 -> 10000, dtype float32 -> float16\); remove"):
        extracted.is_extracted(other, latent_store._extraction(other))
    path = stored.workdir / "latents" / "info.json"
    content = path.read_text()
    try:
        path.write_text(content.replace(json.loads(content)["fingerprint"], "0" * 64))
        with pytest.raises(InputError, match=r"was made by another model .*remove the folder latents"):
            latent_store.decode(stored, mesh, "train")
    finally:
        path.write_text(content)
    with pytest.raises(InputError, match="has the splits train and evaluation, not 'test'"):
        latent_store.decode(stored, mesh, "test")


def gradients(config, size, accumulation=1, rows=None):
    """Objective and gradients of the first step on the first `size` digits, in as many micro-batches."""
    model = model_stage.make(config, DIGITS)
    image = data.open_source(config.data, "train").read(np.arange(size))["image"]
    params = _randomised(model.init(jax.random.key(0))[0])
    state = {"params": params, "extra": {}, "step": jnp.int32(0)}
    batch = {"image": jnp.asarray(image), "position": jnp.arange(size, dtype=jnp.int32)}
    everywhere = sharding.replicated(sharding.make_mesh(sharding.MeshConfig()))
    places = jax.tree.map(lambda leaf: everywhere, params)
    whole = lambda state, batch: step_lib._gradients(model, accumulation, state, batch, jax.random.key(5), places)
    return jax.jit(whole)(state, batch)


def _randomised(params, by=0.05):
    """Nothing zero, so that every branch says something."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + by * generator.standard_normal(leaf.shape).astype(np.float32), params)


@pytest.mark.slow
@pytest.mark.parametrize("gamma_steps", [0, 10])
def test_noise_loss_and_balance_do_not_depend_on_micro_batches(gamma_steps):
    config = run_lib.parse(config_files.load("vdvae_digits:tiny"))[1]
    config = dataclasses.replace(config, objective=ObjectiveConfig(gamma_steps=gamma_steps))
    one, _, expected = gradients(config, 4)
    two, _, found = gradients(config, 4, accumulation=2)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1e-3))


@pytest.mark.parametrize(
    ("step", "beta"), [(0, 1e-4), (20, 1e-4), (2499, (2500 - 21) / 5021), (5041, 1.0), (9999, 1.0), (10_000, 1.0)]
)
def test_the_objective_is_that_of_the_update_being_taken(step, beta, monkeypatch):
    config = run_lib.parse(config_files.load("vdvae_digits:tiny"))[1]
    config = dataclasses.replace(config, objective=ObjectiveConfig(kl_steps=5000, gamma_steps=10_000))
    reconstruction, kl = np.float32([60.0, 80.0]), np.float32([[1.0, 3.0], [20.0, 12.0], [6.0, 2.0]])
    monkeypatch.setattr(model_stage.vae, "bound", lambda *_: (jnp.asarray(reconstruction), jnp.asarray(kl)))
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "position": np.arange(2, dtype=np.int32)}
    found, aux = model_stage.make(config, DIGITS).loss({}, {}, batch, jax.random.key(0), jnp.int32(step))
    share = np.array([2.0 / 2, 16.0 / 128, 4.0 / 128])  # of an element; layers of 1x1x2, 8x8x2 and 8x8x2
    gamma = 3 * share / share.sum() if step < 10_000 else np.ones(3)
    np.testing.assert_allclose(found, (70.0 + beta * (gamma * [2.0, 16.0, 4.0]).sum()) / 64, rtol=1e-6)
    np.testing.assert_allclose(aux.parts["nats"], reconstruction + kl.sum(0))  # the bound itself, whatever the weights


def test_layers_are_balanced_over_the_global_batch():
    """The mean divergence is that of all devices' examples, not each device's own."""
    config = run_lib.parse(config_files.load("vdvae_digits:tiny"))[1]
    # From the first step on the divergence has its whole weight, so that its balance is seen.
    config = dataclasses.replace(config, objective=ObjectiveConfig(gamma_steps=10))
    model = model_stage.make(config, DIGITS)
    params = _randomised(model.init(jax.random.key(0))[0], 0.3)
    image = data.open_source(config.data, "train").read(np.arange(8))["image"]
    batch = {"image": image, "position": np.arange(8, dtype=np.int32)}
    loss = jax.jit(lambda params, batch: model.loss(params, {}, batch, jax.random.key(1), jnp.int32(0))[0])
    alone = loss(params, jax.device_put(batch, jax.devices()[0]))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    together = loss(params, jax.device_put(batch, sharding.over_batch(mesh)))
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    # The test would see the difference: each example's own balance gives another loss.
    own = np.mean([loss(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)) for i in range(8)])
    assert abs(own - alone) > 1e-4 * abs(alone)


def test_the_trunk_in_half_precision_gives_nearly_the_same_bound():
    config = run_lib.parse(config_files.load("vdvae_digits:tiny"))[1].model
    image = data.open_source(run_lib.parse(config_files.load("vdvae_digits:tiny"))[1].data, "train")
    image, keys = image.read(np.arange(4))["image"], jax.random.split(jax.random.key(0), 4)
    nats = {}
    for dtype in ("float32", "bfloat16"):
        model = vae.make(dataclasses.replace(config, dtype=dtype), DIGITS)
        params = _randomised(vae.init(model, jax.random.key(0)))
        reconstruction, kl = jax.jit(lambda params, model=model: vae.bound(model, params, image, keys))(params)
        assert reconstruction.dtype == kl.dtype == jnp.float32
        nats[dtype] = reconstruction + kl.sum(0)
    assert (nats["float32"] != nats["bfloat16"]).all()
    np.testing.assert_allclose(nats["bfloat16"], nats["float32"], rtol=0.02)


def test_training_images_alone_are_mirrored_and_only_where_the_config_says(monkeypatch):
    seen = []
    monkeypatch.setattr(model_stage.augment, "flip", lambda keys, image: seen.append(keys.shape) or image)
    config = run_lib.parse(config_files.load("vdvae_digits:tiny"))[1]
    image = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.uint8)
    batch = {"image": image, "position": jax.ShapeDtypeStruct((4,), jnp.int32)}
    for flips in (False, True):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, flip=flips))
        model = model_stage.make(changed, DIGITS)
        params, _ = jax.eval_shape(model.init, jax.random.key(0))
        jax.eval_shape(model.measure, params, {}, batch, jax.random.key(0))
        assert not seen
        jax.eval_shape(model.loss, params, {}, batch, jax.random.key(0), jnp.int32(0))
        assert seen == [(4,)] * flips


@pytest.mark.parametrize("whiten", [(), (120.0, 64.0)])
def test_the_encoder_sees_all_bits_where_the_likelihood_is_that_of_fewer(whiten):
    config = run_lib.parse(config_files.load("vdvae_digits:tiny"))[1].model
    model = vae.make(dataclasses.replace(config, target_bits=5, whiten=whiten), Facts((8, 8, 3), 256))
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    mean, deviation = whiten or (127.5, 127.5)
    np.testing.assert_allclose(vae.inputs(model, image), (image.astype(float) - mean) / deviation, atol=1e-6)
    np.testing.assert_array_equal(vae.target(model, image), image // 8)
    assert model.output.levels == 32


@pytest.mark.parametrize("shape", [(6, 10, 1), (8, 8, 1)])
def test_images_that_no_product_of_strides_divides_are_padded(shape):
    config = run_lib.parse(config_files.load("vdvae_digits:tiny"))[1].model
    model = vae.make(config, Facts(shape, 17))
    image = np.random.default_rng(0).integers(0, 17, (2, *shape), np.uint8)
    params = vae.init(model, jax.random.key(0))
    reconstruction, kl = jax.jit(lambda p: vae.bound(model, p, image, jax.random.split(jax.random.key(0), 2)))(params)
    assert np.isfinite(reconstruction).all() and kl.shape == (model.num_layers, 2)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jax.jit(lambda p: coding.sampled(model, p, keys, coding.by_layer(model, (1.0,)), 1.0))(params)
    assert drawn.shape == (3, *shape)


def test_a_level_without_latents_has_a_block_instead():
    config = ModelConfig(
        strides=(1, 2), layers=(2, 0), skips=(2, 0), blocks=(2, 1), widths=(8, 8), bottlenecks=(0.5, 0.5),
        kernels=(3, 3), latents=(2, 2), mixtures=2,
    )  # fmt: skip
    model = vae.make(config, Facts((4, 4, 1), 17))
    params = vae.init(model, jax.random.key(0))
    assert levels.latent_shapes(model.net.levels) == ((2, 2, 2),) * 2
    assert set(params["top_down"]["level_1"]) == {"enter", "block"}
    image = np.random.default_rng(0).integers(0, 17, (2, 4, 4, 1), np.uint8)
    reconstruction, kl = jax.jit(lambda p: vae.bound(model, p, image, jax.random.split(jax.random.key(0), 2)))(params)
    assert np.isfinite(reconstruction).all() and kl.shape == (2, 2)


def norms_at_start(scale_z, scale_last, depth=24):
    """Gradient norm at the initial parameters of a deep narrow hierarchy, and the largest value of its stream."""
    config = ModelConfig(
        strides=(1, 4), layers=(2, depth), skips=(1, 1), blocks=(1, 1), widths=(16, 16), bottlenecks=(0.5, 0.5),
        kernels=(1, 3), latents=(8, 8), mixtures=2, scale_z_projection=scale_z, scale_last_convolutions=scale_last,
        scan=True,
    )  # fmt: skip
    model = vae.make(config, Facts((4, 4, 1), 17))
    image = np.random.default_rng(0).integers(0, 17, (4, 4, 4, 1), np.uint8)
    keys = jax.random.split(jax.random.key(0), 4)

    def objective(params):
        reconstruction, kl = vae.bound(model, params, image, keys)
        return (reconstruction + kl.sum(0)).mean() / 16

    value, gradient = jax.jit(jax.value_and_grad(objective))(vae.init(model, jax.random.key(0)))
    return float(value), float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient))))


def test_a_deep_hierarchy_starts_tame_only_with_scaled_projections_of_z():
    """Appendix C.1: without the scale of the z projections the first steps diverge, without the other they do not."""
    (tame, tame_norm), (wild, wild_norm) = norms_at_start(True, True), norms_at_start(False, True)
    (other, other_norm) = norms_at_start(True, False)
    assert wild_norm > 10 * max(tame_norm, other_norm)
    assert wild > 2 * max(tame, other)
