"""What the samplers of a trained VQ-VAE-2 take: network calls by level, seconds an image, and whether they agree.

Decoding is part of the time, compilation is not. Not here: the samplers (`sampling.py`).
"""

from collections.abc import Callable, Sequence
from typing import TextIO

import jax
import numpy as np
from jaxtyping import Array, Key

from bitsperdim import plots, sampler_table
from bitsperdim.sampler_table import Row

BATCHES = (1, 8)
SEEDS = 3
BUDGET = 120.0  # seconds beyond which whole passes for every code are estimated, from those of the fixed point

Draw = Callable[[Key[Array, ""], int, str], tuple[np.ndarray, dict[str, float]]]


def compare(
    draw: Draw,
    cells: dict[str, int],
    samplers: Sequence[str],
    key: Key[Array, ""],
    stream: TextIO,
    done: Sequence[Row] = (),
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """A row for each sampler and batch, and their plot. `draw(key, n, sampler)` -> images, mean calls by level. The
    first of the samplers is 'cached'.

    `calls_percent`: of the codes of all levels; `exact`: whether the images of every seed equal those of 'cached', over
    `images_compared`; `seeds` = 0 marks an estimate. `done`: rows of an earlier start, which are not measured again;
    `keep` is called with all rows after each.
    """
    rows = list(done)
    for batch in BATCHES:
        for sampler in samplers:
            if _find(rows, sampler, batch) is not None:
                continue
            rows.append(_row(draw, cells, sampler, batch, key, rows))
            keep(rows)
            print(
                f"{sampler} batch {batch}: {rows[-1]['calls_percent']:.1f} % of calls, "
                f"{rows[-1]['seconds_per_image']:.3f} s an image",
                file=stream,
                flush=True,
            )
    return rows, {"samplers": plots.samplers(rows)}


def _find(rows: Sequence[Row], sampler: str, batch: int) -> Row | None:
    return next((row for row in rows if (row["sampler"], row["batch"]) == (sampler, batch)), None)


def _row(draw: Draw, cells: dict[str, int], sampler: str, batch: int, key: Key[Array, ""], rows: Sequence[Row]) -> Row:
    """One line of the table, given those before it."""
    fixed_point, cached = (_find(rows, name, batch) for name in ("fixed_point", "cached"))
    if sampler == "ancestral" and fixed_point is not None:
        calls = sum(fixed_point[f"calls_{level}"] for level in cells)
        per_call = fixed_point["seconds_per_image"] / calls
        if per_call * batch * sum(cells.values()) > BUDGET:
            return _estimated(fixed_point, cells, per_call)
    keys = [jax.random.fold_in(key, seed) for seed in range(SEEDS)]
    draw(keys[0], batch, sampler)  # compiles
    drawn, seconds = sampler_table.repeated(lambda seed: draw(keys[seed], batch, sampler), SEEDS, BUDGET * SEEDS)
    seconds, calls = [of_batch / batch for of_batch in seconds], [taken for _, taken in drawn]
    digests = [sampler_table.digest(images) for images, _ in drawn]
    by_level = {f"calls_{level}": float(np.mean([taken[level] for taken in calls])) for level in cells}
    return {
        "sampler": sampler,
        "batch": batch,
        "calls_percent": 100.0 * sum(by_level.values()) / sum(cells.values()),
        **by_level,
        "seconds_per_image": float(np.mean(seconds)),
        "seconds_deviation": sampler_table.deviation(seconds),
        "seeds": len(drawn),
        **sampler_table.agreement(digests, cached["digests"] if cached is not None else (), batch),
        "digests": digests,
    }


def _estimated(fixed_point: Row, cells: dict[str, int], per_call: float) -> Row:
    """Whole passes for every code, at the fixed point's time of one."""
    by_level = {f"calls_{level}": float(count) for level, count in cells.items()}
    seconds = {"seconds_per_image": per_call * sum(cells.values()), "seconds_deviation": None, "seeds": 0}
    nothing_drawn = {"exact": None, "images_compared": 0, "digests": []}
    return fixed_point | {"sampler": "ancestral", "calls_percent": 100.0, **by_level, **seconds, **nothing_drawn}
