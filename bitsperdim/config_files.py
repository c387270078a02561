"""Config files by path or by name: what `--config=NAME[:VARIANT]` means, in scripts, configs and importers alike.

Not here: what a config may say (`config.py`, the `config.py` of each family), and flags that change it (`cli.py`).
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from bitsperdim.errors import InputError

PACKAGE = pathlib.Path(__file__).resolve().parent
# Installed, configs are data of this package; in a checkout they stand beside it.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def names() -> list[str]:
    """The configs that `--config=NAME` finds."""
    return sorted({path.stem for folder in FOLDERS if folder.is_dir() for path in folder.glob("*.py")})


def find(name: str) -> pathlib.Path:
    """The file of `FILE.py`, `configs/NAME.py` or `NAME`; `InputError` with the known names when there is none."""
    given = pathlib.Path(name)
    if given.suffix == ".py" and given.is_file():
        return given
    if given.suffix in ("", ".py") and given.parent.name in ("", "configs"):
        for folder in FOLDERS:
            if (folder / f"{given.stem}.py").is_file():
                return folder / f"{given.stem}.py"
    raise InputError(f"there is no config '{name}'; known are {', '.join(names())}, or give the path of a file")


def load(name: str) -> ConfigDict:
    """`NAME[:variant]` as the ConfigDict that its `get_config` makes. Runs the file."""
    file, _, variant = name.partition(":")
    path = find(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config(variant)
    except InputError:
        raise
    except ValueError as error:  # what a config says of a variant that it does not have
        raise InputError(f"--config={name}: {error}") from error
    except Exception as error:
        raise InputError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(values, ConfigDict):
        raise InputError(f"get_config in {path} must return a ConfigDict, not {values!r}")
    return values
