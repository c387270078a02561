"""Time of one training step and of the forward pass of a very deep VAE, with the time to compile them.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 python benchmarks/vdvae_step.py

One JSON line a case. Random images, untrained weights. On CPUs `cpu_seconds` is the median of the process's own time,
which other work on the machine disturbs less than `seconds`; on accelerators `images_per_second` is what counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

from bitsperdim import scripts

scripts.keep_freed_memory()  # as the scripts do, before JAX has threads

import jax
import numpy as np

from bitsperdim import config_files, optim, sharding
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.facts import Facts
from vdvae import model_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="vdvae_cifar10:c1")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scan", choices=("on", "off"), default="on")
    parser.add_argument("--what", nargs="+", choices=("forward", "step"), default=("forward", "step"))
    arguments = parser.parse_args()
    values = config_files.load(arguments.config)
    values.model.scan, values.train.batch_size = arguments.scan == "on", arguments.batch
    config = run_lib.parse(values)[1]
    edge, bits = config.data.image_size or 28, config.data.bits
    facts = Facts((edge, edge, 3), 2**bits) if config.model.output != "bernoulli" else Facts((28, 28, 1), 2)
    model, mesh = model_stage.make(config, facts), sharding.make_mesh(config.mesh)
    optimizer = optim.optimizer(config.optim, config.train.steps)
    like = state_lib.abstract(model, optimizer, jax.random.key(0), mesh, config.mesh)
    state = state_lib.create(model, optimizer, jax.random.key(0), like)
    image = np.random.Generator(np.random.Philox(0)).integers(
        0, facts.levels, (arguments.batch, *facts.shape), np.uint8
    )
    position = np.arange(arguments.batch, dtype=np.int32)
    batch = jax.device_put({"image": image, "position": position}, sharding.over_batch(mesh))
    about = {"config": arguments.config, "batch": arguments.batch, "device": jax.devices()[0].device_kind}
    about |= {"parameters": state_lib.num_params(state), "scan": arguments.scan}
    for what in arguments.what:
        if what == "forward":
            bound = lambda params, batch: model.measure(params, {}, batch, jax.random.key(0)).parts["nats"]
            run = measure(jax.jit(bound), (state["params"], batch), lambda out: (state["params"], batch), arguments)
        else:
            step = step_lib.compiled(model, config.optim, config.train, 0, mesh, like)
            run = measure(step, (state, batch), lambda out: (out[0], batch), arguments)
        print(json.dumps({**about, "what": what, **run}), flush=True)


def measure(function: Callable, first: tuple, following: Callable, arguments: argparse.Namespace) -> dict:
    """Medians over the repeats, the first two calls apart. `following` makes the next arguments of a result."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*first) if not hasattr(function, "lower") else function.lower(*first)
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    inputs, seconds, cpu = first, [], []
    for _ in range(arguments.repeats + 2):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - begun_cpu)
        inputs = following(out)
    median = statistics.median(seconds[2:])
    return {
        "seconds": round(median, 4),
        "cpu_seconds": round(statistics.median(cpu[2:]), 4),
        "images_per_second": round(arguments.batch / median, 2),
        "gflop": round(cost.get("flops", 0.0) / 1e9, 1),
        "compile_seconds": round(compile_seconds, 1),
        "program_kb": round(len(lowered.as_text()) / 1e3),
    }


if __name__ == "__main__":
    main()
