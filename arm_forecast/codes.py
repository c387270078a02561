"""Stage `codes` of a latent ARM: whole splits as codes, made once with the trained autoencoder.

    codes    uint8 [n, h, w, channels], in the order of the split

Source: Wiggers & Hoogeboom 2020, supplement A.3. The autoencoder is frozen: an ARM refuses codes of another one.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from arm_forecast import autoencoder_stage, facts
from bitsperdim import extracted, trainer
from bitsperdim.model import Stage
from bitsperdim.run import Run
from bitsperdim.sources import Source

CODES = extracted.Extraction("codes", of="autoencoder", then=("arm",))


def stage() -> Stage:
    is_extracted = lambda run: extracted.is_extracted(run, CODES)
    return Stage("codes", needs=("autoencoder",), extract=_extract, is_extracted=is_extracted)


def _extract(run: Run, mesh: Mesh, check_signals: Callable[[], None]) -> None:
    """Encodes both splits. An extraction that was interrupted goes on."""
    _, state = trainer.restore(run, "autoencoder", mesh)
    encoder = autoencoder_stage.encoder(run)
    encode = lambda params, extra, batch: {"codes": encoder(params, extra, batch["image"]).astype(jnp.uint8)}
    batch_size = run.config.autoencoder.codes_batch_size
    extracted.encode_images(run, CODES, state, encode, batch_size, mesh, check_signals)


def open_codes(run: Run, split: str) -> Source:
    """The codes of a split as a source: `codes` int32 [n, h, w, channels]."""
    codes, grid = extracted.open_arrays(run, CODES, split)["codes"], facts.grid(run)
    read = lambda indices: {"codes": codes[indices].astype(np.int32)}
    shape, origin = (grid.height, grid.width, grid.channels), extracted.origin(run, CODES)
    return Source(f"codes of {split}", len(codes), shape, grid.values, 0, read, fingerprint=origin)


def autoencoder(run: Run, mesh: Mesh) -> PyTree:
    """The trained autoencoder (`ema`, `extra`); InputError where the run's codes were made by another one."""
    return extracted.source_state(run, CODES, mesh)
