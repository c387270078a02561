"""What every sampler takes on one trained run: network calls, seconds, and whether all draw the same samples.

Compilation is kept apart, and every time is taken after the result is on the host. The same noise goes to all samplers.
Not here: the samplers (`samplers.py`), and how the figures are drawn (`pictures.py`).
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from jaxtyping import Array, Key

from arm_forecast import pictures, samplers
from arm_forecast.samplers import Arm, Sampler
from bitsperdim.run import Run

BATCHES = (1, 8, 32, 64)
SEEDS = 5
BUDGET = 120.0  # seconds of a row, beyond which no further batch is drawn; nor the first, if it would take longer
PROBE = 24  # dimensions drawn to time a call
# Forecasts that are there to be compared with: drawn one image at a time, and estimated for larger batches.
BASELINES = ("fixed_point_without_noise", "last", "zeros", "ancestral")

Row = dict[str, Any]


class _Timed(NamedTuple):
    samples: Any
    seconds: float


def compare(
    run: Run, restored: Callable[[], Arm], decode: Callable | None, key: Key[Array, ""], stream: TextIO
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row for each sampler and batch; plots of them, and maps of the forecasts' mistakes.

    Columns: calls of the network in % of the dimensions (mean over images and its deviation over seeds), calls of the
    whole batch, seconds an image, the smallest margin. `exact`: whether the first batch equals that of fixed-point
    iteration on whole images, noise for noise. `seeds` = 0 marks an estimate, calls as at the smaller batch times the
    time of one call: of baselines, and where one batch would take longer than two minutes.
    """
    arm = restored()
    rows: list[Row] = []
    for batch in BATCHES:
        reference: np.ndarray | None = None
        whole_call = 0.0
        for sampler in _samplers(arm):
            before = next((row for row in reversed(rows) if row["sampler"] == str(sampler)), None)
            if before is not None and sampler.name in BASELINES:
                row = _estimated(sampler, batch, whole_call, before["calls_percent"], before["network_calls"])
            else:
                row, drawn, call = _row(arm, sampler, batch, key, reference, before)
                reference = drawn if reference is None else reference
                whole_call = whole_call or call
            rows.append(row)
            line = f"{row['sampler']} batch {batch}: {row['calls_percent']:.2f} % of calls"
            print(f"{line}, {row['seconds_per_image']:.3f} s an image", file=stream, flush=True)
    shown = pictures.mistakes(_mistakes(arm, key), arm.grid, arm.grid.values, decode)
    return rows, {"samplers": pictures.comparison(rows), **shown}


def _samplers(arm: Arm) -> list[Sampler]:
    """Fixed-point iteration on whole images first: the others are compared with its samples."""
    learned = ["modules"] if arm.modules is not None else []
    windowed = [Sampler(name, rows) for name in ["fixed_point", *learned] for rows in samplers.windows(arm.grid)]
    return [Sampler(name) for name in ["fixed_point", *learned, *BASELINES, "cached"]] + windowed


def _row(
    arm: Arm, sampler: Sampler, batch: int, key: Key[Array, ""], reference: np.ndarray | None, before: Row | None
) -> tuple[Row, np.ndarray | None, float]:
    """One line of the table, the samples of seed 0 if they were drawn, and the seconds of a call."""
    num_dims = arm.grid.height * arm.grid.width * arm.grid.channels
    draw = samplers.compiled(arm.config, arm.modules, arm.grid, sampler, batch, batch)
    compilation = _timed(draw, arm, key, _all_but(num_dims, 1)).seconds
    probe = _timed(draw, arm, key, _all_but(num_dims, PROBE))
    per_call = probe.seconds / max(int(probe.samples.network_calls), 1)
    # How many calls it takes is not known before the first batch, so that is drawn whatever it takes.
    if before is not None and per_call * before["network_calls"] > BUDGET:
        row = _estimated(sampler, batch, per_call, before["calls_percent"], before["network_calls"])
        return row, None, per_call
    runs = [_timed(draw, arm, jax.random.fold_in(key, 0), None)]
    while len(runs) < SEEDS and sum(run.seconds for run in runs) < BUDGET:
        runs.append(_timed(draw, arm, jax.random.fold_in(key, len(runs)), None))
    percents = [100.0 * float(np.mean(run.samples.calls)) / num_dims for run in runs]
    seconds = [run.seconds / batch for run in runs]
    first = runs[0].samples.x
    row = {
        "sampler": str(sampler),
        "batch": batch,
        "calls_percent": float(np.mean(percents)),
        "calls_deviation": _deviation(percents),
        "network_calls": round(float(np.mean([run.samples.network_calls for run in runs]))),
        "seconds_per_image": float(np.mean(seconds)),
        "seconds_deviation": _deviation(seconds),
        "seeds": len(runs),
        "exact": None if reference is None else bool((first == reference).all()),
        "margin": min(float(np.min(run.samples.margin)) for run in runs),
        "first_call_seconds": compilation,
    }
    return row, first, per_call


def _estimated(sampler: Sampler, batch: int, per_call: float, percent: float, network_calls: int) -> Row:
    seconds = {"seconds_per_image": per_call * network_calls / batch, "seconds_deviation": None, "seeds": 0}
    calls = {"calls_percent": percent, "calls_deviation": None, "network_calls": network_calls}
    row = {"sampler": str(sampler), "batch": batch, **calls, **seconds}
    return row | {"exact": None, "margin": None, "first_call_seconds": None}


def _timed(draw: Callable, arm: Arm, key: Key[Array, ""], given: np.ndarray | None) -> _Timed:
    start = time.perf_counter()
    samples = jax.device_get(jax.block_until_ready(draw(arm.params, key, given=given)))
    return _Timed(samples, time.perf_counter() - start)


def _all_but(num_dims: int, free: int) -> np.ndarray:
    """All dimensions known to be 0 but the last few."""
    return np.where(np.arange(num_dims) < num_dims - free, 0, -1).astype(np.int32)


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _mistakes(arm: Arm, key: Key[Array, ""]) -> dict[str, Any]:
    """16 samples by fixed-point iteration and, where there are modules, by them, with the same noise.

    On whole images: the last dimension of a window would count as a mistake.
    """
    names = ["fixed_point", *(["modules"] if arm.modules is not None else [])]
    return {name: samplers.draw(arm, Sampler(name), key, 16, 16) for name in names}
