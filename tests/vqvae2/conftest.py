"""Parameters for small networks and whole runs, drawn without compiling their initialisation."""

import jax
import numpy as np
import pytest

from bitsperdim import run as run_lib
from bitsperdim import sharding, trainer


@pytest.fixture(scope="session")
def random_variables():
    """`random_variables(module, *inputs, **named)`: what `module.init` would make, but nothing zero and nothing small.

    So no residual branch hides behind its initial scale. Deviations are 1 / sqrt(fan in).
    """

    def draw(module, *inputs, **named):
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named))
        generator = np.random.default_rng(0)
        scale = lambda leaf: max(np.prod(leaf.shape[:-1]), 1) ** -0.5
        normal = lambda leaf: (scale(leaf) * generator.standard_normal(leaf.shape)).astype(np.float32)
        return jax.tree.map(normal, shapes)

    return draw


@pytest.fixture(scope="session")
def untrained():
    """`untrained(folder, config)` -> a complete run of random weights. Its data set is read for the codes alone."""

    def make(folder, config):
        run = run_lib.check(folder, config)
        mesh = sharding.make_mesh(run.config.mesh)
        for stage in run.stages():
            if stage.extract is not None:
                stage.extract(run, mesh, lambda: None)
                continue
            model = stage.model(run)
            sources = {split: stage.source(run, split) for split in ("train", "evaluation")}
            trainer._record_start(run, stage, sources)
            with trainer.checkpoints_of(run, stage) as checkpoints:
                checkpoints.save(6, _random_state(trainer.abstract_state(run, stage, model, mesh)))
        assert all(trainer.is_complete(run, stage) for stage in run.stages())
        return run

    return make


def _random_state(shapes):
    """Weights as large as trained ones, and running averages of a codebook in use."""
    generator = np.random.default_rng(2)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.dtype != np.float32:
            value = np.full(leaf.shape, 6, leaf.dtype)
        elif "ema_counts" in name:
            value = generator.uniform(1, 2, leaf.shape)
        else:
            value = generator.standard_normal(leaf.shape)
            value *= (2.0 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.0
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)
