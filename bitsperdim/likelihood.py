"""From nats per example to the figures that are reported: bits/dim and exact means over a whole split.

Every figure is a mean over *all* images of the named split, each counted once; the padding of the last batch is dropped
by its mask. Sums run in float64 on the host.
"""

import math
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float

Nats = TypeVar("Nats", float, Float[Array, "..."])


def bits_per_dim(nats: Nats, num_dims: int) -> Nats:
    """-log2 p(x) / D = nats / (D log 2), with D = height x width x channels."""
    return nats_to_bits(nats) / num_dims


def nats_to_bits(nats: Nats) -> Nats:
    """log2 x = log x / log 2."""
    return nats / math.log(2.0)


class Means:
    """Exact means, standard errors and maxima of per-example values that arrive in padded batches."""

    def __init__(self) -> None:
        self._values: dict[str, list[np.ndarray]] = {}
        self.count = 0

    def add(self, parts: dict[str, np.ndarray], mask: np.ndarray) -> None:
        """Adds one batch; rows where `mask` is False do not exist."""
        self.count += int(mask.sum())
        for name, values in parts.items():
            self._values.setdefault(name, []).append(np.asarray(values, np.float64)[mask])

    def means(self) -> dict[str, float]:
        return {name: float(np.concatenate(values).mean()) for name, values in self._values.items()}

    def maxima(self) -> dict[str, float]:
        return {name: float(np.concatenate(values).max()) for name, values in self._values.items()}

    def standard_error(self, name: str) -> float:
        """s / sqrt(n), s the sample deviation over the images: what another test set of this size would change."""
        values = np.concatenate(self._values[name])
        return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
