"""A released checkpoint of Efficient-VDVAE (PyTorch or JAX) or of VDVAE as a run: its config, weights and averages.

What the arrays are is known to `convert.py`, what the hyper-parameters beside them say to `hyperparameters.py`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bitsperdim import archives
from bitsperdim.adopt import Imported, Moments, Weights
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from bitsperdim.run import parse
from vdvae import convert, hyperparameters, vae
from vdvae.convert import Tensors
from vdvae.layers import Params
from vdvae.vae import Vae

# Parts of a VDVAE checkpoint: PREFIX-model-ema.th and so on.
PARTS = {"ema": "-model-ema.th", "params": "-model.th", "optimizer": "-opt.th", "log": "-log.jsonl"}
SECOND = {"Adamax": "exp_inf", "Adam": "exp_avg_sq"}  # moment of PyTorch's optimizers, by name


def imported(path: str, hparams: str = "") -> Imported:
    """The run of a checkpoint, with the hyper-parameters of the file `hparams`, which is else looked for beside it.

    `path` is `checkpoints-RUN` of PyTorch (or one of its state_dicts as .npz), `checkpoints-RUN` or
    `checkpoints-RUN/checkpoint_STEP` of JAX, or any part of VDVAE's `PREFIX-model-ema.th`, `PREFIX-model.th`,
    `PREFIX-opt.th`; hyper-parameters are in `logs-RUN/hparams-RUN.cfg` and `PREFIX-log.jsonl`.
    Raises InputError where a file is missing, damaged or of another model.
    """
    place = pathlib.Path(path).expanduser()
    if place.is_dir():
        place = _last_of(place)
    beside = pathlib.Path(hparams).expanduser() if hparams else _hyperparameters_beside(place)
    if beside.suffix == ".jsonl":
        return _baseline(place, beside)
    return _efficient(place, beside)


def _last_of(folder: pathlib.Path) -> pathlib.Path:
    """The checkpoint of the most steps in a folder of Flax."""
    steps = {file: file.name.removeprefix("checkpoint_") for file in folder.glob("checkpoint_*")}
    found = {file: int(step) for file, step in steps.items() if step.isdigit()}
    if not found:
        raise InputError(f"{folder} has no file checkpoint_STEP")
    return max(found, key=lambda file: found[file])


def _hyperparameters_beside(path: pathlib.Path) -> pathlib.Path:
    prefix, part = _split(path)
    if part:
        return pathlib.Path(f"{prefix}{PARTS['log']}")
    folder = path.parent if path.name.startswith("checkpoint_") else path
    name = folder.name.removeprefix("checkpoints-")
    places = [folder.parent / f"logs-{name}" / f"hparams-{name}.cfg", folder.parent / f"hparams-{name}.cfg"]
    found = [place for place in places if place.is_file()]
    if not found:
        raise InputError(f"the hyper-parameters of {path} are not in {places[0]}; give them by --hparams=FILE")
    return found[0]


def _split(path: pathlib.Path) -> tuple[str, str]:
    """PREFIX and the ending of VDVAE's parts; the ending is '' where it is none."""
    for ending in (*PARTS.values(), "-model-ema.npz", "-model.npz"):
        if path.name.endswith(ending):
            return str(path).removesuffix(ending), ending
    return str(path), ""


def _efficient(path: pathlib.Path, hparams: pathlib.Path) -> Imported:
    values = hyperparameters.read_cfg(hparams)
    contents = archives.read(path)
    is_flax = "ema_params" in contents
    config = hyperparameters.efficient(values, hparams, decays=is_flax)
    model = _model(config, values["data.channels"])
    if is_flax:
        return _of_flax(contents, config, model, path)
    if "ema_model_state_dict" not in contents:  # one state_dict alone
        params = convert.efficient_from_torch(archives.read_arrays(path), model.net)
        return _run(config, model.facts, params, steps=1)
    entry = lambda name: _entry(contents, name, path)
    tensors = archives.without_prefix(entry("model_state_dict"))
    moments = _moments_of_torch(entry("optimizer_state_dict"), tensors, values["optimizer.type"], path)
    from_torch = lambda tensors: convert.efficient_from_torch(tensors, model.net)
    return _run(
        config,
        model.facts,
        from_torch(tensors),
        from_torch(archives.without_prefix(entry("ema_model_state_dict"))),
        moments and Moments(from_torch(moments.first), from_torch(moments.second), moments.count),
        steps=int(entry("global_step")),
    )


