"""What the samplers of a trained VQ-VAE-2 take: network calls by level, seconds an image, and whether they agree.

Decoding is part of the time, compilation is not. Not here: the samplers (`sampling.py`).
"""

import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import numpy as np
from jaxtyping import Array, Key

from arm_forecast import pictures

BATCHES = (1, 8)
SEEDS = 3
BUDGET = 120.0  # seconds beyond which whole passes for every code are estimated, from those of the fixed point

Row = dict[str, Any]
Draw = Callable[[Key[Array, ""], int, str], tuple[np.ndarray, dict[str, float]]]


def compare(
    draw: Draw, cells: dict[str, int], key: Key[Array, ""], stream: TextIO
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row for each sampler and batch, and their plot. `draw(key, n, sampler)` -> images, mean calls by level.

    `calls_percent`: of the codes of all levels; `exact`: whether the images of all seeds equal those of 'cached';
    `seeds` = 0 marks an estimate.
    """
    rows: list[Row] = []
    for batch in BATCHES:
        cached = _row(draw, cells, "cached", batch, key, None)
        fixed_point = _row(draw, cells, "fixed_point", batch, key, cached["images"])
        per_call = fixed_point["seconds_per_image"] / fixed_point["calls"]
        if per_call * batch * sum(cells.values()) > BUDGET:
            ancestral = _estimated(fixed_point, cells, per_call)
        else:
            ancestral = _row(draw, cells, "ancestral", batch, key, cached["images"])
        for row in (cached, fixed_point, ancestral):
            rows.append({name: value for name, value in row.items() if name not in ("images", "calls")})
            print(
                f"{row['sampler']} batch {batch}: {row['calls_percent']:.1f} % of calls, "
                f"{row['seconds_per_image']:.3f} s an image",
                file=stream,
                flush=True,
            )
    return rows, {"samplers": pictures.comparison(rows)}


def _row(
    draw: Draw, cells: dict[str, int], sampler: str, batch: int, key: Key[Array, ""], reference: list[np.ndarray] | None
) -> Row:
    draw(jax.random.fold_in(key, 0), batch, sampler)  # compiles, the folding too
    images, calls, seconds = [], [], []
    for seed in range(SEEDS):
        start = time.perf_counter()
        drawn, taken = draw(jax.random.fold_in(key, seed), batch, sampler)
        seconds.append((time.perf_counter() - start) / batch)
        images.append(drawn)
        calls.append(taken)
    by_level = {f"calls_{level}": float(np.mean([taken[level] for taken in calls])) for level in cells}
    return {
        "sampler": sampler,
        "batch": batch,
        "calls_percent": 100.0 * sum(by_level.values()) / sum(cells.values()),
        **by_level,
        "seconds_per_image": float(np.mean(seconds)),
        "seconds_deviation": float(np.std(seconds, ddof=1)),
        "seeds": SEEDS,
        "exact": None if reference is None else bool(np.array_equal(images, reference)),
        "images": images,
        "calls": sum(by_level.values()),
    }


def _estimated(fixed_point: Row, cells: dict[str, int], per_call: float) -> Row:
    """Whole passes for every code, at the fixed point's time of one."""
    by_level = {f"calls_{level}": float(count) for level, count in cells.items()}
    seconds = {"seconds_per_image": per_call * sum(cells.values()), "seconds_deviation": None, "seeds": 0}
    return fixed_point | {"sampler": "ancestral", "calls_percent": 100.0, **by_level, **seconds, "exact": None}
