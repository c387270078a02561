"""Where arrays live: the device mesh, the batch axis, and regex rules that place parameters. No model knows of it.

One idiom serves one core and a pod: `jax.jit` over global arrays with a `NamedSharding`; the compiler places the
collectives. The same config runs on any number of devices, only `mesh` changes.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from bitsperdim.config import at_least
from bitsperdim.errors import InputError

Rules = tuple[tuple[str, tuple[str, ...]], ...]
_PLANNED: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")
_BY_ROWS: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("by_rows", default=None)
BATCH = ("data", "fsdp")  # the axes over which a batch lies
FURTHER = ("model", "spatial")  # those that a mesh has where they are above 1


def platform() -> str:
    """What programs are made for: 'cpu', 'gpu' or 'tpu'."""
    return _PLANNED.get() or jax.default_backend()


@contextlib.contextmanager
def made_for(name: str) -> Iterator[None]:
    """Programs that are traced in here are those of another platform: to find out what they will take there."""
    token = _PLANNED.set(name)
    try:
        yield
    finally:
        _PLANNED.reset(token)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (-1: all remaining devices) and the rules that shard parameters.

    A rule is (regex, axes): the first regex found in a parameter's path decides, and `axes` names a mesh axis, or ''
    for none, for each of the *last* dimensions. A dimension that the axis does not divide stays whole, and so, for
    `rules`, does a parameter of fewer than `smallest` values: each gathering has a price, whatever its size.

    The batch lies over `data` and `fsdp`. What `rules` shard is gathered before it is used; what `model_rules` shard
    over `model` is used as it lies, each device computing its part of a layer's outputs, which are then sent around:
    for models, or batches, that the other two cannot spread far enough.

    `spatial` divides images, and whatever convolutions make of them, by their rows: for images so large that one alone
    needs more than a device has. Neighbours exchange the rows at their borders. Not for models that see pixels or codes
    one after another.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    spatial: int = 1
    rules: Rules = (("(kernel|table)$", ("fsdp",)),)
    smallest: int = 16_384
    model_rules: Rules = (("kernel$", ("model",)),)

    def __post_init__(self) -> None:
        for name in ("data", "fsdp"):
            size = getattr(self, name)
            if size == 0 or size < -1:
                raise ValueError(f"{name} must be a number of devices or -1 (all that remain), not {size}")
        if self.data == self.fsdp == -1:
            raise ValueError("data and fsdp must not both be -1")
        for name in FURTHER:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a number of devices, not {getattr(self, name)}")
        at_least(self, 0, "smallest")
        _check_rules("rules", self.rules, ("data", "fsdp", ""))
        _check_rules("model_rules", self.model_rules, ("model", ""))


def _check_rules(name: str, rules: Rules, known: tuple[str, ...]) -> None:
    for pattern, axes in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} must begin with regular expressions, not {pattern!r} ({error})") from error
        if unknown := set(axes) - set(known):
            axes = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise ValueError(f"{name} must name the axes {axes}, not {sorted(unknown)} for {pattern!r}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp) over `devices` (None: all), with the axes `model` and `spatial` where they are above 1.

    `InputError` when the sizes do not fit the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    further = {name: size for name in FURTHER if (size := getattr(config, name)) > 1}
    fixed = max(config.data, 1) * max(config.fsdp, 1) * math.prod(further.values())
    sizes = {name: count // fixed if size == -1 else size for name, size in vars(config).items() if name in BATCH}
    sizes |= further
    if math.prod(sizes.values()) != count:
        asked = " x ".join(f"mesh.{name}={getattr(config, name)}" for name in sizes)
        remaining = "" if -1 in (config.data, config.fsdp) else "--config.mesh.data=-1 or "
        raise InputError(
            f"{asked} does not use the {count} devices present; set {remaining}sizes whose product is {count}"
        )
    # Explicit axes, the default of make_mesh, fail in gathers and space-to-depth reshapes.
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def mesh_at_hand(config: MeshConfig) -> Mesh:
    """The configured mesh where it fits the devices present, else all of them on the axis `data`.

    For evaluation and sampling, which may happen on another machine than training did.
    """
    try:
        return make_mesh(config)
    except InputError:
        return make_mesh(MeshConfig(rules=config.rules))


def over_batch(mesh: Mesh) -> NamedSharding:
    """Examples over the devices: the leading axis over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


