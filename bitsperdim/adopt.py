"""Published weights become a run: a folder that evaluate.py, sample.py and `bitsperdim.load` take like any other.

A family reads the file (`convert.py` there) and says what its weights are; here they get a config, a checkpoint and
their manifest. Training goes on from there where the steps are raised, with a new optimizer.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import optim, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run


class Weights(NamedTuple):
    """One stage's weights, and the facts of the data that it would have measured."""

    params: PyTree
    extra: PyTree
    facts: dict[str, Any]


class Imported(NamedTuple):
    """What a family makes of a published file."""

    config: ConfigDict
    stages: Mapping[str, Weights]


def adopt(workdir: str | os.PathLike[str], imported: Imported) -> Run:
    """Writes the run. Raises InputError where the folder is taken or the weights are not those of the config."""
    run = run_lib.check(workdir, imported.config)
    if (run.workdir / "config.json").exists():
        raise InputError(f"{run.workdir} is a run already; use a new --workdir")
    mesh = sharding.make_mesh(run.config.mesh)
    run_lib.create(run)
    for name, weights in imported.stages.items():
        stage = run.stage(name)
        assert stage.model and stage.optim and stage.settings
        run_lib.write_json(run.folder(name) / "data.json", weights.facts)
        model = stage.model(run)
        like = trainer.abstract_state(run, stage, model, mesh)
        state = state_lib.create(model, optim.optimizer(stage.optim, stage.settings.steps), jax.random.key(0), like)
        _check(state, weights, name)
        for entry, values in (("params", weights.params), ("ema", weights.params), ("extra", weights.extra)):
            place = lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding)
            state[entry] = jax.tree.map(place, values, state[entry])
        state["step"] = jax.device_put(jnp.int32(stage.settings.steps), state["step"].sharding)
        with trainer.checkpoints_of(run, stage) as checkpoints:
            checkpoints.save(stage.settings.steps, state)
    return run


def _check(state: PyTree, weights: Weights, name: str) -> None:
    shapes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    expected = shapes({"params": state["params"], "extra": state["extra"]})
    found = shapes({"params": weights.params, "extra": weights.extra})
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise InputError(
                f"stage '{name}': {path} has the shape {found.get(path)} in the file, "
                f"{expected.get(path)} in the model of its config"
            )
