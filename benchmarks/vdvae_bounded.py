"""What a bound on the scales of the output does at 5 bits: Efficient-VDVAE's figures 2 and 3, from trained runs.

    python train.py --config=vdvae_cifar10:cpu_5bit_unbounded --config.train.evaluate_every=500
    python train.py --config=vdvae_cifar10:cpu_5bit_bounded --config.train.evaluate_every=500
    python -m benchmarks vdvae_bounded runs/vdvae_cifar10-cpu_5bit_unbounded runs/vdvae_cifar10-cpu_5bit_bounded

`curves.png`: reconstruction, KL, their sum (the bound) in bits/dim and SSIM over the training steps, as each evaluation
in training found them. `images.png`: held-out images as the runs see them, the reconstructions of either, and the same
images at 8 bits; with a third run, of 8 bits, its reconstructions too. A JSON line a run has its last figures.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

import bitsperdim
from benchmarks.record import Record
from bitsperdim import data, facts, figures, images, likelihood, metrics, plots
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run
from bitsperdim.sources import Source
from vdvae import vae

PANELS = {
    "reconstruction_bits_per_dim": "reconstruction, bits/dim",
    "kl_bits_per_dim": "KL, bits/dim",
    "bits_per_dim": "negative ELBO, bits/dim",
    "ssim": "SSIM",
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("unbounded", help="folder of a run whose scales have no bound, or the lower one")
    parser.add_argument("bounded", help="folder of a run whose scales have a bound")
    parser.add_argument("eight_bits", nargs="?", help="folder of a run on the same images at 8 bits")
    parser.add_argument("--num", type=int, default=6, help="images in the picture")
    parser.add_argument("--out", default=".", help="folder of both pictures")
    arguments, record = parser.parse_args(), Record("vdvae_bounded")
    runs = {"unbounded": run_lib.open_run(arguments.unbounded), "bounded": run_lib.open_run(arguments.bounded)}
    if arguments.eight_bits:
        runs["8 bits"] = run_lib.open_run(arguments.eight_bits)
    source = same_images(runs)
    records = {name: evaluations(run) for name, run in runs.items()}
    folder = pathlib.Path(arguments.out)
    for name, run in runs.items():
        record.say("run", {"run": run.workdir.name, "scales": name}, **records[name][-1])
    images.save_png(folder / "curves.png", curves({name: records[name] for name in ("unbounded", "bounded")}))
    images.save_png(folder / "images.png", picture(runs, source, arguments.num))
    record.end()
    print(f"written to {folder / 'curves.png'} and {folder / 'images.png'}")


def same_images(runs: dict[str, Run]) -> Source:
    """The held-out images of all runs, at their full depth. Raises InputError where the runs cannot be compared."""
    for run in runs.values():
        if run.family.__name__ != "vdvae":
            raise InputError(f"{run.workdir} is a run of {run.family.__name__}, whose output has no such bound")
    bounds = [runs[name].config.model.min_log_scale for name in ("unbounded", "bounded")]
    if not bounds[0] < bounds[1]:
        raise InputError(f"model.min_log_scale of the first run must be below that of the second, not {bounds}")
    sources = {
        name: data.open_source(dataclasses.replace(run.config.data, bits=8), "evaluation") for name, run in runs.items()
    }
    first = sources["unbounded"]
    for name, run in runs.items():
        other = sources[name]
        if any(getattr(first, key) != getattr(other, key) for key in ("name", "size", "shape", "levels")):
            raise InputError(f"{run.workdir} has other held-out images than {runs['unbounded'].workdir}")
        expected = first.levels if name == "8 bits" else model_of(runs["unbounded"]).output.levels
        if (found := model_of(run).output.levels) != expected:
            raise InputError(f"{run.workdir} has {found} levels, not {expected}")
    return first


def model_of(run: Run) -> vae.Vae:
    return vae.make(run.config.model, facts.of_run(run))


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The evaluations that were made while the run was trained, with the parts of the bound in bits/dim."""
    path = run.folder("model") / metrics.FILE
    num_dims, found = model_of(run).num_dims, []
    for record in metrics.read(path):
        if record.get("kind") == "evaluation":
            parts = {f"{part}_bits_per_dim": record[f"{part}_nats"] for part in ("reconstruction", "kl")}
            in_bits = {name: likelihood.bits_per_dim(nats, num_dims) for name, nats in parts.items()}
            found.append({"step": record["step"], **in_bits, "bits_per_dim": record["bits_per_dim"]})
            found[-1] |= {"ssim": record["ssim"]} if "ssim" in record else {}
    if not found:
        raise InputError(f"{path} has no evaluation; train the run first")
    return found


def curves(records: dict[str, list[dict[str, Any]]]) -> UInt8[np.ndarray, "h w 3"]:
    """A panel for each figure, a line for each run."""
    figure, canvas = plots.blank(4 * len(PANELS), 3.4)
    for panel, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for label, of_run in records.items():
            points = [(record["step"], record[name]) for record in of_run if name in record]
            panel.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3, label=label)
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return plots.render(canvas)


def picture(runs: dict[str, Run], source: Source, n: int) -> UInt8[np.ndarray, "H W 3"]:
    """Target, unbounded, bounded, the image at its full depth, its reconstruction: a row for each image."""
    originals = source.read(np.linspace(0, source.size, n, endpoint=False).astype(np.int64))["image"]
    spread = lambda levels, x: np.rint(np.asarray(x, np.float32) * (255.0 / (levels - 1))).astype(np.uint8)
    columns = {}
    for name, run in runs.items():
        model = model_of(run)
        seen = originals >> (8 - run.config.data.bits)
        target = spread(model.output.levels, vae.target(model, jnp.asarray(seen)))
        found = spread(model.output.levels, bitsperdim.load(str(run.workdir)).reconstruct(seen))
        if name == "unbounded":
            columns[f"target, {model.output.levels} levels"] = target
        elif name == "8 bits":
            columns[f"target, {source.levels} levels"] = target
        columns[name] = found
    columns.setdefault(f"target, {source.levels} levels", spread(source.levels, originals))
    return figures.side_by_side(list(columns.values()), list(columns), levels=256)
