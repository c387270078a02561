"""The figures of a model over every image of a split, each counted once, whatever the batch, devices or hosts.

A run keeps those of every split that was measured, each in a file of its own.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from bitsperdim import data, sharding
from bitsperdim import run as run_lib
from bitsperdim.likelihood import Means
from bitsperdim.model import Aux, Batch, Model

COMPARED = ("train", "evaluation")  # the splits whose difference shows how much was learned by heart


def compiled(model: Model, mesh: Mesh) -> Callable[[PyTree, PyTree, Batch, Array], Any]:
    """`model.measure` with its results gathered on every host."""

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        with sharding.by_rows(mesh):
            return model.measure(params, extra, batch, key)

    return jax.jit(measure, out_shardings=sharding.replicated(mesh))


def evaluate(
    model: Model,
    measure: Callable[[PyTree, PyTree, Batch, Array], Any],
    params: PyTree,
    extra: PyTree,
    source: data.Source,
    batch_size: int,
    mesh: Mesh,
    key: Key[Array, ""],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """`model.summarize` of the exact means (and maxima) over `source`, with `images` and the standard error of parts.

    `progress(done)` is called after each batch, in images.
    """
    means, maxima, tallies = Means(), Means(), None
    for batch in data.evaluation_batches(source, batch_size, sharding.over_batch(mesh)):
        aux = jax.device_get(measure(params, extra, batch, key))
        # Only the tail of the split is padding, so every host knows the mask of all rows.
        mask = np.arange(batch_size) < source.size - means.count
        means.add(aux.parts, mask)
        maxima.add(aux.maxima, mask)
        # float64: a split of millions of images has counts that float32 cannot hold.
        widened = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), aux.tallies)
        tallies = widened if tallies is None else jax.tree.map(np.add, tallies, widened)
        progress(means.count)
    summary = model.summarize(means.means() | maxima.maxima(), tallies)
    errors = {f"{name}_standard_error": means.standard_error(name) for name in means.means() if name in summary}
    return {"images": means.count, **summary, **errors}


def figure_names(model: Model, params: PyTree, extra: PyTree, source: data.Source, batch_size: int) -> list[str]:
    """The names of what `evaluate` returns, from the shapes of parameters and data: nothing is computed."""
    fields = source.read(np.zeros(1, np.int64)) | {"mask": np.zeros(1, bool), "position": np.zeros(1, np.int32)}
    like = lambda value: jax.ShapeDtypeStruct((batch_size, *value.shape[1:]), value.dtype)
    aux = jax.eval_shape(model.measure, params, extra, jax.tree.map(like, fields), jax.random.key(0))
    # Numbers that mean nothing, of which nothing but the names is kept.
    means: dict[str, float] = {name: np.float64(0.5) for name in (*aux.parts, *aux.maxima)}
    with np.errstate(all="ignore"):
        summary = model.summarize(means, jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5), aux.tallies))
    return ["images", *summary, *(f"{name}_standard_error" for name in aux.parts if name in summary)]


def file_name(split: str) -> str:
    """Of the figures of a split: evaluation.json for the default one, evaluation-SPLIT.json for others."""
    return "evaluation.json" if split == "evaluation" else f"evaluation-{re.sub(r'[^A-Za-z0-9_.+-]', '_', split)}.json"


def command(workdir: Any, measured: dict[str, Any]) -> str:
    """What measures these figures again, also where a bound of more samples than the config's was asked for."""
    names = [name for values in (measured, *measured.values()) if isinstance(values, dict) for name in values]
    samples = re.search(r"importance_weighted_(\d+)", " ".join(names))
    return f"python evaluate.py --workdir={workdir}" + (f" --samples={samples[1]}" if samples else "")


def side_by_side(folder: epath.Path) -> list[tuple[str, float, float, float]]:
    """(name, training images, held-out images, difference) of the figures of a run; [] unless both were measured.

    Those of stages that have been trained further since are not compared: the same steps must stand in both files.
    """
    paths = [folder / file_name(split) for split in COMPARED]
    if not all(path.exists() for path in paths):
        return []
    train, held_out = (run_lib.read_json(path) for path in paths)
    steps = lambda measured: {name: value["step"] for name, value in measured.items() if isinstance(value, dict)}
    if steps(train) != steps(held_out):
        return []
    is_figure = lambda value: isinstance(value, float)
    names = [name for name in held_out if is_figure(held_out[name]) and is_figure(train.get(name))]
    return [(name, train[name], held_out[name], held_out[name] - train[name]) for name in names]
