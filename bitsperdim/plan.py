"""`train.py --plan`: what a run will take on a mesh of accelerators, from programs that are compiled and never run.

    parameters; GiB on each device (weights, average, optimizer, batch, temporary memory of a step); arithmetic; traffic
    between devices; whether it fits a chip, a step's time there, and what would make it fit

The mesh may be larger than this machine: devices are those of the CPU backend, in any number, and shapes stand for the
images. The CPU backend computes bfloat16 in float32, so an accelerator needs less temporary memory where the config
says bfloat16, up to half.
"""

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from bitsperdim import config as config_lib
from bitsperdim import data, program, sharding, tfds_source, trained
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.data import DataConfig
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from bitsperdim.model import Batch, Stage
from bitsperdim.run import Run

GIB = 2**30
UTILISATION = 0.4  # of the peak arithmetic that convolutions and products of well-tuned models reach
USABLE = 0.92  # of the memory: the rest is the runtime's, and lost between allocations
STAND_INS = 64  # images of noise
PARTS = {"params": "weights", "ema": "average", "opt": "optimizer", "extra": "other"}


class Chip(NamedTuple):
    """Peak figures of one device, by its vendor."""

    flops: float  # a second, of bfloat16 products summed in float32
    memory: float  # bytes
    link: float  # bytes a second that it can send to the others


CHIPS = {
    "v3": Chip(61.5e12, 16 * GIB, 70e9),  # one core, which is a device
    "v4": Chip(275e12, 32 * GIB, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 600e9),
    "a100": Chip(312e12, 80 * GIB, 300e9),
    "h100": Chip(989e12, 80 * GIB, 450e9),
}


def chip(name: str) -> Chip:
    """One of CHIPS, or peak figures as 'TFLOPS:GIB:GB_PER_SECOND'."""
    if name in CHIPS:
        return CHIPS[name]
    try:
        tera, gib, giga = (float(number) for number in name.split(":"))
        if not all(0 < number < math.inf for number in (tera, gib, giga)):
            raise ValueError
    except ValueError:
        raise InputError(
            f"chip must be {', '.join(CHIPS)}, or figures as TFLOPS:GIB:GB_PER_SECOND such as 989:80:450, not '{name}'"
        ) from None
    return Chip(tera * 1e12, gib * GIB, giga * 1e9)


def use_devices(count: int) -> None:
    """Makes this process one of `count` devices of the CPU. `InputError` where it has others already."""
    if count < 1:
        raise InputError(f"plan must be a number of devices, not {count}")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise InputError(f"devices are in use already ({error}); plan in a process of its own") from error


def plan(values: ConfigDict | Mapping[str, Any], only: str = "") -> Iterator[dict[str, Any]]:
    """What every trained stage (or the stage `only`) takes on all devices of this process, one record each.

    Bytes are those on one device; arithmetic is that of all. Raises InputError where config, mesh and batch do not fit.
    """
    with planned(values) as (run, mesh):
        if only and run.stage(only).model is None:
            raise InputError(f"stage '{only}' trains no model, so there is nothing to plan")
        for stage in [run.stage(only)] if only else run.stages():
            if stage.model is not None:
                yield {"stage": stage.name} | of_stage(run, stage, mesh)


@contextlib.contextmanager
def planned(values: ConfigDict | Mapping[str, Any], count: int = 0) -> Iterator[tuple[Run, Mesh]]:
    """A run on stand-ins for its images, over the first `count` devices of this process (0: all), whose programs are an
    accelerator's."""
    with tempfile.TemporaryDirectory() as folder, sharding.made_for("gpu"):
        run = run_lib.check(folder, _with_stand_ins(values))
        yield run, sharding.make_mesh(run.config.mesh, jax.devices()[: count or None])


