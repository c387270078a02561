"""What is seen of a stage while it trains: log lines, `metrics.jsonl`, evaluation on held-out data, pictures.

It reads the state and changes nothing. Not here: the loop that calls it (`trainer.py`), how lines and bars are written
(`metrics.py`).
"""

import functools
import textwrap
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from bitsperdim import evaluation, hosts, images, metrics, plots, rng
from bitsperdim import run as run_lib
from bitsperdim import step as step_lib
from bitsperdim.errors import NonFiniteError
from bitsperdim.model import Model, Stage
from bitsperdim.run import Run
from bitsperdim.sources import Source

Watch = Callable[[Run, str], None]  # (run, name of the stage), whose folder has new figures or pictures


class Observer:
    """Call `open` when the first step is known, `after_step` after each, `close` at the end."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        model: Model,
        source: Source,
        mesh: Mesh,
        check_signals: Callable[[], None] = lambda: None,
        watch: Watch | None = None,
    ) -> None:
        assert stage.settings and stage.pictures
        self._config, self._model, self._mesh = stage.settings, model, mesh
        self._folder = run.folder(stage.name)
        self._remarks = lambda step, figures: stage.remarks(run, step, figures)
        self._source = source
        self._check_signals = check_signals
        self._watch = functools.partial(watch, run, stage.name) if watch is not None and hosts.is_first() else None
        self._pictures = stage.pictures(run, hosts.local_mesh(mesh))
        self._key = rng.for_purpose(jax.random.key(run.seed(stage.name)), "evaluation")
        self._measure = evaluation.compiled(model, mesh)
        self._writer: metrics.Writer | None = None
        self._console = metrics.Console(self._config.steps, run_lib.stream())
        self._throughput = metrics.Throughput(self._config.batch_size)
        self._window: list[step_lib.Report] = []
        self._compiled = False
        self._tracing = False

    def open(self, start: int) -> None:
        """Makes the stage's metrics file, or goes on with it after step `start`."""
        if hosts.is_first():
            self._writer = metrics.Writer(self._folder, start, self._config.tensorboard)
        self._profile(start)

    def catch_up(self, start: int, state: PyTree) -> dict[str, float]:
        """The evaluation and pictures of step `start`, where a signal kept the last start from making them."""
        if start == 0 or not self._evaluates(start):
            return {}
        lines = lambda: metrics.read(self._folder / metrics.FILE)
        is_of_start = lambda line: line["step"] == start and line.get("kind") == "evaluation"
        is_there = hosts.from_first(lambda: any(map(is_of_start, lines())))
        return {} if is_there else self._look(start, state)

    def after_step(self, done: int, state: PyTree, report: step_lib.Report) -> dict[str, float]:
        """Logs, evaluates and draws when it is time to; returns the figures of this step's evaluation, or none.

        `Interrupted` in the middle of an evaluation where a signal has come.
        """
        self._window.append(report)
        self._console.tick(done)
        self._profile(done, report)
        if not self._compiled:
            jax.block_until_ready(report)
            self._throughput.restart(done)
            self._compiled = True
        if logs := self._is_due(done, self._config.log_every):
            with jax.transfer_guard("allow"):  # the loop forbids what a step did not ask for; figures come and go
                self._log(done)
        figures = self._look(done, state)
        if self._watch is not None and (logs or figures or self._is_due(done, self._config.pictures_every)):
            self._watch()
            self._throughput.restart(done)
        return figures

    def _look(self, done: int, state: PyTree) -> dict[str, float]:
        """Evaluates and draws when it is time to."""
        evaluates, draws = self._evaluates(done), self._is_due(done, self._config.pictures_every)
        figures: dict[str, float] = {}
        if evaluates or draws:
            with jax.transfer_guard("allow"):
                if evaluates:
                    figures = self._evaluate(done, state)
                if draws:
                    self._draw(done, state)
            self._throughput.restart(done)
        return figures

    def _is_due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self._config.steps

    def _evaluates(self, done: int) -> bool:
        return self._is_due(done, self._config.evaluate_every) or done in dict(self._config.milestones).values()

    def message(self, text: str) -> None:
        self._console.message(text)

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
        self._console.close()
        if self._writer is not None:
            self._writer.close()

    def _log(self, done: int) -> None:
        # Averages over every step since the last log, or since a start between two logs, so their number is logged too.
        # Fetched at once: a fetch per step would stall the device.
        reports, last = [(report.parts, report.tallies) for report in self._window], self._window[-1].figures
        norms = [report.figures["gradient_norm"] for report in self._window]
        reports, figures, norms = jax.device_get((reports, last, norms))
        self._window = []
        over = lambda reduce: lambda *values: reduce(np.concatenate(values), axis=0)
        means = {name: float(v) for name, v in jax.tree.map(over(np.mean), *[parts for parts, _ in reports]).items()}
        tallies = jax.tree.map(over(np.sum), *[tallies for _, tallies in reports])
        figures = {name: float(values[-1]) for name, values in figures.items()}
        figures["largest_gradient_norm"] = float(np.max(np.concatenate(norms)))  # which a skip rule goes by
        rate = self._throughput.read(done)
        summary = self._model.summarize(means, tallies)
        shown = {name: summary[name] for name in list(summary)[:2]}
        if figures["skipped_steps"] or done == self._config.steps:
            shown["skipped_steps"] = int(figures["skipped_steps"])
        self._console.progress(done, shown, rate)
        count = {"steps": len(reports) * self._config.steps_per_dispatch}
        self._write(done, "train", {**count, **summary, **figures, "images_per_second": rate.images_per_second})
        bad = int(figures["non_finite_in_a_row"])
        # At the end there is no next step that could be finite: a stage must not pass for trained.
        if bad >= self._config.max_non_finite or (bad and done == self._config.steps):
            raise NonFiniteError(
                f"loss or gradients were not finite for {bad} steps in a row, up to step {done:,}; lower the learning "
                f"rate or set clip_norm, and start in a new --workdir (the checkpoints in {self._folder} are finite)"
            )

    def _evaluate(self, done: int, state: PyTree) -> dict[str, float]:
        # The last one is made in full, since a complete stage is not started again.
        may_stop = done < self._config.steps
        figures = evaluation.evaluate(
            self._model,
            self._measure,
            state["ema"],
            state["extra"],
            self._source,
            self._config.batch_size,
            self._mesh,
            self._key,
            lambda _: self._check_signals() if may_stop else None,
        )
        self._write(done, "evaluation", figures)
        for name in [name for name, step in self._config.milestones if step == done]:
            self._write(done, "milestone", {f"{figure}_at_{name}": value for figure, value in figures.items()})
        shown = {name: value for name, value in figures.items() if not name.endswith("_standard_error")}
        text = f"evaluation at step {done}: {metrics.shown(shown)}"
        for line in (text, *self._remarks(done, figures)):
            self._console.message(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    "))
        return figures

    def _draw(self, done: int, state: PyTree) -> None:
        """In the first process, on its first device where there are several."""
        params, extra = hosts.local((state["ema"], state["extra"]))
        with hosts.together():
            if hosts.is_first():
                folder = self._folder / "images"
                for name, picture in self._pictures(params, extra, self._key).items():
                    images.save_png(folder / f"{name}-{done:08d}.png", picture)
                images.save_png(folder / "curves.png", plots.curves(metrics.read(self._folder / metrics.FILE)))

    def _profile(self, done: int, report: step_lib.Report | None = None) -> None:
        """Starts and ends the trace of the steps that were asked for."""
        if not self._config.profile:
            return
        first, last = self._config.profile
        if self._tracing and done >= last:
            jax.block_until_ready(report)
            jax.profiler.stop_trace()
            self._tracing = False
        elif not self._tracing and first - self._config.steps_per_dispatch <= done < min(last, self._config.steps):
            jax.block_until_ready(report)
            jax.profiler.start_trace(str(self._folder / "profile"))
            self._tracing = True

    def _write(self, done: int, kind: str, figures: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(done, kind, figures)
