"""Time of drawing images from any config, with weights before training, or from a trained run.

    python -m benchmarks samplers --config=vqvae2_imagenet --batches 1 16
    python -m benchmarks samplers --config=flows_cifar10 --batches 1 4 16 --vary model.inverse lines fixed_point
    python -m benchmarks samplers --workdir=published/arm_binary_mnist-cpu --samplers cached fixed_point:8 modules

`seconds` are medians of a batch after the one that compiles, with all that `run.sample` does; `cpu_seconds` those of
the process's processors. Weights do not change what a flow, a VAE or cached sampling takes; how many calls predictive
sampling saves is a matter of trained ones (`sample.py --compare_samplers` measures all of these, over seeds). The
paper's VQ-VAE-2 (supplement, section F), 256 pixels on its own hardware: 4.5 + 42 minutes an image by whole passes, 4
with caches, 3 with caches in larger batches.
"""

import argparse
import inspect

import jax

from benchmarks import untrained
from benchmarks.record import Record
from bitsperdim import run as run_lib
from bitsperdim import sharding
from bitsperdim.errors import InputError
from bitsperdim.run import Run


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    untrained.add_flags(parser, "flows_cifar10")
    parser.add_argument("--workdir", default="", help="a trained or published run instead of --config")
    parser.add_argument("--samplers", nargs="+", default=[""], help="of an autoregressive model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images drawn at once")
    parser.add_argument("--repeats", type=int, default=3, help="of each time")
    arguments, record = parser.parse_args(), Record("samplers")
    if arguments.workdir:
        run = run_lib.open_run(arguments.workdir)
        measure(record, {"run": run.workdir.name}, run, arguments)
    for about, config in untrained.cases(arguments) if not arguments.workdir else ():
        with untrained.initial(config) as run:
            measure(record, about, run, arguments)
    record.end()


def measure(record: Record, about: dict, run: Run, arguments: argparse.Namespace) -> None:
    """Every sampler at every batch."""
    loaded = run.family.load(run, sharding.mesh_at_hand(run.config.mesh))
    known = inspect.signature(loaded.draw).parameters
    for sampler in arguments.samplers:
        if sampler and "sampler" not in known:
            raise InputError(f"a run of {run.family.__name__} has one sampler; leave out --samplers")
        for size in arguments.batches:
            given = {"batch_size": size, "sampler": sampler}
            options = {name: value for name, value in given.items() if name in known and value}
            draw = lambda options=options, size=size: loaded.draw(jax.random.key(0), size, **options)[0]
            times = untrained.timed(draw, arguments.repeats)
            of = about | {"sampler": sampler or "default", "batch": size}
            record.say("draw", of, **times, seconds_per_image=times["seconds"] / size)
