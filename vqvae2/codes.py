"""Stage `codes`: whole splits as codes, made once with the Polyak weights and the final codebooks.

    WORKDIR/codes/SPLIT/{top,bottom}.npy    uint16 [n, h, w], in the order of the split
    WORKDIR/codes/SPLIT/label.npy           int32 [n], where the images have labels
    WORKDIR/codes/info.json                 fingerprint of the autoencoder, sha256 of the files; its presence commits

Source: Razavi et al. 2019, algorithm 2. A prior refuses codes of another autoencoder (`autoencoder`).
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from bitsperdim import atomic, cache, data, manifest, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.data import Source
from bitsperdim.errors import InputError
from bitsperdim.model import Batch
from bitsperdim.run import Run
from vqvae2 import autoencoder_stage, facts

SPLITS = ("train", "evaluation")
INFO = ("fingerprint", "autoencoder_step", "autoencoder_steps", "files")


def extract(run: Run, mesh: Mesh, check_signals: Callable[[], None]) -> None:
    """Encodes both splits. An extraction that was interrupted begins anew."""
    _check_steps(run)
    _, state = trainer.restore(run, "autoencoder", mesh)
    about = facts.of_run(run)
    net = autoencoder_stage.network(run.config.autoencoder.model, about)

    def encode(params: PyTree, extra: PyTree, batch: Batch) -> dict[str, jax.Array]:
        x = autoencoder_stage.to_input(batch["image"], about.levels)
        tables = autoencoder_stage.embeddings(extra["codebooks"])
        codes = net.apply({"params": params}, x, tables, method="encode")
        rows = {level: value.astype(jnp.uint16) for level, value in codes.items()}  # pyright: ignore
        return rows | {name: batch[name] for name in ("label",) if name in batch}

    batch_size = sharding.whole_batch(run.config.codes.batch_size, mesh)
    encode = jax.jit(encode, out_shardings=sharding.replicated(mesh))
    for split in SPLITS:
        source = data.open_source(run.config.data, split)
        trainer.check_sources(run, run.stage("autoencoder"), {split: source})
        encoded = _Writer(run.folder("codes") / split, source.size)
        progress = trainer.progress(f"codes of {source.name}", source.size)
        for batch in data.evaluation_batches(source, batch_size, sharding.over_batch(mesh)):
            check_signals()
            rows = jax.device_get(encode(state["ema"], state["extra"], batch))
            progress(encoded.add(rows))
        encoded.close()
    info = {
        "fingerprint": fingerprint(state),
        "autoencoder_step": int(state["step"]),
        "autoencoder_steps": run.config.autoencoder.train.steps,
        "files": {split: manifest.hash_files(run.folder("codes") / split) for split in SPLITS},
    }
    run_lib.write_json(run.folder("codes") / "info.json", info)


def is_extracted(run: Run) -> bool:
    """Raises InputError where there are codes, but the autoencoder is to be trained further than when it made them."""
    _check_steps(run)
    return (run.folder("codes") / "info.json").exists()


def _check_steps(run: Run) -> None:
    path = run.folder("codes") / "info.json"
    if path.exists():
        then, now = run_lib.read_json(path, INFO)["autoencoder_steps"], run.config.autoencoder.train.steps
        if then != now:
            raise _of_another(run, then, now)


def open_codes(run: Run, split: str) -> Source:
    """The codes of a split as a source: `top` and `bottom` int32 [n, h, w], and `label` where there are labels.

    Raises InputError where the autoencoder has been trained further since; `autoencoder` compares the weights too.
    """
    info = run_lib.read_json(run.folder("codes") / "info.json", INFO)
    if info["autoencoder_step"] != trainer.restored_step(run, "autoencoder"):
        raise _of_another(run, info["autoencoder_step"], trainer.restored_step(run, "autoencoder"))
    folder = _at_hand(run, split, info["fingerprint"])
    _verify(folder, json.dumps(info["files"][split]))
    arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
    size, *grid = arrays["bottom"].shape

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[indices].astype(np.int32) for name, array in arrays.items()}

    levels, num_classes = run.config.autoencoder.model.num_codes, facts.of_run(run).num_classes
    return Source(f"codes of {split}", size, (grid[0], grid[1], 1), levels, num_classes, read)


@functools.lru_cache(maxsize=8)  # once a process: the codes of a large data set take seconds to read
def _verify(folder: epath.Path, files: str) -> None:
    """Raises InputError where a file of the codes is not what was written."""
    expected = {name: tuple(found) for name, found in json.loads(files).items()}
    found = manifest.hash_files(folder) if folder.exists() else {}
    for name in expected:
        if found.get(name) != expected[name]:
            state = "is missing" if name not in found else "has changed since it was written"
            raise InputError(f"{folder / name} {state}; remove the folder {folder.parent} to extract the codes again")


def fingerprint(state: PyTree) -> str:
    """sha256 of the Polyak weights and the codebooks: what decides the codes of an image."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path({"ema": state["ema"], "extra": state["extra"]}):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def autoencoder(run: Run, mesh: Mesh) -> PyTree:
    """The trained autoencoder (`ema`, `extra`); raises InputError where the run's codes were made by another one."""
    _, state = trainer.restore(run, "autoencoder", mesh)
    info = run_lib.read_json(run.folder("codes") / "info.json", INFO)
    if info["fingerprint"] != fingerprint(state):
        raise _of_another(run, info["autoencoder_step"], int(state["step"]))
    return state


