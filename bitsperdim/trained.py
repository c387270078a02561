"""What a run has trained: the checkpoints of its stages, and the weights in them, or in the file of a published run.

Not here: how they come to be (`trainer.py`), and how a state is stored (`checkpoint.py`).
"""

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from bitsperdim import checkpoint, optim, published
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim.checkpoint import Checkpoints
from bitsperdim.errors import InputError
from bitsperdim.model import Model, Stage
from bitsperdim.run import Run


def checkpoints_of(run: Run, stage: Stage, remedy: str = checkpoint.REMEDY) -> Checkpoints:
    """The checkpoints of a stage; to be closed. `remedy` is said where their arrays are not those of the config."""
    assert stage.settings is not None
    best = (stage.settings.best_metric, "min") if stage.settings.best_metric else None
    return Checkpoints(run.folder(stage.name) / "checkpoints", stage.settings.keep_checkpoints, best, remedy)


def abstract_state(run: Run, stage: Stage, model: Model, mesh: Mesh) -> PyTree:
    """Shapes, types and places of a stage's whole train state. `InputError` where its optimizer does not fit them."""
    assert stage.optim and stage.settings
    optimizer = optim.optimizer(stage.optim, stage.settings.steps)
    try:
        return state_lib.abstract(model, optimizer, jax.random.key(0), mesh, run.config.mesh)
    except InputError as error:
        raise InputError(f"{stage.name}: {error}") from error


def restore(run: Run, name: str, mesh: Mesh) -> tuple[Model, PyTree]:
    """A trained stage's model and what of its state is used after training: `step`, `ema` and `extra`.

    That of the last checkpoint, or of the best one where the stage's `best_metric` names a figure.
    """
    stage = run.stage(name)
    assert stage.model is not None
    if not restored_step(run, name):
        raise InputError(f"stage '{name}' of {run.workdir} has no checkpoint yet; train it first")
    model = stage.model(run)
    like = abstract_state(run, stage, model, mesh)
    return model, weights(run, stage, {entry: like[entry] for entry in ("step", "ema", "extra")})[1]


def weights(run: Run, stage: Stage, like: PyTree, remedy: str = checkpoint.REMEDY) -> tuple[int, PyTree]:
    """Step and entries of the state, those of `like`, as they are used after training. There must be some."""
    if run.is_published:
        return published.restore(run.workdir, stage.name, like, remedy)
    with checkpoints_of(run, stage, remedy) as checkpoints:
        return _best_or_last(checkpoints, like)


def check_weights(run: Run, stage: Stage, like: PyTree, remedy: str) -> None:
    """Raises InputError where the arrays that `weights` gives are not those of `like`. Reads no checkpoint."""
    if run.is_published:
        published.check(run.workdir, stage.name, like, remedy)
        return
    with checkpoints_of(run, stage, remedy) as checkpoints:
        checkpoints.check_step(checkpoints.best_step() or checkpoints.newest(), like)


def restored_step(run: Run, name: str) -> int:
    """The step that `restore` gives, as far as it can be told without reading it; 0 where there is none."""
    if run.is_published:
        return published.steps(run.workdir).get(name, 0)
    with checkpoints_of(run, run.stage(name)) as checkpoints:
        return checkpoints.best_step() or checkpoints.newest()


def _best_or_last(checkpoints: Checkpoints, like: PyTree) -> tuple[int, PyTree]:
    best = checkpoints.best_step()
    if best is not None:
        try:
            return best, checkpoints.restore_step(best, like)
        except InputError as error:
            run_lib.say(f"warning: the best checkpoint cannot be used, the last one is: {error}")
    restored = checkpoints.restore(like)
    assert restored is not None
    return restored
