"""The file of a published run: weights of its trained stages, without pickle, as safetensors.

    FOLDER/model.safetensors    STAGE/ema/...     Polyak weights, under their paths in the parameters
                                STAGE/extra/...   what stands beside them: codebooks, BatchNorm moments
                                metadata          bitsperdim: the version of this form, 1
                                                  steps: JSON, the step of each stage
                                                  sha256: of all arrays (`digest`), since the format has no checksum

A folder with it and a config.json is opened like a run; nothing is written into it. It is small, and read whole.
Not here: how the folder is made of a run (`export.py`).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from jaxtyping import PyTree

from bitsperdim import atomic, leaves
from bitsperdim.errors import InputError
from bitsperdim.run import PUBLISHED

VERSION = "1"
REMEDY = "get the folder anew"


class Weights(NamedTuple):
    """Arrays by name, STAGE/ENTRY/PATH, and the step that each stage had reached."""

    steps: dict[str, int]
    arrays: dict[str, np.ndarray]


def write(folder: epath.Path, weights: Weights) -> None:
    """The file, whole or not at all."""
    metadata = {"bitsperdim": VERSION, "steps": json.dumps(weights.steps), "sha256": digest(weights.arrays)}
    atomic.write_bytes(folder / PUBLISHED, safetensors.numpy.save(weights.arrays, metadata))


def read(folder: epath.Path) -> Weights:
    """Raises InputError where the file is damaged, or was not written by `write`."""
    path = folder / PUBLISHED
    try:
        content = path.read_bytes()
        arrays = safetensors.numpy.load(content)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged, or no safetensors file ({error}); {REMEDY}") from error
    # The library has found the header to be whole, but has no function that reads the metadata from memory.
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    if metadata.get("bitsperdim") != VERSION:
        found = f"has '{metadata['bitsperdim']}'" if "bitsperdim" in metadata else "lacks the key"
        raise InputError(
            f"{path} is no published run: its metadata should say bitsperdim='{VERSION}', but {found}; such a file "
            "is written by convert.py --export"
        )
    if metadata.get("sha256") != digest(arrays):
        raise InputError(f"{path} has changed since it was written (sha256 of its arrays); {REMEDY}")
    try:
        steps = {str(name): int(step) for name, step in json.loads(metadata["steps"]).items()}
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is damaged (its metadata have no steps of stages); {REMEDY}") from error
    return Weights(steps, arrays)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over name, type, shape and little-endian bytes of each array, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {leaves.describe(arrays[name])}\n".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


def steps(folder: epath.Path) -> dict[str, int]:
    """The stages that the file has, and the step of each."""
    return read(folder).steps


def check(folder: epath.Path, stage: str, like: PyTree, remedy: str) -> Weights:
    """Raises InputError where the file has not the arrays of `like` (`ema`, `extra`) for the stage."""
    weights, start = read(folder), f"{stage}/"
    if stage not in weights.steps:
        have = ", ".join(weights.steps) or "none"
        raise InputError(f"{folder / PUBLISHED} has no weights of stage '{stage}'; it has those of {have}")
    stored = {name[len(start) :]: leaves.describe(a) for name, a in weights.arrays.items() if name.startswith(start)}
    leaves.check(stored, _wanted(like), f"stage '{stage}' of {folder / PUBLISHED}", remedy)
    return weights


def restore(folder: epath.Path, stage: str, like: PyTree, remedy: str) -> tuple[int, PyTree]:
    """The stage's step, and the entries of `like`, each array where `like` places it."""
    weights = check(folder, stage, like, remedy)
    step = weights.steps[stage]
    wanted = leaves.by_path(like)
    given = {path: weights.arrays[f"{stage}/{path}"] for path in _wanted(like)}
    given |= {path: np.asarray(step, leaf.dtype) for path, leaf in wanted.items() if path == "step"}
    placed = [_placed(given[path], leaf) for path, leaf in wanted.items()]
    return step, jax.tree.unflatten(jax.tree.structure(like), placed)


def _wanted(like: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: leaf for path, leaf in leaves.by_path(like).items() if path != "step"}


def _placed(value: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """On every process its part, of an array that all of them have read."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
