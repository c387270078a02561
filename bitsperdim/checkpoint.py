"""Checkpoints of a train state: written in the background, checked before use, safe against a kill at any moment.

    checkpoints/00001000/manifest.json    written last, so it is the commit (`manifest.py`)
    checkpoints/00001000/state/           the arrays, written by Orbax under their paths in the state

Nothing that a manifest names is changed or removed before another checkpoint is committed; whatever no manifest names
is a left-over of a killed run and goes before the next save. No folder is renamed, as object stores cannot.
Not here: when to save, what to do on a signal (`trainer.py`), and what a state holds (`state.py`).
"""

import concurrent.futures
import logging
import math
import os
import re
import sys
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, PyTree

from bitsperdim import atomic, hosts, leaves
from bitsperdim import manifest as manifest_lib
from bitsperdim.errors import InputError
from bitsperdim.manifest import Damaged, Manifest

REMEDY = "use the config that it was trained with, or a new --workdir"
_NONE, _ALL_DAMAGED = -1, -2  # what the first process tells the others when there is no step to restore
DATA = ("state", "state_again")  # folders of the arrays
SECONDS_TO_END = 20.0  # of a save, where this process cannot go on


class Checkpoints:
    """The checkpoints of one stage of a run: the newest `keep`, and the best.

    `best` is the name of a metric and whether 'min' or 'max' of it is best, such as ('bits_per_dim', 'min'); metrics
    are stored with each checkpoint, so the best survives a restart. `remedy` ends the message for arrays that are not
    those that are asked for. Of several processes each calls every method, in the same order, and the folder is one
    that all of them see; what is there is what the first one sees. Usable as a context manager.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int = 2,
        best: tuple[str, str] | None = None,
        remedy: str = REMEDY,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        if best is not None and best[1] not in ("min", "max"):
            raise ValueError(f"best must be (metric, 'min' or 'max'), not {best}")
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        self._folder = _absolute(epath.Path(folder))
        self._keep = keep
        self._best = best
        self._remedy = remedy
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._damaged: set[int] = set()

    def save(self, step: int, state: PyTree[Array], metrics: Mapping[str, float] | None = None) -> None:
        """Saves `state` as the checkpoint of `step`, replacing an older one of that step once the new one is whole.

        Returns as soon as the arrays are copied to the host, so `state` may be donated at once; the rest happens in a
        thread. Waits for the save before. Raises what that one or this one met: InputError for a full disk.
        """
        self.wait()
        folder = self._path(step)
        arrays = leaves.by_path(state)
        contents = {path: leaves.describe(leaf) for path, leaf in arrays.items()}
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        data = DATA[hosts.from_first(lambda: self._make_room(folder))]
        with hosts.together():
            try:
                self._orbax.save(folder / data, args=ocp.args.PyTreeSave(_saved(arrays)))
            except Exception as error:
                raise _explained(error, folder) from error
        self._pending = self._thread.submit(self._commit, step, data, metrics, contents)

    def restore(self, abstract: PyTree[jax.ShapeDtypeStruct]) -> tuple[int, PyTree[Array]] | None:
        """The newest whole checkpoint as (step, state), or None where nothing was ever committed.

        `abstract` gives shapes, dtypes and shardings (on any mesh; without one: the first device). It may leave out
        whole top-level entries of the saved state, such as the optimizer's where only samples are wanted. A damaged
        checkpoint is named on stderr and the one before it taken. Raises InputError where all are damaged, and where
        the arrays are not those that `abstract` asks for.
        """
        self.wait()
        step = hosts.from_first(self._newest_whole)
        if step == _ALL_DAMAGED:
            raise InputError(
                f"every checkpoint in {self._folder} is damaged; restore a copy of it, or remove it to train the stage "
                "anew"
            )
        if step == _NONE:
            return None
        return step, self._load(step, abstract)

    def restore_step(self, step: int, abstract: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
        """The state of one step, as `restore`; InputError where that checkpoint does not exist or is damaged."""
        self.wait()
        with hosts.together():
            try:
                if hosts.is_first():
                    manifest_lib.verify(self._path(step))
            except FileNotFoundError as error:
                steps = ", ".join(map(str, self.steps())) or "none"
                raise InputError(f"{self._folder} has no checkpoint of step {step}; there is {steps}") from error
            except Damaged as damage:
                raise InputError(f"{damage}; use the checkpoint of another step") from damage
        return self._load(step, abstract)

    def check_step(self, step: int, abstract: PyTree[jax.ShapeDtypeStruct]) -> None:
        """Raises InputError where the arrays of a step are not those that `abstract` asks for. Reads none of them."""
        committed = _read(self._path(step))
        if committed is not None:  # a damaged manifest is named by `restore`, which takes another step
            leaves.check(committed.arrays, leaves.by_path(abstract), self._path(step), self._remedy)

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        if not self._folder.exists():
            return []
        folders = [path for path in self._folder.iterdir() if path.name.isdigit()]
        return sorted(int(path.name) for path in folders if (path / manifest_lib.FILE).exists())

    def newest_whole(self) -> int:
        """The newest step whose files are as they were written, 0 where there is none; names damage on stderr."""
        return max(hosts.from_first(self._newest_whole), 0)

    def best_step(self) -> int | None:
        """The step with the best metric, the earliest of equals; None where no whole checkpoint has a finite one."""
        if self._best is None:
            return None
        step = hosts.from_first(lambda: _NONE if (best := self._best_step()) is None else best)
        return None if step == _NONE else step

    def newest(self) -> int:
        """The newest committed step, 0 where there is none. Collective, as everything but `steps` and `check_step`."""
        return hosts.from_first(lambda: max(self.steps(), default=0))

    def wait(self) -> None:
        """Returns once no save is under way, on any host; raises what the last one met."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with hosts.together():
            pending.result()

    def close(self) -> None:
        """Waits, then ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or hosts.is_of_all(error):
            self.close()
            return
        # The other processes are elsewhere, or gone: a save under way may end, but not by waiting for them.
        if self._pending is not None:
            concurrent.futures.wait([self._pending], SECONDS_TO_END)
        self._thread.shutdown(wait=False)

    def _commit(self, step: int, data: str, metrics: dict[str, float], contents: dict[str, str]) -> None:
        """In the thread: waits for Orbax, then hashes, commits and tidies up, in the first process."""
        folder, is_written = self._path(step), False
        try:
            self._orbax.wait_until_finished()
            is_written = True
            if hosts.is_first():
                files = manifest_lib.hash_files(folder / data)
                manifest_lib.write(folder, Manifest(step, data, metrics, contents, files))
                self._remove_old(step)
        except Exception as error:
            explained = _explained(error, folder)
            # Until all have written their parts, each waits for the others inside of Orbax.
            raise explained if is_written else hosts.of_one(explained) from error

    def _remove_old(self, newest: int) -> None:
        """Removes what need not be kept now that `newest` is committed, and what `restore` found damaged."""
        whole = [step for step in self.steps() if step not in self._damaged or step == newest]
        kept = {newest, self._best_step(), *whole[-self._keep :]}
        for step in self.steps():
            if step not in kept:
                # The manifest first: half a removed checkpoint must not look like a whole one.
                (self._path(step) / manifest_lib.FILE).unlink()
                self._path(step).rmtree()
        self._damaged.clear()

    def _best_step(self) -> int | None:
        if self._best is None:
            return None
        name, direction = self._best
        manifests = {step: _read(self._path(step)) for step in self.steps()}
        values = {step: found.metrics.get(name, math.nan) for step, found in manifests.items() if found is not None}
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        return (min if direction == "min" else max)(finite, key=lambda step: finite[step], default=None)

    def _make_room(self, folder: epath.Path) -> int:
        """Which of `DATA` the arrays go to: a committed checkpoint of this step stays whole until the new one is."""
        try:
            self._remove_leftovers()
        except OSError as error:
            raise _explained(error, folder) from error
        committed = _read(folder)
        return int(committed is not None and committed.data == DATA[0])

    def _remove_leftovers(self) -> None:
        """Removes what saves and removals that were killed have left behind. No save may be under way."""
        folders = self._folder.iterdir() if self._folder.exists() else []
        for folder in [path for path in folders if path.name.isdigit()]:
            committed = _read(folder)
            if committed is None:
                folder.rmtree()
                continue
            for path in list(folder.iterdir()):
                if path.name not in (manifest_lib.FILE, committed.data):
                    path.rmtree() if path.is_dir() else path.unlink()

    def _newest_whole(self) -> int:
        steps = self.steps()
        for step in reversed(steps):
            try:
                manifest_lib.verify(self._path(step))
                return step
            except Damaged as damage:
                self._damaged.add(step)
                print(f"warning: checkpoint of step {step} is damaged: {damage}", file=sys.stderr)
        return _ALL_DAMAGED if steps else _NONE

    def _load(self, step: int, abstract: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
        """Reads a verified checkpoint."""
        with hosts.together():
            committed = manifest_lib.read(self._path(step))
        what = f"{self._path(step)} is not what the first process has there; all must see the same run folder"
        hosts.check_same(zlib.crc32(repr(committed).encode()), what)
        wanted = leaves.by_path(jax.tree.map(_placed, abstract))
        leaves.check(committed.arrays, wanted, self._path(step), self._remedy)
        stored = _saved(wanted)
        arguments = ocp.args.PyTreeRestore(
            stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored), partial_restore=True
        )
        arrays = self._orbax.restore(self._path(step) / committed.data, args=arguments)
        empty = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        whole = [arrays[path] if path in stored else empty(leaf) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract), whole)

    def _path(self, step: int) -> epath.Path:
        return self._folder / f"{step:08d}"


def _saved(arrays: dict[str, Any]) -> dict[str, Any]:
    """Orbax refuses arrays without elements; the manifest alone holds those."""
    return {path: leaf for path, leaf in arrays.items() if leaf.size > 0}


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read(folder: epath.Path) -> Manifest | None:
    """The manifest, or None where nothing was committed or can be known any more."""
    try:
        return manifest_lib.read(folder)
    except (FileNotFoundError, Damaged):
        return None


def _explained(error: Exception, folder: epath.Path) -> Exception:
    """Errors of the file system as one line for people; tensorstore hides their code in the text of a ValueError."""
    hidden = re.search(r"os_error_code='(\d+)'", str(error))
    code = error.errno if isinstance(error, OSError) else int(hidden[1]) if hidden else None
    if code is None:
        return error
    return InputError(
        f"cannot write the checkpoint {folder}: {os.strerror(code)}; make room there or use another --workdir "
        "(the checkpoints before it are whole)"
    )


def _absolute(folder: epath.Path) -> epath.Path:
    """Orbax wants absolute paths; 'gs://bucket/...' is one, though `resolve` does not know it."""
    return folder if atomic.is_remote(folder) else folder.resolve()


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs each step of its work, and a failure with five tracebacks; what matters of it we raise ourselves."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname
