"""A run is a folder: its config, what it was started on, and one folder per stage.

    WORKDIR/config.json          the config in full
    WORKDIR/environment.json     versions, devices and CPU count, on which bit-for-bit equality rests
    WORKDIR/STAGE/               metrics.jsonl, checkpoints/, images/

Not here: what is inside a checkpoint (`checkpoint.py`), and what a stage does (`trainer.py`).
"""

import dataclasses
import errno
import importlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import types
import zlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TextIO

import jax
from etils import epath
from ml_collections import ConfigDict

from bitsperdim import atomic, hosts, optim
from bitsperdim import config as config_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Stage

# Keys that do not change what is learned: they may differ when a run is started again.
FREE_KEYS = frozenset(
    {"log_every", "evaluate_every", "pictures_every", "save_every", "keep_checkpoints", "milestones"}
    | {"scan", "remat"}
    | {"accumulation", "max_non_finite", "tensorboard", "profile"}
    | {"data_dir", "download", "cache_dir", "decode_threads", "cache_limit_gib"}
    # Where images lie; that they are the same ones is checked by their fingerprint.
    | {"path", "evaluation_path"}
)
# What is done with a trained run.
FREE_SECTIONS = ("mesh", "sampling", "evaluation", "encoding")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # a flag of XLA
# Of the section `data`: places on this machine, kept in full so that a run can be used from any folder.
PATH_KEYS = ("path", "evaluation_path", "data_dir", "cache_dir")
PUBLISHED = "model.safetensors"  # a folder that has it is a published run (`published.py`)


class Run(NamedTuple):
    """A run folder, its config, and the family whose stages are trained in it."""

    workdir: epath.Path
    config: Any  # the family's Config
    family: types.ModuleType
    elsewhere: epath.Path | None = None  # of a published run, into which nothing is written: what is made of it

    def folder(self, stage: str) -> epath.Path:
        return self.workdir / stage

    def made(self, stage: str) -> epath.Path:
        """The folder for what is made with trained weights: that of the stage, unless the run is a published one."""
        return self.outputs / stage

    @property
    def outputs(self) -> epath.Path:
        return self.elsewhere or self.workdir

    @property
    def is_published(self) -> bool:
        return self.elsewhere is not None

    def seed(self, stage: str) -> int:
        """Each stage has its own seed, so that priors do not share their batches' order or noise."""
        return zlib.crc32(f"{self.config.seed}/{stage}".encode())

    def stages(self) -> tuple[Stage, ...]:
        return self.family.stages(self.config)

    def stage(self, name: str) -> Stage:
        """The stage of that name; `InputError` with the existing ones otherwise."""
        for stage in self.stages():
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages())
        raise InputError(f"there is no stage '{name}' in {self.workdir}; its stages are {names}")


def parse(values: ConfigDict | Mapping[str, Any]) -> tuple[types.ModuleType, Any]:
    """The family's module and its `Config`, every key checked."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if "family" not in values:
        raise InputError("the config lacks the key 'family' (for example 'vqvae2')")
    module = family(values["family"])
    return module, config_lib.unpack(values, module.Config)


def family(name: Any) -> types.ModuleType:
    """The package of that name; `InputError` where it is none with models."""
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"'family' must name an installed family such as 'vqvae2', not {name!r}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"the family '{name}' of the config is not an installed package") from error
    if not hasattr(module, "Config") or not hasattr(module, "stages"):
        raise InputError(f"'{name}' is not a family of models: it exports no Config and stages")
    return module


def check(workdir: str | os.PathLike[str], values: ConfigDict | Mapping[str, Any]) -> Run:
    """A new run for `workdir`, or the one that is there if it has the same config (`FREE_KEYS` apart).

    Writes nothing: a data set that turns out to be missing should leave no folder behind.
    """
    family, config = parse(values)
    paths = {name: _in_full(getattr(config.data, name)) for name in PATH_KEYS}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))
    folder = place(workdir)
    run = Run(folder, config, family)
    if (folder / PUBLISHED).exists():
        raise InputError(
            f"{folder} is a published run, whose optimizer was left out, so it is not trained further; begin a new "
            f"--workdir with its weights: --init_from={folder}"
        )
    if (folder / "config.json").exists():
        _refuse_differences(read_json(folder / "config.json"), run)
    elif folder.is_file():
        raise InputError(f"{folder} is a file, not a folder; use a new --workdir")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and is no run (it has no config.json); use a new --workdir")
    return run


def check_same_config(run: Run, only: str = "") -> None:
    """Raises `InputError` where this process was given another config, or stage, than the first one. Collective."""
    values = config_lib.to_plain(run.config)
    values["data"] = {key: value for key, value in values["data"].items() if key not in PATH_KEYS}
    message = "this process was given another config or --stage than the first one; all take the same flags"
    hosts.check_same(zlib.crc32(json.dumps([values, only], sort_keys=True).encode()), message)


def create(run: Run) -> list[str]:
    """Writes the run's config and environment; returns a line for each thing that changed since the last start."""
    try:
        if hosts.is_first():
            run.workdir.mkdir(parents=True, exist_ok=True)
            write_json(run.workdir / "config.json", config_lib.to_plain(run.config))
        return _note_environment(run)
    except OSError as error:
        room = "make room there or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise InputError(f"cannot write to {run.workdir}: {error.strerror}; {room}use another --workdir") from error


