"""What images of a VQ-VAE-2 config take to sample, with weights drawn at random: all levels and decoding. JSON lines.

    python benchmarks/sampling.py --config=vqvae2_imagenet --batches 1 16
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 python benchmarks/sampling.py --config=vqvae2_cifar10:cpu

Weights do not change what cached sampling takes. No data set is opened. `seconds` are those of a batch after the one
that compiles, by level and in all; of the processor where that is a CPU. The paper's (supplement, section F), of 256
pixels on its own hardware: 4.5 + 42 minutes an image by whole passes, 4 with caches, 3 with caches in larger batches.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from bitsperdim import config_files, sharding
from bitsperdim import run as run_lib
from vqvae2 import autoencoder_stage, chain


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="vqvae2_imagenet")
    parser.add_argument("--sampler", choices=chain.SAMPLERS, default="cached")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = run_lib.check(folder, config_files.load(arguments.config))
        edge, num_classes = run.config.data.image_size, 1000
        facts = {"shape": [edge, edge, 3], "levels": 256, "num_classes": num_classes, "variance": 0.25}
        run_lib.write_json(run.folder("autoencoder") / "data.json", facts)
        mesh = sharding.make_mesh(run.config.mesh)
        states = {stage.name: state_of(run, stage.name, mesh) for stage in run.stages() if stage.model}
        for batch in arguments.batches:
            case = {"config": arguments.config, "sampler": arguments.sampler, "batch": batch}
            print(json.dumps(case | measure(run, states, mesh, arguments.sampler, batch)), flush=True)


def state_of(run: run_lib.Run, name: str, mesh: jax.sharding.Mesh) -> tuple[PyTree, PyTree]:
    """Weights as sampling has them, and what is kept beside them."""
    params, extra = jax.jit(run.stage(name).model(run).init)(jax.random.key(0))
    return (
        (params, extra)
        if name == "autoencoder"
        else chain.for_drawing(run, name, {"ema": params, "extra": extra}, mesh)
    )


def measure(run: run_lib.Run, states: dict, mesh: jax.sharding.Mesh, sampler: str, batch: int) -> dict[str, float]:
    ids, drawn, seconds = jnp.arange(batch, dtype=jnp.int32), {}, {}
    for level in run.config.levels:
        label = jnp.zeros(batch, jnp.int32) if run.config.prior(level).model.class_conditional else None
        given = *states[level], jax.random.key(0), ids, chain.upper(run, level, drawn), label, 1.0
        sample = chain.draw(run, level, mesh, sampler)
        drawn[level], seconds[level] = timed(lambda sample=sample, given=given: sample(*given)[0])
    decode = autoencoder_stage.coder(run).decode
    _, seconds["decoding"] = timed(lambda: decode(*states["autoencoder"], drawn))
    of_batch = sum(seconds.values())
    figures = {f"seconds_{name}": round(value, 3) for name, value in seconds.items()}
    return figures | {"seconds": round(of_batch, 3), "seconds_per_image": round(of_batch / batch, 4)}


def timed(call: Callable[[], Array | np.ndarray]) -> tuple[Array | np.ndarray, float]:
    """The result of a second call, and its time."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(call())
    start = clock()
    result = jax.block_until_ready(call())
    return result, clock() - start


if __name__ == "__main__":
    main()
