"""The golden layers of MaCow with their parameters in our names, in float64 or float32."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from flows import convert


class Golden(NamedTuple):
    state: convert.State
    arrays: dict
    config: dict

    def array(self, name, dtype=np.float64):
        """NHWC where it is an image; in float64 that which was computed so, where there is one."""
        found = self.arrays.get(f"{name}_f64", self.arrays[name]) if dtype == np.float64 else self.arrays[name]
        found = found.astype(dtype) if np.issubdtype(found.dtype, np.floating) else found
        return np.moveaxis(found, -3, -1) if found.ndim >= 4 else found


def state_of(arrays, prefix, dtype):
    names = [name for name in arrays if name.startswith(prefix)]
    return convert.State({name.removeprefix(prefix): arrays[name].astype(dtype) for name in names})


@pytest.fixture(scope="session")
def macow(golden):
    """`macow(name, dtype, prefix="param/")` -> Golden."""

    def load(name, dtype=np.float64, prefix="param/"):
        arrays = golden(f"flows/{name}")
        return Golden(state_of(arrays, prefix, dtype), arrays, json.loads(str(arrays["config_json"])))

    return load


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
