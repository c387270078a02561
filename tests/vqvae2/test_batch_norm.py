"""A prior whose conditioning stack is normalised over the batch: its running moments, and who uses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from bitsperdim import config as config_lib
from bitsperdim import config_files, evaluation, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.sources import Source
from vqvae2 import prior_stage

BATCH = 16
KEY = jax.random.key(0)
# Programs that run once: the compiler spends most of its time on making them fast.
QUICK = {"xla_backend_optimization_level": "0"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = config_lib.to_plain(config_files.load("vqvae2_photos:tiny").to_dict())
    values["data"]["image_size"] = 16
    values["bottom"]["model"]["conditioning"] |= {"norm": "batch", "blocks": 2, "widths": [8, 8], "bottlenecks": [8, 8]}
    return run_lib.check(tmp_path_factory.mktemp("batch_norm") / "none", values)


def read(indices):
    """Codes that are a function of their number."""
    draw = lambda index: np.random.default_rng(int(index)).integers(0, 32, (5, 4), np.int32)
    codes = np.stack([draw(index) for index in indices])
    return {"bottom": codes[:, :4], "top": codes[:, 4].reshape(-1, 2, 2)}


@pytest.fixture(scope="module")
def model(run):
    return prior_stage.make(run, "bottom")


@pytest.fixture(scope="module")
def params(model):
    """No branch is silent."""
    generator = np.random.default_rng(0)
    scale = lambda leaf: (2.0 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.5
    shapes, _ = jax.eval_shape(model.init, KEY)
    return jax.tree.map(lambda leaf: (scale(leaf) * generator.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def train(model, params):
    """`train(devices)` -> the mesh, and what is kept beside the parameters before, and after one to three batches."""

    @functools.cache
    def batches(num_devices):
        devices = jax.devices()[:num_devices]
        mesh = jax.make_mesh((num_devices, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)

        def update(params, extra, batch):
            _, aux = model.loss(params, extra, batch, KEY, jnp.int32(0))
            return model.update_extra(extra, aux.statistics, KEY, jnp.int32(0))

        update = jax.jit(update, out_shardings=sharding.replicated(mesh), compiler_options=QUICK)
        shapes = jax.eval_shape(model.init, KEY)[1]["batch_stats"]
        names = lambda path, leaf: (np.ones if "var" in jax.tree_util.keystr(path) else np.zeros)(
            leaf.shape, leaf.dtype
        )
        states = [{"batch_stats": jax.tree_util.tree_map_with_path(names, shapes)}]
        for index in range(3):
            batch = read(range(index * BATCH, (index + 1) * BATCH)) | {"position": np.arange(BATCH, dtype=np.int32)}
            batch = jax.device_put(batch, sharding.over_batch(mesh))
            states.append(jax.device_get(update(params, states[-1], batch)))
        return mesh, states

    return batches


def running(extra):
    """Means and variances of all layers, as two lists."""
    leaves = jax.tree_util.tree_leaves_with_path(extra["batch_stats"])
    ending = lambda name: [leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith(f"['{name}']")]
    return ending("mean"), ending("var")


def test_running_moments_begin_at_zero_and_one(model):
    means, variances = running(jax.jit(model.init, compiler_options=QUICK)(KEY)[1])
    # One before the way down, two below, one after; those of a run in one array.
    assert sorted(len(mean) for mean in means) == sorted(len(variance) for variance in variances) == [1, 1, 2]
    assert all((mean == 0).all() for mean in means) and all((variance == 1).all() for variance in variances)


def test_a_training_batch_moves_them_a_tenth_of_the_way_to_its_own(train):
    _, (_, after, *_) = train(1)
    for mean, var in zip(*running(after), strict=True):
        assert (mean != 0).all()
        assert (var >= 0.9).all() and (var != 1).all()  # 0.9 of the ones, and a tenth of what is never negative


@pytest.mark.parametrize("accumulation, norm, warned", [(4, "batch", True), (1, "batch", False), (4, "group", False)])
def test_micro_batches_with_a_norm_over_the_batch_are_warned_of_once(run, capsys, accumulation, norm, warned):
    values = config_lib.to_plain(run.config)
    values["bottom"]["model"]["conditioning"]["norm"] = norm
    values["bottom"]["train"] |= {"accumulation": accumulation, "batch_size": 128}
    other = run_lib.check(run.workdir, values)
    stage = other.stage("bottom")
    _, extra = jax.eval_shape(stage.model(other).init, KEY)
    trainer._warn_of_micro_batches(stage, {"extra": extra})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned
    for line in lines:
        assert line.startswith("warning: bottom: accumulation=4: BatchNorm normalises each micro-batch of 32 by itself")


def test_eight_devices_move_them_as_one_does(train):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(train(1)[1], train(8)[1], strict=True):
        jax.tree.map(close, theirs, ours)


def test_evaluation_uses_them_and_so_knows_nothing_of_the_rest_of_the_batch(model, params, train):
    mesh, (*_, last) = train(8)
    measure, measured = jax.jit(model.measure, compiler_options=QUICK), {}
    for size in (8, 24):
        source, kept = Source("codes", 24, (4, 4, 1), 32, 0, read), []
        keep = lambda *given, kept=kept: kept.append(measure(*given)) or kept[-1]
        evaluation.evaluate(model, keep, params, last, source, size, mesh, KEY)
        measured[size] = np.concatenate([aux.parts["nats_per_code"] for aux in kept])
    np.testing.assert_allclose(measured[24], measured[8], rtol=1e-5)
    # Other moments, other figures; and in training an example does depend on its batch.
    moved = jax.tree.map(lambda leaf: leaf + 1, last)
    batch = read(np.arange(8)) | {"mask": np.ones(8, bool), "position": np.arange(8, dtype=np.int32)}
    others = measure(params, moved, jax.device_put(batch, sharding.over_batch(mesh)), KEY).parts["nats_per_code"]
    assert np.abs(others - measured[8][:8]).min() > 1e-5
    loss = jax.jit(lambda given: model.loss(params, last, given, KEY, jnp.int32(0))[1].parts, compiler_options=QUICK)
    swapped = {name: values[[0, *range(8, len(values))]] for name, values in read(range(15)).items()}
    swapped["position"] = batch["position"]
    first = [loss({name: given[name] for name in swapped})["nats_per_code"][0] for given in (batch, swapped)]
    assert abs(first[0] - first[1]) > 1e-4
