"""The table of a run's samplers, samplers.json: how its rows are measured, and kept one by one as they come.

    {"device": ..., "seed": ..., "steps": {stage: step}, "complete": true, "rows": [{"sampler": ...}, ...]}

A table holds for the weights and the kind of device that it was measured with. A comparison that is stopped leaves an
incomplete one, and the next one of the same conditions goes on behind its rows.
Not here: which samplers there are (the families' `comparison.py`), and the plot (`plots.py`).
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath

from bitsperdim import run as run_lib
from bitsperdim import trained
from bitsperdim.errors import InputError
from bitsperdim.run import Run

FILE = "samplers.json"
REMEDY = "remove it, or measure again: sample.py --compare_samplers"

Row = dict[str, Any]
T = TypeVar("T")


class Table(NamedTuple):
    """`conditions`: device, seed and steps."""

    conditions: dict[str, Any]
    rows: list[Row]
    complete: bool


def conditions(run: Run, seed: int) -> dict[str, Any]:
    """What the rows of one table have in common: the kind of device, the seed, the steps of the trained stages."""
    stages = [stage.name for stage in run.stages() if stage.model is not None]
    steps = {name: step for name in stages if (step := trained.restored_step(run, name))}
    return {"device": jax.devices()[0].device_kind, "seed": seed, "steps": steps}


def read(path: epath.Path) -> Table | None:
    """The table, None where there is none. Raises InputError for a damaged one."""
    if not path.exists():
        return None
    needed = {"device": str, "seed": int, "steps": dict, "rows": list}
    values = run_lib.read_json(path, needed, REMEDY)
    for number, row in enumerate(values["rows"], start=1):
        if misfit := _misfit(row):
            raise InputError(f"{path} is damaged (row {number}: {misfit}); {REMEDY}")
    of_run = {name: values[name] for name in ("device", "seed", "steps")}
    return Table(of_run, values["rows"], values.get("complete") is True)


def of_run(run: Run) -> Table | None:
    """The run's own table; of a published run the one that was made of it here, before the one that came with it."""
    made = run.outputs / FILE
    return read(made if made.exists() else run.workdir / FILE)


def write(path: epath.Path, table: Table) -> None:
    """Atomically: whoever reads it finds whole rows."""
    run_lib.write_json(path, {**table.conditions, "complete": table.complete, "rows": table.rows})


def begun(path: epath.Path, conditions: Mapping[str, Any]) -> list[Row]:
    """The rows of an incomplete table of the same conditions, to go on behind; [] where a new one begins."""
    try:
        table = read(path)
    except InputError as error:
        run_lib.say(f"warning: {error}; it is replaced")
        return []
    return [] if table is None or table.complete or table.conditions != conditions else table.rows


def measure(
    compare: Callable[..., tuple[list[Row], dict[str, np.ndarray]]], run: Run, seed: int, folder: epath.Path
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """`Loaded.compare_samplers` with its table kept in the folder after every row: all rows, and the pictures."""
    path, of_run = folder / FILE, conditions(run, seed)
    done = begun(path, of_run)
    if done:
        run_lib.say(f"{path} has {len(done)} rows of the same weights, device and seed: going on behind them")
    keep = lambda rows, complete=False: write(path, Table(of_run, rows, complete))
    rows, pictures = compare(jax.random.key(seed), run_lib.stream(), done, keep)
    keep(rows, complete=True)
    return rows, pictures


def _misfit(row: Any) -> str:
    if not isinstance(row, dict):
        return "it is no object"
    kinds = {"sampler": str, "batch": int, "seconds_per_image": int | float, "exact": bool | None}
    for name, kind in kinds.items():
        if name not in row or not isinstance(row[name], kind):
            return f"{name} is {row.get(name)!r}"
    return "" if row["batch"] >= 1 and row["seconds_per_image"] > 0 else "batch and seconds must be above 0"


# --- Measuring --------------------------------------------------------------------------------------------------------


def repeated(draw: Callable[[int], T], seeds: int, budget: float) -> tuple[list[T], list[float]]:
    """draw(0), draw(1), ... and the seconds of each: `seeds` of them, or as many as begin within `budget` seconds."""
    results, seconds = [], []
    while len(results) < seeds and (not results or sum(seconds) < budget):
        start = time.perf_counter()
        results.append(draw(len(results)))
        seconds.append(time.perf_counter() - start)
    return results, seconds


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, None for less than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def digest(images: np.ndarray) -> str:
    """Sixteen digits that tell whether two samplers drew the same, also across two starts of a comparison."""
    return hashlib.sha256(np.ascontiguousarray(images, np.int32).tobytes()).hexdigest()[:16]


def agreement(digests: Sequence[str], reference: Sequence[str], images: int) -> dict[str, Any]:
    """`exact`: whether the images of all seeds that both drew are equal, `images` of each; None where none were."""
    both = list(zip(digests, reference, strict=False))
    exact = all(ours == theirs for ours, theirs in both) if both else None
    return {"exact": exact, "images_compared": images * len(both)}
