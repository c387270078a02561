"""Whole runs of flows: trained, measured, sampled, opened in a notebook; the start on one device and on eight."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import bitsperdim
from bitsperdim import adopt, cli, config_files, data, dequantize, rng, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from bitsperdim.metrics import read
from flows import actnorm, convert, density, dequantization, encoder, imported, layers, lesson, squeeze


def config_of(variant="tiny", **changes):
    config = config_files.load("flows_digits:tiny")
    config.update_from_flattened_dict(changes)
    if variant == "variational":
        config.model.dequantization = {"flow": {"steps": ((1,),), "widths": (4,)}, "condition_channels": 2}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = {"train.steps": 60, "train.log_every": 20, "train.batch_size": 32}
    config = config_of("variational", **changes)
    # Glow's main flow has two latents and compiles fast; that of the noise stays MaCow's.
    config.model.flow.update({"kind": "glow", "factor": 2})
    return trainer.train(config, str(tmp_path_factory.mktemp("digits") / "run"))


@pytest.fixture(scope="module")
def loaded(run):
    return bitsperdim.load(str(run.workdir))


@pytest.fixture(scope="module")
def images():
    _, config = run_lib.parse(config_of())
    return data.open_source(config.data, "evaluation").read(np.arange(6))["image"]


def test_it_learns_and_every_figure_says_what_it_is(run):
    lines = read(run.workdir / "model" / "metrics.jsonl")
    bits = [line["bits_per_dim"] for line in lines if line.get("kind") == "train"]
    assert bits[-1] < bits[0] - 0.1
    measured = trainer.evaluate(run, "evaluation")
    assert (measured["dequantization"], measured["samples"]) == ("variational", 4)
    bound, weighted = measured["bits_per_dim"], measured["bits_per_dim_importance_weighted_4"]
    assert weighted < bound
    assert measured["dequantization_gap_bits_per_dim"] == pytest.approx(bound - weighted)
    assert measured["noise_entropy_bits_per_dim"] < 0.0  # no noise in the unit cube has more than the uniform one
    assert measured["round_trip_exact_images"] == 1.0
    assert 0.0 < measured["round_trip_mean_error_levels"] < measured["round_trip_largest_error_levels"] < 1e-2
    training = [line for line in lines if line.get("kind") == "evaluation"][-1]
    assert "bits_per_dim_importance_weighted_2" in training
    assert training["bits_per_dim"] == pytest.approx(bound, abs=0.05)


def test_reconstructions_are_the_images(loaded, images):
    np.testing.assert_array_equal(loaded.reconstruct(images), images)
    found = loaded.encode(images)
    assert [latent.shape for latent in found] == [(6, 4, 4, 2), (6, 2, 2, 8)]
    np.testing.assert_array_equal(loaded.decode(found), images)
    with pytest.raises(InputError, match=r"latents must be 2 arrays of shapes \[\['n', 4, 4, 2\]"):
        loaded.decode((found[0][:, :2], found[1]))
    with pytest.raises(InputError, match="with levels below 17"):
        loaded.encode(images + np.uint8(17))


def test_samples_depend_on_key_and_number_alone(loaded):
    drawn, about = loaded.draw(jax.random.key(1), 5, batch_size=8)
    assert about["round_trip_error"] < 1e-3 and about["not_finite_images"] == []
    np.testing.assert_array_equal(loaded.sample(jax.random.key(1), 11, batch_size=16)[:5], drawn)
    cold = loaded.sample(jax.random.key(1), 2, temperature=0.0)
    np.testing.assert_array_equal(cold[0], cold[1])
    with pytest.raises(InputError, match="temperature must be finite"):
        loaded.draw(jax.random.key(1), 1, temperature=-1.0)


def test_images_beyond_all_numbers_are_black_and_said(loaded, capsys):
    far = tuple(np.tile(np.float32([1.0, 1e30])[:, None, None, None], (1, *shape)) for shape in ((4, 4, 2), (2, 2, 8)))
    assert [images.any() for images in loaded.decode(far)] == [True, False]
    assert "warning: 1 of 2 images are not finite, and black" in capsys.readouterr().err
    drawn, about = loaded.draw(jax.random.key(1), 2, temperature=1e30)
    assert about["not_finite_images"] == [0, 1] and about["round_trip_error"] == 0.0 and not drawn.any()


def test_more_noise_samples_tighten_the_bound(loaded, images):
    one, many = (loaded.log_prob(images, samples=samples).mean() for samples in (1, 16))
    assert many > one
    with pytest.raises(InputError, match="samples must be at most 2"):
        loaded.log_prob(images, samples=3)


def test_what_noise_lacks_in_width_is_taken_from_the_bound():
    image, keys = jnp.full((3, 4, 4, 1), 2, jnp.uint8), rng.per_example(jax.random.key(0), jnp.arange(3))[None]
    u, log_q = dequantization.uniform(0.25).draw({}, image, keys)
    whole, none = dequantization.uniform().draw({}, image, keys)
    np.testing.assert_array_equal(u, 0.25 * whole)
    np.testing.assert_allclose(log_q, np.full((1, 3), 16 * np.log(4.0)), rtol=1e-6)  # 1 / volume
    np.testing.assert_array_equal(none, 0.0)
    for changes in ({"model.noise_width": 0.0}, {"model.noise_width": 1.5}):
        with pytest.raises(InputError, match=r"noise_width must lie in \(0, 1\]"):
            run_lib.parse(config_of(**changes))


@pytest.mark.slow
def test_inside_a_bin_stand_the_noise_of_the_pixel_and_a_density_of_its_values(run, images):
    for noise, line in lesson._along(run, images[0]).values():
        assert noise.shape == (lesson.DRAWS,) and 0.0 <= noise.min() and noise.max() < 1.0
        assert np.trapezoid(line, lesson.OFFSETS) == pytest.approx(1.0)
    assert lesson.inside_a_bin({"learned": run}).shape[2] == lesson.densities({"learned": run}).shape[2] == 3


def test_paths_between_images_begin_and_end_with_them(loaded, images):
    one, other = images, images[::-1]
    for share, end in ((0.0, one), (1.0, other)):
        np.testing.assert_array_equal(loaded.interpolate(one, other, share), end)
    middle = loaded.interpolate(one, other, 0.5)
    assert (middle != one).any() and (middle != other).any()
    with pytest.raises(InputError, match="must be as many, not 6 and 5"):
        loaded.interpolate(one, one[:5], 0.5)


def test_a_latent_left_open_is_drawn_anew_and_the_others_stay(loaded, images):
    first, top = loaded.encode(images)
    varied = loaded.decode([first, None], jax.random.key(3))
    assert (varied != images).any((1, 2, 3)).all()
    np.testing.assert_array_equal(loaded.decode([first[:4], None], jax.random.key(3)), varied[:4])
    assert (loaded.decode([first, None], jax.random.key(4)) != varied).any()
    cold = loaded.decode([None, top], temperature=0.0)
    np.testing.assert_array_equal(cold, loaded.decode([np.zeros_like(first), top]))
    with pytest.raises(InputError, match="must be given for a scale at least"):
        loaded.decode([None, None])


def test_figures_are_drawn_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    def sample(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--workdir={run.workdir}", f"--out={tmp_path}", *flags])
        cli.sample()

    for name, columns in (("interpolation", 11), ("scales", 3), ("reconstruction", 3)):
        sample("--num=6", f"--figure={name}", *(["--temperature=0.7"] if name == "scales" else []))
        height, width, _ = np.asarray(PIL.Image.open(tmp_path / f"{name}.png")).shape
        assert (width, height > 6 * 96) == (columns * 98 - 2, True)
    first, top = json.loads((tmp_path / "scales.json").read_text())["rows"]
    assert (first["shape"], top["shape"], first["share_of_dims"]) == ("4x4x2", "2x2x8", 0.5)
    assert min(first["mean_change_levels"], top["mean_change_levels"]) > 0.0
    record = json.loads((tmp_path / "reconstruction.json").read_text())
    assert record["exact_images"] == 1.0 and record["mean_error_levels"] < record["largest_error_levels"] < 1e-2


def test_the_start_on_eight_devices_is_that_on_one_and_sees_noise(run):
    stage = run.stage("model")
    alone = jax.make_mesh(
        (1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    meshes = (sharding.make_mesh(run.config.mesh), alone)
    dequantizer = dequantization.variational(run.config.model.dequantization, 1, 17, False)
    eight, one = (jax.device_get(stage.begin(run, mesh)["params"]) for mesh in meshes)
    for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # The first actnorm standardises the images with their noise, and the encoder's last convolution its features.
    count = run.config.model.init_images
    images = data.open_source(run.config.data, "train")
    batch = data.train_batch(images, run.seed("model"), 0, count, sharding.over_batch(meshes[0]))
    key = rng.for_purpose(jax.random.key(run.seed("model")), "init")
    keys = rng.per_example(rng.for_purpose(key, "noise"), batch["position"])
    u, _ = jax.jit(dequantizer.draw)(eight["dequantizer"], batch["image"], keys[None])
    z = squeeze.squeeze(dequantize.scale(batch["image"] + u[0], 17, "symmetric"))
    first = jax.tree.map(lambda leaf: leaf[0], eight["flow"]["level0"]["steps0"]["actnorm"])
    y, _ = actnorm.forward_and_log_det(first, z)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 2), ddof=1), 1.0, rtol=1e-3)
    c = dequantize.scale(batch["image"].astype(float), 17, "symmetric")
    features = jax.jit(encoder.encoder(1, 2, 0).apply)(eight["dequantizer"]["encoder"], c)
    np.testing.assert_allclose(features.std((0, 1, 2), ddof=1), 1.0, rtol=1e-3)


@pytest.mark.slow
def test_a_published_state_dict_becomes_a_run(golden, tmp_path):
    arrays = golden("flows/e_vdq_16_L2")
    state = {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}
    np.savez(tmp_path / "weights.npz", **{f"module.{name}": value for name, value in state.items()})
    run = adopt.adopt(tmp_path / "run", imported(str(tmp_path / "weights.npz"), 16))
    assert run.config.model.flow.widths == (8, 16) and run.config.model.dequantization.condition_channels == 4
    params = trainer.restore(run, "model", sharding.make_mesh(run.config.mesh))[1]["ema"]
    expected, _, _ = convert.model(convert.State(state))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.savez(tmp_path / "odd.npz", **state, odd=np.zeros(3))
    with pytest.raises(InputError, match="1 tensors that MaCow has not, such as 'odd'"):
        imported(str(tmp_path / "odd.npz"), 16)
    del state["flow.blocks.1.steps.0.glow_step.actnorm.bias"]
    np.savez(tmp_path / "less.npz", **state)
    with pytest.raises(InputError, match=r"lacks the tensor 'flow\.blocks\.1\.steps\.0\.glow_step\.actnorm\.bias'"):
        imported(str(tmp_path / "less.npz"), 16)


PARAMETERS = {
    "flows_cifar10": (32, 37_197_547),
    "flows_cifar10:variational": (32, 38_403_423),
    "flows_cifar10:glow": (32, 44_175_264),
    "flows_imagenet64": (64, 117_244_127),
    "flows_imagenet64:variational": (64, 123_100_393),
    "flows_imagenet64:glow": (64, 111_592_800),
    "flows_lsun128:church": (128, 166_570_083),
    "flows_lsun128:tower_variational": (128, 171_913_089),
    "flows_lsun128:glow": (128, 198_596_076),
    "flows_celebahq256:glow": (256, 170_883_756),
    "flows_celebahq256": (256, 171_945_151),
    "flows_celebahq256:variational": (256, 177_288_157),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configs_have_as_many_parameters_as_the_released_ones(name):
    edge, count = PARAMETERS[name]
    _, config = run_lib.parse(config_files.load(name))
    model = density.make(config.model, Facts((edge, edge, 3), 2**config.data.bits))
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))) == count


def test_latents_of_cifar10_have_the_channels_of_the_paper():
    _, config = run_lib.parse(config_files.load("flows_cifar10"))
    shapes = density.make(config.model, Facts((32, 32, 3), 256)).latent_shapes
    assert shapes == ((16, 16, 3), (16, 16, 3), (8, 8, 6), (8, 8, 6), (4, 4, 48))
    assert layers.num_splits(config.model.flow, 1) == 2


def test_the_run_keeps_what_sampling_needs(run):
    assert json.loads((run.workdir / "model" / "data.json").read_text()) == {"shape": [8, 8, 1], "levels": 17}
    names = {path.name for path in (run.workdir / "model" / "images").iterdir()}
    assert {"samples_0.7-00000060.png", "samples_1.0-00000060.png"} <= names
    assert jnp.isfinite(
        jnp.asarray([line.get("objective", 0.0) for line in read(run.workdir / "model" / "metrics.jsonl")])
    ).all()
