"""Why images are dequantized, made visible: trainings with less and less noise, and what lies inside one bin.

The values of an image are points, on which a density may grow without end: its likelihood says nothing then. With noise
u in [0, 1) it bounds that of the levels (`dequantization.py`). Both pictures compare runs of the same data.
Not here: figures of one run (`figures.py`).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bitsperdim import facts, figures, metrics, plots, rng, sharding, trainer
from bitsperdim.run import Run
from flows import density

DRAWS = 2048  # of the noise of an image
# Where the density along a pixel is looked at, in levels beyond the pixel's own: dense where narrow noise would lie
EVEN = np.linspace(-0.5, 1.5, 501)
OFFSETS = np.union1d(EVEN, np.geomspace(2.0**-18, 0.5, 200))


def densities(runs: Mapping[str, Run]) -> UInt8[np.ndarray, "h w 3"]:
    """-log2 p(x + u) of a dimension while the runs train, and the bound on the likelihood that is left of it.

    The density is the bound and the entropy of the noise together: log p = log w + log q. With narrow noise it falls
    without end; the bound, which the width of the noise is taken from, does not.
    """
    figure = Figure(figsize=(11, 4), dpi=80, layout="constrained")
    of_density, of_bound = figure.subplots(1, 2)
    for name, run in runs.items():
        dims = math.prod(facts.of_run(run).shape)
        lines = [line for line in metrics.read(run.folder("model") / metrics.FILE) if line["kind"] == "train"]
        steps, bound = [line["step"] for line in lines], np.array([line["bits_per_dim"] for line in lines])
        entropy = np.array([line["noise_entropy_nats"] for line in lines]) / (dims * math.log(2.0))
        of_density.plot(steps, bound + entropy, label=name)
        of_bound.plot(steps, bound, label=name)
    for panel, title in ((of_density, "density: -log2 p(x + u) / D"), (of_bound, "bound on -log2 P(x) / D")):
        panel.set(xlabel="step", ylabel="bits", title=title)
        panel.grid(alpha=0.3)
    of_density.legend(fontsize=8)
    return plots.render(FigureCanvasAgg(figure))


def inside_a_bin(runs: Mapping[str, Run], image: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """For three pixels of a held-out image, a dark, a grey and a bright one: where the noise of the run lies in the bin
    of the pixel's level (bars), and the density of the flow along it (line), the other pixels as they are.

    Both integrate to 1 over what is shown; a line that leaves the panel does so above.
    """
    figure = Figure(figsize=(11, 2.4 * len(runs)), dpi=80, layout="constrained")
    rows = figure.subplots(len(runs), 3, squeeze=False)
    for panels, (name, run) in zip(rows, runs.items(), strict=True):
        x = figures.held_out(run, image + 1)[image]
        for panel, (place, (noise, line)) in zip(panels, _along(run, x).items(), strict=True):
            panel.axvspan(0.0, 1.0, color="0.93")
            panel.hist(noise, bins=np.linspace(0.0, 1.0, 26), density=True, color="C0", alpha=0.5)
            panel.plot(OFFSETS, line, c="C3", lw=1)
            panel.set(xlim=(-0.5, 1.5), ylim=(0.0, 3.0), title=f"{name}: level {x[place]}")
            panel.tick_params(labelsize=7)
            panel.title.set_fontsize(9)
    return plots.render(FigureCanvasAgg(figure))


def _along(run: Run, x: UInt8[np.ndarray, "h w c"]) -> dict[Any, tuple[np.ndarray, Float[np.ndarray, " m"]]]:
    """By pixel: draws of its noise, and the density along it at `OFFSETS`."""
    model = density.make(run.config.model, facts.of_run(run))
    params = trainer.restore(run, "model", sharding.mesh_at_hand(run.config.mesh))[1]["ema"]
    keys = rng.per_example(jax.random.key(0), jnp.arange(DRAWS))
    y = np.asarray(jax.jit(model.noisy)(params, jnp.repeat(jnp.asarray(x)[None], DRAWS, 0), keys))
    log_prob = jax.jit(model.log_prob)

    def slice_of(place: Any) -> Float[np.ndarray, " m"]:
        many = np.repeat(y[:1], len(OFFSETS), 0)
        many[(slice(None), *place)] = x[place] + OFFSETS
        log_p = np.asarray(log_prob(params, jnp.asarray(many)), np.float64)
        p = np.exp(log_p - log_p.max())
        return p / np.trapezoid(p, OFFSETS)

    return {place: (y[(slice(None), *place)] - x[place], slice_of(place)) for place in _pixels(x)}


def _pixels(x: UInt8[np.ndarray, "h w c"]) -> list[Any]:
    """A dark one, the one nearest to the middle, a bright one."""
    middle = np.abs(x.astype(float) - x.max() / 2)
    return [np.unravel_index(int(index), x.shape) for index in (x.argmin(), middle.argmin(), x.argmax())]
