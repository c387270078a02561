"""What one stage makes of whole splits with the model of another (codes, samples): written once, checked at every use.

    WORKDIR/STAGE/SPLIT/NAME.npy    one array of each field, in the order of the split
    WORKDIR/STAGE/info.json         which model made them, sha256 of the files; its presence commits

A stage that is trained on them refuses those of another model than the run's. Not here: what is extracted.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from bitsperdim import atomic, cache, data, manifest, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Batch
from bitsperdim.run import Run

SPLITS = ("train", "evaluation")
INFO = {"fingerprint": str, "step": int, "steps": int, "files": dict}


class Extraction(NamedTuple):
    """A stage that extracts, the stage whose model it uses, and those that are trained on what it extracts."""

    name: str
    of: str
    then: tuple[str, ...]


def encode_images(
    run: Run,
    extraction: Extraction,
    state: PyTree,
    encode: Callable[[PyTree, PyTree, Batch], dict[str, Array]],
    batch_size: int,
    mesh: Mesh,
    check_signals: Callable[[], None],
) -> None:
    """`encode(ema, extra, batch)` of every image of both splits; an extraction that was interrupted begins anew."""
    encode = jax.jit(encode, out_shardings=sharding.replicated(mesh))
    batch_size = sharding.whole_batch(batch_size, mesh)
    for split in SPLITS:
        source = data.open_source(run.config.data, split)
        trainer.check_sources(run, run.stage(extraction.of), {split: source})
        progress = trainer.progress(f"{extraction.name} of {source.name}", source.size)
        with Writer(run.folder(extraction.name) / split, source.size) as written:
            for batch in data.evaluation_batches(source, batch_size, sharding.over_batch(mesh)):
                check_signals()
                progress(written.add(jax.device_get(encode(state["ema"], state["extra"], batch))))
    commit(run, extraction, state, SPLITS)


def commit(run: Run, extraction: Extraction, state: PyTree, splits: tuple[str, ...]) -> None:
    """Declares the extraction complete, made with the weights of `state` (`step`, `ema`, `extra`)."""
    folder = run.folder(extraction.name)
    info = {
        "fingerprint": fingerprint(state),
        "step": int(state["step"]),
        "steps": _steps(run, extraction),
        "files": {split: manifest.hash_files(folder / split) for split in splits},
    }
    run_lib.write_json(folder / "info.json", info)


def is_extracted(run: Run, extraction: Extraction) -> bool:
    """Raises InputError where it is, but the model is to be trained further than when it made it."""
    path = run.folder(extraction.name) / "info.json"
    if not path.exists():
        return False
    then, now = run_lib.read_json(path, INFO)["steps"], _steps(run, extraction)
    if then != now:
        raise _of_another(run, extraction, then, now)
    return True


def open_arrays(run: Run, extraction: Extraction, split: str) -> dict[str, np.ndarray]:
    """The arrays of a split by name, mapped into memory.

    Raises InputError where there are none, a file has changed, or the run's model is another one by now.
    """
    path = run.folder(extraction.name) / "info.json"
    if not path.exists():
        raise InputError(f"{path.parent} is missing; train.py makes it again")
    info = run_lib.read_json(path, INFO | {"files": {split: dict}})
    step = trainer.restored_step(run, extraction.of)
    if info["step"] != step or info["fingerprint"] != _fingerprint_at(run, extraction.of, step):
        raise _of_another(run, extraction, info["step"], step)
    folder = _at_hand(run, extraction, split, info["fingerprint"])
    _verify(folder, json.dumps(info["files"][split]))
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}


def origin(run: Run, extraction: Extraction) -> str:
    """The fingerprint of the model that extracted: of a `Source`, so that no stage goes on with what another made."""
    return run_lib.read_json(run.folder(extraction.name) / "info.json", INFO)["fingerprint"]


def source_state(run: Run, extraction: Extraction, mesh: Mesh) -> PyTree:
    """The model that extracted (`step`, `ema`, `extra`); InputError where the run's is another one by now.

    What was extracted may have been removed since: then there is nothing to compare with.
    """
    _, state = trainer.restore(run, extraction.of, mesh)
    path = run.folder(extraction.name) / "info.json"
    if not path.exists():
        return state
    info = run_lib.read_json(path, INFO)
    if info["fingerprint"] != fingerprint(state):
        raise _of_another(run, extraction, info["step"], int(state["step"]))
    return state


def fingerprint(state: PyTree) -> str:
    """sha256 of the Polyak weights and of what stands beside them: what decides an extraction."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path({"ema": state["ema"], "extra": state["extra"]}):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)  # once a process: training and evaluation open the arrays several times
