"""What the loop costs beside the model: reading images, the host's work per step, waiting for data.

    python -m benchmarks loop --name=cifar10:3.0.2 --data_dir=FOLDER

`decode` opens the data set with an empty cache; `first_pass` and `warm` read all of it in shuffled batches from the
memmap; `empty_step` is the whole training loop around a step that computes next to nothing (aim: below 0.3 ms), with
batches so small that reading them costs nothing, then with whole ones, which a thread reads on the same cores;
`waiting` is the share of a 20 ms step, kept busy on the device, that the loop waits for its batch (aim: below 2 %).
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.record import Record
from bitsperdim import data, sharding, trainer
from bitsperdim.model import Aux, Model, Stage
from bitsperdim.optim import OptimConfig
from bitsperdim.run import Run
from bitsperdim.sharding import MeshConfig
from bitsperdim.signals import Signals
from bitsperdim.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    mesh: MeshConfig


RECORD = Record("loop")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="cifar10", help="TFDS data set")
    parser.add_argument("--data_dir", default="", help="of TFDS; default: its usual folder")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = data.DataConfig("tfds", name=arguments.name, data_dir=arguments.data_dir, cache_dir=folder)
        source = decode(config)
        read_all(source, arguments.batch_size)
        mesh = sharding.make_mesh(MeshConfig())
        for batch_size in (8, arguments.batch_size):
            empty_step(source, batch_size, mesh, pathlib.Path(folder) / f"run-{batch_size}")
        waiting(source, arguments.batch_size, mesh)
    RECORD.end()


def decode(config: data.DataConfig) -> data.Source:
    start = time.perf_counter()
    source = data.open_source(config, "train")
    say("decode", images_per_second=source.size / (time.perf_counter() - start))
    return source


def read_all(source: data.Source, batch_size: int) -> None:
    for case, epoch in (("first_pass", 0), ("warm", 1)):
        start = time.perf_counter()
        for begin in range(0, source.size, batch_size):
            count = min(batch_size, source.size - begin)
            source.read(data.train_indices(source.size, 0, epoch * source.size + begin, count))
        say(case, images_per_second=source.size / (time.perf_counter() - start), batch_size=batch_size)


def empty_step(source: data.Source, batch_size: int, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> None:
    """The difference of a long and a short run, so that compilation and the last save cancel; the median of five."""
    times = []
    for repeat in range(5):
        seconds = {}
        for steps in (200, 2200):
            folder = workdir / f"{steps}-{repeat}"
            start = time.perf_counter()
            run = Run(epath.Path(folder), Config(0, MeshConfig()), sys.modules[__name__])
            with Signals() as signals:
                trainer.train_stage(run, _stage(source, batch_size, steps), mesh, signals)
            seconds[steps] = time.perf_counter() - start
        times.append((seconds[2200] - seconds[200]) / 2000)
    say("empty_step", host_ms_per_step=1e3 * float(np.median(times)), batch_size=batch_size)


def waiting(source: data.Source, batch_size: int, mesh: jax.sharding.Mesh, steps: int = 200) -> None:
    matrix = jnp.ones((1024, 1024))
    work = jax.jit(lambda x, repeats: jax.lax.fori_loop(0, repeats, lambda _, y: x @ y / 1024, x))
    repeats = _repeats_for(work, matrix, seconds=0.020)
    over_batch = sharding.over_batch(mesh)
    make = lambda step: data.train_batch(source, 0, step, batch_size, over_batch)
    batches, waited = data.prefetch(make, 0, steps), []
    start = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - before)
        work(matrix, repeats).block_until_ready()
    total = time.perf_counter() - start
    say("waiting", share_percent=100 * sum(waited[1:]) / total, step_ms=1e3 * total / steps, batch_size=batch_size)


def _repeats_for(work, matrix: jax.Array, seconds: float) -> int:
    work(matrix, 1).block_until_ready()
    start = time.perf_counter()
    work(matrix, 20).block_until_ready()
    return max(1, round(20 * seconds / (time.perf_counter() - start)))


def _stage(source: data.Source, batch_size: int, steps: int) -> Stage:
    """One parameter, and a loss that reads one pixel of each image."""

    def aux(params, batch) -> Aux:
        return Aux({"value": params["scale"] * batch["image"][:, 0, 0, 0].astype(jnp.float32)}, (), ())

    def loss(params, extra, batch, key, step):
        return aux(params, batch).parts["value"].mean(), aux(params, batch)

    model = Model(
        init=lambda key: ({"scale": jnp.ones(())}, {}),
        loss=loss,
        measure=lambda params, extra, batch, key: aux(params, batch),
        summarize=lambda means, tallies: means,
    )
    small = source._replace(size=batch_size)  # evaluation is not what is measured
    return Stage(
        "model",
        model=lambda run: model,
        source=lambda run, split: source if split == "train" else small,
        pictures=lambda run, mesh: lambda params, extra, key: {},
        optim=OptimConfig("adam", learning_rate=1e-3),
        settings=TrainConfig(batch_size, steps, evaluate_every=10**9, pictures_every=10**9, save_every=10**9),
    )


def say(case: str, **figures: float) -> None:
    of = {"batch_size": figures.pop("batch_size")} if "batch_size" in figures else {}
    RECORD.say(case, of, **figures)
