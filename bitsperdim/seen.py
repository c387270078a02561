"""Which images a stage began with: kept in STAGE/sources.json, and the same at every start, in every process.

Not here: where images come from (`data.py`), and how those of a folder are fingerprinted (`folder_scan.py`).
"""

import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from bitsperdim import data, hosts
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Stage
from bitsperdim.run import Run

SPLITS = ("train", "evaluation")


def sources_of(run: Run, stage: Stage) -> dict[str, data.Source]:
    """Those that a stage trains on and is measured on."""
    assert stage.source
    return {split: stage.source(run, split) for split in SPLITS}


def record(run: Run, stage: Stage) -> epath.Path:
    """The file of a stage; of one that extracts, and of published weights, there is none."""
    return run.folder(stage.name) / "sources.json"


def check_sources(run: Run, stage: Stage, sources: Mapping[str, data.Source]) -> None:
    """Raises InputError where the images are not those that the stage began with."""
    path = record(run, stage)
    before = run_lib.read_json(path, {"train": dict, "evaluation": dict}) if path.exists() else {}
    for split, source in sources.items():
        now = _describe(source)
        changed = [key for key in now if split in before and before[split].get(key) != now[key]]
        # The name of a folder is its place, which may change; what is in it has a fingerprint.
        if [key for key in changed if key != "name" or not source.fingerprint]:
            changes = ", ".join(f"{key} {before[split].get(key)} -> {now[key]}" for key in changed)
            raise InputError(
                f"the {split} images of {run.folder(stage.name)} have changed since it began ({changes}); "
                "restore them, or use a new --workdir"
            )


def check_same_images(sources: Mapping[str, data.Source]) -> None:
    """Raises InputError where a process of the run reads others than the first one. Collective."""
    described = [_describe(source) | ({"name": ""} if source.fingerprint else {}) for source in sources.values()]
    message = "the images that this process reads are not those of the first one; give all of them the same"
    hosts.check_same(zlib.crc32(repr(described).encode()), message)


def _describe(source: data.Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "size": source.size,
        "shape": list(source.shape),
        "levels": source.levels,
        "class_names": list(source.class_names),
        "fingerprint": source.fingerprint,
    }


def write(run: Run, stage: Stage, sources: Mapping[str, data.Source]) -> None:
    """Keeps what they are, for the next start."""
    run_lib.write_json(record(run, stage), {split: _describe(source) for split, source in sources.items()})
