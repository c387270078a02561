"""Published weights become a run: a folder that evaluate.py, sample.py and `bitsperdim.load` take like any other.

A family says what the arrays of a file are (`convert.py` there); here they get a config, a checkpoint and its manifest.
Training goes on from there where the steps are raised, with the optimizer's moments where the file has them.
Not here: reading files (`archives.py`).
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import optim, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Stage
from bitsperdim.run import Run


class Moments(NamedTuple):
    """An optimizer after `count` updates: its averages of gradients, and of their squares or largest sizes."""

    first: PyTree  # as the parameters
    second: PyTree
    count: int


class Weights(NamedTuple):
    """One stage's weights, and the facts of the data that it would have measured."""

    params: PyTree
    extra: PyTree
    facts: dict[str, Any]
    ema: PyTree | None = None  # None: the parameters themselves are evaluated
    moments: Moments | None = None  # None: further training begins with a new optimizer


class Imported(NamedTuple):
    """What a family makes of a published file."""

    config: ConfigDict
    stages: Mapping[str, Weights]


def adopt(workdir: str | os.PathLike[str], imported: Imported) -> Run:
    """Writes the run. Raises InputError where the folder is taken or the weights are not those of the config."""
    run = run_lib.check(workdir, imported.config)
    if (run.workdir / "config.json").exists():
        raise InputError(f"{run.workdir} is a run already; use a new --workdir")
    existed = run.workdir.exists()
    try:
        _write(run, imported)
    except BaseException:  # also where a signal ends it: half a run is in the way of the next try
        for path in run.workdir.iterdir() if run.workdir.exists() else ():
            path.rmtree() if path.is_dir() else path.unlink()
        if run.workdir.exists() and not existed:
            run.workdir.rmdir()
        raise
    return run


def _write(run: Run, imported: Imported) -> None:
    mesh = sharding.make_mesh(run.config.mesh)
    run_lib.create(run)
    for name, weights in imported.stages.items():
        stage = run.stage(name)
        assert stage.model and stage.settings
        run_lib.write_json(run.folder(name) / "data.json", weights.facts)
        like = trainer.abstract_state(run, stage, stage.model(run), mesh)
        state = _state(stage, weights, like)
        with trainer.checkpoints_of(run, stage) as checkpoints:
            checkpoints.save(stage.settings.steps, state)


def _state(stage: Stage, weights: Weights, like: PyTree) -> PyTree:
    """The train state behind the stage's last step."""
    assert stage.optim and stage.settings
    place = lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding)
    ema = weights.params if weights.ema is None else weights.ema
    given = {"params": weights.params, "ema": ema, "extra": weights.extra}
    _check(like, given, stage.name)
    state = {entry: jax.tree.map(place, values, like[entry]) for entry, values in given.items()}
    state["step"] = place(stage.settings.steps, like["step"])
    state["skips"] = {counter: place(0, leaf) for counter, leaf in like["skips"].items()}
    places = jax.tree.map(lambda leaf: leaf.sharding, like["opt"])
    optimizer = optim.optimizer(stage.optim, stage.settings.steps)
    state["opt"] = jax.jit(optimizer.init, out_shardings=places)(state["params"])
    return state if weights.moments is None else state | _with_moments(state, weights.moments, place, stage.name)


def _with_moments(state: PyTree, moments: Moments, place: Callable[[Any, Any], Any], name: str) -> dict[str, PyTree]:
    """The entries `opt` and `skips` of the state, from which the learning rate follows too."""
    given = {"mu": moments.first, "nu": moments.second}
    fresh = {key: optax.tree.get(state["opt"], key) for key in given}
    _check(fresh, given, name)
    given = {key: jax.tree.map(place, given[key], fresh[key]) for key in given}
    # Several parts of the optimizer count, all the same.
    count = place(moments.count, state["skips"]["total"])
    skipped = place(state["step"] - moments.count, state["skips"]["total"])
    opt = optax.tree.set(state["opt"], **given, count=count)
    return {"opt": opt, "skips": state["skips"] | {"total": skipped}}


def _check(state: PyTree, given: dict[str, PyTree], name: str) -> None:
    shapes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    expected, found = shapes({entry: state[entry] for entry in given}), shapes(given)
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise InputError(
                f"stage '{name}': {path} has the shape {found.get(path)} in the file, "
                f"{expected.get(path)} in the model of its config"
            )
