"""The command line: flags, configs by path or by name, and exit codes. `train.py` and its neighbours only call this.

Exit codes: 0 done, 2 bad input, 3 stopped by a signal and saved, 4 training stayed non-finite; 1 is a defect of ours.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from bitsperdim import config as config_lib
from bitsperdim import images, metrics, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError, RunError

PACKAGE = pathlib.Path(__file__).resolve().parent
# Installed, configs are data of this package; in a checkout they stand beside it.
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def train() -> None:
    """`train.py --config=NAME[:variant] [--workdir=...] [--stage=...] [--config.key=value]`."""
    _script(_train)


def evaluate() -> None:
    """`evaluate.py --workdir=RUN [--split=evaluation]`."""
    _script(_evaluate)


def sample() -> None:
    """`sample.py --workdir=RUN [--num=16] [--seed=0] [--temperature=1] [--label=K] [--out=FOLDER]`."""
    _script(_sample)


def _train(argv: list[str]) -> None:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, help_string="NAME or FILE.py, with :variant.")
    flags.DEFINE_string("workdir", "", "Run folder; default runs/<config>-<variant>.", flag_values=values)
    flags.DEFINE_string("stage", "", "Train this stage alone.", flag_values=values)
    argv = [_with_config_path(argument) for argument in argv]
    _refuse_unknown_keys(argv)
    _parse(values, argv)
    if values.config is None:
        raise InputError(f"--config is missing; one of {', '.join(config_names())}, or a file")
    trainer.train(values.config, values.workdir or _default_workdir(argv), values.stage)


def _evaluate(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Run folder.", flag_values=values)
    flags.DEFINE_string("split", "evaluation", "train or evaluation.", flag_values=values)
    _parse(values, argv)
    if values.split not in ("train", "evaluation"):
        raise InputError(f"--split must be train or evaluation, not '{values.split}'")
    run = run_lib.open_run(_required(values, "workdir"))
    measured = trainer.evaluate(run, values.split)
    path = run.workdir / "evaluation.json"
    run_lib.write_json(path, measured)
    print(metrics.table(list(config_lib.flatten(measured)), ("figure", "value")))
    print(f"written to {path}")


def _sample(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Run folder.", flag_values=values)
    flags.DEFINE_string("out", "", "Folder for the pictures; default the run folder.", flag_values=values)
    flags.DEFINE_integer("num", 16, "Number of samples.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", flag_values=values)
    flags.DEFINE_integer("label", None, "Class to sample; default: all classes in turn.", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "Of the priors; 0 is greedy.", lower_bound=0.0, flag_values=values)
    _parse(values, argv)
    run = run_lib.open_run(_required(values, "workdir"))
    draw = run.family.sampler(run, sharding.make_mesh(run.config.mesh))
    start = time.perf_counter()
    pictures, measured = draw(jax.random.key(values.seed), values.num, values.temperature, values.label)
    seconds = time.perf_counter() - start
    folder = epath.Path(values.out) if values.out else run.workdir
    folder.mkdir(parents=True, exist_ok=True)
    images.save_png(folder / "samples.png", images.grid(pictures))
    with (folder / "samples.npy").open("wb") as file:
        np.save(file, pictures)
    about = {"num": values.num, "seed": values.seed, "temperature": values.temperature, "label": values.label}
    run_lib.write_json(folder / "sampling.json", {**about, "seconds_with_compilation": round(seconds, 3), **measured})
    print(f"{values.num} samples in {seconds:.1f} s (compilation included): {folder / 'samples.png'}")


def config_names() -> list[str]:
    """The configs that `--config=NAME` finds."""
    return sorted({path.stem for folder in CONFIG_FOLDERS if folder.is_dir() for path in folder.glob("*.py")})


def find_config(name: str) -> pathlib.Path:
    """The file of `FILE.py`, `configs/NAME.py` or `NAME`; `InputError` with the known names when there is none."""
    given = pathlib.Path(name)
    if given.suffix == ".py" and given.is_file():
        return given
    if given.suffix in ("", ".py") and given.parent.name in ("", "configs"):
        for folder in CONFIG_FOLDERS:
            if (folder / f"{given.stem}.py").is_file():
                return folder / f"{given.stem}.py"
    raise InputError(f"there is no config '{name}'; known are {', '.join(config_names())}, or give the path of a file")


def load_config(name: str) -> ConfigDict:
    """`NAME[:variant]` as the ConfigDict that its `get_config` makes. Runs the file."""
    name, _, variant = name.partition(":")
    path = find_config(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(variant)
    except Exception as error:
        raise InputError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error


def _with_config_path(argument: str) -> str:
    """`--config=NAME:variant` with NAME as the path of its file."""
    if not argument.startswith("--config="):
        return argument
    name, colon, variant = argument.removeprefix("--config=").partition(":")
    return f"--config={find_config(name)}{colon}{variant}"


def _refuse_unknown_keys(argv: list[str]) -> None:
    """`ml_collections` reports an unknown `--config.key` without its section, so it is looked up first."""
    named = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    if not named:
        return
    valid = [key for key, _ in config_lib.flatten(load_config(named[-1]).to_dict())]
    for argument in argv:
        if argument.startswith("--config."):
            key = argument.removeprefix("--config.").partition("=")[0]
            if key not in valid and not any(name.startswith(f"{key}.") for name in valid):
                raise config_lib.unknown_key(key, valid)


def _default_workdir(argv: list[str]) -> str:
    name, _, variant = [a for a in argv if a.startswith("--config=")][-1].removeprefix("--config=").partition(":")
    return os.path.join("runs", f"{pathlib.Path(name).stem}-{variant or 'base'}")


def _parse(values: flags.FlagValues, argv: list[str]) -> None:
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument '{rest[1]}'; flags are written --name=value")


def _required(values: flags.FlagValues, name: str) -> Any:
    if values[name].value is None:
        raise InputError(f"--{name} is missing")
    return values[name].value


def _script(main: Callable[[list[str]], None]) -> None:
    """Runs a script's body; ends the process with the exit code of what happened."""
    argv = [argument for argument in sys.argv if argument not in ("--traceback", "--help", "-h")]
    if len(argv) < len(sys.argv) and "--traceback" not in sys.argv:
        print(main.__globals__[main.__name__.removeprefix("_")].__doc__.replace("`", ""))
        sys.exit(0)
    _use_compilation_cache()
    try:
        main(argv)
    except RunError as error:
        if "--traceback" in sys.argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(3)


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says where (or '' says not)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.environ.get("BITSPERDIM_CACHE") or os.path.expanduser("~/.cache/bitsperdim")
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
