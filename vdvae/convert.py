"""Parameters from the published checkpoints of Efficient-VDVAE (PyTorch) and VDVAE, given as arrays by name.

Kernels there are OIHW and every layer has arrays of its own; here they are HWIO and those of like layers are stacked.
Levels of Efficient-VDVAE are the entries of its `down_strides`: each has one skip connection, and further layers that
share it. The conversion is linear, so it also takes gradients and averages. Not here: reading files
(`bitsperdim/adopt.py`), and the configs that belong to the arrays.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bitsperdim.errors import InputError
from vdvae.layers import Params
from vdvae.levels import Level

Tensors = dict[str, np.ndarray]
CONVOLUTIONS = 4  # of a cell


class _Reader:
    """Takes tensors by name and remembers which were taken."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self._taken = tensors, set()

    def tensor(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise InputError(f"the file lacks the tensor '{name}'")
        self._taken.add(name)
        return np.asarray(self._tensors[name])

    def conv(self, name: str) -> Params:
        kernel = self.tensor(f"{name}.weight").transpose(2, 3, 1, 0)
        return {"kernel": np.ascontiguousarray(kernel), "bias": self.tensor(f"{name}.bias")}

    def map(self, name: str) -> np.ndarray:
        """[1, c, h, w] -> [h, w, c]."""
        return np.ascontiguousarray(np.moveaxis(self.tensor(name)[0], 0, -1))

    def rest(self) -> list[str]:
        return sorted(set(self._tensors) - self._taken)


def entries(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """The levels of Efficient-VDVAE with one skip connection each, as its configs list them: of a level with several,
    the first layers are entries of their own, and the last one has all that share its skip connection."""
    found: list[Level] = []
    for level in levels:
        for k in range(level.skips):
            last = k == level.skips - 1
            found.append(
                level._replace(
                    stride=level.stride if k == 0 else 1,
                    layers=level.layers - level.skips + 1 if last else 1,
                    skips=1,
                    # Further bottom-up blocks come first, that is in the entry next to the image.
                    blocks=level.blocks - level.skips + 1 if last else 1,
                )
            )
    return tuple(found)


def efficient_from_torch(tensors: Tensors, levels: tuple[Level, ...]) -> Params:
    """The parameters of the style 'efficient'. Raises InputError where tensors are missing or there are others."""
    reader = _Reader(tensors)
    params: Params = {"ends": {}, "bottom_up": {}, "top_down": {}}
    params["ends"]["input"] = reader.conv("bottom_up.input_conv")
    params["ends"]["start"] = reader.map("top_down.trainable_h")
    params["ends"]["output"] = reader.conv("top_down.output_conv")
    entry, count = 0, len(entries(levels))
    for i, level in enumerate(levels):
        numbers = range(entry, entry + level.skips)
        up = [count - 1 - number for number in reversed(numbers)]  # bottom-up begins at the image
        params["bottom_up"][f"level_{i}"] = _efficient_up(reader, level, up, i)
        params["top_down"][f"level_{i}"] = _efficient_down(reader, level, list(numbers))
        entry += level.skips
    _refuse(reader, "Efficient-VDVAE")
    return params


def _efficient_up(reader: _Reader, level: Level, up: list[int], i: int) -> Params:
    extra = level.blocks - level.skips
    names = [f"bottom_up.levels_up.{up[0]}.{j}" for j in range(extra)]
    ends = [f"bottom_up.levels_up_downsample.{number}" for number in up]
    found = {
        "blocks": _stack([_efficient_cells(reader, name, level.cells) for name in names + ends]),
        "skips": _stack([reader.conv(f"{name}.skip_projection") for name in ends]),
    }
    return found | ({"pool": reader.conv(f"{ends[-1]}.pool.ops.0")} if level.stride > 1 else {})


def _efficient_down(reader: _Reader, level: Level, numbers: list[int]) -> Params:
    names = [f"top_down.levels_down_upsample.{number}" for number in numbers]
    found: Params = {}
    if level.stride > 1:
        found["enter"] = reader.conv(f"{names[0]}.unpool.ops.0")
        found["enter"]["bias_map"] = reader.map(f"{names[0]}.unpool.scale_bias")
    names += [f"top_down.levels_down.{numbers[-1]}.{j}" for j in range(level.layers - level.skips)]

    def layer(name: str) -> Params:
        return {
            "prior": _net(reader, lambda k: f"{name}.prior_net.0.convs.{1 + 2 * k}"),
            "prior_projection": reader.conv(f"{name}.prior_layer.projection"),
            "posterior": _net(reader, lambda k: f"{name}.posterior_net.0.convs.{1 + 2 * k}"),
            "posterior_projection": reader.conv(f"{name}.posterior_layer.projection"),
            "z_projection": reader.conv(f"{name}.z_projection"),
            **_efficient_cells(reader, name, level.cells),
        }

    return found | {"layers": _stack([layer(name) for name in names])}


def _efficient_cells(reader: _Reader, name: str, cells: int) -> Params:
    of_cell = lambda b: _net(reader, lambda k: f"{name}.residual_block.{b}.convs.{1 + 2 * k}")
    return {f"cell_{b}": of_cell(b) for b in range(cells)}


def baseline_from_torch(tensors: Tensors, levels: tuple[Level, ...]) -> Params:
    """The parameters of the style 'vdvae'. Raises InputError where tensors are missing or there are others."""
    reader = _Reader(tensors)
    constants = iter(range(len(levels)))
    up_names, down_names = _numbered("encoder.enc_blocks"), _numbered("decoder.dec_blocks")
    bottom_up: Params = {}
    for i in reversed(range(len(levels))):
        level, found = levels[i], {}
        if level.blocks:
            found["blocks"] = _stack([_baseline_cell(reader, next(up_names)) for _ in range(level.blocks)])
        bottom_up[f"level_{i}"] = found | ({"pool": _baseline_cell(reader, next(up_names))} if i > 0 else {})
    top_down: Params = {}
    for i, level in enumerate(levels):
        of_layers = [_baseline_layer(reader, next(down_names)) for _ in range(level.layers)]
        top_down[f"level_{i}"] = {"layers": _stack(of_layers)}
        if f"decoder.bias_xs.{i}" in tensors:
            top_down[f"level_{i}"]["constant"] = reader.map(f"decoder.bias_xs.{next(constants)}")
    gain = {"scale": reader.tensor("decoder.gain").ravel(), "bias": reader.tensor("decoder.bias").ravel()}
    ends = {
        "input": reader.conv("encoder.in_conv"),
        "gain": gain,
        "output": reader.conv("decoder.out_net.out_conv"),
    }
    _refuse(reader, "VDVAE")
    return {"ends": ends, "bottom_up": bottom_up, "top_down": top_down}


def _baseline_layer(reader: _Reader, name: str) -> Params:
    return {
        "prior": _net(reader, lambda k: f"{name}.prior.c{k + 1}"),
        "posterior": _net(reader, lambda k: f"{name}.enc.c{k + 1}"),
        "z_projection": reader.conv(f"{name}.z_proj"),
        "cell_0": _net(reader, lambda k: f"{name}.resnet.c{k + 1}"),
    }


def _baseline_cell(reader: _Reader, name: str) -> Params:
    return {"cell_0": _net(reader, lambda k: f"{name}.c{k + 1}")}


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}.{i}" for i in range(10_000))


def _net(reader: _Reader, name: Callable[[int], str]) -> Params:
    return {f"conv_{k}": reader.conv(name(k)) for k in range(CONVOLUTIONS)}


def _stack(trees: list[Any]) -> Any:
    """Like layers as one tree with a leading axis."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: _stack([tree[key] for tree in trees]) for key in first}
    return np.stack(trees)


def _refuse(reader: _Reader, what: str) -> None:
    if rest := reader.rest():
        raise InputError(f"the file has {len(rest)} tensors that this {what} has not, such as '{rest[0]}'")
