"""Any config without its data set and without training: a run on noise, a batch, random weights; and how time is taken.

    --config=NAME:VARIANT  --stage=STAGE  --batch=N  --set KEY=VALUE ...  --vary KEY VALUE VALUE ...

are the flags that every benchmark of a config takes (`add_flags`); `cases` are all combinations of what is varied.
Times do not depend on values, so weights are those before training, images noise, and codes zeros and ones.
"""

import argparse
import ast
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import config as config_lib
from bitsperdim import config_files, facts, leaves, plan, published, sharding
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Stage
from bitsperdim.run import Run


def add_flags(parser: argparse.ArgumentParser, config: str) -> None:
    """The flags of every benchmark of a config."""
    parser.add_argument("--config", default=config, help=f"default {config}")
    parser.add_argument("--stage", default="", help="default: all that are trained")
    parser.add_argument("--batch", type=int, default=0, help="default: those of the config")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values of the config")
    parser.add_argument("--vary", nargs="+", action="append", default=[], metavar="KEY VALUE", help="a case for each")


def cases(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], ConfigDict]]:
    """What tells a case from others, and its config, for all combinations of the values that are varied."""
    fixed = [text.split("=", 1) for text in arguments.set]
    varied = [[(key, value) for value in values] for key, *values in arguments.vary]
    for chosen in itertools.product(*varied):
        config = config_files.load(arguments.config)
        for key, value in (*fixed, *chosen):
            _change(config, key, literal(value))
        yield {"config": arguments.config} | dict(fixed) | dict(chosen), config


def literal(text: str) -> object:
    """A number, a tuple, a truth value, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _change(config: ConfigDict, key: str, value: object) -> None:
    """Also of keys that the config leaves at their defaults."""
    *path, name = key.split(".")
    for part in path:
        if part not in config:
            raise InputError(f"the config has no section '{part}' (of {key})")
        config = config[part]
    with config.unlocked(), config.ignore_type():  # the family's Config checks both
        config[name] = value


@contextlib.contextmanager
def opened(values: ConfigDict, batch: int = 0) -> Iterator[tuple[Run, Mesh]]:
    """A run of the config on noise, in a temporary folder, with another batch size of its stages where it is given."""
    config = run_lib.parse(values)[1]
    plain = config_lib.to_plain(config) | {"data": config_lib.to_plain(plan.stand_in(config.data))}
    if batch:
        _set_batch(plain, batch)
    with tempfile.TemporaryDirectory() as folder:
        run = run_lib.check(folder, plain)
        yield run, sharding.make_mesh(run.config.mesh)


def _set_batch(section: dict[str, Any], batch: int) -> None:
    for name, value in section.items():
        if name == "train":
            section[name] = value | {"batch_size": batch, "accumulation": 1}
        elif isinstance(value, dict):
            _set_batch(value, batch)


def trained_stages(run: Run, only: str = "") -> list[Stage]:
    """Those that have a model, or the one that is named."""
    return [run.stage(only)] if only else [stage for stage in run.stages() if stage.model is not None]


def stages(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Run, Stage, Mesh]]:
    """What tells a case from others, and its run, stage and mesh, for every stage that is asked for of all `cases`."""
    for about, config in cases(arguments):
        with opened(config, arguments.batch) as (run, mesh):
            for stage in trained_stages(run, arguments.stage):
                assert stage.settings
                yield about | {"stage": stage.name, "batch": stage.settings.batch_size}, run, stage, mesh


def batch_of(run: Run, stage: Stage, mesh: Mesh) -> PyTree:
    """A batch of the stage's shapes: images of noise, codes 0 and 1, class 0."""
    generator, levels = np.random.Generator(np.random.Philox(0)), facts.of_run(run).levels

    def fill(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name == "position":
            values = np.arange(leaf.shape[0])
        elif name == "label" or leaf.dtype.kind not in "iu":
            values = np.zeros(leaf.shape)
        else:
            values = generator.integers(0, levels if name == "image" else 2, leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return {name: fill(name, leaf) for name, leaf in plan.abstract_batch(run, stage, mesh).items()}


@contextlib.contextmanager
def initial(values: ConfigDict) -> Iterator[Run]:
    """The run as a published one whose weights are the initial ones, so that it samples like a trained run."""
    # Programs that run once: as in `state.create`.
    quickly = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    with opened(values) as (run, _), tempfile.TemporaryDirectory() as made:
        steps, arrays = {}, {}
        for stage in trained_stages(run):
            assert stage.model
            run_lib.write_json(run.folder(stage.name) / "data.json", stage.facts(run) if stage.facts else {})
            params, extra = jax.jit(stage.model(run).init, compiler_options=quickly)(jax.random.key(0))
            named = leaves.by_path({"ema": params, "extra": extra})
            arrays |= {f"{stage.name}/{path}": np.asarray(leaf) for path, leaf in named.items()}
            steps[stage.name] = 1
        published.write(run.workdir, published.Weights(steps, arrays))
        yield run._replace(elsewhere=run_lib.place(made))


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of a call after a first one, medians and least ones; of the clock, and of this process's processors."""
    jax.block_until_ready(call())
    wall, processor = [], []
    for _ in range(repeats):
        starts = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        wall.append(time.perf_counter() - starts[0])
        processor.append(time.process_time() - starts[1])
    return {
        "seconds": statistics.median(wall),
        "least_seconds": min(wall),
        "cpu_seconds": statistics.median(processor),
        "least_cpu_seconds": min(processor),
    }
