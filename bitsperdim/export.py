"""A trained run becomes a published one: small, without pickle, and opened like a run (`convert.py --export`).

    FOLDER/README.md                        what it is, and how to check its figures
    FOLDER/config.json  environment.json    as in the run; places of data on the machine are left out
    FOLDER/model.safetensors                the weights (`published.py`)
    FOLDER/evaluation*.json  samplers.json  figures that were measured with these weights; others are left out
    FOLDER/STAGE/                           data.json, sources.json, metrics.jsonl of each stage

Not there: what training needs to go on (raw weights, the optimizer's moments), pictures, extracted codes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from bitsperdim import atomic, evaluation, leaves, metrics, published, sharding, trained, trainer
from bitsperdim import config as config_lib
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Stage
from bitsperdim.published import Weights
from bitsperdim.run import Run


def export(run: Run, folder: epath.Path) -> None:
    """Writes the folder. Raises InputError where it is not empty, or the run has no complete stage, or is published."""
    if run.is_published:
        raise InputError(f"{run.workdir} is a published run already; copy its folder")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; use a new --export")
    stages = [stage for stage in run.stages() if stage.model is not None]
    complete = [stage for stage in stages if trainer.is_complete(run, stage)]
    if not complete:
        raise InputError(f"no stage of {run.workdir} is complete; finish its training first")
    for stage in stages:
        if stage not in complete:
            run_lib.say(f"{stage.name}: left out, for its training is not complete")
    weights = _weights(run, complete)
    for stage in complete:
        _copy_records(run, stage, folder)
    config = config_lib.to_plain(run.config)
    config["data"] |= dict.fromkeys(run_lib.PATH_KEYS, "")
    run_lib.write_json(folder / "config.json", config)
    environment = run.workdir / "environment.json"
    if environment.exists():
        run_lib.write_json(folder / "environment.json", run_lib.read_json(environment))
    figures = dict(_figures(run, weights.steps))
    for name, values in figures.items():
        run_lib.write_json(folder / name, values)
    atomic.write_bytes(folder / "README.md", _readme(run, weights, figures, folder).encode())
    published.write(folder, weights)  # last, so that half a folder is no published run


def _weights(run: Run, complete: list[Stage]) -> Weights:
    mesh, steps, arrays = sharding.mesh_at_hand(run.config.mesh), {}, {}
    for stage in complete:
        _, state = trained.restore(run, stage.name, mesh)
        steps[stage.name] = int(state.pop("step"))
        whole = leaves.by_path(jax.device_get(state))
        # Not `ascontiguousarray`, which makes a vector of a scalar.
        arrays |= {f"{stage.name}/{path}": np.array(leaf, order="C") for path, leaf in whole.items()}
    return Weights(steps, arrays)


def _copy_records(run: Run, stage: Stage, folder: epath.Path) -> None:
    """What a run keeps of a stage beside its weights, without the names of folders on this machine."""
    origin, target = run.folder(stage.name), folder / stage.name
    if (origin / "data.json").exists():
        values = run_lib.read_json(origin / "data.json")
        if isinstance(start := values.get("init_from"), dict) and "run" in start:
            values["init_from"] = start | {"run": os.path.basename(start["run"])}
        run_lib.write_json(target / "data.json", values)
    if (origin / "sources.json").exists():
        sources = run_lib.read_json(origin / "sources.json")
        for source in sources.values():
            source["name"] = os.path.basename(source["name"]) if source.get("fingerprint") else source["name"]
        run_lib.write_json(target / "sources.json", sources)
    if records := metrics.read(origin / metrics.FILE):
        atomic.write_bytes(target / metrics.FILE, "".join(json.dumps(record) + "\n" for record in records).encode())


def _figures(run: Run, steps: Mapping[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files with figures of these very weights, by name; says which ones are not."""
    for path in sorted([*run.workdir.glob("evaluation*.json"), *run.workdir.glob("samplers.json")]):
        values = run_lib.read_json(path)
        of_stages = {name: of["step"] for name, of in values.items() if isinstance(of, dict) and "step" in of}
        found = values["steps"] if isinstance(values.get("steps"), dict) else of_stages
        if found and all(steps.get(name) == step for name, step in found.items()):
            yield path.name, values
        else:
            run_lib.say(f"{path.name}: left out, for it was measured at other steps than those of the weights")


def _readme(run: Run, weights: Weights, figures: Mapping[str, Any], folder: epath.Path) -> str:
    count = sum(a.size for name, a in weights.arrays.items() if name.split("/")[1] == "ema")
    stages = ", ".join(f"`{name}` ({step:,} steps)" for name, step in weights.steps.items())
    data = run.config.data
    source = f"`{data.name}`, read through TFDS" if data.name else f"`{data.source}`"
    place = folder.name if folder.is_absolute() else folder
    lines = [
        f"# {folder.name}",
        "",
        f"A trained model of the family `{run.family.__name__}` with {count:,} parameters: {stages}.",
        f"Images: {source}. Weights: Polyak averages, float32, in `{run_lib.PUBLISHED}` (safetensors; no pickle).",
        "",
        "```bash",
        f"{evaluation.command(place, figures.get('evaluation.json', {}))}    # the figures of evaluation.json again",
        f"python sample.py --workdir={place}",
        "```",
        "",
        "```python",
        "import bitsperdim, jax",
        "",
        f'run = bitsperdim.load("{place}")',
        "images = run.sample(jax.random.key(0), 16)",
        "```",
        "",
        "Nothing is written into this folder: what the scripts make of it goes to "
        f"`runs/published-{folder.name}`, or to `--out`.",
        "Images of TFDS are looked for in its usual folder, or in `--config.data.data_dir=FOLDER`.",
    ]
    if measured := figures.get("evaluation.json"):
        numbers = {name: value for name, value in measured.items() if isinstance(value, float)}
        splits = " and ".join(dict.fromkeys(str(v["split"]) for v in measured.values() if isinstance(v, dict)))
        lines += ["", f"| measured on {splits} | |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in numbers.items()]
    return "\n".join(lines) + "\n"
