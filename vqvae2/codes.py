"""Stage `codes`: whole splits as codes, made once with the Polyak weights and the final codebooks.

    top, ..., bottom    uint16 [n, h, w], in the order of the split; of latents without a quantiser [n, h, w, d], uint8
                        where 256 bins are enough
    label               int32 [n], where the images have labels

Source: Razavi et al. 2019, algorithm 2. Not here: how they are kept, and checked at every use (`extracted.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from bitsperdim import extracted, trainer
from bitsperdim.data import Source
from bitsperdim.errors import InputError
from bitsperdim.model import Batch, Stage
from bitsperdim.run import Run
from vqvae2 import autoencoder_stage, facts

SPLITS = extracted.SPLITS


def _extraction(run: Run) -> extracted.Extraction:
    pixels = ("pixels",) if run.config.pixels else ()
    return extracted.Extraction("codes", of="autoencoder", then=run.config.levels + pixels)


def stage() -> Stage:
    return Stage("codes", ("autoencoder",), extract=extract, is_extracted=is_extracted)


def extract(run: Run, mesh: Mesh, check_signals: Callable[[], None]) -> None:
    """Encodes both splits. An extraction that was interrupted goes on."""
    _, state = trainer.restore(run, "autoencoder", mesh)
    about = facts.of_run(run)
    net = autoencoder_stage.network(run.config.autoencoder.model, about)

    config = run.config.autoencoder.model
    kind = jnp.uint8 if config.cell and config.num_codes <= 256 else jnp.uint16

    def encode(params: PyTree, extra: PyTree, batch: Batch) -> dict[str, jax.Array]:
        x = autoencoder_stage.to_input(batch["image"], about.levels)
        tables = autoencoder_stage.embeddings(extra["codebooks"])
        codes = net.apply({"params": params}, x, tables, method="encode")
        rows = {level: value.astype(kind) for level, value in codes.items()}  # pyright: ignore
        return rows | {name: batch[name] for name in ("label",) if name in batch}

    extracted.encode_images(run, _extraction(run), state, encode, run.config.codes.batch_size, mesh, check_signals)


def is_extracted(run: Run) -> bool:
    """Raises InputError where there are codes, but the autoencoder is to be trained further than when it made them."""
    return extracted.is_extracted(run, _extraction(run))


def open_codes(run: Run, split: str) -> Source:
    """The codes of a split as a source: `top`, ... int32 [n, h, w], and `label` where there are labels.

    Raises InputError where they are not those of the run's autoencoder.
    """
    arrays = extracted.open_arrays(run, _extraction(run), split)
    size, *grid = arrays[run.config.levels[-1]].shape[:3]

    levels, num_classes = run.config.autoencoder.model.num_codes, facts.of_run(run).num_classes
    if "label" in arrays:
        _check_range(run, split, "label", arrays["label"][np.arange(size)], num_classes)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = {name: array[indices].astype(np.int32) for name, array in arrays.items()}
        for level in run.config.levels:  # all of them at once would be read from the disk at every start
            _check_range(run, split, level, rows[level], levels)
        return rows

    origin = extracted.origin(run, _extraction(run))
    return Source(f"codes of {split}", size, (grid[0], grid[1], 1), levels, num_classes, read, fingerprint=origin)


def _check_range(run: Run, split: str, name: str, values: np.ndarray, count: int) -> None:
    """An embedding would take what it has no row for as zero, without a word."""
    if values.size and not 0 <= values.min() <= values.max() < count:
        wrong = values[(values < 0) | (values >= count)].flat[0]
        raise InputError(
            f"the field '{name}' of the {split} codes in {run.made('codes')} holds {wrong}, which does not lie in "
            f"0..{count - 1}; remove the folder, or leave out images without a class"
        )


def autoencoder(run: Run, mesh: Mesh) -> PyTree:
    """The trained autoencoder (`ema`, `extra`); raises InputError where the run has codes that another one made."""
    return extracted.source_state(run, _extraction(run), mesh)
