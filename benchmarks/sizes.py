"""Parameters of every stage of the VQ-VAE-2 configs, and the memory that its training step takes on each of 8 devices.

    python benchmarks/sizes.py                                                  every published config, hours
    python benchmarks/sizes.py --configs vqvae2_cifar10 --stages top bottom     a part of them
    python benchmarks/sizes.py --parameters                                     without memory, a minute

A JSON line a case, and then all of them as a table. Steps are compiled from shapes alone, for the config's mesh over 8
devices of the CPU, its global batch and its accumulation: nothing is trained or allocated. `arguments_gib` are the
state and the batch on one device, `temporary_gib` what the program needs beside them; their sum has to fit. Programs
are those of an accelerator: micro-batches are scanned and, where `layers` says so, the layers of a prior too. XLA's CPU
backend undoes rematerialisation of unrolled layers and computes bfloat16 in float32: both enlarge what it needs.
Codebooks count as no parameters.
"""

import argparse
import json
import os
import runpy
import tempfile
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from bitsperdim import cli, optim, sharding
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.model import Stage
from vqvae2 import chain

# Edge and number of classes of the images: no data set is opened.
IMAGES = {"imagenet": (256, 1000), "ffhq": (1024, 0), "cifar10": (32, 10), "tiny_imagenet": (64, 200)}
COLUMNS = ("config", "stage", "parameters", "batch", "arguments_gib", "temporary_gib", "layers", "compile_seconds")


def published() -> list[tuple[str, tuple[str, ...]]]:
    """Every config and those of its stages that no config before it has."""
    rows = runpy.run_path(str(cli.find_config("vqvae2_imagenet")))["TABLE_4"]
    return [
        ("vqvae2_imagenet", ("autoencoder", "top", "bottom")),
        ("vqvae2_imagenet:paper", ("autoencoder", "top", "bottom")),
        ("vqvae2_imagenet:small_prior", ("top",)),
        *(("vqvae2_imagenet:table4_b{}_h{}_r{}_a{}".format(*row), ("top",)) for row in rows),
        ("vqvae2_ffhq", ("autoencoder", "top", "middle", "bottom")),
        ("vqvae2_cifar10", ("autoencoder", "top", "bottom")),
        ("vqvae2_tiny_imagenet", ("autoencoder", "top", "bottom")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", help="these alone")
    parser.add_argument("--stages", nargs="+", help="these alone")
    parser.add_argument("--parameters", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    # Our modules choose by it between scanning and unrolling; the program of an accelerator is what is asked for.
    jax.default_backend = lambda: "gpu"
    cases = []
    for name, stages in published():
        if arguments.configs and name not in arguments.configs:
            continue
        with tempfile.TemporaryDirectory() as folder:
            run, scanned = of_shapes(folder, name)
            for stage in map(run.stage, stages):
                if arguments.stages and stage.name not in arguments.stages:
                    continue
                layers = "" if stage.name == "autoencoder" else "scanned" if scanned else "unrolled"
                case = {"config": name, "stage": stage.name, "layers": layers}
                cases.append(case | measure(run, stage, not arguments.parameters))
                print(json.dumps(cases[-1]), flush=True)
    print("\n" + "\n".join(table(cases)))


def of_shapes(folder: str, name: str) -> tuple[run_lib.Run, bool]:
    """A run that knows its images by their shape alone, and whether the layers of its priors are scanned."""
    config = cli.load_config(name)
    _, complete = run_lib.parse(config)
    scanned = hasattr(complete.top.model, "scan")
    for level in complete.levels if scanned else ():
        config[level.split("_")[0]].model.scan = "on"
    run = run_lib.check(folder, config)
    edge, num_classes = IMAGES[name.split(":")[0].removeprefix("vqvae2_")]
    facts = {"shape": [edge, edge, 3], "levels": 256, "num_classes": num_classes, "variance": 0.25}
    run_lib.write_json(run.folder("autoencoder") / "data.json", facts)
    return run, scanned


def measure(run: run_lib.Run, stage: Stage, compiles: bool) -> dict:
    assert stage.model and stage.optim and stage.settings
    model, mesh, settings = stage.model(run), sharding.make_mesh(run.config.mesh), stage.settings
    optimizer = optim.optimizer(stage.optim, settings.steps)
    like = state_lib.abstract(model, optimizer, jax.random.key(0), mesh, run.config.mesh)
    parts = f" in {settings.accumulation}" if settings.accumulation > 1 else ""
    figures = {"parameters": state_lib.num_params(like), "batch": f"{settings.batch_size}{parts}"}
    if not compiles:
        return figures
    step = step_lib.compiled(model, stage.optim, settings, 0, mesh, like)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.over_batch(mesh))
    batch = jax.tree.map(place, abstract_batch(run, stage.name, settings.batch_size))
    start = time.perf_counter()
    # The memory is assigned before the machine code is made, so that need not be fast.
    options = {"xla_backend_optimization_level": "0"}
    memory = step.lower(like, *[batch] * settings.steps_per_dispatch).compile(options).memory_analysis()  # pyright: ignore
    return figures | {
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "compile_seconds": round(time.perf_counter() - start),
    }


def abstract_batch(run: run_lib.Run, name: str, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    edge = run_lib.read_json(run.folder("autoencoder") / "data.json")["shape"][0]
    batch = {"position": jax.ShapeDtypeStruct((size,), jnp.int32), "label": jax.ShapeDtypeStruct((size,), jnp.int32)}
    if name == "autoencoder":
        return batch | {"image": jax.ShapeDtypeStruct((size, edge, edge, 3), jnp.uint8)}
    grids = chain.grids(run)
    return batch | {level: jax.ShapeDtypeStruct((size, *grid), jnp.int32) for level, grid in grids.items()}


def table(cases: list[dict]) -> list[str]:
    """Markdown."""
    cell = lambda value: f"{value:,}" if isinstance(value, int | float) else str(value)
    rows = [[cell(case.get(column, "")) for column in COLUMNS] for case in cases]
    return [f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]]


if __name__ == "__main__":
    main()
