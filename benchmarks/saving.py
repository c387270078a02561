"""What checkpoints cost: seconds to save and to restore the state of a stage, and what a save under way does to steps.

    python -m benchmarks saving --config=vqvae2_folder --stage=bottom --folder=FOLDER
    python -m benchmarks saving --config=vqvae2_cifar10 --stage=bottom --folder=FOLDER --batch_size=4 --saves=3

A JSON line a case. `save`: `blocked_seconds` until training may go on, `seconds` until the checkpoint is committed,
with its hashes, and `synced_seconds` until the system has it on its disk; `restore`: with the check of all hashes, of
files that the system still has in memory. With `--saves` steps are taken on a batch of zeros instead: medians of those
with no save under way (`alone`), of those with one, and of the time that a save makes the loop wait; then what a save
costs in all. `peak_gib` is that of the process. The weights are those of a new run.
"""

import argparse
import functools
import os
import resource
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import Record
from bitsperdim import config_files, optim, plan, sharding, trained
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.checkpoint import Checkpoints

ALONE = 5  # steps before each save


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="name of a config, with a variant")
    parser.add_argument("--stage", required=True, help="whose state is saved")
    parser.add_argument("--folder", help="where the checkpoints go; default: the system's for temporary files")
    parser.add_argument("--batch_size", type=int, default=1, help="of the steps beside it")
    parser.add_argument("--saves", type=int, default=0, help="during training")
    arguments, record = parser.parse_args(), Record("saving")
    say = functools.partial(said, record, {"config": arguments.config, "stage": arguments.stage})
    values = config_files.load(arguments.config)
    with plan.planned(values) as (run, mesh), sharding.made_for(jax.default_backend()):
        stage = run.stage(arguments.stage)
        model = stage.model(run)
        like = trained.abstract_state(run, stage, model, mesh)
        examples = plan.abstract_batch(run, stage, mesh)
        settings = stage.settings
        optimizer, key = optim.optimizer(stage.optim, settings.steps), jax.random.key(0)
        state = jax.block_until_ready(state_lib.create(model, optimizer, key, like))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        arrays = len(jax.tree.leaves(state))
        say("state", parameters=state_lib.num_params(state), gib=size / 2**30, arrays=arrays)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, Checkpoints(folder, keep=1) as checkpoints:
            if arguments.saves:
                step = step_lib.compiled(model, stage.optim, settings, 0, mesh, like)
                batch = {name: jnp.zeros((arguments.batch_size, *x.shape[1:]), x.dtype) for name, x in examples.items()}
                train(say, checkpoints, step, state, batch, arguments.saves)
                return record.end()
            save(say, checkpoints, state, size)
            del state
            start = time.perf_counter()
            restored = jax.block_until_ready(checkpoints.restore(like))
            seconds = time.perf_counter() - start
            assert restored is not None
            say("restore", seconds=seconds, gb_per_second=size / seconds / 1e9)
    return record.end()


def save(say: Callable[..., None], checkpoints: Checkpoints, state, size: int) -> None:
    times = [time.perf_counter()]
    for part in (lambda: checkpoints.save(1, state), checkpoints.wait, os.sync):
        part()
        times.append(time.perf_counter())
    blocked, committed, synced = (after - times[0] for after in times[1:])
    speed = size / committed / 1e9
    say("save", blocked_seconds=blocked, seconds=committed, synced_seconds=synced, gb_per_second=speed)


def train(say: Callable[..., None], checkpoints: Checkpoints, step, state, batch, saves: int) -> None:
    """Steps alone, then a save and steps until it is committed, again and again."""
    alone, beside, waited, done = [], [], [], 0

    def one(state):
        start = time.perf_counter()
        state, report = step(state, batch)
        jax.block_until_ready((state, report))
        return state, time.perf_counter() - start

    state, _ = one(state)
    for _ in range(saves):
        for _ in range(ALONE):
            state, seconds = one(state)
            alone.append(seconds)
        done += 1
        start = time.perf_counter()
        checkpoints.save(done, state)
        waited.append(time.perf_counter() - start)
        while done not in checkpoints.steps():
            state, seconds = one(state)
            beside.append(seconds)
        checkpoints.wait()
    median = lambda values: float(np.median(values)) if values else 0.0
    say("steps", alone=median(alone), beside_a_save=median(beside), save_blocked=median(waited))
    say("of_a_save", steps_beside=len(beside) / saves, lost_seconds=sum(waited) / saves + lost(alone, beside) / saves)


def lost(alone: list[float], beside: list[float]) -> float:
    """Seconds that steps took longer beside saves."""
    return sum(beside) - len(beside) * float(np.median(alone))


def said(record: Record, of: dict[str, str], case: str, **figures: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record.say(case, of, **figures, peak_gib=peak)
