"""Runs of like blocks, one after another: scanned or unrolled, with the same parameters and the same values.

The parameters of a run are those of one block with a leading axis for its place in the run. Scanned, a run is one block
to the compiler whatever its length: less to compile, less to launch, and in the backward pass no more memory than one
block needs beside what stands between the blocks. Unrolled it is plain code.
Not here: the blocks (`layers.py`, `conditioning.py`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

X = TypeVar("X")
Block = TypeVar("Block", bound=nn.Module)

SCANS = ("auto", "on", "off")
# Collections in which each block of a run has values of its own.
OWN = ("params", "batch_stats", "batch_moments", "intermediates")


class Manner(NamedTuple):
    """How runs are evaluated: scanned or not, and whether the backward pass computes each block again."""

    scan: bool = False
    remat: bool = False


def is_scanned(scan: str) -> bool:
    """'on' and 'off' as they say; 'auto' scans."""
    return scan != "off"


def run(
    block: Block,
    apply: Callable[[Block, X, Int[Array, ""]], X],
    x: X,
    count: int,
    manner: Manner,
    carried: Sequence[str] = (),
    made: Sequence[str] = (),
) -> X:
    """x <- apply(block, x, i) for i = 0 ... count - 1, each i with parameters of its own.

    The blocks change the collections `carried` one after another, as one array each, and leave the collections `made`
    behind them as one array each, with a leading axis for the block.
    """

    def step(block: Block, x: X, index: Int[Array, ""]) -> tuple[X, None]:
        return apply(block, x, index), None

    repeated = nn.scan(
        rematerialised(step, manner),
        variable_axes=dict.fromkeys((*OWN, *made), 0),
        variable_carry=list(carried),
        split_rngs={"params": True},
        length=count,
        unroll=1 if manner.scan else count,
        check_constancy_invariants=False,
    )
    return repeated(block, x, jnp.arange(count))[0]


def rematerialised(apply: Callable, manner: Manner) -> Callable:
    """apply(module, *arrays); where it is asked, computed once more in the backward pass and not remembered."""
    # A scan keeps the two computations apart; elsewhere the compiler would find them equal and undo it.
    return nn.remat(apply, prevent_cse=not manner.scan) if manner.remat else apply
