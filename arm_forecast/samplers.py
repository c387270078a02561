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
from arm_forecast.config import ModulesConfig
from arm_forecast.engine import Samples
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import metrics
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run

# The second uses the modules also where the fixed point has the better record.
LEARNED = ("modules", "modules_without_fallback")
FORECASTS = ("ancestral", "zeros", "last", "fixed_point", "fixed_point_without_noise", *LEARNED)
CHUNK = 8  # batches of a predictive sampler that one compiled loop draws, refilling its lanes


class Sampler(NamedTuple):
    """A way to draw. `name`: one of `FORECASTS` or 'cached'; `rows`: of the window that is evaluated, 0 for all."""

    name: str
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.rows}" if self.rows else self.name


def parse(text: str, grid: Grid, has_modules: bool) -> Sampler:
    """'fixed_point', or 'fixed_point:8' for windows of 8 rows; InputError for what there is not."""
    name, _, rows = text.partition(":")
    names = [*(name for name in FORECASTS if has_modules or name not in LEARNED), "cached"]
    if name not in names:
        why = ": the run has no forecasting modules" if name in LEARNED else ""
        raise InputError(f"there is no sampler '{text}' here{why}; there are auto, {', '.join(names)}")
    if not rows:
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
    """The fastest sampler for a batch: as measured on this kind of device in the run, or by the built-in rule.

    Modules may have been measured and be missing here: pairs for modules yet to be trained are drawn without any.
    """
    path = run.workdir / "samplers.json"
    if path.exists():
        found = run_lib.read_json(path, {"device": str, "rows": list})
        of = lambda row: row["sampler"].partition(":")[0]
        rows = [row for row in found["rows"] if row["exact"] is not False and (has_modules or of(row) not in LEARNED)]
        if found["device"] == jax.devices()[0].device_kind and rows:
            distance = lambda row: abs(math.log(row["batch"] / batch))
            nearest = min(map(distance, rows))
            at_batch = [row for row in rows if distance(row) == nearest]
            name, _, height = min(at_batch, key=lambda row: row["seconds_per_image"])["sampler"].partition(":")
            return Sampler(name, int(height or 0))
    return default(batch, grid)


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
    }
    return makers[name]()


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
    chunk = batch if sampler.name == "cached" else min(n, CHUNK * batch)
    options = {"top_k": top_k, "top_p": top_p, "mesh": mesh}
    some = compiled(arm.config, arm.modules, arm.grid, sampler, chunk, batch, **options)
    report, parts = metrics.counting("samples", n, run_lib.stream()), []
    num_dims = arm.grid.height * arm.grid.width * arm.grid.channels
    given = np.full((1, num_dims), -1, np.int32) if given is None else given
    for start in range(0, n, chunk):
        ids = np.arange(start, start + chunk)
        known = given[np.minimum(ids, len(given) - 1)]
        # The last chunk is drawn whole, as another shape would be another program to compile. What is not wanted of it
        # is all given, so that no call waits for it.
        known[ids >= n] = 0
        parts.append(jax.device_get(some(arm.params, key, given=known, first_id=start, temperature=temperature)))
        report(min(start + chunk, n))
    joined = {name: np.concatenate([getattr(part, name) for part in parts])[:n] for name in Samples._fields[:-1]}
    return Samples(**joined, network_calls=sum(int(part.network_calls) for part in parts))  # pyright: ignore