def _of_another(run: Run, then: int, now: int) -> InputError:
    return InputError(
        f"{run.folder('codes')} was made by another autoencoder (at step {then:,}, now {now:,}); "
        f"remove the folders codes, top and bottom in {run.workdir} to train the priors anew"
    )


def _at_hand(run: Run, split: str, fingerprint: str) -> epath.Path:
    """The folder of a split; for a remote run a copy in the cache, since only local files can be mapped into memory."""
    folder = run.folder("codes") / split
    if not atomic.is_remote(folder):
        return folder
    copy = epath.Path(cache.location(run.config.data.cache_dir)) / f"codes-{split}-{fingerprint[:12]}"
    copy.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.npy"):
        if not (copy / path.name).exists():
            path.copy(copy / f"{path.name}.{os.getpid()}.partial", overwrite=True).replace(copy / path.name)
    return copy


class _Writer:
    """Arrays of one split, written beside their place (for a remote run: here) and moved there when they are whole."""

    def __init__(self, folder: epath.Path, size: int) -> None:
        self._folder, self._size, self._done = folder, size, 0
        self._partial = folder.parent / f"{folder.name}.partial"
        self._arrays: dict[str, np.memmap] = {}
        if jax.process_index() == 0:
            if atomic.is_remote(folder):
                self._partial = epath.Path(tempfile.mkdtemp(prefix="codes-"))
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def add(self, rows: dict[str, np.ndarray]) -> int:
        """Appends a batch, less the padding of the last one; returns how many examples are written."""
        count = min(len(rows["bottom"]), self._size - self._done)
        for name, values in rows.items() if jax.process_index() == 0 else ():
            if name not in self._arrays:
                shape = (self._size, *values.shape[1:])
                path = self._partial / f"{name}.npy"
                self._arrays[name] = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
            self._arrays[name][self._done : self._done + count] = values[:count]
        self._done += count
        return self._done

    def close(self) -> None:
        for array in self._arrays.values():
            array.flush()
        self._arrays = {}
        if jax.process_index() == 0:
            if self._folder.exists():
                self._folder.rmtree()
            if atomic.is_remote(self._folder):
                for path in self._partial.iterdir():
                    path.copy(self._folder / path.name)
                self._partial.rmtree()
            else:
                self._partial.replace(self._folder)
