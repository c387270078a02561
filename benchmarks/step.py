"""One stage's training step as variants of its `train` and `model` sections: losses, times, memory. A JSON line a case.

    python benchmarks/step.py --config=vqvae2_cifar10:cpu --data_dir=FOLDER

`objective` is the mean over the last ten steps; `step_ms` the median after compilation, `temporary_mib` what the
compiled program needs beside its arguments. XLA's CPU backend emulates bfloat16, so its time says nothing there.
"""

import argparse
import json
import tempfile
import time

import jax
import numpy as np

from bitsperdim import cli, data, optim, sharding
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib

CASES: dict[str, dict[str, object]] = {
    "float32": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "accumulation 4": {"train.accumulation": 4},
    "4 steps a dispatch": {"train.steps_per_dispatch": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="vqvae2_cifar10:cpu")
    parser.add_argument("--stage", default="autoencoder")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    for case, changes in CASES.items():
        config = cli.load_config(arguments.config)
        config.data.data_dir = arguments.data_dir
        section = config[arguments.stage]
        for key, value in changes.items():
            part, name = key.split(".")
            section[part] = section[part].to_dict() | {name: value}
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(run_lib.check(folder, config), arguments.stage, arguments.steps)
        print(json.dumps({"case": case, "stage": arguments.stage, **figures}), flush=True)


def measure(run: run_lib.Run, name: str, steps: int) -> dict[str, float]:
    stage = run.stage(name)
    assert stage.model and stage.source and stage.optim and stage.settings
    config, model, mesh = stage.settings, stage.model(run), sharding.make_mesh(run.config.mesh)
    optimizer = optim.optimizer(stage.optim, config.steps)
    like = state_lib.abstract(model, optimizer, jax.random.key(0), mesh, run.config.mesh)
    source, over_batch, each = stage.source(run, "train"), sharding.over_batch(mesh), config.steps_per_dispatch
    batches = [data.train_batch(source, 0, index, config.batch_size, over_batch) for index in range(steps)]
    state = state_lib.create(model, optimizer, jax.random.key(0), like)
    start = time.perf_counter()
    compiled = step_lib.compiled(model, stage.optim, config, 0, mesh, like).lower(state, *batches[:each]).compile()  # pyright: ignore
    compile_seconds = time.perf_counter() - start
    times, objectives = [], []
    for index in range(0, steps, each):
        start = time.perf_counter()
        state, report = compiled(state, *batches[index : index + each])
        objectives += np.asarray(report.figures["objective"]).tolist()
        times.append((time.perf_counter() - start) / each)
    return {
        "objective": round(float(np.mean(objectives[-10:])), 5),
        "step_ms": round(1e3 * float(np.median(times)), 2),
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "compile_seconds": round(compile_seconds, 1),
    }


if __name__ == "__main__":
    main()
