"""The samplers of a PixelCNN by name, which of them suits a batch, and whole requests in chunks.

Not here: the loops themselves (`engine.py`, `ancestral.py`), and how samplers compare (`comparison.py`).
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from arm_forecast import ancestral, engine, forecasters, networks
from arm_forecast.config import FORECASTS, LEARNED, ModulesConfig
from arm_forecast.engine import Samples
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import metrics, sampler_table
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run

# Noise drawn anew in every call: the same law, but other images than all other samplers draw.
OTHER_NOISE = "fixed_point_fresh_noise"
CHUNK = 8  # batches of a predictive sampler that one compiled loop draws, refilling its lanes


class Sampler(NamedTuple):
    """A way to draw. `name`: of `config.FORECASTS`, or 'cached'; `rows`: of the window that is evaluated, 0 for all."""

    name: str
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.rows}" if self.rows else self.name


def parse(text: str, grid: Grid, has_modules: bool) -> Sampler:
    """'fixed_point', or 'fixed_point:8' for windows of 8 rows; InputError for what there is not."""
    name, colon, rows = text.partition(":")
    names = [*(name for name in FORECASTS if has_modules or name not in LEARNED), "cached"]
    if name not in names:
        why = ": the run has no forecasting modules" if name in LEARNED else ""
        heights = " or ".join(f":{rows}" for rows in windows(grid))
        windowed = f"; all but the first and the last also in windows of rows, NAME{heights}" if heights else ""
        raise InputError(f"there is no sampler '{text}' here{why}; there are auto, {', '.join(names)}{windowed}")
    if not colon:
        return Sampler(name)
    allowed = windows(grid)
    if name == "cached" or not re.fullmatch(r"\d+", rows) or int(rows) not in allowed:
        of = f"{', '.join(map(str, allowed))} rows" if allowed and name != "cached" else "no windows"
        raise InputError(f"sampler '{text}' cannot be: '{name}' takes {of} here")
    return Sampler(name, int(rows))


def windows(grid: Grid) -> tuple[int, ...]:
    """The heights of windows that are shorter than the image."""
    return tuple(rows for rows in (4, 8, 16) if rows < grid.height)


def choose(run: Run, batch: int, grid: Grid, has_modules: bool) -> Sampler:
    """The fastest sampler for a batch: as measured with these weights on this kind of device, or by the built-in rule.

    Modules may have been measured and be missing here: pairs for modules yet to be trained are drawn without any.
    """
    table = sampler_table.of_run(run)
    if table is None or not table.complete:
        return default(batch, grid)
    if table.conditions != sampler_table.conditions(run, table.conditions["seed"]):
        return default(batch, grid)
    rows = [row for row in table.rows if row["exact"] is not False and _is_choice(row["sampler"], grid, has_modules)]
    if not rows:
        return default(batch, grid)
    distance = lambda row: abs(math.log(row["batch"] / batch))
    nearest = min(map(distance, rows))
    at_batch = [row for row in rows if distance(row) == nearest]
    fastest = min(at_batch, key=lambda row: row["seconds_per_image"])
    return parse(fastest["sampler"], grid, has_modules)


def _is_choice(text: str, grid: Grid, has_modules: bool) -> bool:
    """Whether it can be drawn with here. A table of another version may name samplers that there are not."""
    try:
        return parse(text, grid, has_modules).name != OTHER_NOISE
    except InputError:
        return False


def default(batch: int, grid: Grid) -> Sampler:
    """Without measurements. A processor's time is that of the arithmetic, which is least in cached ancestral sampling
    for any batch (`benchmarks` in the README). Accelerators wait for one small step after another instead: there
    predictive sampling serves few images or small ones."""
    if jax.default_backend() == "cpu" or batch > 32:
        return Sampler("cached")
    return Sampler("fixed_point", 0 if grid.height <= 16 else 4)


class Arm(NamedTuple):
    """A trained ARM with its modules, ready to sample from."""

    params: PyTree  # {"arm": prepared weights, "modules": ...}
    config: NetworkConfig
    modules: ModulesConfig | None
    grid: Grid


@functools.lru_cache(maxsize=32)  # a notebook draws again and again
def compiled(
    config: NetworkConfig,
    modules: ModulesConfig | None,
    grid: Grid,
    sampler: Sampler,
    num_samples: int,
    batch: int,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[..., Samples]:
    """draw(prepared params, key, given, first_id, temperature) -> Samples.

    `options` are further ones of `engine.sampler`; 'cached' has none.
    """
    if sampler.name == "cached":
        return ancestral.sampler(config, grid, num_samples, top_k=top_k, top_p=top_p, mesh=mesh, **options)
    if sampler.name == OTHER_NOISE:
        options["fresh_noise"] = True
    network = networks.windowed(config, grid, sampler.rows) if sampler.rows else networks.whole(config, grid)
    return engine.sampler(
        network,
        _forecaster(sampler.name, modules, grid),
        num_samples,
        batch,
        top_k=top_k,
        top_p=top_p,
        mesh=mesh,
        **options,
    )


def _forecaster(name: str, modules: ModulesConfig | None, grid: Grid) -> forecasters.Forecaster:
    if name in LEARNED:
        assert modules is not None
        predict = networks.predictor(modules, grid)
        shape, fallback = (grid.height, grid.width, grid.channels), name == "modules"
        return forecasters.modules(predict, modules.modules, shape, fallback=fallback)
    makers = {
        "ancestral": forecasters.none,
        "zeros": forecasters.zeros,
        "last": forecasters.last,
        "fixed_point": forecasters.fixed_point,
        "fixed_point_without_noise": forecasters.fixed_point_without_noise,
        OTHER_NOISE: forecasters.fixed_point,
    }
    return makers[name]()


def batches_at_once(sampler: Sampler) -> int:
    """Of how many batches one compiled loop draws the images, handing each lane that is free the next one."""
    return 1 if sampler.name == "cached" else CHUNK


def draw(
    arm: Arm,
    sampler: Sampler,
    key: Key[Array, ""],
    n: int,
    batch: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    given: Int[np.ndarray, "_ d"] | None = None,
    mesh: Mesh | None = None,
) -> Samples:
    """n samples as numpy arrays, in chunks of one shape, with progress on stderr."""
    batch = min(batch, n)
    chunk = min(n, batch * batches_at_once(sampler))
    options = {"top_k": top_k, "top_p": top_p, "mesh": mesh}
    some = compiled(arm.config, arm.modules, arm.grid, sampler, chunk, batch, **options)
    report, parts = metrics.counting("samples", n, run_lib.stream()), []
    num_dims = arm.grid.height * arm.grid.width * arm.grid.channels
    given = np.full((1, num_dims), -1, np.int32) if given is None else given
    for start in range(0, n, chunk):
        ids = np.arange(start, start + chunk)
        known = given[np.minimum(ids, len(given) - 1)]
        # The last chunk has the shape of the others, as another would be another program to compile.
        wanted = {} if sampler.name == "cached" else {"count": min(chunk, n - start)}
        samples = some(arm.params, key, given=known, first_id=start, temperature=temperature, **wanted)
        parts.append(jax.device_get(samples))
        report(min(start + chunk, n))
    joined = {name: np.concatenate([getattr(part, name) for part in parts])[:n] for name in Samples._fields[:-1]}
    return Samples(**joined, network_calls=sum(int(part.network_calls) for part in parts))  # pyright: ignore
