"""Layers, parameters, memory of a training step and published figures of the very deep VAEs, side by side.

    python -m benchmarks vdvae_sizes --parameters                        all of them, seconds
    python -m benchmarks vdvae_sizes --configs vdvae_cifar10:c1          with the memory of its compiled step, minutes

A JSON line a case, then all as a table. Nothing is trained or allocated: parameters are counted from their table, and
memory is that of the program compiled from shapes for one device of the CPU, with layers in a loop as on an
accelerator and float32 instead of bfloat16. `published_gb` is of all devices together, as far as the paper says;
`published_ratio` is that of VDVAE over it, and `ratio` ours, where `:vdvae` of the same file is among the cases: both
for the batch of each config, whatever its size. XLA's CPU backend undoes rematerialisation outside loops.
"""

import argparse

from benchmarks.record import Record, markdown
from bitsperdim import config_files, facts, plan
from vdvae import layers, vae

# Published: millions of parameters, gigabytes, bits/dim (nats of MNIST). Table 3 and 4, then 1a, 1b, 7, 8 and 9; None
# where the paper does not say. Batch and devices of the memory are those of the paper.
PUBLISHED: dict[str, tuple[float | None, float | None, float | None]] = {
    "vdvae_binary_mnist:released": (None, None, 79.09),
    "vdvae_cifar10:c1": (18, 8, 2.91),
    "vdvae_cifar10:released": (51, 17, 2.87),
    "vdvae_cifar10:vdvae": (39, 32, 2.87),
    "vdvae_imagenet32:c1": (52, 26, 3.60),
    "vdvae_imagenet32:released": (156, 76, 3.58),
    "vdvae_imagenet32:compact": (None, None, None),
    "vdvae_imagenet32:vdvae": (119, 512, 3.80),
    "vdvae_imagenet64:c1": (57, 29, 3.33),
    "vdvae_imagenet64:released": (168, 116, 3.30),
    "vdvae_imagenet64:compact": (None, None, None),
    "vdvae_imagenet64:vdvae": (125, 512, 3.52),
    "vdvae_celeba64:released": (None, None, 1.83),
    "vdvae_celeba64:compact": (None, None, None),
    "vdvae_celebahq256:released_5bit": (None, None, None),
    "vdvae_celebahq256:unbounded": (None, None, 0.51),
    "vdvae_celebahq256:bounded": (None, None, 0.57),
    "vdvae_celebahq256:released_8bit": (None, None, 1.35),
    "vdvae_celebahq256:compact": (None, None, None),
    "vdvae_ffhq256:c1": (66, 101, 0.61),
    "vdvae_ffhq256:released_5bit": (198, 304, 0.60),
    "vdvae_ffhq256:unbounded": (None, None, 0.53),
    "vdvae_ffhq256:bounded": (None, None, 0.60),
    "vdvae_ffhq256:released_8bit": (None, None, 2.17),
    "vdvae_ffhq256:compact": (None, None, None),
    "vdvae_ffhq256:vdvae": (115, 512, 0.61),
    "vdvae_faces1024:celebahq": (None, None, 1.01),
    "vdvae_faces1024:ffhq": (None, None, 2.30),
    "vdvae_faces1024:vdvae": (115, None, 2.42),
    "vdvae_faces1024:table2b_ffhq_unsmoothed": (None, None, None),
    "vdvae_faces1024:table2b_celebahq_unsmoothed": (None, None, None),
    "vdvae_imagenet32:table1a_11_15_19_7_6": (None, 66, 3.63),
    "vdvae_imagenet32:table1a_16_15_19_7_6": (None, 71, 3.61),
    "vdvae_imagenet32:table1a_25_25_19_7_6": (None, 88, 3.58),
    "vdvae_imagenet32:table1a_41_20_10_7_6": (None, 99, 3.59),
    "vdvae_imagenet32:table1b_256": (None, 64, 3.61),
    "vdvae_imagenet32:table1b_32_32_64_128_256": (None, 12, 3.63),
    "vdvae_imagenet32:table1b_64_64_128_256_512": (None, 34, 3.61),
    "vdvae_cifar10:table2a_batch4": (None, None, 3.22),
    "vdvae_cifar10:table2a_batch4_unsmoothed": (None, None, 3.25),
    "vdvae_cifar10:table2a_batch8": (None, None, 3.11),
    "vdvae_cifar10:table2a_batch8_unsmoothed": (None, None, 3.11),
    "vdvae_cifar10:table2a_batch32": (None, None, 2.97),
    "vdvae_cifar10:table2a_batch32_unsmoothed": (None, None, 2.97),
    "vdvae_ffhq256:table7_30": (None, None, 2.27),
    "vdvae_ffhq256:table7_30_unsmoothed": (None, None, 2.28),
    "vdvae_ffhq256:table7_49": (None, None, 2.21),
    "vdvae_ffhq256:table7_49_unsmoothed": (None, None, 2.20),
    "vdvae_ffhq256:table7_66": (None, None, 2.18),
    "vdvae_ffhq256:table7_66_unsmoothed": (None, None, 2.18),
    "vdvae_ffhq256:table7_69_unsmoothed": (None, None, 2.18),
    "vdvae_ffhq256:table7_75": (None, None, 2.17),
    "vdvae_ffhq256:table7_75_unsmoothed": (None, None, 2.17),
    "vdvae_cifar10:table8_22": (None, 13, 2.90),
    "vdvae_cifar10:table8_27": (None, 15, 2.89),
    "vdvae_cifar10:table8_40": (None, 20, 2.87),
    "vdvae_cifar10:table8_47": (None, 22, 2.87),
    "vdvae_cifar10:table9_0": (None, 9, 2.96),
    "vdvae_cifar10:table9_11": (None, 13, 2.91),
}
COLUMNS = (
    *("config", "batch", "bottom_up", "top_down", "parameters_m", "published_m", "state_gib", "temporary_gib"),
    *("published_gb", "ratio", "published_ratio", "published_nll", "tflop", "compile_seconds", "program_kb"),
)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", help="these alone")
    parser.add_argument("--parameters", action="store_true", help="compile nothing")
    parser.add_argument("--batch", type=int, default=0, help="instead of the config's")
    parser.add_argument("--scan", choices=("on", "off"), default="on", help="layers in a loop, or unrolled")
    arguments, record = parser.parse_args(), Record("vdvae_sizes")
    plan.use_devices(1)
    cases = []
    for name in arguments.configs or PUBLISHED:
        cases.append(case(name, arguments.parameters, arguments.batch, arguments.scan))
        of = {key: cases[-1][key] for key in ("config", "batch")}
        record.say("step", of, **{key: value for key, value in cases[-1].items() if key not in of})
    add_ratios(cases)
    print("\n" + "\n".join(markdown(COLUMNS, [[case.get(column) for column in COLUMNS] for case in cases])))