def _of_flax(contents: dict, config: ConfigDict, model: Vae, path: pathlib.Path) -> Imported:
    mixtures = 0 if model.config.output == "bernoulli" else model.config.mixtures
    from_flax = lambda tree: convert.efficient_from_flax(tree, model.net, model.facts.shape[-1], mixtures)
    optimizer = _entry(contents, "opt_state", path)
    moments = next((part for part in optimizer.values() if isinstance(part, Mapping) and "mu" in part), None)
    if moments is not None:
        moments = Moments(from_flax(moments["mu"]), from_flax(moments["nu"]), int(moments["count"]))
    params, ema = (from_flax(_entry(contents, name, path)) for name in ("params", "ema_params"))
    return _run(config, model.facts, params, ema, moments, int(_entry(contents, "step", path)))


def _baseline(path: pathlib.Path, log: pathlib.Path) -> Imported:
    values, step = hyperparameters.read_log(log)
    config = hyperparameters.baseline(values, log)
    model = _model(config, 3)
    prefix, ending = _split(path)
    files = {part: pathlib.Path(f"{prefix}{PARTS[part]}") for part in ("params", "ema", "optimizer")}
    if not ending or path.suffix == ".npz":
        return _run(
            config, model.facts, convert.baseline_from_torch(archives.read_arrays(path), model.net), steps=max(step, 1)
        )
    read = {part: archives.read_arrays(files[part]) for part in ("params", "ema") if files[part].exists()}
    if not read:
        raise InputError(f"there is neither {files['ema']} nor {files['params']}")
    found = {part: convert.baseline_from_torch(tensors, model.net) for part, tensors in read.items()}
    moments = None
    if "params" in read and files["optimizer"].exists():
        moments = _moments_of_torch(archives.read(files["optimizer"]), read["params"], "Adam", files["optimizer"])
        from_torch = lambda tensors: convert.baseline_from_torch(tensors, model.net)
        moments = moments and Moments(from_torch(moments.first), from_torch(moments.second), moments.count)
    params = found["params"] if "params" in found else found["ema"]
    return _run(config, model.facts, params, found.get("ema"), moments, max(step, 1))


def _moments_of_torch(optimizer: Mapping, tensors: Tensors, name: str, path: pathlib.Path) -> Moments | None:
    """The moments under the names of the parameters, whose order is theirs; None before the first update."""
    state = _entry(optimizer, "state", path)
    if not state:
        return None
    if sorted(state) != list(range(len(tensors))):
        raise InputError(f"{path}: the optimizer is one of {len(state)} tensors, not of {len(tensors)}")
    of = {key: {} for key in ("exp_avg", SECOND[name])}
    for number, (parameter, tensor) in enumerate(tensors.items()):
        for key, found in of.items():
            value = _entry(state[number], key, path)
            if value.shape != tensor.shape:
                raise InputError(f"{path}: '{key}' of '{parameter}' has the shape {value.shape}, not {tensor.shape}")
            found[parameter] = value
    # Apex counts for all parameters at once.
    counts = state[0] if "step" in state[0] else _entry(optimizer, "param_groups", path)[0]
    return Moments(*of.values(), count=int(_entry(counts, "step", path)))


def _entry(contents: Mapping, name: str, path: pathlib.Path) -> Any:
    if name not in contents:
        raise InputError(f"{path} lacks the entry '{name}'")
    return contents[name]


def _model(config: ConfigDict, channels: int) -> Vae:
    """Raises InputError where the hyper-parameters make no model."""
    parsed = parse(config)[1]
    if parsed.model.output == "bernoulli":
        return vae.make(parsed.model, Facts((28, 28, channels), 2))
    edge = parsed.data.image_size
    return vae.make(parsed.model, Facts((edge, edge, channels), 2**parsed.data.bits))


def _run(
    config: ConfigDict,
    facts: Facts,
    params: Params,
    ema: Params | None = None,
    moments: Moments | None = None,
    steps: int = 1,
) -> Imported:
    """It is complete as it is; more steps go on from here."""
    config.update_from_flattened_dict({"train.steps": steps})
    described = {"shape": list(facts.shape), "levels": facts.levels}
    return Imported(config, {"model": Weights(params, {}, described, ema, moments)})
