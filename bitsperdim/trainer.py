"""The one loop: every family and every stage is trained, evaluated and resumed here. Read it from top to bottom.

    config -> run folder -> mesh -> for each stage: data, model -> state (restored or new) -> steps -> checkpoint

Not here: what a step computes (`step.py`), what a model is (`model.py`), how a state is stored (`checkpoint.py`).
"""

import contextlib
import io
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import data, evaluation, images, metrics, optim, rng, sharding
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.checkpoint import Checkpoints
from bitsperdim.errors import InputError, NonFiniteError
from bitsperdim.model import Model, Stage
from bitsperdim.run import Run
from bitsperdim.signals import Signals


def train(values: ConfigDict | Mapping[str, Any], workdir: str, only: str = "") -> Run:
    """Trains every stage that is not complete, in order (or the stage `only`), in the run folder `workdir`.

    The same call again goes on where the last one stopped, bit for bit. Raises `InputError` before anything is written
    when the config, the data or the folder do not fit, `Interrupted` after a signal, `NonFiniteError`.
    """
    run = run_lib.check(workdir, values)
    chosen = (run.stage(only),) if only else run.stages()
    for stage in chosen:
        _check_schedule(stage)
    mesh = sharding.make_mesh(run.config.mesh)
    for stage in chosen:
        _check_batch_size(stage, mesh)
    if all(is_complete(run, stage) for stage in chosen):
        _say(f"{run.workdir} is complete: nothing left to do (raise a stage's train.steps to train it further)")
    with Signals() as signals:
        for stage in chosen:
            if is_complete(run, stage):
                _say(f"{stage.name}: complete")
                continue
            _require(run, stage)
            if stage.extract is not None:
                stage.extract(run, mesh, signals.check)
            else:
                train_stage(run, stage, mesh, signals)
            signals.check()
    return run


def is_complete(run: Run, stage: Stage) -> bool:
    """Has the stage reached its last step, or is its extraction done?"""
    if stage.is_extracted is not None:
        return stage.is_extracted(run)
    assert stage.settings is not None
    with _checkpoints(run, stage) as checkpoints:
        return max(checkpoints.steps(), default=0) >= stage.settings.steps


def train_stage(run: Run, stage: Stage, mesh: Mesh, signals: Signals) -> None:
    """From the newest checkpoint, or from nothing, to the stage's last step."""
    assert stage.model and stage.source and stage.optim and stage.settings
    config, seed, model = stage.settings, stage_seed(run, stage), stage.model(run)
    source = stage.source(run, "train")
    observer = _Observer(run, stage, model, mesh)
    _write_facts(run, stage)
    like = _abstract_state(run, stage, model, mesh)
    step = step_lib.compiled(model, stage.optim, config, seed, mesh, like)
    with _checkpoints(run, stage) as checkpoints:
        state, start = _restored_or_new(run, stage, model, checkpoints, like)
        observer.open(start)
        over_batch = sharding.over_batch(mesh)
        make = lambda index: data.train_batch(source, seed, index, config.batch_size, over_batch)
        with contextlib.closing(observer), contextlib.closing(data.prefetch(make, start, config.steps)) as batches:
            for done, batch in enumerate(batches, start + 1):
                state, report = step(state, batch)
                figures = observer.after_step(done, state, report)
                if done % config.save_every == 0 or done == config.steps or signals.received is not None:
                    checkpoints.save(done, state, figures)
                if signals.received is not None and done < config.steps:
                    checkpoints.wait()
                    observer.message(f"{stage.name}: saved at step {done:,}")
                    signals.check()


