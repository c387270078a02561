"""Flows: training steps, sampling, how masked convolutions are inverted, memory. A JSON line a case.

    taskset -c 0 python benchmarks/macow.py train sample              MaCow's CIFAR-10 model, one thread
    taskset -c 0 python benchmarks/macow.py train sample --config=flows_cifar10:glow
    taskset -c 0 python benchmarks/macow.py sample --batches 1 4 16 64
    taskset -c 0 python benchmarks/macow.py train --memory plain remat reversible --config=flows_cifar10:glow
    python benchmarks/macow.py memory --config=flows_cifar10:glow     temporary memory by `memory` and depth

`cpu_seconds` is the least processor time of some calls after compilation, which other work on the machine disturbs
least; `seconds` the least wall time. Weights are those after the data-dependent start, images are noise.
"""

import argparse
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

from bitsperdim import scripts

scripts.keep_freed_memory()  # as the scripts do, before JAX has threads

import jax
import jax.numpy as jnp

from bitsperdim import config_files, optim, plan, rng
from bitsperdim import run as run_lib
from bitsperdim.facts import Facts
from flows import density, stage
from flows.config import Config, ModelConfig


def main() -> None:
    cases = {"train": train, "sample": sample, "memory": memory}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=cases)
    parser.add_argument("--config", default="flows_cifar10")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--scan", nargs="+", default=["on"], choices=("on", "off"))
    parser.add_argument("--memory", nargs="+", help="what a training step keeps; default the config's")
    parser.add_argument("--inverse", nargs="+", default=["lines", "fixed_point"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.cases:
        cases[name](arguments)


def opened(name: str) -> tuple[Config, Facts]:
    """A config, and what its images are like: no data set is opened."""
    _, config = run_lib.parse(config_files.load(name))
    return config, plan.facts_of(config.data)


def batch_of(about: Facts, size: int) -> tuple[jax.Array, jax.Array]:
    images = jax.random.randint(jax.random.key(1), (size, *about.shape), 0, about.levels).astype(jnp.uint8)
    return images, rng.per_example(jax.random.key(2), jnp.arange(size))


def train(arguments: argparse.Namespace) -> None:
    config, about = opened(arguments.config)
    for scan, kept in itertools.product(arguments.scan, arguments.memory or [config.model.flow.memory]):
        flow = dataclasses.replace(config.model.flow, memory=kept)
        model = density.make(dataclasses.replace(config.model, flow=flow, scan=scan == "on"), about)
        params = started(model, about)
        optimizer = optim.optimizer(config.optim, config.train.steps)
        moments = jax.jit(optimizer.init)(params)

        def step(params, moments, images, keys, model=model, optimizer=optimizer):
            loss = lambda params: -model.log_weights(params, images, keys, 1)[0].mean()
            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return jax.tree.map(jnp.add, params, updates), moments

        about_case = {"case": "training step", "config": arguments.config, "scan": scan, "memory": kept}
        for size in arguments.batches[:1]:
            images, keys = batch_of(about, size)
            # Buffers are reused, as those of a training run are.
            figures = measured(step, (params, moments, images, keys), arguments.repeats, donated=2)
            print(json.dumps(about_case | {"batch": size, **figures}), flush=True)


def sample(arguments: argparse.Namespace) -> None:
    for inverse in arguments.inverse:
        config, about = opened(arguments.config)
        model = density.make(dataclasses.replace(config.model, inverse=inverse), about)
        params = started(model, about)
        for size in arguments.batches:
            keys = rng.per_example(jax.random.key(3), jnp.arange(size))
            draw = lambda params, keys: model.decode(params, stage.normal_latents(model, keys, 1.0))  # noqa: B023
            figures = measured(draw, (params, keys), arguments.repeats)
            case = {"case": "sampling", "config": arguments.config, "inverse": inverse, "batch": size}
            print(json.dumps(case | figures), flush=True)


def started(model: density.Density, about: Facts) -> dict:
    """Parameters after the data-dependent start on 8 images."""
    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    begun = jax.jit(
        lambda *batch: model.init_from_batch(model.init(jax.random.key(0)), *batch), compiler_options=options
    )
    return begun(*batch_of(about, 8))


def measured(function: Callable, inputs: tuple, repeats: int, donated: int = 0) -> dict[str, float]:
    """Times after compilation. The first `donated` inputs are given away, and are the outputs of the call before."""
    start = time.perf_counter(), time.process_time()
    compiled = jax.jit(function, donate_argnums=tuple(range(donated))).lower(*inputs).compile()
    compilation = time.perf_counter() - start[0], time.process_time() - start[1]
    given, rest = jax.tree.map(jnp.copy, inputs[:donated]), inputs[donated:]
    wall, cpu = [], []
    for _ in range(repeats + 1):
        starts = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(compiled(*given, *rest))
        wall.append(time.perf_counter() - starts[0])
        cpu.append(time.process_time() - starts[1])
        given = found if donated else ()
    memory = compiled.memory_analysis()
    return {
        "cpu_seconds": round(min(cpu[1:]), 3),
        "seconds": round(min(wall[1:]), 3),
        "compile_cpu_seconds": round(compilation[1], 1),
        "compile_seconds": round(compilation[0], 1),
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 1),
    }


def memory(arguments: argparse.Namespace) -> None:
    """What a gradient keeps, by `memory`, at the config's depth and twice it. Scanned, as on an accelerator.

    `mib_an_image` is what one image more in the batch adds to the temporary memory. The rest of it is as large as the
    parameters: kernels with their norm applied, and the gradients of these.
    """
    config, about = opened(arguments.config)
    size = arguments.batches[0]
    for kept in ("plain", "remat", *(("reversible",) if config.model.flow.kind == "glow" else ())):
        for factor in (1, 2):
            steps = tuple(tuple(factor * count for count in level) for level in config.model.flow.steps)
            flow = dataclasses.replace(config.model.flow, memory=kept, steps=steps)
            changed: ModelConfig = dataclasses.replace(config.model, flow=flow, scan=True)
            model = density.make(changed, about)
            params = jax.eval_shape(model.init, jax.random.key(0))
            loss = lambda params, images, keys: -model.log_weights(params, images, keys, 1)[0].mean()  # noqa: B023

            def temporary(size: int, loss: Callable = loss, params: dict = params) -> float:
                # The memory is assigned before the machine code is made, so that need not be fast.
                options = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
                compiled = jax.jit(jax.value_and_grad(loss)).lower(params, *batch_of(about, size)).compile(options)
                return compiled.memory_analysis().temp_size_in_bytes / 2**20

            found = [temporary(batch) for batch in (size, 2 * size)]
            case = {"case": "gradient", "config": arguments.config, "memory": kept, "steps": steps, "batch": size}
            case |= {"parameter_mib": round(sum(4 * leaf.size for leaf in jax.tree.leaves(params)) / 2**20, 1)}
            case |= {"temporary_mib": round(found[0], 1), "mib_an_image": round((found[1] - found[0]) / size, 2)}
            print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
