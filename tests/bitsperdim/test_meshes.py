"""Eight devices, four ways to use them: every stage of every family learns the same, whatever the mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from bitsperdim import config_files, data, sharding, trainer
from bitsperdim import step as step_lib
from bitsperdim.sharding import MeshConfig

MESHES = {
    "replicated": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=8, smallest=0),
    "model": MeshConfig(fsdp=2, model=2, smallest=0),
    "spatial": MeshConfig(spatial=4),
}


def two_steps(run, stage, config):
    """Objectives and gradient norms of two steps that go on from the trained weights, these before and after, and how
    many of them are sharded."""
    run = run._replace(config=dataclasses.replace(run.config, mesh=config))
    mesh, model = sharding.make_mesh(config), stage.model(run)
    like = trainer.abstract_state(run, stage, model, mesh)
    with trainer.checkpoints_of(run, stage) as checkpoints:
        start, state = checkpoints.restore(like)
    step = step_lib.compiled(model, stage.optim, stage.settings, run.seed(stage.name), mesh, like)
    source, figures, before = stage.source(run, "train"), [], jax.device_get(state["params"])
    for index in range(start, start + 2):
        place = sharding.over_batch(mesh)
        batch = data.train_batch(source, run.seed(stage.name), index, stage.settings.batch_size, place)
        state, report = step(state, batch)
        figures += [float(report.figures[name][0]) for name in ("objective", "gradient_norm")]
    sharded = [leaf for leaf in jax.tree.leaves(state["params"]) if not leaf.is_fully_replicated]
    return figures, before, jax.device_get(state["params"]), len(sharded)


def mean_gap(got, expected):
    gaps = [np.abs(a - b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)]
    return sum(gap.sum() for gap in gaps) / sum(gap.size for gap in gaps)


def still_learning(values):
    """Without the schedules that end where training does, and of sizes that eight devices divide."""
    for key, value in values.items():
        if key == "optim":
            value.schedule = "constant"
        elif isinstance(value, ConfigDict):
            still_learning(value)
    if "arm" in values:
        values.arm.model.filters = values.arm.forecast.filters = 16
    return values


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqvae2_photos", "vdvae_digits", "flows_digits", "arm_digits"])
def test_every_stage_learns_the_same_on_every_mesh(name, tmp_path):
    run = trainer.train(still_learning(config_files.load(f"{name}:tiny")), str(tmp_path / "run"))
    for stage in run.stages():
        if stage.model is None or stage.on_request:
            continue
        expected, before, after, _ = two_steps(run, stage, MESHES["replicated"])
        learned = mean_gap(after, before)
        assert learned > 0
        for kind in ("fsdp", "model", *["spatial"] * stage.by_rows):
            figures, _, params, num_sharded = two_steps(run, stage, MESHES[kind])
            gap = mean_gap(params, after)
            print(f"{name} {stage.name} {kind}: {figures} for {expected}; weights learned {learned:.1e}, gap {gap:.1e}")
            assert (num_sharded > 0) == (kind != "spatial")
            np.testing.assert_allclose(figures, expected, rtol=1e-3, err_msg=f"{stage.name} {kind}")
            assert gap < learned / 100
