"""Where arrays live: the device mesh, the batch axis, and regex rules that place parameters. No model knows of it.

One idiom serves one core and a pod: `jax.jit` over global arrays with a `NamedSharding`; the compiler places the
collectives. The same config runs on any number of devices, only `mesh` changes.
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from bitsperdim.errors import InputError

_PLANNED: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")


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
    for none, for each of the *last* dimensions. A dimension that the axis does not divide stays whole.
    """

    data: int = -1
    fsdp: int = 1
    rules: tuple[tuple[str, tuple[str, ...]], ...] = (("(kernel|table)$", ("fsdp",)),)

    def __post_init__(self) -> None:
        for name in ("data", "fsdp"):
            size = getattr(self, name)
            if size == 0 or size < -1:
                raise ValueError(f"{name} must be a number of devices or -1 (all that remain), not {size}")
        if self.data == self.fsdp == -1:
            raise ValueError("data and fsdp must not both be -1")
        for pattern, axes in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rules must begin with regular expressions, not {pattern!r} ({error})") from error
            if unknown := set(axes) - {"", "data", "fsdp"}:
                raise ValueError(
                    f"rules must name the axes 'data', 'fsdp' or '', not {sorted(unknown)} for {pattern!r}"
                )


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh (data, fsdp) over all devices; `InputError` when the sizes do not fit their number."""
    count = jax.device_count()
    fixed = max(config.data, 1) * max(config.fsdp, 1)
    sizes = tuple(count // fixed if size == -1 else size for size in (config.data, config.fsdp))
    if sizes[0] * sizes[1] != count:
        raise InputError(
            f"mesh.data={config.data} x mesh.fsdp={config.fsdp} does not use the {count} devices present; "
            f"set --config.mesh.data=-1 or sizes whose product is {count}"
        )
    # Explicit axes, the default of make_mesh, fail in gathers and space-to-depth reshapes.
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def mesh_at_hand(config: MeshConfig) -> Mesh:
    """The configured mesh where it fits the devices present, else all of them on the axis `data`.

    For evaluation and sampling, which may happen on another machine than training did.
    """
    try:
        return make_mesh(config)
    except InputError:
        return make_mesh(MeshConfig(rules=config.rules))


def over_batch(mesh: Mesh) -> NamedSharding:
    """Examples over every device: the leading axis over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def whole_batch(batch_size: int, mesh: Mesh) -> int:
    """The batch size rounded up to a multiple of the devices, for work that pads its last batch anyway."""
    return -(-batch_size // mesh.size) * mesh.size


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


def for_state(state: PyTree, config: MeshConfig, mesh: Mesh) -> PyTree:
    """A sharding for every array of an (abstract) train state.

    Optimizer moments and the Polyak average carry the path of their parameter as a suffix, so one set of rules places
    all three alike.
    """

    def place(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in config.rules if re.search(pattern, name)), ())
        axes = axes[max(len(axes) - leaf.ndim, 0) :]
        spec: list[str | None] = [None] * (leaf.ndim - len(axes))
        for axis, size in zip(axes, leaf.shape[leaf.ndim - len(axes) :], strict=True):
            spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, state)
