"""What the two styles of blocks have to say to the core: one record of functions for each.

The core (`network.py`) runs the levels, draws the latents and takes their divergence; a style says which parameters
there are and how they act. Not here: the styles themselves (`efficient.py`, `baseline.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from vdvae.layers import Arithmetic, Params
from vdvae.levels import Level

Levels = tuple[Level, ...]
# Between blocks of one level, and of a level and the next, runs one stream; `skip` is what bottom-up hands to top-down.


class Blocks(NamedTuple):
    """`i` is the number of a level, deepest 0; the stream comes in `Arithmetic.dtype`."""

    bottom_up_table: Callable[[Levels, int], Params]  # {'blocks': stacked, ['skips': stacked,] ['pool': ...]}
    top_down_table: Callable[[Levels, int], Params]  # {['enter': ...,] ['layers': stacked | 'block': ...]}
    ends_table: Callable[[Levels, int, int], Params]  # (levels, image channels, outputs) -> input, output, start, ...
    read: Callable[[Params, Array, Arithmetic], Array]  # the image into the stream
    block: Callable[[Params, Array, Arithmetic], Array]  # a residual block
    skip: Callable[[Params | None, Array, Arithmetic], Array]  # what top-down sees
    pool: Callable[[Params, Array, Levels, int, Arithmetic], Array]  # level i -> level i - 1
    start: Callable[[Params, int, Levels, Arithmetic], Array]  # (ends, batch): the stream before the deepest level
    enter: Callable[[Params, Array, Levels, int, Arithmetic], Array]  # level i - 1 -> level i
    # (y, channels of z) -> the numbers of the distribution, in float32, as parts of so many channels; what y gets added
    prior: Callable[[Params, Array, int, Arithmetic], tuple[list[Array], Array]]
    posterior: Callable[[Params, Array, Array, int, Arithmetic], list[Array]]  # (y, skip, channels of z) -> numbers
    write: Callable[[Params, Array, Arithmetic], Array]  # the stream into outputs, in float32
