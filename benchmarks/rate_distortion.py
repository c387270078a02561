"""Rate against distortion of several VQ-VAE-2 runs, such as one for each size of the codebook.

    python evaluate.py --workdir=RUN                                             # of each, first
    python -m benchmarks rate_distortion RUN RUN ... --out=rate_distortion.png

The rate is in bits per image. Of a level whose prior is trained it is the prior's mean negative log-likelihood; of the
others log2 K for each of its codes, what uniform codes take (`rate_of` says which level is which); beside it
`bits_uniform` takes all levels so. It rates a reconstruction: no likelihood of the image follows from it. The
distortion is the mean squared error in [-1, 1) and its PSNR in dB with the peak 2. All of it comes from the runs'
evaluation.json.
"""

import argparse
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from benchmarks.record import Record
from bitsperdim import images, metrics, plots
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from vqvae2 import facts
from vqvae2.autoencoder import level_names

COLUMNS = ("run", "num_codes", "cells", "bits_uniform", "bits_per_image", "rate_of", "mse", "psnr_db")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders with an evaluation.json")
    parser.add_argument("--out", default="rate_distortion.png", help="the picture")
    arguments, record = parser.parse_args(), Record("rate_distortion")
    cases = sorted(map(case, arguments.runs), key=lambda figures: figures["bits_uniform"])
    check_comparable(cases)
    for figures in cases:
        of = {name: figures[name] for name in ("run", "split", "images", "data", "num_codes", "rate_of")}
        record.say("run", of, **{name: value for name, value in figures.items() if name not in of})
    print(metrics.table([[figures[name] for name in COLUMNS] for figures in cases], COLUMNS))
    images.save_png(arguments.out, picture(cases))
    print(f"written to {arguments.out}")


def case(workdir: str) -> dict[str, Any]:
    """The figures of a run. Raises InputError where it is none of VQ-VAE-2, or not evaluated."""
    run = run_lib.open_run(workdir)
    if run.family.__name__ != "vqvae2":
        raise InputError(f"{run.workdir} is a run of {run.family.__name__}, which has no rate and distortion")
    path = run.workdir / "evaluation.json"
    if not path.exists():
        raise InputError(f"{path} is missing; python evaluate.py --workdir={run.workdir} makes it")
    measured = run_lib.read_json(path, {"split": str, "autoencoder": {"mse": float, "psnr_db": float, "images": int}})
    num_codes, strides = run.config.autoencoder.model.num_codes, run.config.autoencoder.model.strides
    grids = facts.of_run(run).grids(strides, level_names(len(strides)))
    uniform = {level: height * width * math.log2(num_codes) for level, (height, width) in grids.items()}
    of_priors = {level: measured[level]["rate_bits_per_image"] for level in grids if level in measured}
    rates, about = uniform | of_priors, measured["autoencoder"]
    return {
        "run": run.workdir.name,
        "split": measured["split"],
        "images": about["images"],
        "data": _images_of(run),
        "num_codes": num_codes,
        "cells": sum(height * width for height, width in grids.values()),
        "bits_uniform": sum(uniform.values()),
        "bits_per_image": sum(rates.values()),
        "bits_per_image_by_level": rates,
        "rate_of": ", ".join(f"{level} {'prior' if level in of_priors else 'uniform'}" for level in grids),
        "mse": about["mse"],
        "psnr_db": about["psnr_db"],
    }


def _images_of(run: run_lib.Run) -> str:
    """What tells the run's held-out images from others: name or, of a folder, fingerprint; shape and levels."""
    about = facts.of_run(run)
    path = run.folder("autoencoder") / "sources.json"
    source = run_lib.read_json(path, {"evaluation": dict})["evaluation"] if path.exists() else {}
    name = source.get("fingerprint") or source.get("name") or run.config.data.source
    return f"{name}, {'x'.join(map(str, about.shape))}, {about.levels} levels"


def check_comparable(cases: list[dict[str, Any]]) -> None:
    """Raises InputError where the runs were not evaluated on the same images."""
    if len({(figures["split"], figures["images"], figures["data"]) for figures in cases}) > 1:
        lines = (f"{figures['run']}: {figures['images']} images of {figures['data']}" for figures in cases)
        raise InputError(f"these runs were evaluated on different images ({'; '.join(lines)}); evaluate them alike")


def picture(cases: list[dict[str, Any]]) -> UInt8[np.ndarray, "h w 3"]:
    """PSNR and MSE over the rate: one curve for uniform codes, one for each way in which the rate was taken."""
    curves = {"uniform codes": [(figures["bits_uniform"], figures) for figures in cases]}
    for figures in cases:
        if "prior" in figures["rate_of"]:
            curves.setdefault(figures["rate_of"], []).append((figures["bits_per_image"], figures))
    figure, canvas = plots.blank(11, 4.5)
    for panel, name, title in zip(figure.subplots(1, 2), ("psnr_db", "mse"), ("PSNR in dB", "MSE"), strict=True):
        for label, points in curves.items():
            panel.plot([bits for bits, _ in points], [figures[name] for _, figures in points], marker="o", label=label)
            for bits, figures in points:
                panel.annotate(f"K = {figures['num_codes']}", (bits, figures[name]), fontsize=7)
        panel.set(xlabel="bits per image", title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return plots.render(canvas)
