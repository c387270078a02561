"""The one loop: every family and every stage is trained, evaluated and resumed here. Read it from top to bottom.

    config -> run folder -> mesh -> for each stage: data, model -> state (restored or new) -> steps -> checkpoint

Not here: what a step computes (`step.py`), what a model is (`model.py`), how a state is stored (`checkpoint.py`).
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import atomic, checkpoint, data, evaluation, metrics, optim, rng, sharding
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.checkpoint import Checkpoints
from bitsperdim.errors import InputError, Interrupted
from bitsperdim.model import Model, Stage
from bitsperdim.observer import Observer
from bitsperdim.run import Run
from bitsperdim.signals import Signals


def train(values: ConfigDict | Mapping[str, Any], workdir: str, only: str = "", init_from: str = "") -> Run:
    """Trains every stage that is not complete, in order (or the stage `only`), in the run folder `workdir`.

    A stage that begins, and that the run `init_from` has trained, begins with the Polyak weights from there.

    The same call again goes on where the last one stopped, bit for bit. Raises `InputError` before anything is written
    when the config, the data or the folder do not fit, `Interrupted` after a signal (`KeyboardInterrupt` where there is
    nothing to save), `NonFiniteError`.
    """
    with Signals() as signals:
        run = run_lib.check(workdir, values)
        chosen = (run.stage(only),) if only else run.stages()
        mesh = sharding.make_mesh(run.config.mesh)
        for stage in chosen:
            _check_schedule(stage)
            _check_batch_size(stage, mesh)
        for stage in chosen:
            # What cannot be built should not be found out when its turn comes, hours later. This may fetch the data.
            if stage.model is not None:
                stage.model(run)
        complete = {stage.name: is_complete(run, stage) for stage in chosen}
        if all(complete.values()):
            _say(f"{run.workdir} is complete: nothing left to do")
            return run
        for stage in chosen:
            if complete[stage.name]:
                _say(f"{stage.name}: complete")
                continue
            _require(run, stage)
            if stage.extract is not None:
                with _alone(run.folder(stage.name)), signals.deferred():
                    stage.extract(run, mesh, signals.check)
            else:
                train_stage(run, stage, mesh, signals, init_from)
            signals.check()
    return run


def is_complete(run: Run, stage: Stage) -> bool:
    """Has the stage reached its last step, or is its extraction done?"""
    if stage.is_extracted is not None:
        return stage.is_extracted(run)
    assert stage.settings is not None
    with checkpoints_of(run, stage) as checkpoints:
        # A damaged last checkpoint is no end: the stage goes on from the one before.
        last = max(checkpoints.steps(), default=0)
        return last >= stage.settings.steps and checkpoints.newest_whole() >= stage.settings.steps


def train_stage(run: Run, stage: Stage, mesh: Mesh, signals: Signals, init_from: str = "") -> None:
    """From the newest checkpoint, or from nothing, to the stage's last step."""
    assert stage.model and stage.source and stage.optim and stage.settings
    config, seed, model = stage.settings, run.seed(stage.name), stage.model(run)
    sources = {split: stage.source(run, split) for split in ("train", "evaluation")}
    check_sources(run, stage, sources)
    like = abstract_state(run, stage, model, mesh)
    _check_best_metric(config, model, like, sources["evaluation"])
    observer = Observer(run, stage, model, sources["evaluation"], mesh, signals.check)
    weights = _warm_start(run, stage, like, init_from)
    _record_start(run, stage, sources)
    _warn_of_micro_batches(stage, like)
    step = step_lib.compiled(model, stage.optim, config, seed, mesh, like)
    with _alone(run.folder(stage.name)), checkpoints_of(run, stage) as checkpoints:
        state, start = _restored_or_new(run, stage, model, mesh, checkpoints, like, weights)
        observer.open(start)
        each, over_batch = config.steps_per_dispatch, sharding.over_batch(mesh)
        batch = lambda index: data.train_batch(sources["train"], seed, index, config.batch_size, over_batch)
        make = lambda dispatch: [batch(index) for index in range(dispatch * each, (dispatch + 1) * each)]
        ahead = data.prefetch(make, start // each, config.steps // each)
        # Guarded, since a copy between host and devices that nobody asked for would stall every step.
        guard = jax.transfer_guard("disallow")
        with signals.deferred(), contextlib.closing(observer), contextlib.closing(ahead) as dispatches, guard:
            if figures := observer.catch_up(start, state):
                checkpoints.save(start, state, figures)
            for done, batches in zip(range(start + each, config.steps + 1, each), dispatches, strict=True):
                state, report = step(state, *batches)
                try:
                    figures = observer.after_step(done, state, report)
                except Interrupted:  # in the middle of an evaluation, which the next start makes
                    figures = {}
                if done % config.save_every == 0 or done == config.steps or signals.received is not None:
                    checkpoints.save(done, state, figures)
                if signals.received is not None and done < config.steps:
                    checkpoints.wait()
                    observer.message(f"{stage.name}: saved at step {done:,}")
                    signals.check()
            checkpoints.wait()


def evaluate(run: Run, split: str) -> dict[str, Any]:
    """The figures of every complete stage over all of `split` ('train' or 'evaluation'), and those of the run."""
    mesh = sharding.mesh_at_hand(run.config.mesh)
    measured: dict[str, Any] = {}
    for stage in run.stages():
        if stage.model is None or stage.source is None or stage.settings is None or not is_complete(run, stage):
            continue
        model, state = restore(run, stage.name, mesh)
        source = stage.source(run, split)
        figures = evaluation.evaluate(
            model,
            evaluation.compiled(model, mesh),
            state["ema"],
            state["extra"],
            source,
            sharding.whole_batch(stage.settings.batch_size, mesh),
            mesh,
            jax.random.key(run.seed(stage.name)),
            progress(f"{stage.name}: {source.name}", source.size),
        )
        measured[stage.name] = {"split": source.name, "step": int(state["step"]), **figures}
    if not measured:
        raise InputError(f"no stage of {run.workdir} is complete; finish its training first")
    return {"split": split, **measured, **run.family.report(run.config, measured)}


def restore(run: Run, name: str, mesh: Mesh) -> tuple[Model, PyTree]:
    """A trained stage's model and what of its state is used after training: `step`, `ema` and `extra`.

    That of the last checkpoint, or of the best one where the stage's `best_metric` names a figure.
    """
    stage = run.stage(name)
    assert stage.model is not None
    with checkpoints_of(run, stage) as checkpoints:
        if not checkpoints.steps():
            raise InputError(f"stage '{name}' of {run.workdir} has no checkpoint yet; train it first")
        model = stage.model(run)
        like = abstract_state(run, stage, model, mesh)
        like = {entry: like[entry] for entry in ("step", "ema", "extra")}
        return model, _best_or_last(checkpoints, like)[1]


def _best_or_last(checkpoints: Checkpoints, like: PyTree) -> tuple[int, PyTree]:
    """Step and state of the best checkpoint where there is one, else of the last. There must be some."""
    best = checkpoints.best_step()
    if best is not None:
        try:
            return best, checkpoints.restore_step(best, like)
        except InputError as error:
            _say(f"warning: the best checkpoint cannot be used, the last one is: {error}")
    restored = checkpoints.restore(like)
    assert restored is not None
    return restored


def restored_step(run: Run, name: str) -> int:
    """The step that `restore` gives, as far as it can be told without reading it; 0 where there is none."""
    with checkpoints_of(run, run.stage(name)) as checkpoints:
        return checkpoints.best_step() or max(checkpoints.steps(), default=0)


def checkpoints_of(run: Run, stage: Stage, remedy: str = checkpoint.REMEDY) -> Checkpoints:
    """The checkpoints of a stage; to be closed. `remedy` is said where their arrays are not those of the config."""
    assert stage.settings is not None
    best = (stage.settings.best_metric, "min") if stage.settings.best_metric else None
    return Checkpoints(run.folder(stage.name) / "checkpoints", stage.settings.keep_checkpoints, best, remedy)


def abstract_state(run: Run, stage: Stage, model: Model, mesh: Mesh) -> PyTree:
    """Shapes, types and places of a stage's whole train state."""
    assert stage.optim and stage.settings
    optimizer = optim.optimizer(stage.optim, stage.settings.steps)
    return state_lib.abstract(model, optimizer, jax.random.key(0), mesh, run.config.mesh)


def _restored_or_new(
    run: Run, stage: Stage, model: Model, mesh: Mesh, checkpoints: Checkpoints, like: PyTree, weights: PyTree | None
) -> tuple[PyTree, int]:
    restored = checkpoints.restore(like)
    if restored is not None:
        _say(f"{stage.name}: going on from step {restored[0]:,}")
        return restored[1], restored[0]
    assert stage.optim and stage.settings
    key = rng.for_purpose(jax.random.key(run.seed(stage.name)), "init")
    state = state_lib.create(model, optim.optimizer(stage.optim, stage.settings.steps), key, like)
    if stage.begin is not None:
        begun = stage.begin(run, mesh)
        place = lambda value, leaf: jax.device_put(value, leaf.sharding)
        state |= jax.tree.map(place, begun, {entry: like[entry] for entry in begun})
    if weights is not None:
        # Copies: a buffer of the state cannot be donated twice.
        state |= weights | {"params": jax.tree.map(jnp.copy, weights["ema"])}
    _say(f"{stage.name}: {state_lib.num_params(state):,} parameters, {stage.settings.steps:,} steps")
    return state, 0


def _warm_start(run: Run, stage: Stage, like: PyTree, init_from: str) -> PyTree | None:
    """`ema` and `extra` of the same stage of another run; None where it has not trained it, or the stage has begun.

    Raises InputError where the folder is no run or its arrays have other shapes.
    """
    if not init_from or restored_step(run, stage.name):
        return None
    other = run_lib.open_run(init_from)
    if not restored_step(other, stage.name):
        _say(f"{stage.name}: not trained in {init_from}, so it starts anew")
        return None
    remedy = f"begin without --init_from, or with the '{stage.name}' of a run whose model and images are like these"
    with checkpoints_of(other, other.stage(stage.name), remedy) as checkpoints:
        step, weights = _best_or_last(checkpoints, {entry: like[entry] for entry in ("ema", "extra")})
    _say(f"{stage.name}: starting with the weights of step {step:,} of {init_from}")
    return weights


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Holds the lock of a stage's folder; `InputError` where another process of this machine does.

    Two runs in one folder would remove each other's files. The system frees the lock of a process that is killed.
    """
    if atomic.is_remote(folder) or jax.process_index() > 0:
        yield
        return
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is working on {folder}; wait for it, or use a new --workdir") from error
        yield


def check_sources(run: Run, stage: Stage, sources: dict[str, data.Source]) -> None:
    """Raises InputError where the images are not those that the stage began with."""
    path = run.folder(stage.name) / "sources.json"
    before = run_lib.read_json(path, {"train": dict, "evaluation": dict}) if path.exists() else {}
    for split, source in sources.items():
        now = _describe(source)
        changed = [key for key in now if split in before and before[split].get(key) != now[key]]
        # The name of a folder is its place, which may change; what is in it has a fingerprint.
        if [key for key in changed if key != "name" or not source.fingerprint]:
            changes = ", ".join(f"{key} {before[split].get(key)} -> {now[key]}" for key in changed)
            raise InputError(
                f"the {split} images of {run.folder(stage.name)} have changed since it began ({changes}); "
                "restore them, or use a new --workdir"
            )


def _describe(source: data.Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "size": source.size,
        "shape": list(source.shape),
        "levels": source.levels,
        "class_names": list(source.class_names),
        "fingerprint": source.fingerprint,
    }


def _record_start(run: Run, stage: Stage, sources: dict[str, data.Source]) -> None:
    """The first thing that is written: by now the config, the data and the stages before have been found to fit."""
    facts = stage.facts(run) if stage.facts else {}
    for line in run_lib.create(run):
        _say(f"note: {line}; bit-for-bit equality with the earlier part is not promised")
    if jax.process_index() == 0:
        run_lib.write_json(run.folder(stage.name) / "data.json", facts)
        described = {split: _describe(source) for split, source in sources.items()}
        run_lib.write_json(run.folder(stage.name) / "sources.json", described)


def _require(run: Run, stage: Stage) -> None:
    for name in stage.needs:
        if not is_complete(run, run.stage(name)):
            raise InputError(
                f"stage '{stage.name}' needs '{name}', which is not complete in {run.workdir}; "
                f"run the same command with --stage={name} first, or without --stage"
            )


def _check_schedule(stage: Stage) -> None:
    """A schedule that does not fit its steps is refused now, not when its stage begins."""
    if stage.optim and stage.settings:
        try:
            optim.schedule(stage.optim, stage.settings.steps)
        except InputError as error:
            raise InputError(f"{stage.name}: {error}") from error


def _warn_of_micro_batches(stage: Stage, like: PyTree) -> None:
    """BatchNorm cannot know the moments of a whole batch before its last micro-batch has passed."""
    assert stage.settings
    parts = stage.settings.accumulation
    if parts > 1 and isinstance(like["extra"], dict) and jax.tree.leaves(like["extra"].get("batch_stats")):
        _say(
            f"warning: {stage.name}: accumulation={parts}: BatchNorm normalises each micro-batch of "
            f"{stage.settings.batch_size // parts} by itself; a model with norm='group', where it has the choice, is "
            "the same function as without accumulation"
        )


def _check_best_metric(config: step_lib.TrainConfig, model: Model, like: PyTree, source: data.Source) -> None:
    if not config.best_metric:
        return
    names = evaluation.figure_names(model, like["ema"], like["extra"], source, config.batch_size)
    if config.best_metric not in names:
        raise InputError(
            f"best_metric '{config.best_metric}' is no figure of the evaluation; there are {', '.join(names)}"
        )


def _check_batch_size(stage: Stage, mesh: Mesh) -> None:
    if stage.settings is None:
        return
    parts = stage.settings.accumulation
    micro_batch = stage.settings.batch_size // parts
    if micro_batch % mesh.size:
        raise InputError(
            f"{stage.name}.train.batch_size={stage.settings.batch_size} "
            f"in {parts} part(s) is not divisible by the {mesh.size} devices; use a multiple of {mesh.size * parts}"
        )


def progress(what: str, total: int) -> Callable[[int], None]:
    """`metrics.counting`, seen on one host."""
    return metrics.counting(what, total, run_lib.stream())


def _say(line: str) -> None:
    print(line, file=run_lib.stream(), flush=True)
