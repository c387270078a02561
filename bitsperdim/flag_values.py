"""What people write behind a flag where it is more than one number: values by level, shares, functions, arrays.

Every function of one value takes the name of its flag, for the message of its InputError.
Not here: the flags themselves (`cli.py`), and those that change a config (`flag_config.py`).
"""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags

from bitsperdim.errors import InputError
from bitsperdim.model import Loaded
from bitsperdim.run import Run

OF_DRAW = ("temperature", "output_temperature", "label", "top_k", "top_p", "sampler", "batch_size", "given", "keep")
# Those of them that may differ by level: least and greatest value, type.
BY_LEVEL = {"temperature": (0.0, math.inf, float), "top_k": (1, math.inf, int), "top_p": (0.0, 1.0, float)}


def draw_options(given: Mapping[str, Any], loaded: Loaded, run: Run) -> dict[str, Any]:
    """The flags `OF_DRAW` that were given, as arguments of the family's `draw`; InputError where it has none such."""
    return options(given, loaded.draw, f"a run of {run.family.__name__}", run)


def options(given: Mapping[str, Any], function: Callable[..., Any], whose: str, run: Run) -> dict[str, Any]:
    """The flags `OF_DRAW` that were given, as arguments of a function of the family; InputError where it has none such.
    `whose` says whose function it is."""
    known, family = inspect.signature(function).parameters, run.family.__name__
    options = dict(given)
    for name in options:
        if name not in known:
            flags_of_it = ", ".join(f"--{option}" for option in OF_DRAW if option in known)
            raise InputError(f"--{name} means nothing for {whose}; it knows {flags_of_it or 'none of its kind'}")
    for name in BY_LEVEL.keys() & options.keys():
        options[name] = by_level(name, given[name], *BY_LEVEL[name])
        if isinstance(options[name], dict) and not hasattr(run.config, "levels"):
            raise InputError(f"--{name}={given[name]}: a run of {family} has no levels; give one number")
    if "output_temperature" in options:
        options["output_temperature"] = _number("output_temperature", given["output_temperature"], 0.0, math.inf)
    if "given" in options:
        options["given"] = array("given", options["given"])
    if "keep" in options:
        options["keep"] = shares("keep", options["keep"])
    return options


def by_level(flag: str, text: str, low: float, high: float, kind: type = float) -> float | dict[str, float]:
    """'0.9', or 'top=0.9,bottom=1' as a dict: finite numbers in low..high. Which levels there are the family knows."""
    if "=" not in text:
        return _number(flag, text, low, high, kind)
    values: dict[str, float] = {}
    for part in text.split(","):
        level, equals, number = part.partition("=")
        level = level.strip()
        if not (level and equals) or level in values:
            raise InputError(f"--{flag}={text}: '{part}' must be LEVEL=NUMBER, each level once, as in top=0.9,bottom=1")
        values[level] = _number(flag, number, low, high, kind)
    return values


def shares(flag: str, text: str) -> tuple[float, ...]:
    """'1,0.5,0.05' as numbers in (0, 1], the largest first."""
    found = {_number(flag, part, 0.0, 1.0) for part in text.split(",")}
    if 0.0 in found:
        raise InputError(f"--{flag} must be above 0 and at most 1, not {text}")
    return tuple(sorted(found, reverse=True))


def _number(flag: str, text: str, low: float, high: float, kind: type = float) -> Any:
    try:
        value = kind(text)
    except ValueError as error:
        raise InputError(f"--{flag} must be {'an integer' if kind is int else 'a number'}, not '{text}'") from error
    if not (low <= value <= high and math.isfinite(value)):
        bounds = f"be finite and at least {low:g}" if high == math.inf else f"lie in {low:g}..{high:g}"
        raise InputError(f"--{flag} must {bounds}, not {text}")
    return value


def function(flag: str, text: str) -> Callable[..., Any]:
    """'package.module:name' as that function. Imports, and so runs, the module: of this folder, or an installed one.

    Raises InputError where module or function are missing, or the import fails.
    """
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name):
        raise InputError(f"--{flag} must be MODULE:FUNCTION, not '{text}'")
    # A script's own folder is on the path, that in which it was called is not.
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"--{flag}={text}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"--{flag}={text}: {module_name} has no function '{name}'")
    return found


def call(flag: str, given: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """What a given function returns, as an array of finite numbers. InputError where it fails or returns others."""
    try:
        result = np.asarray(given(*arguments))
    except Exception as error:
        raise InputError(f"the function of --{flag} failed: {type(error).__name__}: {error}") from error
    # bfloat16, as JAX returns it, is no number of NumPy's own.
    if result.dtype.kind not in "fiub" and result.dtype.name != "bfloat16":
        raise InputError(f"the function of --{flag} must return numbers, not {result.dtype} {result.shape}")
    result = result.astype(np.float64)
    if not np.isfinite(result).all():
        raise InputError(f"the function of --{flag} returned {(~np.isfinite(result)).sum()} values that are not finite")
    return result


def array(flag: str, path: str) -> np.ndarray:
    """The array of a .npy file."""
    try:
        # Not np.load, which takes archives as well, and whatever else for pickled objects.
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--{flag}={path} is no readable .npy file ({error})") from error


def chosen_functions(values: flags.FlagValues) -> tuple[Callable | None, Callable | None]:
    """The scorer of --accept_top and the features of --nearest, where they are given."""
    if bool(values.scorer) != bool(values.accept_top):
        raise InputError("--accept_top=SHARE and --scorer=MODULE:FUNCTION need each other")
    if values.candidates and not values.accept_top:
        raise InputError("--candidates=N needs --accept_top=SHARE, for without it every sample is kept")
    if values.features and not values.nearest:
        raise InputError("--features needs --nearest=K, the number of images to look for")
    scorer = function("scorer", values.scorer) if values.scorer else None
    return scorer, function("features", values.features) if values.features else None
