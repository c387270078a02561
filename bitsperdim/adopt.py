"""Published weights become a run: a folder that evaluate.py, sample.py and `bitsperdim.load` take like any other.

A family says what the arrays of a file are (`convert.py` there); here they get a config, a checkpoint and its manifest.
Training goes on from there where the steps are raised, with a new optimizer. Nothing here unpickles a file.
"""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import optim, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run

HOW_TO_EXPORT = """\
  import numpy, torch
  state = torch.load("checkpoint.pth", map_location="cpu", weights_only=True)
  numpy.savez("checkpoint.npz", **{name: tensor.numpy() for name, tensor in state.items()})"""


class Weights(NamedTuple):
    """One stage's weights, and the facts of the data that it would have measured."""

    params: PyTree
    extra: PyTree
    facts: dict[str, Any]


class Imported(NamedTuple):
    """What a family makes of a published file."""

    config: ConfigDict
    stages: Mapping[str, Weights]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. Raises InputError with the lines that export one from PyTorch."""
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path} is not an .npz file; PyTorch files are not read. Export it first:\n{HOW_TO_EXPORT}")
    name = ""
    try:
        # NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {}
            for name in arrays.files:
                # Checkpoints of a model under DataParallel carry its prefix.
                found[name.removeprefix("module.")] = arrays[name]
            return found
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        why = f"array '{name}': {error}" if name else str(error)
        what = f"{path} is not a whole .npz file of plain arrays ({why or type(error).__name__})"
        raise InputError(f"{what}. Export it again:\n{HOW_TO_EXPORT}") from error


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
