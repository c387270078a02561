"""What every sampler takes on one trained run: network calls, seconds, and whether all draw the same samples.

Compilation is kept apart, and every time is taken after the result is on the host. The same noise goes to all samplers.
Predictive ones are measured as `samplers.draw` runs them, lanes that have finished taking the next image.
Not here: the samplers (`samplers.py`), the table that the rows stand in (`bitsperdim/sampler_table.py`), and how the
figures are drawn (`pictures.py`, `bitsperdim/plots.py`).
"""

from collections.abc import Callable, Sequence
from typing import TextIO

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from arm_forecast import pictures, samplers
from arm_forecast.pixelcnn import Grid
from arm_forecast.samplers import Arm, Sampler, Samples
from bitsperdim import plots, sampler_table
from bitsperdim.sampler_table import Row

BATCHES = (1, 8, 32, 64)
SEEDS = 5
# Seconds after which a row begins no further seed. A row of which one batch alone would take longer is estimated,
# except where nothing is known to estimate it from: at the first batch.
BUDGET = 120.0
PROBE = 24  # dimensions drawn to time a call
# Forecasts that are there to be compared with: drawn one image at a time, and estimated for larger batches.
BASELINES = ("fixed_point_without_noise", samplers.OTHER_NOISE, "last", "zeros", "ancestral")
REFERENCE = Sampler("fixed_point")  # on whole images: the others are compared with its samples

Draw = Callable[[Key[Array, ""], Int[np.ndarray, " d"] | None], Samples]  # (key, given), the samples on the host