@contextlib.contextmanager
def by_rows(mesh: Mesh) -> Iterator[None]:
    """What is traced in here divides activations by rows over the axis `spatial`, where `mesh` has it."""
    token = _BY_ROWS.set(mesh if "spatial" in mesh.shape else None)
    try:
        yield
    finally:
        _BY_ROWS.reset(token)


def check_whole_images(mesh: Mesh, stage: str) -> None:
    """Raises `InputError` where `mesh` divides images by rows, which the model of this stage cannot."""
    if "spatial" in mesh.shape:
        raise InputError(
            f"mesh.spatial={mesh.shape['spatial']} divides images by rows, which the model of stage '{stage}' cannot; "
            "set it to 1 (--stage=NAME trains another stage with a mesh of its own)"
        )


def divides_rows() -> bool:
    """Are rows divided, inside `by_rows`?"""
    return _BY_ROWS.get() is not None


def over_rows(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The same, inside `by_rows` told where to live: rows over `spatial`, whole where it does not divide them."""
    mesh = _BY_ROWS.get()
    if mesh is None:
        return x
    rows, free = "spatial" if x.shape[1] % mesh.shape["spatial"] == 0 else None, PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(free, rows, free, free)))


def num_batch_shards(mesh: Mesh) -> int:
    """Among how many devices, or groups of them that share their examples, a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch_size(mesh: Mesh, section: str, batch_size: int, parts: int) -> None:
    """Raises `InputError` where a batch of a `section` of the config, in so many micro-batches, cannot be divided."""
    count = num_batch_shards(mesh)
    if batch_size % (parts * count):
        among = f"{count} devices" if count == mesh.size else f"{count} groups of devices (data x fsdp)"
        # More devices need fewer micro-batches for the same memory.
        fewer = [n for n in range(1, parts) if batch_size % (n * count) == 0]
        raise InputError(
            f"{section}.batch_size={batch_size} in {parts} part(s) is not divisible by the {among}; "
            f"use {f'--config.{section}.accumulation={fewer[-1]} or ' if fewer else ''}a multiple of {count * parts}"
        )


def whole_batch(batch_size: int, mesh: Mesh) -> int:
    """The batch size rounded up to what can be divided, for work that pads its last batch anyway."""
    return -(-batch_size // num_batch_shards(mesh)) * num_batch_shards(mesh)


def in_batches(function: Callable[[PyTree], PyTree], rows: PyTree, mesh: Mesh, size: int) -> PyTree:
    """`function` of at most `size` rows at a time, over all devices; its rows, as numpy."""
    count = len(jax.tree.leaves(rows)[0])
    size = whole_batch(min(size, max(count, 1)), mesh)
    parts = []
    for start in range(0, max(count, 1), size):
        # The last batch is filled up: another size would be another program to compile.
        places = np.minimum(np.arange(start, start + size), max(count - 1, 0))
        batch = jax.tree.map(lambda leaf, places=places: leaf[places], rows)
        parts.append(jax.device_get(function(jax.device_put(batch, over_batch(mesh)))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def in_use(place: NamedSharding) -> NamedSharding:
    """Where a parameter that lies at `place` is while it is used: gathered, but for the axis `model`."""
    axes = [tuple(axis for axis in _names(of_dimension) if axis == "model") for of_dimension in place.spec]
    return NamedSharding(place.mesh, PartitionSpec(*axes))


def _names(of_dimension: Any) -> tuple[str, ...]:
    return of_dimension if isinstance(of_dimension, tuple) else (of_dimension,) if of_dimension else ()


def for_state(state: PyTree, config: MeshConfig, mesh: Mesh) -> PyTree:
    """A sharding for every array of an (abstract) train state.

    Optimizer moments and the Polyak average carry the path of their parameter as a suffix, so one set of rules places
    all three alike.
    """

    def place(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        chosen: list[tuple[str, ...]] = [()] * leaf.ndim
        # `model` first: what is left of a dimension where it is gathered over `fsdp` is then one piece.
        for rules in (config.model_rules, config.rules if leaf.size >= config.smallest else ()):
            axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
            for i, axis in zip(range(leaf.ndim - 1, -1, -1), reversed(axes), strict=False):
                pieces = math.prod(mesh.shape[other] for other in (*chosen[i], axis) if other in mesh.shape)
                if axis in mesh.shape and leaf.shape[i] % pieces == 0:
                    chosen[i] += (axis,)
        # One axis by its name, which is how an array tells its place.
        return NamedSharding(mesh, PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in chosen)))

    return jax.tree_util.tree_map_with_path(place, state)
