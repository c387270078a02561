"""One stage's training step as variants of its `train` and `model` sections: losses, times, memory. A JSON line a case.

    python benchmarks/step.py --config=vqvae2_cifar10:cpu --data_dir=FOLDER
    python benchmarks/step.py --random --config=vqvae2_imagenet --cases given --steps=6 --set train.batch_size=2 \\
        train.accumulation=1 model.dtype=float32
    python benchmarks/step.py --random --config=vqvae2_imagenet --cases given --steps=4 --stage=top \\
        --set train.batch_size=1 train.accumulation=1 model.dtype=float32 model.remat=False model.hidden=256 \\
        model.residual=512 model.layers=23 model.attention_every=5 model.output_layers=0 model.class_conditional=False

`--random` needs no data set and no stage before this one: images of noise, and for a prior random codes. `objective` is
the mean over the last ten steps; `step_ms` the median after compilation, `step_cpu_seconds` the same in seconds of the
processor, which the machine's other work changes less, `least_cpu_seconds` their minimum; `temporary_mib` what the
compiled program needs beside its arguments. XLA's CPU backend emulates bfloat16, so its time says nothing there. One
thread: XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0. Without the C library's keeping freed memory (any
variable MALLOC_... leaves it as it is) a tenth to a fifth of a step at 256 pixels goes into mapping it anew.
"""

import argparse
import ast
import json
import tempfile
import time

from bitsperdim import scripts

scripts.keep_freed_memory()  # as the scripts do, before JAX has threads

import jax
import numpy as np
from ml_collections import ConfigDict

from bitsperdim import config as config_lib
from bitsperdim import config_files, data, optim, sharding
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.model import Stage
from vqvae2 import chain

CASES: dict[str, dict[str, object]] = {
    "float32": {"model.dtype": "float32"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "accumulation 4": {"train.accumulation": 4},
    "4 steps a dispatch": {"train.steps_per_dispatch": 4},
    "given": {},
}
EXAMPLES = 64  # of random data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="vqvae2_cifar10:cpu")
    parser.add_argument("--stage", default="autoencoder")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--random", action="store_true", help="noise instead of data")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:-1])
    parser.add_argument("--set", nargs="+", default=[], metavar="PART.KEY=VALUE", help="of the stage's section")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    given = dict(argument.split("=", 1) for argument in arguments.set)
    for case in arguments.cases:
        config = config_files.load(arguments.config)
        config.data.data_dir = arguments.data_dir
        if arguments.random:
            size = config.data.image_size
            config.data = {"source": "synthetic", "image_size": size, "synthetic_size": EXAMPLES}
        section = config[arguments.stage]
        for key, value in ({key: literal(value) for key, value in given.items()} | CASES[case]).items():
            part, name = key.split(".")
            section[part] = ConfigDict(section[part].to_dict() | {name: value})
        with tempfile.TemporaryDirectory() as folder:
            run = run_lib.check(folder, config_lib.to_plain(config.to_dict()))
            figures = measure(run, arguments.stage, arguments.steps, arguments.random)
        print(json.dumps({"case": case, "stage": arguments.stage, **given, **figures}), flush=True)


def literal(text: str) -> object:
    """A number, a tuple, a truth value, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def open_source(run: run_lib.Run, stage: Stage, is_random: bool) -> data.Source:
    assert stage.source
    if not is_random or stage.name == "autoencoder":
        return stage.source(run, "train")
    num_codes, generator = run.config.autoencoder.model.num_codes, np.random.Generator(np.random.Philox(0))
    grids = chain.grids(run)
    codes = {level: generator.integers(0, num_codes, (EXAMPLES, *grid), np.int32) for level, grid in grids.items()}
    codes["label"] = np.zeros(EXAMPLES, np.int32)
    read = lambda indices: {name: values[indices] for name, values in codes.items()}
    return data.Source("random codes", EXAMPLES, (*grids[stage.name], 1), num_codes, 1, read)


def measure(run: run_lib.Run, name: str, steps: int, is_random: bool) -> dict[str, float]:
    if is_random:
        edge = run.config.data.image_size
        facts = {"shape": [edge, edge, 3], "levels": 256, "num_classes": 1, "variance": 0.25}
        run_lib.write_json(run.folder("autoencoder") / "data.json", facts)
    stage = run.stage(name)
    assert stage.model and stage.optim and stage.settings
    config, model, mesh = stage.settings, stage.model(run), sharding.make_mesh(run.config.mesh)
    optimizer = optim.optimizer(stage.optim, config.steps)
    like = state_lib.abstract(model, optimizer, jax.random.key(0), mesh, run.config.mesh)
    source, over_batch, each = open_source(run, stage, is_random), sharding.over_batch(mesh), config.steps_per_dispatch
    batches = [data.train_batch(source, 0, index, config.batch_size, over_batch) for index in range(steps)]
    state = state_lib.create(model, optimizer, jax.random.key(0), like)
    start = time.perf_counter()
    compiled = step_lib.compiled(model, stage.optim, config, 0, mesh, like).lower(state, *batches[:each]).compile()  # pyright: ignore
    compile_seconds = time.perf_counter() - start
    times, processor, objectives = [], [], []
    for index in range(0, steps, each):
        start, busy = time.perf_counter(), time.process_time()
        state, report = compiled(state, *batches[index : index + each])
        objectives += np.asarray(report.figures["objective"]).tolist()
        times.append((time.perf_counter() - start) / each)
        processor.append((time.process_time() - busy) / each)
    return {
        "parameters": state_lib.num_params(like),
        "objective": round(float(np.mean(objectives[-10:])), 5),
        "step_ms": round(1e3 * float(np.median(times)), 2),
        "step_cpu_seconds": round(float(np.median(processor)), 3),
        "least_cpu_seconds": round(min(processor), 3),
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "compile_seconds": round(compile_seconds, 1),
    }


if __name__ == "__main__":
    main()
