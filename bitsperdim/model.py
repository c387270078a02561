"""The records between the loop and the families: Model, Aux, Stage, and the train state.

A family is a module (named by the config's `family`) that exports

    Config                            the frozen dataclass that its configs are unpacked into
    stages(config) -> tuple[Stage]    in the order in which they depend on each other
    report(config, measured)          the figures of a whole run, from those of its stages
    load(run, mesh) -> Loaded         what can be done with a trained run

and, where it has them, imported(...) for published weights (`adopt.py`) and plots(run, measured) (`run_plots.py`).
Not here: how a stage is trained (`trainer.py`) and how a step is compiled (`step.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

if TYPE_CHECKING:
    from bitsperdim.data import Source
    from bitsperdim.optim import OptimConfig
    from bitsperdim.run import Run
    from bitsperdim.step import TrainConfig

Batch = dict[str, Array]
Pictures = Callable[[PyTree, PyTree, Key[Array, ""]], dict[str, np.ndarray]]  # (params, extra, key) -> uint8 RGB


class Aux(NamedTuple):
    """What a loss returns beside its objective. Tallies and statistics are sums over the examples of the batch, so
    that they may be added over devices and micro-batches; means would not survive a ragged last batch."""

    parts: dict[str, Float[Array, " b"]]  # one value per example, named with its unit
    tallies: PyTree  # what `summarize` needs beside the parts (code counts)
    statistics: PyTree  # what `update_extra` needs (codebook sums, BatchNorm moments); not kept
    # Of `measure`: as `parts`, but the largest value is reported, not the mean
    maxima: Mapping[str, Float[Array, " b"]] = {}


class Model(NamedTuple):
    """A family's model as pure functions.

    `loss` is trained with the noise of its key; `measure` is the deterministic evaluation of one batch. Both see a
    batch with `position` (int32, the example's index in the global batch or split) beside the fields of the source;
    `measure` also with `mask` (bool, False for padding).
    """

    init: Callable[[Key[Array, ""]], tuple[PyTree, PyTree]]  # -> params, extra
    loss: Callable[[PyTree, PyTree, Batch, Key[Array, ""], Int[Array, ""]], tuple[Float[Array, ""], Aux]]
    measure: Callable[[PyTree, PyTree, Batch, Key[Array, ""]], Aux]  # masked examples count in no tally
    # (means of the parts and the maxima, tallies) -> logged figures
    summarize: Callable[[dict[str, float], PyTree], dict[str, float]]
    update_extra: Callable[[PyTree, PyTree, Key[Array, ""], Int[Array, ""]], PyTree] = lambda extra, *_: extra
    # Of the arguments of `loss`, means over a batch that it must know before it sees a part: under accumulation `loss`
    # finds those over all micro-batches as batch["whole_batch"]
    whole_batch: Callable[[PyTree, PyTree, Batch, Key[Array, ""], Int[Array, ""]], PyTree] | None = None


class Stage(NamedTuple):
    """One part of a run. Either trained (`model` to `settings`) or extracted (`extract`, `is_extracted`).

    The functions are called when the stages named in `needs` are complete, and only those that are needed: sampling
    opens no data set. `model` alone is called at the start too, so that it can refuse what cannot be built. A stage
    `on_request` runs only where it is named (`train.py --stage`).
    """

    name: str
    needs: tuple[str, ...] = ()
    model: Callable[["Run"], Model] | None = None
    evaluated: Callable[["Run"], Model] | None = None  # the same with a more thorough `measure`, for evaluate.py
    source: Callable[["Run", str], "Source"] | None = None  # (run, 'train' | 'evaluation' | another split to measure)
    # Shapes and types of one example, where `source` opens what an earlier stage has to extract first
    example: Callable[["Run"], dict[str, Any]] | None = None
    pictures: Callable[["Run", Mesh], Pictures] | None = None
    begin: Callable[["Run", Mesh], dict[str, PyTree]] | None = None  # entries of a new state that are not fresh
    facts: Callable[["Run"], dict[str, Any]] | None = None  # of the data (shape, levels, ...): kept in STAGE/data.json
    optim: "OptimConfig | None" = None
    settings: "TrainConfig | None" = None
    warning: str = ""  # said whenever its training starts
    extract: Callable[["Run", Mesh, Callable[[], None]], None] | None = None  # the last one raises after a signal
    is_extracted: Callable[["Run"], bool] | None = None
    # (run, step, held-out figures) -> lines that are said behind an evaluation of the training, and by evaluate.py
    remarks: Callable[["Run", int, dict[str, float]], list[str]] = lambda run, step, figures: []
    on_request: bool = False
    by_rows: bool = False  # can its images be divided by rows, `mesh.spatial`?


class Loaded(NamedTuple):
    """A trained run with its Polyak weights, as functions. Images are levels, uint8 [n, h, w, c].

    A function that the family cannot offer raises `InputError` with the reason; so does one whose stage is not trained.
    """

    config: Any
    levels: int  # images hold 0 ... levels - 1
    # (images, key, samples) -> nats per image, a bound with that many samples where it is one
    log_prob: Callable[..., Float[np.ndarray, " n"]]
    # (key, n, temperature=..., ...) -> images, and what is to be known of drawing them (network calls); the options are
    # those of the family
    draw: Callable[..., tuple[UInt8[np.ndarray, "n h w c"], dict[str, Any]]]
    # Of images alone, of latents alone; the options of the family (a key, layers left open) are in their docstrings
    encode: Callable[..., PyTree]
    decode: Callable[..., UInt8[np.ndarray, "n h w c"]]
    reconstruct: Callable[[UInt8[np.ndarray, "n h w c"]], UInt8[np.ndarray, "n h w c"]]
    # (key, progress, rows of an earlier start, keep) -> what each of the family's samplers takes, one row each, and
    # plots of it; where it has several. `keep` is called with all rows whenever there is one more
    compare_samplers: Callable[..., tuple[list[dict[str, Any]], dict[str, np.ndarray]]] | None = None
    # (images, as many others, share) -> images so far on the way from the one to the other
    interpolate: Callable[..., UInt8[np.ndarray, "n h w c"]] | None = None
    # by name, (key, n, progress, options of its own) -> a picture of n held-out images, and a record with its figures,
    # those of a table as `rows`
    figures: Mapping[str, Callable[..., tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]]] = {}
    # (split) -> how many images the run has stored of it as latents, and these in order, in batches, each with its
    # figures by image where the data set is at hand
    decode_stored: Callable[[str], tuple[int, Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]]] | None = None

    def sample(self, key: Key[Array, ""], n: int, **options: Any) -> UInt8[np.ndarray, "n h w c"]:
        """n images; image i depends on (key, i) alone, not on n. `help(run.draw)` shows the options."""
        return self.draw(key, n, **options)[0]
