"""Whole runs of flows: trained, measured, sampled, opened in a notebook; the start on one device and on eight."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitsperdim
from bitsperdim import adopt, config_files, data, facts, rng, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from bitsperdim.metrics import read
from flows import convert, density, imported, latents, layers


def config_of(variant="tiny", **changes):
    config = config_files.load("flows_digits:tiny")
    config.update_from_flattened_dict(changes)
    if variant == "variational":
        config.model.dequantization = {"flow": {"steps": ((1,),), "widths": (4,)}, "condition_channels": 2}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = {"train.steps": 60, "train.log_every": 20, "train.batch_size": 32}
    return trainer.train(config_of("variational", **changes), str(tmp_path_factory.mktemp("digits") / "run"))


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
    training = [line for line in lines if line.get("kind") == "evaluation"][-1]
    assert "bits_per_dim_importance_weighted_2" in training
    assert training["bits_per_dim"] == pytest.approx(bound, abs=0.05)


def test_reconstructions_are_the_images(loaded, images):
    np.testing.assert_array_equal(loaded.reconstruct(images), images)
    found = loaded.encode(images)
    assert [latent.shape for latent in found] == [(6, 4, 4, 4)]
    np.testing.assert_array_equal(loaded.decode(found), images)
    with pytest.raises(InputError, match=r"latents must be 1 arrays of shapes \[\['n', 4, 4, 4\]\]"):
        loaded.decode((found[0][:, :2],))
    with pytest.raises(InputError, match="with levels below 17"):
        loaded.encode(images + np.uint8(17))


def test_samples_depend_on_key_and_number_alone(loaded):
    drawn, about = loaded.draw(jax.random.key(1), 5, batch_size=8)
    assert about["round_trip_error"] < 1e-3
    np.testing.assert_array_equal(loaded.sample(jax.random.key(1), 11, batch_size=16)[:5], drawn)
    cold = loaded.sample(jax.random.key(1), 2, temperature=0.0)
    np.testing.assert_array_equal(cold[0], cold[1])
    with pytest.raises(InputError, match="temperature must be finite"):
        loaded.draw(jax.random.key(1), 1, temperature=-1.0)


def test_more_noise_samples_tighten_the_bound(loaded, images):
    one, many = (loaded.log_prob(images, samples=samples).mean() for samples in (1, 16))
    assert many > one
    with pytest.raises(InputError, match="samples must be at most 2"):
        loaded.log_prob(images, samples=3)


def test_paths_between_images_begin_and_end_with_them(loaded, images):
    path = latents.interpolate(loaded, images[0], images[1], 5)
    np.testing.assert_array_equal(path[[0, -1]], images[:2])
    assert (path[2] != images[0]).any() and (path[2] != images[1]).any()


def test_one_scale_is_drawn_anew_and_the_others_stay(loaded, images):
    varied = latents.vary(loaded, images[0], -1, jax.random.key(0), 3)
    assert len(varied) == 3 and (varied[0] != varied[1]).any()
    with pytest.raises(InputError, match=r"scale must lie in -1\.\.0"):
        latents.vary(loaded, images[0], 1, jax.random.key(0), 1)


def test_the_start_on_eight_devices_is_that_on_one(tmp_path):
    config = config_of("variational")
    run = run_lib.check(tmp_path / "run", config)
    stage = run.stage("model")
    alone = jax.make_mesh(
        (1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    meshes = (sharding.make_mesh(run.config.mesh), alone)
    eight, one = (jax.device_get(stage.begin(run, mesh)["params"]) for mesh in meshes)
    for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # And it is a start: every scale has moved.
    model = density.make(run.config.model, facts.of_run(run))
    fresh = jax.jit(model.init)(rng.for_purpose(jax.random.key(run.seed("model")), "init"))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), eight, jax.device_get(fresh))
    assert min(jax.tree.leaves(moved["flow"]["level0"]["steps0"]["unit0"]["actnorm1"])) > 0.01


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
    "flows_lsun128:church": (128, 166_570_083),
    "flows_lsun128:tower_variational": (128, 171_913_089),
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
