"""Files of published weights as numpy arrays by name: .npz, PyTorch's archives, Flax's msgpack.

Nothing here unpickles a file: PyTorch reads its own with its loader for weights alone (extra `convert`), which refuses
all else. Not here: what the arrays are (`convert.py` of a family), and the run that they become (`adopt.py`).
"""

import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np
from flax import serialization

from bitsperdim.errors import InputError

HOW_TO_EXPORT = """\
  import numpy, torch
  state = torch.load("checkpoint.pth", map_location="cpu", weights_only=True)
  numpy.savez("checkpoint.npz", **{name: tensor.numpy() for name, tensor in state.items()})"""
PARALLEL = "module."  # what DataParallel puts before every name


def read(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """What is in a file, in dicts and lists, its arrays as numpy. Raises InputError for damaged and other files."""
    path = pathlib.Path(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    try:
        with path.open("rb") as file:
            first = file.read(2)
        if first == b"PK":
            with zipfile.ZipFile(path) as archive:
                is_npz = not any(name.endswith("data.pkl") for name in archive.namelist())
            return _read_npz(path) if is_npz else _read_torch(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a whole file of weights ({error}); get it again") from error
    if first == b"\x80\x02":  # before PyTorch 1.6
        return _read_torch(path)
    if first[:1] in (b"\xde", b"\xdf") or b"\x81" <= first[:1] <= b"\x8f":  # a map
        return _read_msgpack(path)
    raise InputError(f"{path} is no file of weights: neither .npz nor of PyTorch nor msgpack of Flax")


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file that holds nothing else, by name, such as a state_dict."""
    found = read(path)
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise InputError(f"{path} is no state_dict: its entry '{name}' is no array but {type(value).__name__}")
    return without_prefix(found)


def without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under the names that a model has without DataParallel."""
    return {name.removeprefix(PARALLEL): array for name, array in arrays.items()}


def _read_npz(path: pathlib.Path) -> dict[Any, Any]:
    name = ""
    try:
        # NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {}
            for name in arrays.files:
                found[name] = arrays[name]
            return found
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        why = f"array '{name}': {error}" if name else str(error)
        what = f"{path} is not a whole .npz file of plain arrays ({why or type(error).__name__})"
        raise InputError(f"{what}. Export it again:\n{HOW_TO_EXPORT}") from error


def _read_torch(path: pathlib.Path) -> dict[Any, Any]:
    try:
        import torch  # pyright: ignore
    except ImportError as error:
        raise InputError(
            f"{path} is a file of PyTorch, and reading it needs PyTorch: pip install 'bitsperdim[convert]'; or, where "
            f"PyTorch is, export a state_dict:\n{HOW_TO_EXPORT}"
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its own errors have no common base
        why = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} is not a whole file of tensors ({why or type(error).__name__})") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no names but one {type(loaded).__name__}")
    return _as_numpy(loaded)


def _as_numpy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_numpy(item) for item in value]
    if hasattr(value, "detach"):
        value = value.detach()
        return (value if value.dtype.itemsize >= 4 or not value.is_floating_point() else value.float()).numpy()
    return value


def _read_msgpack(path: pathlib.Path) -> dict[Any, Any]:
    try:
        loaded = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # of several libraries
        raise InputError(f"{path} is not a whole msgpack file of Flax ({error or type(error).__name__})") from error
    assert isinstance(loaded, dict)
    return loaded
