"""The one loop: every family and every stage is trained, evaluated and resumed here. Read it from top to bottom.

    config -> run folder -> mesh -> for each stage: data, model -> state (restored or new) -> steps -> checkpoint

Not here: what a step computes (`step.py`), what a model is (`model.py`), how a state is stored (`checkpoint.py`) and
restored (`trained.py`).
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import config as config_lib
from bitsperdim import data, evaluation, hosts, lock, metrics, optim, rng, seen, sharding, warm_start
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.checkpoint import Checkpoints
from bitsperdim.errors import InputError, Interrupted
from bitsperdim.model import Model, Stage
from bitsperdim.observer import Observer, Watch
from bitsperdim.run import Run
from bitsperdim.signals import Signals
from bitsperdim.trained import abstract_state, checkpoints_of, restore
from bitsperdim.trained import restored_step as restored_step


def train(
    values: ConfigDict | Mapping[str, Any],
    workdir: str,
    only: str = "",
    init_from: str = "",
    watch: Watch | None = None,
) -> Run:
    """Trains every stage that is not complete, in order (or the stage `only`), in the run folder `workdir`.

    A stage that begins, and that the run `init_from` has trained, begins with the Polyak weights from there; one that
    has begun goes on. `watch(run, stage)` is called whenever the folder of a stage has new figures or pictures.

    The same call again goes on where the last one stopped, bit for bit. Raises `InputError` before anything is written
    when the config, the data or the folder do not fit, `Interrupted` after a signal (`KeyboardInterrupt` where there is
    nothing to save), `NonFiniteError`. Of several processes (`hosts.py`) all call it, and all see what one raises.
    """
    with Signals(hosts.any_of) as signals:
        with hosts.together():
            run = run_lib.check(workdir, values)
            chosen = [run.stage(only)] if only else [stage for stage in run.stages() if not stage.on_request]
            mesh = sharding.make_mesh(run.config.mesh)
            for stage in chosen:
                _check_schedule(stage)
                if (settings := stage.settings) is not None:
                    section = config_lib.path_of(settings, run.config)
                    sharding.check_batch_size(mesh, section, settings.batch_size, settings.accumulation)
                if stage.model is not None and not stage.by_rows:
                    sharding.check_whole_images(mesh, stage.name)
            for stage in chosen:
                # What cannot be built should not be found out when its turn comes, hours later. May fetch the data.
                if stage.model is not None:
                    like = abstract_state(run, stage, stage.model(run), mesh)
                    if init_from:
                        warm_start.check(run, stage, like, init_from)
        run_lib.check_same_config(run, only)
        complete = {stage.name: is_complete(run, stage) for stage in chosen}
        if all(complete.values()):
            with hosts.together():
                for stage in chosen:
                    if seen.record(run, stage).exists():
                        seen.check_sources(run, stage, seen.sources_of(run, stage))
            run_lib.keep_free_keys(run)
            run_lib.say(f"{run.workdir} is complete: nothing left to do")
            return run
        hosts.check_shared(run.workdir)
        for stage in chosen:
            if complete[stage.name]:
                run_lib.say(f"{stage.name}: complete")
                continue
            _require(run, stage)
            if stage.extract is not None:
                with lock.alone(run.made(stage.name)), signals.deferred():
                    stage.extract(run, mesh, signals.check)
            else:
                train_stage(run, stage, mesh, signals, init_from, watch)
            signals.check()
    return run


def is_complete(run: Run, stage: Stage) -> bool:
    """Has the stage reached its last step, or is its extraction done?"""
    if (is_extracted := stage.is_extracted) is not None:
        return bool(hosts.from_first(lambda: is_extracted(run)))
    if run.is_published:
        return bool(restored_step(run, stage.name))
    assert stage.settings is not None
    with checkpoints_of(run, stage) as checkpoints:
        # A damaged last checkpoint is no end: the stage goes on from the one before.
        return checkpoints.newest() >= stage.settings.steps and checkpoints.newest_whole() >= stage.settings.steps


def train_stage(
    run: Run, stage: Stage, mesh: Mesh, signals: Signals, init_from: str = "", watch: Watch | None = None
) -> None:
    """From the newest checkpoint, or from nothing, to the stage's last step."""
    assert stage.model and stage.source and stage.optim and stage.settings
    config, seed, model = stage.settings, run.seed(stage.name), stage.model(run)
    with hosts.together():
        sources = seen.sources_of(run, stage)
        seen.check_sources(run, stage, sources)
    seen.check_same_images(sources)
    like = abstract_state(run, stage, model, mesh)
    _check_best_metric(config, model, like, sources["evaluation"])
    observer = Observer(run, stage, model, sources["evaluation"], mesh, signals.check, watch)
    weights, record = warm_start.begin(run, stage, like, init_from)
    _record_start(run, stage, sources, record)
    if stage.warning:
        run_lib.say(f"warning: {stage.name}: {stage.warning}")
    _warn_of_micro_batches(stage, like)
    step = step_lib.compiled(model, stage.optim, config, seed, mesh, like)
    with lock.alone(run.folder(stage.name)), checkpoints_of(run, stage) as checkpoints:
        state, start = _restored_or_new(run, stage, model, mesh, checkpoints, like, weights)
        observer.open(start)
        each, over_batch = config.steps_per_dispatch, sharding.over_batch(mesh)
        batch = lambda index: data.train_batch(sources["train"], seed, index, config.batch_size, over_batch)
        make = lambda dispatch: [batch(index) for index in range(dispatch * each, (dispatch + 1) * each)]
        ahead = data.prefetch(make, start // each, config.steps // each)
        # Guarded, since a copy between host and devices that nobody asked for would stall every step.
        guard, vote = jax.transfer_guard("disallow"), hosts.Vote(mesh)
        with signals.deferred(), contextlib.closing(observer), contextlib.closing(ahead) as dispatches, guard:
            if figures := observer.catch_up(start, state):
                checkpoints.save(start, state, figures)
            for done, batches in zip(range(start + each, config.steps + 1, each), dispatches, strict=True):
                state, report = step(state, *batches)
                try:
                    figures = observer.after_step(done, state, report)
                except Interrupted:  # in the middle of an evaluation, which the next start makes
                    figures = {}
                stops = signals.is_seen(vote)
                if done % config.save_every == 0 or done == config.steps or stops:
                    checkpoints.save(done, state, figures)
                if stops and done < config.steps:
                    checkpoints.wait()
                    observer.message(f"{stage.name}: saved at step {done:,}")
                    signals.check()
            checkpoints.wait()


def evaluate(run: Run, split: str) -> dict[str, Any]:
    """The figures of every complete stage over all of `split`, and those of the run.

    `split` is 'train', 'evaluation', or another one of the run's data set; on the latter stages are not measured whose
    data were extracted from the first two. InputError where the images are not those that the run was trained with.
    """
    mesh = sharding.mesh_at_hand(run.config.mesh)
    if run.is_published:
        _extract_again(run, split, mesh)
    measured: dict[str, Any] = {}
    for stage in run.stages():
        if stage.model is None or stage.source is None or stage.settings is None or not is_complete(run, stage):
            continue
        if lacking := _lacking(run, stage, split):
            run_lib.say(f"{stage.name}: not measured, for {lacking}")
            continue
        with hosts.together():
            source = stage.source(run, split)
            seen.check_sources(run, stage, {split: source})
        model, state = restore(run, stage.name, mesh)
        model = stage.evaluated(run) if stage.evaluated else model
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
        for line in stage.remarks(run, int(state["step"]), figures):
            run_lib.say(f"{stage.name}: {line}")
    if not measured:
        raise InputError(f"no stage of {run.workdir} is complete; finish its training first")
    return {"split": split, **measured, **run.family.report(run.config, measured)}


def _extract_again(run: Run, split: str, mesh: Mesh) -> None:
    """What stages of a published run are measured on is not published, but made of the images where it is needed."""
    complete = [stage for stage in run.stages() if stage.model is not None and is_complete(run, stage)]
    for extraction in map(run.stage, dict.fromkeys(name for stage in complete for name in stage.needs)):
        if extraction.extract is not None and split in seen.SPLITS and not is_complete(run, extraction):
            with lock.alone(run.made(extraction.name)):
                extraction.extract(run, mesh, lambda: None)


def _lacking(run: Run, stage: Stage, split: str) -> str:
    """Why a stage that is measured on what another one extracted has nothing to be measured on; '' where it has."""
    for extraction in map(run.stage, stage.needs):
        if extraction.extract is not None and split not in seen.SPLITS:
            return f"'{extraction.name}' has the splits {' and '.join(seen.SPLITS)} only"
        if extraction.extract is not None and not is_complete(run, extraction):
            return f"{run.made(extraction.name)} is missing; train.py makes it again"
    return ""


def _restored_or_new(
    run: Run, stage: Stage, model: Model, mesh: Mesh, checkpoints: Checkpoints, like: PyTree, weights: PyTree | None
) -> tuple[PyTree, int]:
    restored = checkpoints.restore(like)
    if restored is not None:
        run_lib.say(f"{stage.name}: going on from step {restored[0]:,}")
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
    run_lib.say(f"{stage.name}: {state_lib.num_params(state):,} parameters, {stage.settings.steps:,} steps")
    return state, 0


def _record_start(run: Run, stage: Stage, sources: dict[str, data.Source], record: Mapping[str, Any] = {}) -> None:
    """The first thing that is written: by now the config, the data and the stages before have been found to fit."""
    facts = stage.facts(run) if stage.facts else {}
    with hosts.together():
        for line in run_lib.create(run):
            run_lib.say(f"note: {line}; bit-for-bit equality with the earlier part is not promised")
        if hosts.is_first():
            run_lib.write_json(run.folder(stage.name) / "data.json", {**facts, **record})
            seen.write(run, stage, sources)


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
        run_lib.say(
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


def progress(what: str, total: int) -> Callable[[int], None]:
    """`metrics.counting`, seen on one host."""
    return metrics.counting(what, total, run_lib.stream())
