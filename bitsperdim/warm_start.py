"""`--init_from`: a stage that begins takes the Polyak weights that another run has trained for it.

What fits is found out from the manifests before anything is trained; where the weights came from is kept in
STAGE/data.json. Not here: the state that they become a part of (`trainer.py`).
"""

from typing import Any, NamedTuple

from jaxtyping import PyTree

from bitsperdim import run as run_lib
from bitsperdim import trained
from bitsperdim.model import Stage
from bitsperdim.run import Run

REMEDY = "leave out --init_from, or use the config that it was trained with"


class Start(NamedTuple):
    """What a stage begins with: `ema` and `extra` of another run, or None; and what data.json says of it."""

    weights: PyTree | None
    record: dict[str, Any]


def check(run: Run, stage: Stage, like: PyTree, init_from: str) -> None:
    """Raises InputError where the folder is no run or its arrays have other shapes; says where it is not heeded."""
    other = run_lib.open_run(init_from)
    if _has_begun(run, stage):
        run_lib.say(f"--init_from={init_from} is ignored: stage '{stage.name}' has begun")
        return
    if not trained.restored_step(other, stage.name):
        run_lib.say(f"{stage.name}: not trained in {init_from}, so it starts anew")
        return
    trained.check_weights(other, other.stage(stage.name), _wanted(like), REMEDY)


def begin(run: Run, stage: Stage, like: PyTree, init_from: str) -> Start:
    """The weights for a stage that has not begun; for one that has, none but the record of what it began with."""
    if _has_begun(run, stage):
        path = run.folder(stage.name) / "data.json"
        before = run_lib.read_json(path) if path.exists() else {}
        return Start(None, {name: before[name] for name in ("init_from",) if name in before})
    other = run_lib.open_run(init_from) if init_from else None
    if other is None or not trained.restored_step(other, stage.name):
        return Start(None, {})
    step, weights = trained.weights(other, other.stage(stage.name), _wanted(like), REMEDY)
    run_lib.say(f"{stage.name}: starting with the weights of step {step:,} of {init_from}")
    return Start(weights, {"init_from": {"run": str(other.workdir), "step": step}})


def _has_begun(run: Run, stage: Stage) -> bool:
    with trained.checkpoints_of(run, stage) as checkpoints:
        return checkpoints.newest() > 0


def _wanted(like: PyTree) -> PyTree:
    return {entry: like[entry] for entry in ("ema", "extra")}
