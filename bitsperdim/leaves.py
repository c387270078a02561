"""The arrays of a state by name, such as 'opt/0/mu/encoder/kernel', as files hold them.

So a file depends on no container class of optax or of ours. Not here: the files (`checkpoint.py`, `published.py`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bitsperdim.errors import InputError


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays of the state have the same path; names must not contain '/'")
    return named


def describe(leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> str:
    """Type and shape, such as float32[3,3,16,32]."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def check(stored: Mapping[str, str], wanted: Mapping[str, jax.ShapeDtypeStruct], where: Any, remedy: str) -> None:
    """Raises InputError for the first array that is not described as it is wanted, is missing, or is one too many.

    Too many are arrays of the top-level entries that are wanted; others may be there.
    """
    for path, leaf in wanted.items():
        if path not in stored:
            raise InputError(f"{where} has no array '{path}', which should be {describe(leaf)}; {remedy}")
        if stored[path] != describe(leaf):
            raise InputError(f"'{path}' is {stored[path]} in {where}, but should be {describe(leaf)}; {remedy}")
    entries = {path.split("/")[0] for path in wanted}
    for path in stored:
        if path not in wanted and path.split("/")[0] in entries:
            raise InputError(f"{where} has an array '{path}' {stored[path]}, which should not be there; {remedy}")