def keep_free_keys(run: Run) -> None:
    """Writes the config of a complete run where free keys have other values, such as those of `sampling`."""
    path = run.workdir / "config.json"
    now = config_lib.to_plain(run.config)
    if hosts.is_first() and read_json(path) != now:
        write_json(path, now)


def open_run(workdir: str | os.PathLike[str], paths: Mapping[str, str] = {}) -> Run:
    """The run in an existing folder; `InputError` when it is none. `paths`: other values of `PATH_KEYS`.

    What is made of a published one goes to the folder runs/published-NAME, unless `elsewhere` is replaced.
    """
    folder = place(workdir)
    if not folder.exists():
        raise InputError(f"there is no run folder {folder}")
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is no run: it has no config.json")
    values = read_json(folder / "config.json")
    if paths and isinstance(values.get("data"), dict):
        values["data"] |= {name: _in_full(path) for name, path in paths.items()}
    try:
        family, config = parse(values)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    if not (folder / PUBLISHED).exists():
        return Run(folder, config, family)
    return Run(folder, config, family, place(f"runs/published-{os.path.basename(os.path.abspath(folder))}"))


def with_evaluation(run: Run, **changes: Any) -> Run:
    """The run with other values of the config's section `evaluation`, for a measurement; `InputError` where it has no
    such, or they do not fit."""
    section = getattr(run.config, "evaluation", None)
    if lacking := [key for key in changes if not hasattr(section, key)]:
        raise InputError(f"--{lacking[0]} means nothing for a run of {run.family.__name__}")
    assert section is not None
    try:
        section = dataclasses.replace(section, **changes)
        return run._replace(config=dataclasses.replace(run.config, evaluation=section))
    except ValueError as error:
        raise InputError(f"{', '.join(f'--{key}={value}' for key, value in changes.items())}: {error}") from error


def place(path: str | os.PathLike[str]) -> epath.Path:
    """A folder as people give it: '~' is their home."""
    return epath.Path(os.path.expanduser(path))


def _in_full(path: str) -> str:
    return path if not path or atomic.is_remote(path) else os.path.abspath(os.path.expanduser(path))


