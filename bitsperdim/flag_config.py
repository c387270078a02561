"""The flags `--config=NAME[:VARIANT]` and `--config.KEY=VALUE`: which config is meant, and what is changed in it.

Not here: how a config is found and loaded (`config_files.py`); other flags (`cli.py`, `flag_values.py`).
"""

import dataclasses
import os
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bitsperdim import config as config_lib
from bitsperdim import config_files
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError


def pop(argv: list[str]) -> tuple[str, list[str]]:
    """The value of `--config=NAME` (or `--config NAME`), and the other arguments."""
    names, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            names.append(value if equals else next(arguments, ""))
        else:
            rest.append(argument)
    if len(names) > 1:
        raise InputError(f"--config is given {len(names)} times: {', '.join(names)}")
    if names and names[0]:
        return names[0], rest
    raise InputError(
        f"--config is missing; known are {', '.join(config_files.names())}, or give the path of a file; "
        "train.py --list says more of them"
    )


def default_workdir(name: str) -> str:
    """Of the config that `--config` names."""
    path, _, variant = name.partition(":")
    return os.path.join("runs", f"{pathlib.Path(path).stem}-{variant or 'base'}")


def define(values: flags.FlagValues, config: ConfigDict, argv: list[str]) -> None:
    """The flags --config.KEY=VALUE, for every key and not only those that the config names."""
    complete = ConfigDict(dataclasses.asdict(run_lib.parse(config)[1]))
    _refuse_unknown_keys(argv, dict(config_lib.flatten(complete.to_dict())))
    config_flags.DEFINE_config_dict("config", complete, flag_values=values, sys_argv=argv)


def _refuse_unknown_keys(argv: list[str], valid: dict[str, Any]) -> None:
    """`ml_collections` reports an unknown `--config.key` without its section, so it is looked up first."""
    for argument in argv:
        key = argument.removeprefix("--config.").partition("=")[0]
        if not argument.startswith("--config.") or valid.get(key) is not None:
            continue
        if key in valid:
            raise InputError(f"'{key}' is a section that this config leaves out; take a variant or a file that has it")
        inside = [name for name in valid if name.startswith(f"{key}.")]
        if inside:
            raise InputError(
                f"'{key}' is a section of the config: one of its keys is set by --config.{key}.KEY=VALUE, "
                f"such as --config.{inside[0]}=VALUE"
            )
        raise config_lib.unknown_key(key, list(valid))
