"""The golden networks with their parameters in our names, and what each output of a network depends on."""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from arm_forecast import convert, layers, pixelcnn
from arm_forecast.pixelcnn import Grid, NetworkConfig


class Golden(NamedTuple):
    config: NetworkConfig
    grid: Grid
    params: dict
    x: np.ndarray
    arrays: dict


def nhwc(array):
    return np.moveaxis(array, -3, -1)


@pytest.fixture(scope="session")
def to_nhwc():
    return nhwc


@pytest.fixture(scope="session")
def random_params():
    """`random_params(config, grid)`: what `pixelcnn.init` would make, drawn without compiling it."""

    def draw(config, grid):
        shapes = jax.eval_shape(lambda: pixelcnn.init(jax.random.key(0), config, grid))
        generator = np.random.default_rng(0)
        bound = lambda leaf: max(np.prod(leaf.shape[:-1]), 8) ** -0.5
        uniform = lambda leaf: (bound(leaf) * generator.uniform(-1, 1, leaf.shape)).astype(np.float32)
        return jax.tree.map(uniform, shapes)

    return draw


@pytest.fixture(scope="session")
def categorical(golden):
    """The categorical network with masks, of `arm_cat_tiny`; masks by our layer names are in `arrays["masks"]`."""
    arrays = golden("arm/arm_cat_tiny")
    params, masks = {}, {}
    for name in [key[2:-2] for key in arrays if re.fullmatch(r"p/(?!fc).*\.w", key)]:
        ours = _our_name(name)
        axes = (2, 3, 0, 1) if ours.startswith("upsize") else (2, 3, 1, 0)
        layers.insert(params, ours, {"kernel": arrays[f"p/{name}.w"].transpose(axes), "bias": arrays[f"p/{name}.b"]})
        masks[ours] = arrays[f"mask/{name}.w"].transpose(axes) if f"mask/{name}.w" in arrays else None
    config = NetworkConfig(resnets=1, filters=12)
    return Golden(config, Grid(8, 8, 3, 4), params, nhwc(arrays["x"]), arrays | {"masks": masks})


def _our_name(name):
    stems = {"u_init": "u", "ul_init0": "ul_above", "ul_init1": "ul_left", "ul_init2": "ul_here"}
    if name in stems:
        return f"stem/{stems[name]}"
    if name == "out":
        return "head"
    block, index, stream, part = re.fullmatch(r"([a-z]+)(\d)\.(ul?\d?)\.?(\w*)", name).groups()
    kind = {"dn": "downsize", "upx": "upsize"}.get(block, block)
    level = {"down": 2 - int(index), "upx": 1 - int(index)}.get(block, int(index))
    part = {"c1": "/conv_in", "c2": "/conv_out", "skip": "/skip", "": ""}[part]
    return f"{kind}{level}/{stream}{part}"


@pytest.fixture(scope="session")
def mixture(golden):
    """The PixelCNN++ of `pcnnpp_tiny_rgb`, its weight normalisation kept."""
    arrays = golden("arm/pcnnpp_tiny_rgb")
    state = {name[3:]: value for name, value in arrays.items() if name.startswith("sd/")}
    config, _ = convert.network_from_torch(state)
    params = convert.params_from_torch(state, weight_norm=True)
    return Golden(config, Grid(8, 8, 3, 256), params, nhwc(arrays["x_int"]), arrays | {"state": state})


@pytest.fixture(scope="session")
def dependencies():
    """`dependencies(f, x, values)` -> bool [outputs, inputs]: which entries of f(x[b h w c]) -> [b n] change with which
    entries of the image x[h w c], in raster order, when it takes another of the values."""

    def find(f, x, values):
        changed = []
        for shift in range(1, min(values, 4)):
            steps = np.eye(x.size, dtype=int).reshape(x.size, *x.shape) * shift
            outputs = np.asarray(f(np.concatenate([x[None], x + steps]) % values))
            changed.append(outputs[1:] != outputs[0])
        return np.any(changed, 0).T

    return find
