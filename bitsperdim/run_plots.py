"""Plots of a whole run, from what it has recorded: `evaluate.py --plots`. Nothing is measured.

    curves-STAGE.png    training and held-out figures over the steps, by what they are about
    samplers.png        calls and seconds by sampler, where --compare_samplers was run
    and those of the family: its optional function plots(run, measured) -> {name: picture}

Not here: the curves that every training draws of each figure it logs (`plots.curves`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from bitsperdim import evaluation, metrics, plots, sampler_table
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.run import Run

Picture = UInt8[np.ndarray, "h w 3"]
COLUMNS = 3
SETTLED = 0.1  # the share of the steps whose values may leave the panel: the first ones would flatten all others
HEADROOM = 0.22  # of a panel's height, for its legend


class Panel(NamedTuple):
    """Figures, by a pattern of their whole names, that are looked at side by side. The group in it is the label."""

    title: str
    pattern: str
    is_log: bool = False
    is_sequence: bool = False  # its lines have an order, which their colours show
    from_zero: bool = False


PANELS = (
    Panel("bits/dim", r"(bits_per_dim.*)"),
    Panel("nats per code", r"(nats_per_code)"),
    Panel("nats per pixel", r"(nats_per_pixel)"),
    Panel("mean squared error in [-1, 1)", r"(mse|mse_without_\w+)", is_log=True),
    Panel("parts of the bound, nats an image", r"(reconstruction|kl|noise_entropy)_nats"),
    Panel("KL by resolution, nats an image", r"kl_nats_(\d+x\d+)", is_log=True, is_sequence=True),
    Panel("codes in use", r"used_codes_(\w+)", from_zero=True),
    Panel("perplexity of the codes", r"perplexity_codes_(\w+)", from_zero=True),
    Panel("divergence of the forecasting modules, nats", r"(forecast_kl_nats)", is_log=True),
    Panel("dequantization, bits/dim", r"(dequantization_gap|noise_entropy)_bits_per_dim"),
    Panel("SSIM of the reconstructions", r"(ssim)"),
    Panel("learning rate", r"(learning_rate)", from_zero=True),
    Panel("norm of the gradient", r"((?:largest_)?gradient_norm)", is_log=True),
    Panel("skipped steps", r"(skipped_steps)", from_zero=True),
    Panel("images a second, training", r"(images_per_second)", from_zero=True),
)


def draw(run: Run) -> dict[str, Picture]:
    """All plots by name. Raises InputError where the run has recorded nothing yet."""
    found = {}
    for stage in run.stages():
        if records := metrics.read(run.folder(stage.name) / metrics.FILE):
            found[f"curves-{stage.name}"] = curves(records, f"{run.workdir.name}, {stage.name}")
    if not found:
        raise InputError(f"no stage of {run.workdir} has a {metrics.FILE} yet; train it first")
    if table := sampler_table.of_run(run):
        found["samplers"] = plots.samplers(table.rows)
    measured = next((path for path in _evaluations(run) if path.exists()), None)
    if measured is not None and hasattr(run.family, "plots"):
        found |= run.family.plots(run, run_lib.read_json(measured))
    return found


def _evaluations(run: Run) -> tuple:
    name = evaluation.file_name("evaluation")
    return run.outputs / name, run.workdir / name


def curves(records: Sequence[Mapping[str, Any]], title: str) -> Picture:
    """A panel of PANELS for each group of figures that was logged."""
    records = [record for record in records if record.get("kind") in plots.KINDS]
    logged = list(dict.fromkeys(name for record in records for name in record))
    panels = [(panel, names) for panel in PANELS if (names := matching(panel, logged))]
    rows = max(1, -(-len(panels) // COLUMNS))
    figure, canvas = plots.blank(4.4 * COLUMNS, 0.5 + 2.7 * rows)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", color=plots.INK)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, (panel, names) in zip(axes, panels, strict=False):
        _draw(axis, panel, names, records)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if any(record["kind"] == "evaluation" for record in records):
        lines = [axes[0].plot([], [], c="grey", **_style(kind))[0] for kind in plots.KINDS]
        texts = ["training images", "held-out images"]
        figure.legend(lines, texts, loc="upper right", ncols=2, fontsize=9, frameon=False, labelcolor=plots.INK)
    return plots.render(canvas)


def matching(panel: Panel, logged: Sequence[str]) -> dict[str, str]:
    """Label -> name of the logged figures that the panel shows, resolutions in their order."""
    found = {match[1]: name for name in logged if (match := re.fullmatch(panel.pattern, name))}
    found = {label: name for label, name in found.items() if not name.endswith("_standard_error")}
    return dict(sorted(found.items(), key=lambda pair: int(pair[0].split("x")[0]))) if panel.is_sequence else found


def _draw(axis: Any, panel: Panel, names: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> None:
    shown = []
    for i, (label, name) in enumerate(names.items()):
        colour = _colour(i, len(names), panel.is_sequence)
        found = {kind: _points(records, kind, name) for kind in plots.KINDS}
        for kind, points in found.items():
            if points:
                alone = {"alpha": 1.0, "linewidth": 1.3} if not found["evaluation"] else {}
                axis.plot(*zip(*points, strict=True), c=colour, **_style(kind) | alone)
                shown += points
        axis.plot([], [], c=colour, label=label.replace("_", " "))
    plots.plain(axis, panel.title)
    axis.set_xlabel("step", fontsize=8)
    has_legend = len(names) > 1 or "|" in panel.pattern
    if shown:
        _scale(axis, panel, shown, HEADROOM if has_legend else 0.06)
    if has_legend:
        axis.legend(loc="upper right", fontsize=7, frameon=False, labelcolor=plots.INK, ncols=min(3, len(names)))


def _points(records: Sequence[Mapping[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    return [(r["step"], r[name]) for r in records if r["kind"] == kind and r.get(name) is not None]


def _scale(axis: Any, panel: Panel, points: Sequence[tuple[int, float]], above: float) -> None:
    """Limits by the values after the first steps; counts and rates begin at zero."""
    begin = SETTLED * max(step for step, _ in points)
    values = np.array([value for step, value in points if step >= begin], float)
    low, high = values.min(), values.max()
    if panel.is_log and low > 0 and high > 3 * low:
        axis.set_yscale("log")
        axis.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** above)
        plots.mark_decades(axis.yaxis)
        return
    if panel.from_zero:
        axis.set_ylim(-0.03 * (high or 1.0), high * (1.0 + above) or 1.0)
        axis.yaxis.get_major_locator().set_params(integer=high >= 3 or not high)
        return
    margin = high - low or 0.5
    axis.set_ylim(low - 0.06 * margin, high + above * margin)


def _style(kind: str) -> dict[str, Any]:
    """Training a thin line, held-out images a strong one with marks."""
    if kind == "evaluation":
        return {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
    return {"linewidth": 1.0, "alpha": 0.5}


def _colour(index: int, count: int, is_sequence: bool) -> Any:
    if not is_sequence:
        return f"C{index % 10}"
    import matplotlib

    return matplotlib.colormaps["viridis"](0.9 * index / max(1, count - 1))