class _Observer:
    """What is seen of a stage while it trains: log lines, metrics.jsonl, evaluation, pictures. Changes no state."""

    def __init__(self, run: Run, stage: Stage, model: Model, mesh: Mesh) -> None:
        assert stage.settings and stage.source and stage.pictures
        self._config, self._model, self._mesh = stage.settings, model, mesh
        self._folder = run.folder(stage.name)
        self._source = stage.source(run, "evaluation")
        self._pictures = stage.pictures(run, mesh)
        self._key = rng.for_purpose(jax.random.key(stage_seed(run, stage)), "evaluation")
        self._measure = evaluation.compiled(model, mesh)
        self._writer: metrics.Writer | None = None
        self._console = metrics.Console(self._config.steps, _stream())
        self._throughput = metrics.Throughput(self._config.batch_size)
        self._window: list[step_lib.Report] = []
        self._figures: dict[str, float] = {}
        self._compiled = False

    def open(self, start: int) -> None:
        """Makes the stage's metrics file, or goes on with it after step `start`."""
        if jax.process_index() == 0:
            self._writer = metrics.Writer(self._folder, start)

    def after_step(self, done: int, state: PyTree, report: step_lib.Report) -> dict[str, float]:
        """Logs, evaluates and draws when it is time to; returns the newest evaluation."""
        config, last = self._config, done == self._config.steps
        self._window.append(report)
        if not self._compiled:
            jax.block_until_ready(report)
            self._throughput.restart(done)
            self._compiled = True
        if done % config.log_every == 0 or last:
            self._log(done)
        evaluates, draws = done % config.evaluate_every == 0 or last, done % config.pictures_every == 0 or last
        if evaluates:
            self._evaluate(done, state)
        if draws:
            self._draw(done, state)
        if evaluates or draws:
            self._throughput.restart(done)
        return self._figures

    def message(self, text: str) -> None:
        self._console.message(text)

    def close(self) -> None:
        self._console.close()
        if self._writer is not None:
            self._writer.close()

    def _log(self, done: int) -> None:
        # Averages over every step since the last log, fetched at once: a fetch per step would stall the device.
        window = jax.device_get(self._window)
        self._window = []
        means = jax.tree.map(lambda *values: float(np.mean(values)), *[report.parts for report in window])
        tallies = jax.tree.map(lambda *values: np.sum(values, axis=0), *[report.tallies for report in window])
        figures = {name: float(value) for name, value in window[-1].figures.items()}
        rate = self._throughput.read(done)
        summary = self._model.summarize(means, tallies)
        self._console.progress(done, {name: summary[name] for name in list(summary)[:2]}, rate)
        self._write(done, "train", {**summary, **figures, "images_per_second": rate.images_per_second})
        bad = int(figures["non_finite_in_a_row"])
        if bad >= self._config.max_non_finite:
            raise NonFiniteError(
                f"loss or gradients were not finite for {bad} steps in a row, up to step {done:,}; lower the learning "
                f"rate or set clip_norm, and start in a new --workdir (the checkpoints in {self._folder} are finite)"
            )

    def _evaluate(self, done: int, state: PyTree) -> None:
        self._figures = evaluation.evaluate(
            self._model,
            self._measure,
            state["ema"],
            state["extra"],
            self._source,
            self._config.batch_size,
            self._mesh,
            self._key,
        )
        self._write(done, "evaluation", self._figures)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self._figures.items() if "_error" not in name)
        self._console.message(f"  evaluation at step {done:,}: {shown}")

    def _draw(self, done: int, state: PyTree) -> None:
        for name, picture in self._pictures(state["ema"], state["extra"], self._key).items():
            if jax.process_index() == 0:
                images.save_png(self._folder / "images" / f"{name}-{done:08d}.png", picture)

    def _write(self, done: int, kind: str, figures: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(done, kind, figures)


def evaluate(run: Run, split: str) -> dict[str, Any]:
    """The figures of every complete stage over all of `split` ('train' or 'evaluation'), and those of the run."""
    mesh = sharding.make_mesh(run.config.mesh)
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
            stage.settings.batch_size,
            mesh,
            jax.random.key(stage_seed(run, stage)),
            progress(f"{stage.name}: {source.name}", source.size),
        )
        measured[stage.name] = {"split": source.name, "step": int(state["step"]), **figures}
    if not measured:
        raise InputError(f"no stage of {run.workdir} is complete; finish its training first")
    return {"split": split, **measured, **run.family.report(run.config, measured)}


def restore(run: Run, name: str, mesh: Mesh) -> tuple[Model, PyTree]:
    """A trained stage's model and what of its state is used after training: `step`, `ema` and `extra`."""
    stage = run.stage(name)
    assert stage.model is not None
    with _checkpoints(run, stage) as checkpoints:
        if not checkpoints.steps():
            raise InputError(f"stage '{name}' of {run.workdir} has no checkpoint yet; train it first")
        model = stage.model(run)
        like = _abstract_state(run, stage, model, mesh)
        restored = checkpoints.restore({entry: like[entry] for entry in ("step", "ema", "extra")})
    assert restored is not None
    return model, restored[1]


def stage_seed(run: Run, stage: Stage) -> int:
    """Each stage has its own seed, so that priors do not share their batches' order or noise."""
    return zlib.crc32(f"{run.config.seed}/{stage.name}".encode())


def _checkpoints(run: Run, stage: Stage) -> Checkpoints:
    assert stage.settings is not None
    return Checkpoints(run.folder(stage.name) / "checkpoints", stage.settings.keep_checkpoints)


def _abstract_state(run: Run, stage: Stage, model: Model, mesh: Mesh) -> PyTree:
    assert stage.optim and stage.settings
    optimizer = optim.optimizer(stage.optim, stage.settings.steps)
    return state_lib.abstract(model, optimizer, jax.random.key(0), mesh, run.config.mesh)


def _restored_or_new(
    run: Run, stage: Stage, model: Model, checkpoints: Checkpoints, like: PyTree
) -> tuple[PyTree, int]:
    restored = checkpoints.restore(like)
    if restored is not None:
        _say(f"{stage.name}: going on from step {restored[0]:,}")
        return restored[1], restored[0]
    assert stage.optim and stage.settings
    key = rng.for_purpose(jax.random.key(stage_seed(run, stage)), "init")
    state = state_lib.create(model, optim.optimizer(stage.optim, stage.settings.steps), key, like)
    _say(f"{stage.name}: {state_lib.num_params(state):,} parameters, {stage.settings.steps:,} steps")
    return state, 0


def _write_facts(run: Run, stage: Stage) -> None:
    """The first thing that is written: by now the config, the data and the stages before have been found to fit."""
    facts = stage.facts(run) if stage.facts else {}
    for line in run_lib.create(run):
        _say(f"note: {line}; bit-for-bit equality with the earlier part is not promised")
    if jax.process_index() == 0:
        run_lib.write_json(run.folder(stage.name) / "data.json", facts)


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


def _check_batch_size(stage: Stage, mesh: Mesh) -> None:
    if stage.settings is None:
        return
    parts = stage.settings.accumulation
    micro_batch = stage.settings.batch_size // parts
    if micro_batch % mesh.size:
        raise InputError(
            f"{stage.name}.train.batch_size={stage.settings.batch_size} "
            f"in {parts} part(s) is not divisible by the {mesh.size} devices; "
            f"the nearest that fits is {max(1, round(micro_batch / mesh.size)) * mesh.size * parts}"
        )


def progress(what: str, total: int) -> Callable[[int], None]:
    """`metrics.counting`, seen on one host."""
    return metrics.counting(what, total, _stream())


def _say(line: str) -> None:
    print(line, file=_stream(), flush=True)


def _stream() -> TextIO:
    """One process of a run speaks; the others write into the void."""
    return sys.stderr if jax.process_index() == 0 else io.StringIO()
