"""What one stage makes of whole splits with the model of another (codes, samples): written once, checked at every use.

    WORKDIR/STAGE/STAGE-SPLIT.tfrecord-*    shards in TFDS form (`records.py`), in the order of the split
    WORKDIR/STAGE/unfinished.json           which model makes them, while they are made
    WORKDIR/STAGE/info.json                 which model made them, sha256 of the files; its presence commits

An extraction that was killed goes on at the first shard that is missing, with the same model. A stage that is trained
on what was extracted refuses that of another model than the run's. Not here: what is extracted.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from bitsperdim import atomic, cache, data, hosts, manifest, records, seen, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Batch
from bitsperdim.run import Run

SPLITS = ("train", "evaluation")
INFO = {"fingerprint": str, "step": int, "steps": int, "fields": dict, "shard_lengths": dict, "files": dict}


class Extraction(NamedTuple):
    """A stage that extracts, the stage whose model it uses, and those that are trained on what it extracts.

    `settings`, as JSON has them, are what else decides what is extracted: with others it begins anew.
    """

    name: str
    of: str
    then: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}


def encode_images(
    run: Run,
    extraction: Extraction,
    state: PyTree,
    encode: Callable[[PyTree, PyTree, Batch], dict[str, Array]],
    batch_size: int,
    mesh: Mesh,
    check_signals: Callable[[], None],
    about: Mapping[str, Any] = {},
) -> None:
    """`encode(ema, extra, batch)` of every image of both splits; goes on where it was interrupted.

    A batch has `index` too, the number of each image in its split: noise that depends on it alone is the same however
    often the extraction was interrupted. `about` is kept beside what is extracted (`record`).
    """
    compiled = jax.jit(encode, out_shardings=sharding.replicated(mesh))
    batch_size = sharding.whole_batch(batch_size, mesh)
    sources = {split: data.open_source(run.config.data, split) for split in SPLITS}
    seen.check_sources(run, run.stage(extraction.of), sources)
    shapes = jax.eval_shape(encode, state["ema"], state["extra"], _after(sources["train"], 0).read(np.arange(1)))
    fields = {name: np.dtype((leaf.dtype, leaf.shape[1:])) for name, leaf in shapes.items()}
    writers = begin(
        run, extraction, state, {split: source.size for split, source in sources.items()}, fields, batch_size
    )
    for split, source in sources.items():
        progress = trainer.progress(f"{extraction.name} of {source.name}", source.size)
        for batch in data.evaluation_batches(
            _after(source, writers[split].done), batch_size, sharding.over_batch(mesh)
        ):
            check_signals()
            progress(writers[split].add(jax.device_get(compiled(state["ema"], state["extra"], batch))))
    commit(run, extraction, state, writers, fields, about)


def _after(source: data.Source, start: int) -> data.Source:
    """What of it is left, with the `index` of each image in the whole."""
    read = lambda indices: source.read(start + indices) | {"index": (start + indices).astype(np.int32)}
    return source._replace(size=source.size - start, read=read)


def begin(
    run: Run, extraction: Extraction, state: PyTree, sizes: dict[str, int], fields: records.Fields, batch_size: int
) -> dict[str, "Writer"]:
    """A writer for each split, which knows how many of its examples an extraction that was interrupted has `done`.

    What it has written is kept where it had the same model and batches, on which the bits of the rest depend.
    """
    folder = run.made(extraction.name)
    now = {"fingerprint": fingerprint(state), "step": int(state["step"]), "batch_size": batch_size}
    now |= {"settings": dict(extraction.settings)} if extraction.settings else {}
    with hosts.together():
        if hosts.is_first():
            _clear_unless(now, folder, extraction)
    return {
        split: Writer(folder, extraction.name, split, records.lengths(size, batch_size, fields), fields)
        for split, size in sizes.items()
    }


def _clear_unless(now: dict[str, Any], folder: epath.Path, extraction: Extraction) -> None:
    """Makes the folder anew where what is in it was not begun with the model and settings of `now`."""
    path = folder / "unfinished.json"
    before = run_lib.read_json(path) if path.exists() else None
    if before == now:
        return
    if before is not None:
        others = " or with other settings" if extraction.settings else ""
        run_lib.say(f"{extraction.name}: begins anew, for its first part was made by another {extraction.of}{others}")
    with _explained(folder):
        if folder.exists():
            folder.rmtree()
        run_lib.write_json(path, now)


def commit(
    run: Run,
    extraction: Extraction,
    state: PyTree,
    writers: dict[str, "Writer"],
    fields: records.Fields,
    about: Mapping[str, Any] = {},
) -> None:
    """Declares the extraction complete, made with the weights of `state` (`step`, `ema`, `extra`)."""
    folder, made_by = run.made(extraction.name), fingerprint(state)
    text = f"Made by the stage '{extraction.of}' at step {int(state['step'])}, fingerprint {made_by}."
    shard_lengths = {split: writer.lengths for split, writer in writers.items()}
    info = {
        "fingerprint": made_by,
        "step": int(state["step"]),
        "steps": _steps(run, extraction),
        "settings": dict(extraction.settings),
        "about": dict(about),
        "fields": {name: [dtype.base.name, list(dtype.shape)] for name, dtype in sorted(fields.items())},
        "shard_lengths": shard_lengths,
    }
    with hosts.together(), _explained(folder):
        if hosts.is_first():
            info["files"] = {
                split: {name: manifest.hash_file(folder / name, flush=True) for name in writer.names}
                for split, writer in writers.items()
            }
            records.describe(folder, extraction.name, text, fields, shard_lengths)
            run_lib.write_json(folder / "info.json", info)
            (folder / "unfinished.json").unlink()


def is_extracted(run: Run, extraction: Extraction) -> bool:
    """Raises InputError where it is, but with other settings, or the model is to be trained further than when it made
    it."""
    path = run.made(extraction.name) / "info.json"
    if not path.exists():
        return False
    info, now = run_lib.read_json(path, INFO), _steps(run, extraction)
    if info["steps"] != now:
        raise _of_another(run, extraction, info["steps"], now)
    before = info.get("settings", {})
    if changed := [name for name, value in extraction.settings.items() if before.get(name) != value]:
        changes = ", ".join(f"{name} {before.get(name)} -> {extraction.settings[name]}" for name in changed)
        raise InputError(f"{path.parent} was made with other settings ({changes}); {_remedy(run, extraction)}")
    return True


def open_arrays(run: Run, extraction: Extraction, split: str) -> dict[str, records.Column]:
    """The fields of a split by name, mapped into memory.

    Raises InputError where there are none, a file has changed, or the run's model is another one by now.
    """
    path = run.made(extraction.name) / "info.json"
    if not path.exists():
        raise InputError(f"{path.parent} is missing; train.py makes it again")
    info = run_lib.read_json(path, INFO | {"files": {split: dict}})
    step = trainer.restored_step(run, extraction.of)
    if info["step"] != step or info["fingerprint"] != _fingerprint_at(run, extraction.of, step):
        raise _of_another(run, extraction, info["step"], step)
    names = list(info["files"][split])
    folder = _at_hand(run, extraction, names, info["fingerprint"])
    _verify(folder, json.dumps(info["files"][split]))
    fields = {name: np.dtype((kind, tuple(shape))) for name, (kind, shape) in info["fields"].items()}
    return records.columns([folder / name for name in names], fields)


def record(run: Run, extraction: Extraction, split: str) -> dict[str, Any]:
    """What info.json has of an extraction that `open_arrays` takes: its settings, `about`, and the files of a split."""
    return run_lib.read_json(run.made(extraction.name) / "info.json", INFO | {"about": dict, "files": {split: dict}})


def origin(run: Run, extraction: Extraction) -> str:
    """The fingerprint of the model that extracted: of a `Source`, so that no stage goes on with what another made."""
    return run_lib.read_json(run.made(extraction.name) / "info.json", INFO)["fingerprint"]


def source_state(run: Run, extraction: Extraction, mesh: Mesh) -> PyTree:
    """The model that extracted (`step`, `ema`, `extra`); InputError where the run's is another one by now.

    What was extracted may have been removed since: then there is nothing to compare with.
    """
    _, state = trainer.restore(run, extraction.of, mesh)
    path = run.made(extraction.name) / "info.json"
    if not path.exists():
        return state
    info = run_lib.read_json(path, INFO)
    if info["fingerprint"] != fingerprint(state):
        raise _of_another(run, extraction, info["step"], int(state["step"]))
    return state


def fingerprint(state: PyTree) -> str:
    """sha256 of the Polyak weights and of what stands beside them: what decides an extraction."""
    digest = hashlib.sha256()
    whole = hosts.local({"ema": state["ema"], "extra": state["extra"]})
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
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
    difference = f"at step {then:,}, now {now:,}" if then != now else f"other weights of step {now:,}"
    return InputError(
        f"{run.made(extraction.name)} was made by another {extraction.of} ({difference}); {_remedy(run, extraction)}"
    )


def _remedy(run: Run, extraction: Extraction) -> str:
    if not extraction.then:
        return f"remove the folder {extraction.name} in {run.workdir} to extract again"
    folders = " and ".join(filter(None, [", ".join([extraction.name, *extraction.then[:-1]]), *extraction.then[-1:]]))
    return f"remove the folders {folders} in {run.workdir} to train them anew"


@functools.lru_cache(maxsize=8)  # once a process: the codes of a large data set take seconds to read
def _verify(folder: epath.Path, files: str) -> None:
    """Raises InputError where a file is not what was written."""
    for name, expected in json.loads(files).items():
        path = folder / name
        if not path.exists() or list(manifest.hash_file(path)) != expected:
            state = "has changed since it was written" if path.exists() else "is missing"
            raise InputError(f"{path} {state}; remove the folder {folder} to extract again")


def _at_hand(run: Run, extraction: Extraction, names: list[str], fingerprint: str) -> epath.Path:
    """Where the shards are; for a remote run a copy in the cache, since only local files can be mapped into memory."""
    folder = run.made(extraction.name)
    if not atomic.is_remote(folder):
        return folder
    copy = epath.Path(cache.location(run.config.data.cache_dir)) / f"{extraction.name}-{fingerprint[:12]}"
    copy.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).exists() and not (copy / name).exists():
            (folder / name).copy(copy / f"{name}.{os.getpid()}.partial", overwrite=True).replace(copy / name)
    return copy


class Writer:
    """The shards of one split, each put in its place when it is whole; those that are there are not written again.

    `done` examples are in whole shards at the beginning; the next one is the first to be added. An error of the file
    system is an `InputError`.
    """

    def __init__(self, folder: epath.Path, name: str, split: str, lengths: list[int], fields: records.Fields) -> None:
        self.lengths, self._folder, self._fields = lengths, folder, fields
        self.names = [records.shard_name(name, split, index, len(lengths)) for index in range(len(lengths))]
        missing = lambda: (i for i, file in enumerate(self.names) if not (folder / file).exists())
        present = hosts.from_first(lambda: next(missing(), len(lengths)))
        self._next = present
        self.done = sum(lengths[:present])
        self._rows: list[dict[str, np.ndarray]] = []

    def add(self, rows: dict[str, np.ndarray]) -> int:
        """Appends a batch, less the padding of the last one; returns how many examples it has."""
        end = sum(self.lengths[: self._next + 1])
        count = min(len(next(iter(rows.values()))), end - self.done)
        self._rows.append({name: values[:count] for name, values in rows.items()})
        self.done += count
        if self.done == end:
            self._write()
        return self.done

    def _write(self) -> None:
        rows = {name: np.concatenate([batch[name] for batch in self._rows]) for name in self._fields}
        path = self._folder / self.names[self._next]
        self._next, self._rows = self._next + 1, []
        with hosts.together(), _explained(path):
            if hosts.is_first():
                atomic.write_bytes(path, records.shard(rows, self._fields))


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        (path.parent / f"{path.name}.tmp").unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({error.strerror}); make room, then the same command goes on") from error