def compare(
    restored: Callable[[], Arm],
    levels: int,
    decode: Callable | None,
    key: Key[Array, ""],
    stream: TextIO,
    done: Sequence[Row] = (),
    keep: Callable[[list[Row]], None] = lambda rows: None,
    batches: Sequence[int] = (),
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row for each sampler and batch; plots of them, and maps of the forecasts' mistakes.

    Columns: network calls in % of the dimensions (mean over images, and its deviation over seeds), images of a seed,
    evaluations of the network for them, seconds an image, the smallest margin. `refilled`: lanes took a next image;
    else one batch was drawn, whose slowest image all wait for. `exact`: whether the first batch of every seed equals
    that of fixed-point iteration on whole images, noise for noise, over `images_compared` images; None where either
    was not drawn. `seeds` = 0 marks an estimate: the calls of the smaller batch, at the time of one call.

    `done`: rows of an earlier start, which are not measured again; `keep` is called with all rows after each.
    `batches`: in rising order; () for all of `BATCHES`, which take their time.
    """
    arm, rows = restored(), list(done)
    for batch in batches or BATCHES:
        for sampler in _samplers(arm):
            if _find(rows, sampler, batch) is not None:
                continue
            rows.append(_row(arm, sampler, batch, key, rows))
            keep(rows)
            line = f"{sampler} batch {batch}: {rows[-1]['calls_percent']:.2f} % of calls"
            print(f"{line}, {rows[-1]['seconds_per_image']:.3f} s an image", file=stream, flush=True)
    shown = pictures.mistakes(_with_mistakes(arm, key), arm.grid, levels, decode)
    return rows, {"samplers": plots.samplers(rows), **shown}


def _samplers(arm: Arm) -> list[Sampler]:
    learned = ["modules"] if arm.modules is not None else []
    windowed = [Sampler(name, rows) for name in ["fixed_point", *learned] for rows in samplers.windows(arm.grid)]
    return [REFERENCE, *(Sampler(name) for name in [*learned, *BASELINES, "cached"]), *windowed]


def _find(rows: Sequence[Row], sampler: Sampler, batch: int) -> Row | None:
    return next((row for row in rows if (row["sampler"], row["batch"]) == (str(sampler), batch)), None)


def _row(arm: Arm, sampler: Sampler, batch: int, key: Key[Array, ""], rows: Sequence[Row]) -> Row:
    """One line of the table, given those before it."""
    before = next((row for row in reversed(rows) if row["sampler"] == str(sampler)), None)
    reference = _find(rows, REFERENCE, batch)
    if before is not None and reference is not None and sampler.name in BASELINES:
        return _estimated(before, batch, _seconds_of_a_call(reference))
    num_dims = _dims(arm.grid)
    together = _batches(sampler, batch, before)
    draw = drawing(arm, sampler, together * batch, batch)
    _, (compilation,) = sampler_table.repeated(lambda _: draw(key, _all_but(num_dims, 1)), 1, 0.0)
    (probe,), (seconds,) = sampler_table.repeated(lambda _: draw(key, _all_but(num_dims, PROBE)), 1, 0.0)
    per_call = seconds / max(int(probe.network_calls), 1)
    # How many calls it takes is not known before the first batch, so that is drawn whatever it takes.
    if before is not None and per_call * before["calls_of_an_image"] > BUDGET:
        return _estimated(before, batch, per_call)
    keys = [jax.random.fold_in(key, seed) for seed in range(SEEDS)]
    runs, seconds = sampler_table.repeated(lambda seed: draw(keys[seed], None), SEEDS, BUDGET)
    return measured(sampler, batch, runs, seconds, reference) | {"first_call_seconds": compilation}


def drawing(arm: Arm, sampler: Sampler, num_samples: int, batch: int) -> Draw:
    """The sampler, compiled for `num_samples` images in `batch` lanes."""
    some = samplers.compiled(arm.config, arm.modules, arm.grid, sampler, num_samples, batch)
    return lambda key, given: jax.device_get(jax.block_until_ready(some(arm.params, key, given=given)))


def measured(
    sampler: Sampler, batch: int, runs: Sequence[Samples], seconds: Sequence[float], reference: Row | None
) -> Row:
    """The row of what was drawn, a run and its seconds for each seed."""
    images, num_dims = runs[0].x.shape
    calls = [float(np.mean(run.calls)) for run in runs]
    per_image = [of_run / images for of_run in seconds]
    digests = [sampler_table.digest(np.asarray(run.x[:batch])) for run in runs]
    compared = () if reference is None or sampler.name == samplers.OTHER_NOISE else reference["digests"]
    return {
        "sampler": str(sampler),
        "batch": batch,
        "calls_percent": 100.0 * float(np.mean(calls)) / num_dims,
        "calls_deviation": sampler_table.deviation([100.0 * count / num_dims for count in calls]),
        "calls_of_an_image": float(np.mean(calls)),
        "images": images,
        "refilled": images > batch,
        "network_calls": round(float(np.mean([run.network_calls for run in runs]))),
        "seconds_per_image": float(np.mean(per_image)),
        "seconds_deviation": sampler_table.deviation(per_image),
        "seeds": len(runs),
        **sampler_table.agreement(digests, compared, batch),
        "margin": min(float(np.min(run.margin)) for run in runs),
        "digests": digests,
    }


def _estimated(before: Row, batch: int, per_call: float) -> Row:
    """What a batch would take if lanes were never idle: the calls of an image as `before`, a call for all lanes."""
    seconds = {"seconds_per_image": per_call * before["calls_of_an_image"] / batch, "seconds_deviation": None}
    evaluations = {"images": batch, "refilled": False, "network_calls": round(before["calls_of_an_image"])}
    compared = {"exact": None, "images_compared": 0, "digests": []}
    nothing_drawn = {"calls_deviation": None, "seeds": 0, "margin": None, "first_call_seconds": None}
    return before | {"batch": batch} | evaluations | seconds | compared | nothing_drawn


def _seconds_of_a_call(row: Row) -> float:
    return row["seconds_per_image"] * row["images"] / row["network_calls"]


def _batches(sampler: Sampler, batch: int, before: Row | None) -> int:
    """How many batches a loop draws: as many as `samplers.draw` would, or fewer where that would take too long.

    A single lane has nobody to wait for, so at batch 1 one image is as good.
    """
    if batch == 1 or before is None:
        return 1
    # A call for all lanes takes at most as much longer as there are more of them.
    one_batch = _seconds_of_a_call(before) * batch / before["batch"] * before["calls_of_an_image"]
    affordable = max(1, int(BUDGET / 2 / one_batch))
    return min(samplers.batches_at_once(sampler), affordable)


def _all_but(num_dims: int, free: int) -> Int[np.ndarray, " d"]:
    """All dimensions known to be 0 but the last few."""
    return np.where(np.arange(num_dims) < num_dims - free, 0, -1).astype(np.int32)


def _dims(grid: Grid) -> int:
    return grid.height * grid.width * grid.channels


def _with_mistakes(arm: Arm, key: Key[Array, ""]) -> dict[str, Samples]:
    """16 samples by fixed-point iteration and, where there are modules, by them, with the same noise.

    On whole images: the last dimension of a window would count as a mistake.
    """
    names = ["fixed_point", *(["modules"] if arm.modules is not None else [])]
    count = pictures.NUM_SAMPLES
    return {name: samplers.draw(arm, Sampler(name), key, count, count) for name in names}