def machine() -> dict[str, Any]:
    """Versions, devices, and the processors that this process may use."""
    return {
        "bitsperdim": importlib.metadata.version("bitsperdim"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _note_environment(run: Run) -> list[str]:
    now = machine() | {
        "processes": jax.process_count(),
        "mesh": config_lib.to_plain(run.config.mesh),
        "deterministic": DETERMINISTIC in os.environ.get("XLA_FLAGS", ""),
    }
    path = run.workdir / "environment.json"
    before = now | read_json(path) if path.exists() else now  # keys that have come since are as they are now
    if hosts.is_first():
        write_json(path, now)
    before = dict(config_lib.flatten(before))
    return [
        f"{key} changed from {before.get(key)} to {value}"
        for key, value in config_lib.flatten(now)
        if before.get(key) != value
    ]


def _refuse_differences(old: dict[str, Any], run: Run) -> None:
    before = dict(config_lib.flatten(_completed(old, run)))
    after = dict(config_lib.flatten(config_lib.to_plain(run.config)))
    lines = [
        f"         {key}   {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _may_differ(key, before, after, run.config)
    ]
    if lines:
        reasons = [_why_not_longer(key, before, after, run) for key in sorted(before.keys() & after.keys())]
        raise InputError(
            f"{run.workdir} was trained with another config; use a new --workdir or the old values:\n"
            + "\n".join(lines + [reason for reason in reasons if reason])
        )


def _completed(old: dict[str, Any], run: Run) -> dict[str, Any]:
    """With the keys that have come since, at their defaults: what the code did before it had them."""
    try:
        return config_lib.to_plain(config_lib.unpack(old, type(run.config)))
    except InputError:  # it has keys that are gone: they are among the differences
        return old


def _why_not_longer(key: str, before: dict[str, Any], after: dict[str, Any], run: Run) -> str:
    """What a longer training would have needed; '' where `key` does not ask for one."""
    section, _, name = key.rpartition(".")
    if name != "steps" or after[key] <= before[key] or not optim.depends_on_steps(_optim_beside(section, run.config)):
        return ""
    beside = ".".join([*section.split(".")[:-1], "optim"])
    return (
        f"the cosine schedule of {beside} ends with {key}, so a longer training has other learning rates from its "
        f"beginning; set {beside}.cosine_steps or another {beside}.schedule from the beginning, or begin a new "
        f"--workdir with the weights of this one: --init_from={run.workdir}"
    )


def _may_differ(key: str, before: dict[str, Any], after: dict[str, Any], config: Any) -> bool:
    section, _, name = key.rpartition(".")
    if name in FREE_KEYS or section.split(".")[0] in FREE_SECTIONS:
        return True
    if name == "steps" and key in before and key in after:
        return after[key] > before[key] and not optim.depends_on_steps(_optim_beside(section, config))
    return False


def _optim_beside(section: str, config: Any) -> optim.OptimConfig:
    """The optimizer section that stands beside a `train` section."""
    parent = config
    for name in section.split(".")[:-1]:
        parent = getattr(parent, name)
    return parent.optim


def read_json(
    path: epath.Path,
    needed: Collection[str] | Mapping[str, Any] = (),
    remedy: str = "restore it, or use a new --workdir",
) -> dict[str, Any]:
    """A file of the run; `InputError` with the remedy where it is damaged or not what is `needed`.

    That is names of keys, or their types by name: a class, a list of types, or again types by name.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged (it holds no object); {remedy}")
    if misfit := _misfit(values, needed):
        raise InputError(f"{path} is damaged ({misfit}); {remedy}")
    return values


def _misfit(values: Mapping[str, Any], needed: Collection[str] | Mapping[str, Any], path: str = "") -> str:
    """What is lacking or of another type, '' where nothing is."""
    if lacking := [path + key for key in needed if key not in values]:
        return f"it lacks {', '.join(lacking)}"
    for key, kind in needed.items() if isinstance(needed, Mapping) else ():
        if not _is_of(values[key], dict if isinstance(kind, Mapping) else kind):
            return f"{path + key} is {json.dumps(values[key])[:40]}"
        if isinstance(kind, Mapping) and (misfit := _misfit(values[key], kind, f"{path}{key}.")):
            return misfit
    return ""


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and len(value) == len(kind) and all(map(_is_of, value, kind))
    return isinstance(value, kind) and not isinstance(value, bool)


def write_json(path: epath.Path, values: Any) -> None:
    """Atomically: a killed process leaves the old file or the new one. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def stream() -> TextIO:
    """Where a run speaks to people: stderr of the first process; the others write into the void."""
    return sys.stderr if hosts.is_first() else io.StringIO()


def say(line: str) -> None:
    """A line for people, once for all hosts."""
    print(line, file=stream(), flush=True)