def case(name: str, parameters_only: bool, batch: int, scan: str) -> dict:
    values = config_files.load(name)
    values.model.scan, values.model.dtype = scan == "on", "float32"
    values.train.batch_size = batch or values.train.batch_size
    published, gigabytes, nll = PUBLISHED.get(name, (None, None, None))
    whole = PUBLISHED.get(f"{name.split(':')[0]}:vdvae", (None, None, None))[1]
    with plan.planned(values) as (run, mesh):
        config = run.config
        model = vae.make(config.model, facts.of_run(run))
        pooled = sum(level.stride > 1 for level in model.net.levels) if config.model.style == "vdvae" else 0
        found = {
            "config": name,
            "batch": config.train.batch_size,
            "bottom_up": sum(level.blocks for level in model.net.levels) + pooled,
            "top_down": model.num_layers,
            "parameters_m": round(layers.size(model.net.table) / 1e6, 2),
            "published_m": published,
            "published_gb": gigabytes,
            "published_ratio": round(whole / gigabytes, 2) if whole and gigabytes else None,
            "published_nll": nll,
        }
        return found if parameters_only else found | figures(plan.of_stage(run, run.stage("model"), mesh))


def add_ratios(cases: list[dict]) -> None:
    """VDVAE's memory over that of the other configs of its file."""
    total = {case["config"]: case["state_gib"] + case["temporary_gib"] for case in cases if "state_gib" in case}
    for case in cases:
        whole = total.get(f"{case['config'].split(':')[0]}:vdvae")
        if whole and case["config"] in total:
            case["ratio"] = round(whole / total[case["config"]], 2)


def figures(record: dict) -> dict:
    """Of a record of `bitsperdim.plan`: one training step for the whole batch on one device."""
    temporary = record["bytes"]["temporary"]
    return {
        "state_gib": round((sum(record["bytes"].values()) - temporary) / 2**30, 2),
        "temporary_gib": round(temporary / 2**30, 2),
        "tflop": round(record["flops"] / 1e12, 3),
        "compile_seconds": record["compile_seconds"],
        "program_kb": record["program_kb"],
    }