def of_stage(run: Run, stage: Stage, mesh: Mesh, compiles: bool = True) -> dict[str, Any]:
    """The record of one stage; without `compiles` its parameters and bytes of its state alone."""
    assert stage.model and stage.settings and stage.optim
    if not stage.by_rows:
        sharding.check_whole_images(mesh, stage.name)
    model, settings = stage.model(run), stage.settings
    section = config_lib.path_of(settings, run.config)
    sharding.check_batch_size(mesh, section, settings.batch_size, settings.accumulation)
    like, each = trained.abstract_state(run, stage, model, mesh), settings.steps_per_dispatch
    record = {
        "devices": dict(mesh.shape),
        "parameters": state_lib.num_params(like),
        "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
        "steps": settings.steps,
        "section": section,
        "savings": _savings(run.config, section),
        "by_rows": stage.by_rows,
        "bytes": {name: _bytes_on_a_device(like[entry]) for entry, name in PARTS.items()},
    }
    if not compiles:
        return record
    batch = abstract_batch(run, stage, mesh)
    start = time.perf_counter()
    traced = step_lib.compiled(model, stage.optim, settings, 0, mesh, like).trace(like, *[batch] * each)  # pyright: ignore
    # The memory is assigned before the machine code is made, so that need not be fast.
    lowered = traced.lower()
    compiled = lowered.compile({"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False})
    record["bytes"] |= {
        "batch": each * _bytes_on_a_device(batch),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    moved = program.traffic(compiled.as_text())
    return record | {
        "flops": program.flops(traced.jaxpr.jaxpr) // each,
        "product_bytes": program.product_bytes(traced.jaxpr.jaxpr) // each,
        "traffic": {kind: {name: value // each for name, value in of.items()} for kind, of in moved.items()},
        "program_kb": round(len(lowered.as_text()) / 1e3),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def abstract_batch(run: Run, stage: Stage, mesh: Mesh) -> Batch:
    """Shapes, types and places of a batch of a stage."""
    assert stage.source and stage.settings
    if stage.example is not None:
        example = stage.example(run)
    else:
        one = stage.source(run, "train").read(np.arange(1))
        example = {name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in one.items()}
    size, place = stage.settings.batch_size, sharding.over_batch(mesh)
    example["position"] = jax.ShapeDtypeStruct((), jnp.int32)
    whole = lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=place)
    return jax.tree.map(whole, example)


def on_chip(record: Mapping[str, Any], kind: Chip) -> dict[str, float]:
    """Seconds of a step: arithmetic at 40 % of the peak, and after it, as if nothing overlapped, the traffic.

    n devices that reduce or gather in a ring send (n - 1) / n of an array, twice to reduce it on all.
    """
    count = math.prod(record["devices"].values())
    arithmetic = record["flops"] / count / (UTILISATION * kind.flops)
    sent = sum(of["bytes"] * (2 if name == "all-reduce" else 1) for name, of in record["traffic"].items())
    traffic = sent * (count - 1) / count / kind.link
    return {"arithmetic": arithmetic, "traffic": traffic, "step": arithmetic + traffic}


def lines(record: Mapping[str, Any], kind: Chip | None, name: str) -> list[str]:
    """A record for people, as far as `kind` (called `name`) is given with what it would do there."""
    count, parts, held = math.prod(record["devices"].values()), record["accumulation"], record["bytes"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in record["devices"].items())
    micro = f" in {parts} micro-batches" if parts > 1 else ""
    some = ", ".join(f"{part} {_size(value)}" for part, value in held.items() if value)
    moved = ", ".join(f"{name} {_size(of['bytes'])} in {of['count']:,}" for name, of in record["traffic"].items())
    flops = record["flops"] / 1e12
    found = [
        f"{record['stage']}: {record['parameters']:,} parameters on {count} devices ({mesh}), "
        f"batch {record['batch_size']:,}{micro}",
        f"  on each device {_size(sum(held.values()))}: {some}",
        f"  arithmetic of a step: {flops:.3g} TFLOP, {flops / count:.3g} on each device",
        f"  traffic of a step on each device: {moved or 'none'}",
    ]
    if kind is None:
        return found
    times = on_chip(record, kind)
    found.append(
        f"  {name}: a step about {times['step']:.2g} s ({times['arithmetic']:.2g} arithmetic at {UTILISATION:.0%} of "
        f"its peak, {times['traffic']:.2g} traffic), {record['batch_size'] / times['step']:,.0f} examples/s, "
        f"{record['steps'] * times['step'] / 3600:,.1f} h for {record['steps']:,} steps"
    )
    return found + [f"  {line}" for line in _fit(record, kind.memory * USABLE)]


def _fit(record: Mapping[str, Any], memory: float) -> list[str]:
    """Whether it fits, and what would make it."""
    held, devices = record["bytes"], record["devices"]
    count = devices["data"] * devices["fsdp"]
    total, parts = sum(held.values()), record["accumulation"]
    state = total - held["temporary"] - held["batch"]
    if total <= memory:
        return [f"fits: {_size(total)} of {_size(memory)} usable"]
    found = [f"does NOT fit: {_size(total)} of {_size(memory)} usable"]
    whole = state * devices["fsdp"]
    shards = [n for n in range(devices["fsdp"] + 1, count + 1) if count % n == 0]
    fitting = [n for n in shards if whole / n + held["temporary"] + held["batch"] <= memory]
    if state > memory / 2 and shards:
        found.append(f"the state is {_size(state)}: try --config.mesh.fsdp={(fitting or shards[-1:])[0]}")
    most = record["batch_size"] // count
    needed = [n for n in range(parts + 1, most + 1) if most % n == 0]
    enough = [n for n in needed if state + held["temporary"] * parts / n <= memory]
    keys = [f"--config.{key}" for key in record["savings"]]
    keys += [f"--config.{record['section']}.accumulation={(enough or needed[-1:])[0]}"] if needed else []
    keys += [f"--config.mesh.spatial={2 * devices.get('spatial', 1)}"] if record["by_rows"] and not needed else []
    if keys and held["temporary"] > memory / 10:
        found.append(f"the step needs {_size(held['temporary'])} beside it: try {' or '.join(keys)}")
    return [*found, "else more devices, or a smaller batch"]


def _with_stand_ins(values: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The same config on noise of the shape of its images, which need not be at hand."""
    config = run_lib.parse(values)[1]
    plain = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    return plain | {"data": config_lib.to_plain(stand_in(config.data))}


def stand_in(config: DataConfig) -> DataConfig:
    """Noise in the shape, levels and classes of what a data config describes.

    Of TFDS's data sets they are known without the images. Raises InputError where only the images could tell.
    """
    if config.source in ("photos", "digits", "synthetic"):
        return config
    height, width = data.edges(config)
    if config.source == "tfds":
        shape, levels, classes = tfds_source.described(config.name, data.tfds_dir(config))
    elif config.labels or not height:
        source = data.open_source(config, "train")
        shape, levels, classes = source.shape, 256, source.num_classes
    else:
        shape, levels, classes = (height, width, config.channels or 3), 256, 0
    height, width, channels = height or shape[0], width or shape[1], config.channels or shape[2]
    if not (height and width and channels):
        raise InputError(
            f"images of {config.name or config.path} have no size of their own; set data.image_size and data.channels"
        )
    return DataConfig(
        source="synthetic",
        image_height=height,
        image_width=width,
        bits=config.bits,
        binarize=config.binarize,
        labels=config.labels,
        synthetic_size=STAND_INS,
        synthetic_channels=channels,
        synthetic_levels=levels,
        synthetic_classes=classes,
    )


def facts_of(config: DataConfig) -> Facts:
    """Of the images that a data config describes, without opening them."""
    source = data.open_source(stand_in(config), "train")
    return Facts(source.shape, source.levels)


def _savings(config: Any, section: str) -> list[str]:
    """The keys of the model beside these settings that would lessen the memory of its step."""
    model = f"{section.rpartition('.')[0]}.model.".removeprefix(".")
    values = dict(config_lib.flatten(config_lib.to_plain(config)))
    changes = {"remat": ((False, "true"), (0, "1")), "memory": (("plain", "remat"),)}
    found = []
    for name, choices in changes.items():
        now = values.get(model + name)
        found += [f"{model}{name}={other}" for value, other in choices if now == value and type(now) is type(value)]
    return found


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.2f} MiB"


def _bytes_on_a_device(tree: PyTree) -> int:
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


def write(values: ConfigDict, count: int, name: str, only: str, out: str) -> None:
    """Plans for `count` devices, prints what it finds, and adds a JSON line a stage to `out` where it is given."""
    kind = chip(name) if name else None
    use_devices(count)
    for record in plan(values, only):
        print("\n".join(lines(record, kind, name)), flush=True)
        if out:
            with open(out, "a") as file:
                print(json.dumps(record), file=file)
