"""Parameters of every stage of the VQ-VAE-2 configs, and the memory that its training step takes on each device.

    python -m benchmarks sizes --out=sizes.jsonl                                every published config, an hour or two
    python -m benchmarks sizes --configs vqvae2_cifar10 --stages top bottom     a part of them
    python -m benchmarks sizes --parameters                                     without memory, a minute
    python -m benchmarks sizes --configs vqvae2_folder --devices 1              on one device instead of 8

A JSON line a case, and then all of them as a table; what `--out` holds already is not measured again, so that the same
command goes on where it was stopped. Steps are compiled from shapes alone, for the config's mesh over 8
devices of the CPU, its global batch and its accumulation: nothing is trained or allocated. `arguments_gib` are the
state and the batch on one device, `temporary_gib` what the program needs beside them; their sum has to fit. XLA's CPU
backend computes bfloat16 in float32, so an accelerator needs less where the config says bfloat16, up to half of
`temporary_gib`. Codebooks count as no parameters.
"""

import argparse
import difflib
import runpy

from benchmarks.record import Record, markdown
from bitsperdim import config_files, plan
from bitsperdim.errors import InputError

# Not one of TFDS's own data sets, so that without its folder only we know its images.
TINY_IMAGENET = {"source": "synthetic", "image_size": 64, "synthetic_size": 64, "synthetic_classes": 200}
TABLE_5 = ("vq", "ae8", "ae16", "ae32", "ae64")
COLUMNS = (
    *("config", "stage", "parameters", "batch", "arguments_gib", "temporary_gib", "sum_gib"),
    *("tflop", "compile_seconds"),
)


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
            for name in ("folder", "tiny_imagenet", "cifar10", "photos", "digits")
        ),
        ("vqvae2_photos:pixels", ("pixels",)),
        ("vqvae2_digits:pixels", ("pixels",)),
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
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", help="these alone")
    parser.add_argument("--stages", nargs="+", help="these alone")
    parser.add_argument("--parameters", action="store_true", help="compile nothing")
    parser.add_argument("--out", help="a file of JSON lines, added to")
    parser.add_argument("--devices", type=int, default=8, help="of the mesh")
    arguments = parser.parse_args()
    record, cases = Record("sizes", arguments.out), []
    plan.use_devices(arguments.devices)
    for name, stages in chosen(arguments.configs, arguments.stages):
        values = config_files.load(name)
        if name == "vqvae2_tiny_imagenet":
            values.data = TINY_IMAGENET
        with plan.planned(values) as (run, mesh):
            for stage in map(run.stage, stages):
                of = {"config": name, "stage": stage.name}
                line = record.known("step", of)
                if line is None:
                    found = plan.of_stage(run, stage, mesh, compiles=not arguments.parameters)
                    line = record.say("step", of, **figures(found))
                cases.append(line["of"] | line["figures"])
    print("\n" + "\n".join(markdown(COLUMNS, [[case.get(column) for column in COLUMNS] for case in cases])))


def figures(record: dict) -> dict:
    """Of a record of `bitsperdim.plan`."""
    parts = f" in {record['accumulation']}" if record["accumulation"] > 1 else ""
    found = {"parameters": record["parameters"], "batch": f"{record['batch_size']}{parts}"}
    if "flops" not in record:
        return found
    temporary = record["bytes"]["temporary"]
    arguments = sum(record["bytes"].values()) - temporary
    return found | {
        "arguments_gib": round(arguments / 2**30, 2),
        "temporary_gib": round(temporary / 2**30, 2),
        "sum_gib": round((arguments + temporary) / 2**30, 2),
        "tflop": round(record["flops"] / 1e12, 3),
        "compile_seconds": record["compile_seconds"],
    }
