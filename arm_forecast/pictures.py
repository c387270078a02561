"""Pictures of autoregressive models: samples, the map of forecasting mistakes, and what samplers take.

After Wiggers & Hoogeboom 2020, supplement C: 16 uncurated samples, the mistakes of the modules and those of fixed-point
iteration on the same noise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree, UInt8

from arm_forecast import codes, engine, facts, networks, samplers
from arm_forecast.autoencoder_stage import coder
from arm_forecast.engine import Samples
from arm_forecast.pixelcnn import Grid
from arm_forecast.samplers import Sampler
from bitsperdim import dequantize, images, plots
from bitsperdim.model import Pictures
from bitsperdim.run import Run

NUM_SAMPLES = 16
RED = np.array([230, 30, 30])


def of_arm(run: Run, mesh: Mesh) -> Pictures:
    """Samples during training, always of the same noise, and where their forecasts were wrong."""
    config, grid, levels = run.config.arm, facts.grid(run), facts.of_run(run).levels
    draw = samplers.compiled(config.model, None, grid, Sampler("fixed_point"), NUM_SAMPLES, NUM_SAMPLES)
    decode = decoder(run, mesh)

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        samples = draw(networks.prepared(params, config.model, grid), key)
        x = _as_images(samples, grid)
        shown = x.astype(np.uint8) if decode is None else decode(x)
        return {
            "samples": images.grid(shown, levels=levels),
            **mistakes({"fixed_point": samples}, grid, levels, decode),
        }

    return pictures


def decoder(run: Run, mesh: Mesh) -> Callable[[np.ndarray], UInt8[np.ndarray, "n h w c"]] | None:
    """Codes to images, for a latent run."""
    if run.config.autoencoder is None:
        return None
    autoencoder = codes.autoencoder(run, mesh)
    return lambda drawn: coder(run).decode(autoencoder["ema"], autoencoder["extra"], drawn)


def mistakes(
    drawn: Mapping[str, Samples], grid: Grid, levels: int, decode: Callable | None
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """For each forecaster a grid of its samples with the wrongly forecast pixels in red, the rest in faint grey.

    The depth of the red is the share of the pixel's channels (or of the codes at that place) that were wrong. With a
    decoder the maps, which lie on the grid of codes, are laid over the decoded images.
    """
    pictures = {}
    for name, samples in drawn.items():
        x = _as_images(samples, grid)
        shown = np.asarray(dequantize.to_uint8(x, levels) if decode is None else decode(x))
        wrong = np.asarray(engine.mistakes(jnp.asarray(samples.call_of)))
        share = wrong.reshape(x.shape).mean(-1)
        factor = shown.shape[1] // share.shape[1]
        overlaid = _overlay(shown, share.repeat(factor, 1).repeat(factor, 2))
        pictures[f"mistakes_{name}"] = images.grid(overlaid)
    return pictures


def _overlay(shown: UInt8[np.ndarray, "n h w c"], share: np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
    grey = np.broadcast_to(shown.mean(-1, keepdims=True), (*shown.shape[:3], 3))
    faint = 255.0 - (255.0 - grey) * 0.35
    strength = np.sqrt(share)[..., None]
    return np.rint(faint * (1.0 - strength) + RED * strength).astype(np.uint8)


def comparison(rows: Sequence[Mapping[str, Any]]) -> UInt8[np.ndarray, "h w 3"]:
    """Calls and seconds of each sampler over the batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in names))
    lines = {"": "-", "4": "--", "8": "-.", "16": ":"}  # by the rows of the window
    for name in names:
        kind, _, height = name.partition(":")
        style = {"color": f"C{kinds.index(kind)}", "linestyle": lines[height], "marker": "o", "markersize": 3}
        own = [row for row in rows if row["sampler"] == name]
        batches = [row["batch"] for row in own]
        left.plot(batches, [row["calls_percent"] for row in own], label=name, **style)
        right.plot(batches, [row["seconds_per_image"] for row in own], label=name, **style)
    for panel, title in ((left, "network calls in % of the dimensions"), (right, "seconds an image")):
        panel.set(xscale="log", yscale="log", xlabel="batch", title=title)
        panel.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return plots.render(FigureCanvasAgg(figure))


def _as_images(samples: Samples, grid: Grid) -> np.ndarray:
    return np.asarray(samples.x).reshape(-1, grid.height, grid.width, grid.channels)
