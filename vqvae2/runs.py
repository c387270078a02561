"""Runs of like blocks, one after another: scanned or unrolled, with the same parameters and the same values.

The parameters of a run are those of one block with a leading axis for its place in the run. Scanned, a run is one block
to the compiler whatever its length: less to compile, less to launch, and in the backward pass no more memory than one
block needs beside what stands between the blocks. Unrolled it is plain code.
Not here: the blocks (`layers.py`, `conditioning.py`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bitsperdim.causal import take

X = TypeVar("X")
Block = TypeVar("Block", bound=nn.Module)

# Collections in which each block of a run has values of its own.
OWN = ("params", "batch_stats", "batch_moments", "intermediates")


class Manner(NamedTuple):
    """How runs are evaluated: scanned or not, and whether the backward pass computes each block again."""

    scan: bool = False
    remat: bool = False


def run(
    block: Block,
    apply: Callable[[Block, X, Int[Array, ""]], X],
    x: X,
    count: int,
    manner: Manner,
    made: Sequence[str] = (),
) -> X:
    """x <- apply(block, x, i) for i = 0 ... count - 1, each i with parameters of its own.

    What the blocks leave in the collections `made` becomes one array each too.
    """
    repeated = nn.scan(
        rematerialised(_stepping(apply), manner),
        variable_axes=dict.fromkeys((*OWN, *made), 0),
        split_rngs={"params": True},
        length=count,
        unroll=1 if manner.scan else count,
        check_constancy_invariants=False,
    )
    return repeated(block, x, jnp.arange(count))[0]


def loop(
    block: Block,
    apply: Callable[[Block, X, Int[Array, ""]], X],
    x: X,
    count: int,
    manner: Manner,
    carried: Sequence[str],
) -> X:
    """As `run` for blocks that change the collections `carried`, where each finds its own by its number, without
    gradients. The parameters too are those of the whole run, until `at_place`: runs within runs that hand on parts of
    them would copy all of them once for every level, which is most of the time where they are used for one cell."""
    repeated = nn.scan(
        _stepping(apply),
        variable_broadcast="params",
        variable_carry=list(carried),
        split_rngs={"params": False},
        length=count,
        unroll=1 if manner.scan else count,
        check_constancy_invariants=False,
    )
    return repeated(block, x, jnp.arange(count))[0]


def at_place(apply: Callable, place: tuple[Int[Array, ""] | int, ...]) -> Callable:
    """apply(module, *arrays), where the module has the parameters at this place of the runs that it is in."""
    own = lambda leaf: take(leaf, place, (0,) * (leaf.ndim - len(place)), leaf.shape[len(place) :])
    return nn.map_variables(apply, "params", trans_in_fn=lambda params: jax.tree.map(own, params))


def _stepping(apply: Callable) -> Callable:
    return lambda block, x, index: (apply(block, x, index), None)


def rematerialised(apply: Callable, manner: Manner) -> Callable:
    """apply(module, *arrays); where it is asked, computed once more in the backward pass and not remembered."""
    # A scan keeps the two computations apart; elsewhere the compiler would find them equal and undo it.
    return nn.remat(apply, prevent_cse=not manner.scan) if manner.remat else apply
