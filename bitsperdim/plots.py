"""Curves of a stage as a picture: every logged figure over the steps, training beside evaluation.

Not here: grids of images (`images.py`).
"""

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

COLUMNS = 3
KINDS = {"train": "", "evaluation": "o"}  # of line, and its marker
# Drawn beside what they belong to, or of no use as a curve.
HIDDEN = ("step", "kind", "steps", "images", "non_finite_in_a_row")


def curves(records: Sequence[Mapping[str, Any]]) -> UInt8[np.ndarray, "h w 3"]:
    """One panel per figure of `metrics.read`, in the order in which they were logged.

    Left out are standard errors, figures that were always zero, and lines of another kind.
    """
    # Of a home that cannot be written to: a temporary folder does as well.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, for those who only sample
    from matplotlib.figure import Figure

    records = [record for record in records if record.get("kind") in KINDS]
    names = dict.fromkeys(name for record in records for name in record if _is_shown(name))
    names = [name for name in names if any(record.get(name) for record in records)]
    rows = max(1, -(-len(names) // COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 2.6 * rows), dpi=100, layout="constrained")
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
    return render(FigureCanvasAgg(figure))


def _is_shown(name: str) -> bool:
    return name not in HIDDEN and not name.endswith("_standard_error")


def render(canvas: Any) -> UInt8[np.ndarray, "h w 3"]:
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    buffer.seek(0)
    return np.asarray(PIL.Image.open(buffer).convert("RGB"))
