"""The PixelCNN network alone: one image forward, and one training step. A JSON line a case.

    taskset -c 0 python benchmarks/arm.py
    python benchmarks/arm.py --memory --output=categorical --batch=64    # what a training step needs; runs nothing

The defaults are PixelCNN++ as published (5 resnets, 162 filters, a mixture of 10 logistics, 55 M parameters), on one
thread. `cpu_seconds` is the least processor time of three after compilation, which other work on the machine disturbs
least; `seconds` the least wall time.
"""

import argparse
import json
import os
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

from bitsperdim import scripts

scripts.keep_freed_memory()  # as the scripts do, before JAX has threads

import jax
import jax.numpy as jnp

from arm_forecast import arm_stage
from arm_forecast.config import ArmStageConfig
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import optim
from bitsperdim.optim import OptimConfig
from bitsperdim.step import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--resnets", type=int, default=5)
    parser.add_argument("--filters", type=int, default=162)
    parser.add_argument("--output", default="dmol", choices=("dmol", "categorical"))
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    grid = Grid(arguments.size, arguments.size, arguments.channels, 2**arguments.bits)
    network = NetworkConfig(
        arguments.resnets, arguments.filters, output=arguments.output, weight_norm=arguments.output == "dmol"
    )
    train = OptimConfig("adam", 2e-4)
    config = ArmStageConfig(network, train, TrainConfig(arguments.batch, 1))
    model, optimizer = arm_stage.make(config, grid, "image"), optim.optimizer(train, 1)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    about = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)), **vars(arguments)}

    def batch(size: int) -> dict[str, jax.Array]:
        shape = (size, grid.height, grid.width, grid.channels)
        images = jax.random.randint(jax.random.key(1), shape, 0, grid.values).astype(jnp.uint8)
        return {"image": images, "position": jnp.arange(size), "mask": jnp.ones(size, bool)}

    def step(params, moments, batch):
        loss = lambda params: model.loss(params, {}, batch, jax.random.key(2), jnp.int32(0))[0]
        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return jax.tree.map(jnp.add, params, updates), moments

    if arguments.memory:
        state = shapes, jax.eval_shape(optimizer.init, shapes)
        figures = _memory(step, *state, jax.eval_shape(lambda: batch(arguments.batch)))
        print(json.dumps({"case": "memory of a training step", **about, **figures}), flush=True)
        return
    params, _ = jax.jit(model.init)(jax.random.key(0))
    forward = jax.jit(lambda params, batch: model.measure(params, {}, batch, jax.random.key(2)).parts["nats"])
    print(json.dumps({"case": "forward, one image", **about, **_measure(forward, params, batch(1))}), flush=True)
    moments = jax.jit(optimizer.init)(params)
    figures = _measure(jax.jit(step), params, moments, batch(arguments.batch))
    print(json.dumps({"case": "training step", **about, **figures}), flush=True)


def _memory(function, *shapes) -> dict[str, float]:
    """As the compiler plans it for this kind of device: parameters, moments and batch; all else at its peak."""
    planned = jax.jit(function, donate_argnums=(0, 1)).lower(*shapes).compile().memory_analysis()
    assert planned is not None
    gib = lambda size: round(size / 2**30, 2)
    return {"state_gib": gib(planned.argument_size_in_bytes), "temporary_gib": gib(planned.temp_size_in_bytes)}


def _measure(function, *inputs) -> dict[str, float]:
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    compilation = time.perf_counter() - start
    wall, cpu = [], []
    for _ in range(3):
        starts = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*inputs))
        wall.append(time.perf_counter() - starts[0])
        cpu.append(time.process_time() - starts[1])
    return {
        "cpu_seconds": round(min(cpu), 3),
        "seconds": round(min(wall), 3),
        "first_call_seconds": round(compilation, 1),
    }


if __name__ == "__main__":
    main()
