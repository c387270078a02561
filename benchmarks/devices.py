"""One stage of every family on 1, 8, 64 and 128 devices: memory, traffic, and how well it should scale.

    python -m benchmarks devices --out=devices.jsonl                    all of it, a quarter of an hour of a core
    python -m benchmarks devices --configs vqvae2_imagenet --stages top --counts 8 64

A JSON line a case, and then all of them as a table; what `--out` holds already is not compiled again, so that the same
command goes on where it was stopped. Steps are compiled from shapes alone, over devices of the CPU, with a batch that
grows with the devices (weak scaling): nothing is trained or allocated. Bytes are those on one device.

The efficiency is an estimate, from the time of a step on one device over that on all. A step takes the longer of

    arithmetic        FLOP at 40 % of the peak of bfloat16 products
    memory traffic    what products and convolutions read and write, at 80 % of the peak

on one device, and on several the collectives too, an all-reduce twice its bytes x (n - 1) / n, others once, at the peak
of LINKS. Both ends are given: nothing of them overlaps, all of it does. Latencies, stragglers and reading are left out.
"""

import argparse
import math
from typing import NamedTuple

from benchmarks.record import Record, markdown
from bitsperdim import config_files, plan

COUNTS = (1, 8, 64, 128)
MEMORY_UTILISATION = 0.8
MEMORY = {"v4": 1.2e12, "h100": 3.35e12}  # bytes a second, by the vendors
# Bytes a second that a device can send. v4: 50e9 on each of 3 links in a block of 2x2x2, 6 in the tori 4x4x4 and 4x4x8.
# H100: NVLink in a node of 8; between nodes 8 adapters of 50e9, which reductions by node and then between nodes share.
LINKS = {"v4": {1: 1.0, 8: 150e9, 64: 300e9, 128: 300e9}, "h100": {1: 1.0, 8: 450e9, 64: 400e9, 128: 400e9}}
KINDS = ("all-reduce", "all-gather")


class Case(NamedTuple):
    config: str
    stage: str
    section: str  # of its settings
    each: int  # examples on each device
    fsdp: int  # of so many devices, where there are as many


# The batch of each device is that of the published one, over the devices that the config is meant for.
CASES = (
    Case("vqvae2_imagenet", "top", "top.train", 128, 8),
    Case("vdvae_cifar10:c1", "model", "train", 32, 1),
    Case("flows_cifar10", "model", "train", 64, 1),
    Case("arm_cifar10", "arm", "arm.train", 64, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=[case.config for case in CASES], help="these alone")
    parser.add_argument("--stages", nargs="+", default=[case.stage for case in CASES], help="these alone")
    parser.add_argument("--counts", nargs="+", type=int, choices=COUNTS, default=COUNTS, help="of devices")
    parser.add_argument("--out", help="a file of JSON lines, added to")
    arguments = parser.parse_args()
    plan.use_devices(max(arguments.counts))
    record, shown = Record("devices", arguments.out), []
    for case in CASES:
        if case.config not in arguments.configs or case.stage not in arguments.stages:
            continue
        for count in arguments.counts:
            of = {"config": case.config, "count": count}
            line = record.known(case.stage, of) or record.say(case.stage, of, **compiled(case, count))
            shown.append(line["of"] | line["figures"])
    print("\n" + "\n".join(table(shown)))


def compiled(case: Case, count: int) -> dict:
    """Of a case on so many devices, as `bitsperdim.plan` has it."""
    values = config_files.load(case.config)
    values.mesh = {"data": -1, "fsdp": min(case.fsdp, count)}
    values.update_from_flattened_dict({f"{case.section}.batch_size": case.each * count})
    with plan.planned(values, count) as (run, mesh):
        return {"stage": case.stage} | plan.of_stage(run, run.stage(case.stage), mesh)


def seconds(record: dict, one: dict, name: str) -> tuple[float, float]:
    """Of a step on a chip: what each device computes, as `one` device does, and what the collectives take."""
    kind, count = plan.CHIPS[name], record["count"]
    times = plan.on_chip(record, kind._replace(link=LINKS[name][count]))
    return max(times["arithmetic"], one["product_bytes"] / (MEMORY_UTILISATION * MEMORY[name])), times["traffic"]


def efficiency(record: dict, one: dict, name: str) -> tuple[float, float]:
    """Where nothing of the collectives overlaps with the rest, and where all of it does."""
    alone, (computed, sent) = sum(seconds(one, one, name)), seconds(record, one, name)
    return alone / (computed + sent), alone / max(computed, sent)


def table(records: list[dict]) -> list[str]:
    """Markdown, a line a record; efficiencies where the same was compiled for one device."""
    ones = {(record["config"], record["stage"]): record for record in records if record["count"] == 1}
    columns = ["config, stage, batch", "devices", "state, GiB", "temporary, GiB"]
    columns += [f"{kind}, MiB" for kind in (*KINDS, "others")]
    rows = []
    for record in records:
        axes, held, moved = record["devices"], record["bytes"], record["traffic"]
        mesh = f"{record['count']} ({axes['data']} x {axes['fsdp']})" if axes["fsdp"] > 1 else f"{record['count']}"
        state = sum(value for name, value in held.items() if name != "temporary")
        mebi = lambda kinds, moved=moved: f"{sum(moved[kind]['bytes'] for kind in kinds if kind in moved) / 2**20:,.1f}"
        others = [kind for kind in moved if kind not in KINDS]
        row = [
            f"`{record['config']}` {record['stage']}, {record['batch_size']:,}",
            mesh,
            f"{state / 2**30:.2f}",
            f"{held['temporary'] / 2**30:.2f}",
        ]
        row += [*(mebi([kind]) for kind in KINDS), mebi(others)]
        one = ones.get((record["config"], record["stage"]))
        for name in LINKS:
            least, most = efficiency(record, one, name) if one else (math.nan, math.nan)
            row.append(f"{least:.1%} to {most:.1%}" if one and record["count"] > 1 else "")
        rows.append(row)
    return markdown([*columns, *LINKS], rows)
