"""The toy family, its config, and the state that a run has saved."""

import math
import pathlib
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from bitsperdim import config_files, trainer
from bitsperdim import run as run_lib

TOY = pathlib.Path(__file__).resolve().parents[1] / "toy"
sys.path.insert(0, str(TOY))  # so that `toy_family` is importable, as an installed family is


@pytest.fixture(scope="session")
def toy_config():
    """`toy_config({"train.steps": 3})` -> the config of the toy family with some values replaced."""

    def make(changes=()):
        config = config_files.load(str(TOY / "toy.py"))
        config.update_from_flattened_dict(dict(changes))
        return config

    return make


@pytest.fixture(scope="session")
def sub_mesh():
    """`sub_mesh(data, fsdp, model, spatial)` -> a mesh over so many of the first devices."""

    def make(data, fsdp=1, model=1, spatial=1):
        sizes = {"data": data, "fsdp": fsdp} | ({"model": model} if model > 1 else {})
        sizes |= {"spatial": spatial} if spatial > 1 else {}
        kinds, count = (AxisType.Auto,) * len(sizes), math.prod(sizes.values())
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count])

    return make


@pytest.fixture(scope="session")
def saved_state():
    """`saved_state(workdir, step)` -> the whole train state in a checkpoint of a run, as numpy; default the newest."""

    def load(workdir, step=None, name="model"):
        run = run_lib.open_run(workdir)
        stage = run.stage(name)
        with trainer.checkpoints_of(run, stage) as checkpoints:
            mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
            like = trainer.abstract_state(run, stage, stage.model(run), mesh)
            step = checkpoints.steps()[-1] if step is None else step
            return jax.tree.map(np.asarray, checkpoints.restore_step(step, like))

    return load


@pytest.fixture(scope="session")
def assert_same_bits():
    """Two trees of arrays have the same structure, types and bits."""

    def check(got, expected):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), jax.tree_util.keystr(path)

    return check
