"""Rate against distortion of one run: what its codes take, and what they give, with and without the finest level.

Not here: curves over several runs (`python -m benchmarks rate_distortion`).
"""

import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from bitsperdim import plots as plots_lib
from bitsperdim.run import Run
from vqvae2 import facts
from vqvae2.autoencoder import level_names


def plots(run: Run, measured: dict[str, Any]) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """From the figures of evaluation.json; none where the autoencoder alone was not measured."""
    points = rate_distortion(run, measured)
    return {"rate_distortion": picture(points)} if points else {}


def rate_distortion(run: Run, measured: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """(what is sent, bits an image, MSE in [-1, 1)) by how the codes are coded; levels without a prior as uniform."""
    about = measured.get("autoencoder", {})
    strides, num_codes = run.config.autoencoder.model.strides, run.config.autoencoder.model.num_codes
    names = level_names(len(strides))
    finest = names[-1]
    if "mse" not in about or not about.get("mse_over_variance"):
        return {}
    grids = facts.of_run(run).grids(strides, names)
    uniform = {level: height * width * math.log2(num_codes) for level, (height, width) in grids.items()}
    priors = {level: measured[level]["rate_bits_per_image"] for level in grids if level in measured}
    curves = {"uniform codes": uniform} | ({"codes by the trained priors": uniform | priors} if priors else {})
    found = {}
    for title, rates in curves.items():
        points = [("nothing", 0.0, about["mse"] / about["mse_over_variance"])]
        if f"mse_without_{finest}" in about:
            above = [level for level in names if level != finest]
            coarse = sum(rates[level] for level in above)
            points.append((f"{' and '.join(above)} alone", coarse, about[f"mse_without_{finest}"]))
        found[title] = [*points, ("all codes", sum(rates.values()), about["mse"])]
    return found


def picture(curves: dict[str, list[tuple[str, float, float]]]) -> UInt8[np.ndarray, "h w 3"]:
    """PSNR in dB, with the peak 2, over bits per image."""
    figure, canvas = plots_lib.blank(7.0, 4.6)
    axis = figure.subplots()
    for i, (title, points) in enumerate(curves.items()):
        bits, psnr = [bits for _, bits, _ in points], [10.0 * math.log10(4.0 / mse) for *_, mse in points]
        axis.plot(bits, psnr, marker="o", label=title, c=f"C{i}")
        for (name, *_), x, y in zip(points, bits, psnr, strict=True):
            if i == len(curves) - 1:
                offset = {"xytext": (-8, 6), "textcoords": "offset points", "ha": "right"}
                axis.annotate(name, (x, y), fontsize=9, color=plots_lib.INK, **offset)
    axis.set(xlabel="bits an image", ylabel="PSNR of the reconstruction, dB")
    axis.margins(x=0.14, y=0.12)
    axis.legend(loc="lower right", frameon=False, fontsize=9)
    plots_lib.plain(axis, "rate against distortion, held-out images")
    return plots_lib.render(canvas)