def _fingerprint_at(run: Run, stage: str, step: int) -> str:
    """Of the model that the run has at this step."""
    _, state = trainer.restore(run, stage, sharding.mesh_at_hand(run.config.mesh))
    return fingerprint(state)


def _steps(run: Run, extraction: Extraction) -> int:
    settings = run.stage(extraction.of).settings
    assert settings is not None
    return settings.steps


def _of_another(run: Run, extraction: Extraction, then: int, now: int) -> InputError:
    folders = " and ".join(filter(None, [", ".join([extraction.name, *extraction.then[:-1]]), *extraction.then[-1:]]))
    difference = f"at step {then:,}, now {now:,}" if then != now else f"other weights of step {now:,}"
    return InputError(
        f"{run.folder(extraction.name)} was made by another {extraction.of} ({difference}); "
        f"remove the folders {folders} in {run.workdir} to train them anew"
    )


@functools.lru_cache(maxsize=8)  # once a process: the codes of a large data set take seconds to read
def _verify(folder: epath.Path, files: str) -> None:
    """Raises InputError where a file is not what was written."""
    found = manifest.hash_files(folder) if folder.exists() else {}
    for name, expected in json.loads(files).items():
        if list(found.get(name, ())) != expected:
            state = "is missing" if name not in found else "has changed since it was written"
            raise InputError(f"{folder / name} {state}; remove the folder {folder.parent} to extract again")


def _at_hand(run: Run, extraction: Extraction, split: str, fingerprint: str) -> epath.Path:
    """The folder of a split; for a remote run a copy in the cache, since only local files can be mapped into memory."""
    folder = run.folder(extraction.name) / split
    if not atomic.is_remote(folder):
        return folder
    copy = epath.Path(cache.location(run.config.data.cache_dir)) / f"{extraction.name}-{split}-{fingerprint[:12]}"
    copy.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.npy"):
        if not (copy / path.name).exists():
            path.copy(copy / f"{path.name}.{os.getpid()}.partial", overwrite=True).replace(copy / path.name)
    return copy


class Writer:
    """Arrays of one split, written beside their place (for a remote run: here) and moved there when they are whole.

    A context manager: on an error nothing is left, and one of the file system is an `InputError`.
    """

    def __init__(self, folder: epath.Path, size: int) -> None:
        self._folder, self._size, self._done = folder, size, 0
        self._partial = folder.parent / f"{folder.name}.partial"
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "Writer":
        if jax.process_index() == 0:
            with self._explained():
                if atomic.is_remote(self._folder):
                    self._partial = epath.Path(tempfile.mkdtemp(prefix="extracted-"))
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir(parents=True)
        return self

    def add(self, rows: dict[str, np.ndarray]) -> int:
        """Appends a batch, less the padding of the last one; returns how many examples are written."""
        count = min(len(next(iter(rows.values()))), self._size - self._done)
        if jax.process_index() == 0:
            with self._explained():
                for name, values in rows.items():
                    # Plain writes, not a writable memory map: on a full disk they raise, where the map ends in SIGBUS.
                    if name not in self._files:
                        self._files[name] = open(self._partial / f"{name}.npy", "wb")
                        cache.write_header(self._files[name], values.dtype, (self._size, *values.shape[1:]))
                    self._files[name].write(np.ascontiguousarray(values[:count]).data)
        self._done += count
        return self._done

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if jax.process_index() == 0:
            try:
                if error is None:
                    with self._explained():
                        self._commit()
            finally:
                for file in self._files.values():
                    with contextlib.suppress(OSError):  # what it still holds is of no use
                        file.close()
                shutil.rmtree(self._partial, ignore_errors=True)

    def _commit(self) -> None:
        for file in self._files.values():
            atomic.flush(file)
            file.close()
        if self._folder.exists():
            self._folder.rmtree()
        if atomic.is_remote(self._folder):
            for path in self._partial.iterdir():
                path.copy(self._folder / path.name)
        else:
            self._partial.replace(self._folder)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write {self._folder} ({error.strerror}); make room, then the same command goes on"
            ) from error
