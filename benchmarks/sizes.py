"""Parameters of every stage of the VQ-VAE-2 configs, and the memory that its training step takes on each device.

    python benchmarks/sizes.py --out=sizes.jsonl                                every published config, an hour or two
    python benchmarks/sizes.py --configs vqvae2_cifar10 --stages top bottom     a part of them
    python benchmarks/sizes.py --parameters                                     without memory, a minute
    DEVICES=1 python benchmarks/sizes.py --configs vqvae2_folder                on one device instead of 8

A JSON line a case, and then all of them as a table; what `--out` holds already is not measured again, so that the same
command goes on where it was stopped. Steps are compiled from shapes alone, for the config's mesh over 8
devices of the CPU, its global batch and its accumulation: nothing is trained or allocated. `arguments_gib` are the
state and the batch on one device, `temporary_gib` what the program needs beside them; their sum has to fit. XLA's CPU
backend computes bfloat16 in float32, so an accelerator needs less where the config says bfloat16, up to half of
`temporary_gib`. Codebooks count as no parameters.
"""

import argparse
import difflib
import json
import os
import pathlib
import runpy
import tempfile
import time

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={os.environ.get('DEVICES', '8')}"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from bitsperdim import config_files, optim, sharding
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Stage
from vqvae2 import chain

# Classes of the images: no data set is opened.
CLASSES = {"imagenet": 1000, "tiny_imagenet": 200, "cifar10": 10}
TABLE_5 = ("vq", "ae8", "ae16", "ae32", "ae64")
COLUMNS = ("config", "stage", "parameters", "batch", "arguments_gib", "temporary_gib", "sum_gib", "compile_seconds")


def published() -> list[tuple[str, tuple[str, ...]]]:
    """Every config and those of its stages that no config before it has."""
    rows = runpy.run_path(str(config_files.find("vqvae2_imagenet")))["TABLE_4"]
    return [
        ("vqvae2_imagenet", ("autoencoder", "top", "bottom")),
        ("vqvae2_imagenet:paper", ("bottom",)),
        ("vqvae2_imagenet:small_prior", ("top",)),
        *(("vqvae2_imagenet:table4_b{}_h{}_r{}_a{}".format(*row), ("top",)) for row in rows),
        *((f"vqvae2_imagenet:table5_{row}", ("autoencoder", "top")) for row in TABLE_5),
        ("vqvae2_ffhq", ("autoencoder", "top", "middle", "bottom")),
        ("vqvae2_ffhq:paper", ("middle", "bottom")),
        *(
            (f"vqvae2_{name}", ("autoencoder", "top", "bottom"))
            for name in ("folder", "tiny_imagenet", "cifar10", "photos")
        ),
        ("vqvae2_photos:pixels", ("pixels",)),
    ]


def chosen(configs: list[str] | None, stages: list[str] | None) -> list[tuple[str, list[str]]]:
    """The published cases of these names; all of them without names. Raises InputError for one that there is not."""
    cases = dict(published())
    known = {"config": list(cases), "stage": list(dict.fromkeys(stage for row in cases.values() for stage in row))}
    for what, given in (("config", configs), ("stage", stages)):
        for name in given or ():
            if name not in known[what]:
                near = difflib.get_close_matches(name, known[what], n=1, cutoff=0.0)[0]
                raise InputError(f"there is no {what} '{name}' here; did you mean '{near}'?")
    chosen = {name: [stage for stage in row if stage in (stages or row)] for name, row in cases.items()}
    return [(name, row) for name, row in chosen.items() if name in (configs or cases) and row]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", help="these alone")
    parser.add_argument("--stages", nargs="+", help="these alone")
    parser.add_argument("--parameters", action="store_true", help="compile nothing")
    parser.add_argument("--out", help="a file of JSON lines, added to")
    arguments = parser.parse_args()
    try:
        wanted = chosen(arguments.configs, arguments.stages)
    except InputError as error:
        parser.error(str(error))
    # Convolutions choose by it between their forms; that of an accelerator is what is asked for.
    jax.default_backend = lambda: "gpu"
    cases, done = [], measured(arguments.out) if arguments.out else {}
    for name, stages in wanted:
        with tempfile.TemporaryDirectory() as folder:
            run = of_shapes(folder, name)
            for stage in map(run.stage, stages):
                case = done.get((name, stage.name))
                if case is None:
                    case = {"config": name, "stage": stage.name} | measure(run, stage, not arguments.parameters)
                    print(line := json.dumps(case), flush=True)
                    if arguments.out:
                        with open(arguments.out, "a") as stream:
                            print(line, file=stream)
                cases.append(case)
    print("\n" + "\n".join(table(cases)))


def measured(path: str) -> dict[tuple[str, str], dict]:
    """The cases of an earlier start, by config and stage."""
    lines = pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []
    return {(case["config"], case["stage"]): case for case in map(json.loads, lines)}


def of_shapes(folder: str, name: str) -> run_lib.Run:
    """A run that knows its images by their shape alone."""
    run = run_lib.check(folder, config_files.load(name))
    edge, num_classes = run.config.data.image_size, CLASSES.get(name.split(":")[0].removeprefix("vqvae2_"), 0)
    facts = {"shape": [edge, edge, 3], "levels": 256, "num_classes": num_classes, "variance": 0.25}
    run_lib.write_json(run.folder("autoencoder") / "data.json", facts)
    return run


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
        "sum_gib": round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30, 2),
        "compile_seconds": round(time.perf_counter() - start),
    }


def abstract_batch(run: run_lib.Run, name: str, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    edge = run_lib.read_json(run.folder("autoencoder") / "data.json")["shape"][0]
    batch = {"position": jax.ShapeDtypeStruct((size,), jnp.int32), "label": jax.ShapeDtypeStruct((size,), jnp.int32)}
    if name == "autoencoder":
        return batch | {"image": jax.ShapeDtypeStruct((size, edge, edge, 3), jnp.uint8)}
    of_level = lambda level, grid: jax.ShapeDtypeStruct((size, *grid, *chain.values(run, level)[1]), jnp.int32)
    return batch | {level: of_level(level, grid) for level, grid in chain.shapes(run).items()}


def table(cases: list[dict]) -> list[str]:
    """Markdown."""
    cell = lambda value: f"{value:,}" if isinstance(value, int | float) else str(value)
    rows = [[cell(case.get(column, "")) for column in COLUMNS] for case in cases]
    return [f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]]


if __name__ == "__main__":
    main()
