"""What the layers of a run say: their KL as bars; and what pruning costs, where the figure `pruning` was drawn."""

import re
from typing import Any

import numpy as np
from jaxtyping import UInt8

from bitsperdim import facts
from bitsperdim import plots as plots_lib
from bitsperdim import run as run_lib
from bitsperdim.run import Run
from vdvae import levels, vae

Picture = UInt8[np.ndarray, "h w 3"]


def plots(run: Run, measured: dict[str, Any]) -> dict[str, Picture]:
    """From the figures of evaluation.json, and pruning.json."""
    found, about = {}, measured.get("model", {})
    kl = [value for name, value in sorted(about.items()) if re.fullmatch(r"kl_nats_layer_\d+", name)]
    if kl:
        shapes = levels.latent_shapes(vae.make(run.config.model, facts.of_run(run)).net.levels)
        found["kl_by_layer"] = kl_by_layer(kl, [f"{height}x{width}" for height, width, _ in shapes])
    path = run.outputs / "pruning.json"
    if path.exists():
        found["pruning_rate_distortion"] = pruned(run_lib.read_json(path, {"rows": list})["rows"])
    return found


def kl_by_layer(kl: list[float], resolutions: list[str]) -> Picture:
    """A bar for each layer, the first drawn first, in the colour of its resolution."""
    import matplotlib

    figure, canvas = plots_lib.blank(max(6.0, 1.5 + 0.16 * len(kl)), 3.8)
    axis, names = figure.subplots(), list(dict.fromkeys(resolutions))
    for i, name in enumerate(names):
        own = [layer for layer, of_layer in enumerate(resolutions) if of_layer == name]
        colour = matplotlib.colormaps["viridis"](0.9 * i / max(1, len(names) - 1))
        total = sum(kl[layer] for layer in own)
        axis.bar(own, [kl[layer] for layer in own], color=colour, label=f"{name}: {total:.3g} nats")
    axis.set(xlabel="layer, in the order in which they are drawn", ylabel="nats an image")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=9)
    plots_lib.plain(axis, "KL by layer, held-out images")
    axis.grid(axis="x", visible=False)
    return plots_lib.render(canvas)


def pruned(rows: list[dict[str, Any]]) -> Picture:
    """The bound and SSIM over what the kept latents take, as they are stored."""
    rows = sorted(rows, key=lambda row: row["bytes_per_image"])
    figure, canvas = plots_lib.blank(10.0, 3.8)
    titles = {"bits_per_dim": "bound, bits/dim", "ssim": "SSIM of the reconstructions"}
    for axis, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axis.plot([row["bytes_per_image"] for row in rows], [row[name] for row in rows], marker="o")
        axis.set(xscale="log", xlabel="bytes an image, of the channels that are kept")
        plots_lib.plain(axis, title)
        plots_lib.mark_decades(axis.xaxis)
    return plots_lib.render(canvas)
