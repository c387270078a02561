"""Figures of a trained flow on held-out images: paths between two, one latent drawn anew, and what a round trip loses.

Not here: pictures while a run trains (`stage.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from bitsperdim import dequantize, figures
from bitsperdim.figures import Figure
from bitsperdim.model import Loaded
from bitsperdim.run import Run

# images -> y, decoded y, each [n, h, w, c] in units of a level
RoundTrip = Callable[[UInt8[np.ndarray, "n h w c"]], tuple[Float[np.ndarray, "n h w c"], Float[np.ndarray, "n h w c"]]]


def of_run(run: Run, loaded: Loaded, round_trip: RoundTrip) -> dict[str, Callable[..., Figure]]:
    """The figures by name; `loaded` and `round_trip` have what they are drawn with."""
    return {
        "interpolation": functools.partial(figures.interpolation, run, loaded),
        "scales": functools.partial(_scales, run, loaded),
        "reconstruction": functools.partial(_reconstruction, run, loaded.levels, round_trip),
    }


def _scales(
    run: Run, loaded: Loaded, key: Key[Array, ""], n: int, progress: Any, temperature: float | None = None
) -> Figure:
    """One latent drawn from N(0, temperature^2 I), the others as those of the image: a column for each, from the first
    that is split off to the top. The table says by how many levels the pixels change, on average."""
    temperature = run.config.sampling.temperature if temperature is None else temperature
    originals = figures.held_out(run, n)
    latents = loaded.encode(originals)
    heads, columns, rows = ["image"], [originals], []
    for scale, latent in enumerate(latents):
        others = [z if i != scale else None for i, z in enumerate(latents)]
        if len(latents) > 1:
            columns.append(loaded.decode(others, key, temperature))
        else:  # there are no others: a sample
            columns.append(loaded.sample(key, n, temperature=temperature))
        heads.append(f"{scale}: {'x'.join(map(str, latent.shape[1:]))}")
        change = np.abs(columns[-1].astype(float) - originals)
        rows.append(
            {
                "latent": scale,
                "shape": heads[-1].split()[1],
                "share_of_dims": latent[0].size / originals[0].size,
                "mean_change_levels": float(change.mean()),
            }
        )
    return figures.side_by_side(columns, heads, loaded.levels), {"temperature": temperature, "rows": rows}


def _reconstruction(run: Run, levels: int, round_trip: RoundTrip, key: Key[Array, ""], n: int, progress: Any) -> Figure:
    """Images, the same encoded and decoded, and the error between, so magnified that the largest is white."""
    originals = figures.held_out(run, n)
    y, back = round_trip(originals)
    found = np.asarray(dequantize.to_levels(jnp.asarray(back), levels))
    error = np.abs(back.astype(float) - y)
    magnified = np.rint(error * ((levels - 1) / max(error.max(), np.finfo(float).tiny))).astype(np.uint8)
    record = {
        "images": n,
        "mean_error_levels": float(error.mean()),
        "largest_error_levels": float(error.max()),
        "exact_images": float((found == originals).all((1, 2, 3)).mean()),
    }
    heads = ["image", "reconstruction", f"error / {error.max():.0e}"]
    return figures.side_by_side([originals, found, magnified], heads, levels), record
