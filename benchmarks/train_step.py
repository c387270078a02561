"""Time of a training step, and of the forward pass, of any stage of any config.

    python -m benchmarks train_step --config=vdvae_cifar10:c1 --batch=4
    python -m benchmarks train_step --config=arm_cifar10:dmol --batch=4              # PixelCNN++ as published, 55 M
    python -m benchmarks train_step --config=flows_cifar10:glow --batch=4 \\
        --vary model.flow.memory plain remat reversible
    python -m benchmarks train_step --config=vqvae2_imagenet --stage=autoencoder --batch=2 \\
        --set autoencoder.model.dtype=float32
    python -m benchmarks train_step --config=vqvae2_imagenet --stage=top --batch=1 --set top.model.dtype=float32 \\
        top.model.remat=False top.model.hidden=256 top.model.residual=512 top.model.layers=23 \\
        top.model.attention_every=5 top.model.output_layers=0 top.model.class_conditional=False

No data set and no stage before this one is needed: images are noise. `seconds` are medians after compilation,
`cpu_seconds` those of the process's processors, which other work on a machine disturbs less, `least_...` the least of
all repeats; `temporary_mib` what the compiled program needs beside its arguments, `gflop` its arithmetic. One thread:
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0. XLA's CPU backend emulates bfloat16: its time says nothing.
"""

import argparse
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks import untrained
from benchmarks.record import Record
from bitsperdim import optim, program, trained
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.model import Stage
from bitsperdim.run import Run


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    untrained.add_flags(parser, "vdvae_cifar10:c1")
    parser.add_argument(
        "--what", nargs="+", choices=("step", "forward"), default=("step", "forward"), help="is measured"
    )
    parser.add_argument("--repeats", type=int, default=7, help="of which the middle one counts")
    arguments, record = parser.parse_args(), Record("train_step")
    for of, run, stage, mesh in untrained.stages(arguments):
        for what in arguments.what:
            record.say(what, of, **measure(run, stage, mesh, what, arguments.repeats))
    record.end()


def measure(run: Run, stage: Stage, mesh: Mesh, what: str, repeats: int) -> dict[str, Any]:
    """The figures of one case. A training step gives its state away, as in training."""
    assert stage.model and stage.settings and stage.optim
    model, settings = stage.model(run), stage.settings
    optimizer = optim.optimizer(stage.optim, settings.steps)
    like = trained.abstract_state(run, stage, model, mesh)
    state = state_lib.create(model, optimizer, jax.random.key(0), like)
    batch, count = untrained.batch_of(run, stage, mesh), 1
    if what == "forward":
        # Its noise and masks are those of an evaluation.
        rows = batch | {"mask": jax.numpy.ones(settings.batch_size, bool)}
        forward = lambda params, extra, batch: model.measure(params, extra, batch, jax.random.key(0)).parts
        traced, given = jax.jit(forward).trace(state["ema"], state["extra"], rows), (state["ema"], state["extra"], rows)
    else:
        count = settings.steps_per_dispatch
        step = step_lib.compiled(model, stage.optim, settings, 0, mesh, like)
        traced, given = step.trace(state, *[batch] * count), ()  # pyright: ignore[reportFunctionMemberAccess]
    compiled, held = traced.lower().compile(), [state]

    def call() -> Any:
        if what == "forward":
            return compiled(*given)
        held[0], report = compiled(held[0], *[batch] * count)
        return held[0], report.figures["objective"]

    times = {name: value / count for name, value in untrained.timed(call, repeats).items()}
    return {
        **times,
        "images_per_second": settings.batch_size / times["seconds"],
        "parameters": state_lib.num_params(like),
        "gflop": program.flops(traced.jaxpr.jaxpr) / count / 1e9,
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
