"""Memory of a training step of any stage of any config, as the compiler plans it on each of some devices.

    python -m benchmarks memory --config=flows_cifar10:glow --batch=4 --vary model.flow.memory plain remat reversible
    python -m benchmarks memory --config=vqvae2_imagenet --devices=8 --set mesh.fsdp=8
    python -m benchmarks memory --config=arm_cifar10 --slope       # also what one image more adds to it

From shapes alone: nothing is trained or allocated. The program is an accelerator's (layers in loops), its devices are
those of the CPU backend, which computes bfloat16 in float32: an accelerator needs less where the config says bfloat16.
`state_mib` are weights, their average, the optimizer and what stands beside them, `temporary_mib` what the step needs
beside state and batch. Of all configs: `sizes` and `vdvae_sizes`. What fits which chip: `train.py --plan`.
"""

import argparse

from benchmarks import untrained
from benchmarks.record import Record
from bitsperdim import plan, sharding

MIB = 2**20


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    untrained.add_flags(parser, "vdvae_cifar10:c1")
    parser.add_argument("--devices", type=int, default=1, help="to compile for")
    parser.add_argument("--slope", action="store_true", help="also at twice the batch")
    arguments, record = parser.parse_args(), Record("memory")
    plan.use_devices(arguments.devices)
    for about, config in untrained.cases(arguments):
        with sharding.made_for("gpu"):
            measure(record, about | {"devices": arguments.devices}, config, arguments)
    record.end()


def measure(record: Record, about: dict, config, arguments: argparse.Namespace) -> None:
    """All stages of one config."""
    with untrained.opened(config, arguments.batch) as (run, mesh):
        stages = untrained.trained_stages(run, arguments.stage)
        plans = {stage.name: plan.of_stage(run, stage, mesh) for stage in stages}
    for name, found in plans.items():
        size, temporary = found["batch_size"], found["bytes"]["temporary"]
        figures = {
            "parameters": found["parameters"],
            "state_mib": (sum(found["bytes"].values()) - temporary - found["bytes"]["batch"]) / MIB,
            "temporary_mib": temporary / MIB,
            "gflop": found["flops"] / 1e9,
        }
        if arguments.slope:
            with untrained.opened(config, 2 * size) as (run, mesh):
                twice = plan.of_stage(run, run.stage(name), mesh)["bytes"]["temporary"]
            figures["mib_an_image"] = (twice - temporary) / size / MIB
        record.say("step", about | {"stage": name, "batch": size}, **figures)
