"""Stage `codes` of a latent ARM: whole splits as codes, made once with the trained autoencoder.

    WORKDIR/codes/SPLIT/codes.npy    uint8 [n, h, w, channels], in the order of the split

Source: Wiggers & Hoogeboom 2020, supplement A.3. The autoencoder is frozen: an ARM refuses codes of another one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from arm_forecast import autoencoder_stage, facts
from bitsperdim import data, extracted, sharding, trainer
from bitsperdim.model import Stage
from bitsperdim.run import Run
from bitsperdim.sources import Source

CODES = extracted.Extraction("codes", of="autoencoder", then=("arm",))
SPLITS = ("train", "evaluation")


def stage() -> Stage:
    is_extracted = lambda run: extracted.is_extracted(run, CODES)
    return Stage("codes", needs=("autoencoder",), extract=_extract, is_extracted=is_extracted)


def _extract(run: Run, mesh: Mesh, check_signals: Callable[[], None]) -> None:
    """Encodes both splits. An extraction that was interrupted begins anew."""
    _, state = trainer.restore(run, "autoencoder", mesh)
    encoder = autoencoder_stage.encoder(run)
    encode = jax.jit(
        lambda params, extra, image: encoder(params, extra, image).astype(jnp.uint8),
        out_shardings=sharding.replicated(mesh),
    )
    batch_size = sharding.whole_batch(run.config.autoencoder.codes_batch_size, mesh)
    for split in SPLITS:
        source = data.open_source(run.config.data, split)
        trainer.check_sources(run, run.stage("autoencoder"), {split: source})
        progress = trainer.progress(f"codes of {source.name}", source.size)
        with extracted.Writer(run.folder("codes") / split, source.size) as written:
            for batch in data.evaluation_batches(source, batch_size, sharding.over_batch(mesh)):
                check_signals()
                progress(written.add({"codes": np.asarray(encode(state["ema"], state["extra"], batch["image"]))}))
    extracted.commit(run, CODES, state, SPLITS)


def open_codes(run: Run, split: str) -> Source:
    """The codes of a split as a source: `codes` int32 [n, h, w, channels]."""
    codes, grid = extracted.open_arrays(run, CODES, split)["codes"], facts.grid(run)
    read = lambda indices: {"codes": codes[indices].astype(np.int32)}
    return Source(f"codes of {split}", len(codes), (grid.height, grid.width, grid.channels), grid.values, 0, read)


def autoencoder(run: Run, mesh: Mesh) -> PyTree:
    """The trained autoencoder (`ema`, `extra`); InputError where the run's codes were made by another one."""
    return extracted.source_state(run, CODES, mesh)
