"""Plots as pictures: a stage's curves, every logged figure over the steps, and what samplers take over the batch.

Not here: grids of images (`images.py`).
"""

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import UInt8

COLUMNS = 3
TITLE = 24  # pixels
INK, GRID = "#333333", "#dddddd"
KINDS = {"train": "", "evaluation": "o"}  # of line, and its marker
# Drawn beside what they belong to, or of no use as a curve.
HIDDEN = ("step", "kind", "steps", "images", "non_finite_in_a_row")


def curves(records: Sequence[Mapping[str, Any]]) -> UInt8[np.ndarray, "h w 3"]:
    """One panel per figure of `metrics.read`, in the order in which they were logged.

    Left out are standard errors, figures that were always zero, and lines of another kind.
    """
    records = [record for record in records if record.get("kind") in KINDS]
    names = dict.fromkeys(name for record in records for name in record if _is_shown(name))
    names = [name for name in names if any(record.get(name) for record in records)]
    rows = max(1, -(-len(names) // COLUMNS))
    figure, canvas = blank(4 * COLUMNS, 2.6 * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        for kind, marker in KINDS.items():
            of_kind = [record for record in records if record["kind"] == kind and name in record]
            points = [(record["step"], record[name]) for record in of_kind]
            points = [(step, value) for step, value in points if value is not None]
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=kind)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("step", fontsize=7)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    if names:
        panels[0].legend(fontsize=7)
    return render(canvas)


def samplers(rows: Sequence[Mapping[str, Any]]) -> UInt8[np.ndarray, "h w 3"]:
    """Calls and seconds of each sampler over the batch, with the deviation over seeds; estimates (seeds = 0) hollow.

    Samplers of one kind share a colour; the rows of their windows, in 'KIND:ROWS', tell them apart by the line. Every
    second kind has dashes, between which a line that coincides with it is seen.
    """
    figure, canvas = blank(13, 5)
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in names))
    heights = sorted({int(height) for name in names if (height := name.partition(":")[2])})
    batches = sorted({row["batch"] for row in rows})
    columns = (("calls_percent", "calls_deviation"), ("seconds_per_image", "seconds_deviation"))
    for name in names:
        kind, _, height = name.partition(":")
        dashes = (0, (6, 6)) if kinds.index(kind) % 2 else "-"
        line = ("-.", ":", "--")[heights.index(int(height)) % 3] if height else dashes
        color = f"C{kinds.index(kind)}"
        own = [row for row in rows if row["sampler"] == name]
        for panel, (value, error) in zip(panels, columns, strict=True):
            panel.plot([row["batch"] for row in own], [row[value] for row in own], c=color, linestyle=line, label=name)
            for row in own:
                marker = {"marker": "o", "markersize": 4, "markerfacecolor": color if row["seeds"] else "white"}
                panel.errorbar(row["batch"], row[value], row.get(error) or 0.0, c=color, capsize=2, zorder=3, **marker)
    for panel, title in zip(panels, ("network calls in % of the dimensions", "seconds an image"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="batch (hollow: estimated)", title=title)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.set_xticks([], minor=True)
        mark_decades(panel.yaxis)
        panel.tick_params(axis="y", labelsize=8)
        panel.grid(alpha=0.3)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return render(canvas)


def plain(axis: Any, title: str) -> None:
    """A panel with its title to the left, a faint grid and no box around it."""
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=GRID, linewidth=0.6)
    axis.tick_params(labelsize=8, colors=INK)
    axis.set_axisbelow(True)
    axis.xaxis.label.set(fontsize=9, color=INK)
    axis.yaxis.label.set(fontsize=9, color=INK)


def mark_decades(axis: Any) -> None:
    """The ticks of a logarithmic axis (`panel.xaxis` or `.yaxis`) as plain numbers: 1, 2 and 5 of each decade, 1 alone
    where there are more than three."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.10g}")


def titled(picture: UInt8[np.ndarray, "h w 3"], title: str) -> UInt8[np.ndarray, "H W 3"]:
    """The picture below a line of text; as wide as both need."""
    font = PIL.ImageFont.load_default(13)
    width = max(picture.shape[1], int(font.getlength(title)) + 8)
    canvas = PIL.Image.new("RGB", (width, picture.shape[0] + TITLE), "white")
    canvas.paste(PIL.Image.fromarray(picture), (0, TITLE))
    PIL.ImageDraw.Draw(canvas).text((4, 4), title, "black", font)
    return np.asarray(canvas)


def blank(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure of so many inches, and its canvas for `render`."""
    # Of a home that cannot be written to: a temporary folder does as well.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, for those who only sample
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _is_shown(name: str) -> bool:
    return name not in HIDDEN and not name.endswith("_standard_error")


def render(canvas: Any) -> UInt8[np.ndarray, "h w 3"]:
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    buffer.seek(0)
    return np.asarray(PIL.Image.open(buffer).convert("RGB"))
