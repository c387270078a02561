"""Parameters from the published checkpoints of Efficient-VDVAE (PyTorch and Flax) and VDVAE, given as arrays by name.

Kernels of PyTorch are OIHW and every layer has arrays of its own; here they are HWIO and those of like layers are
stacked. Flax's arrays are brought to PyTorch's names and layout first. Levels of Efficient-VDVAE are the entries of its
`down_strides`: each has one skip connection, and further layers that share it. The conversion is linear, so it also
takes gradients and averages. Not here: reading files (`bitsperdim/archives.py`), and the configs that belong to the
arrays (`hyperparameters.py`).
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bitsperdim.errors import InputError
from vdvae.layers import Initial, Params
from vdvae.levels import Level
from vdvae.network import Network

Tensors = Mapping[str, np.ndarray]
CONVOLUTIONS = 4  # of a cell
# Flax's names of modules, and PyTorch's.
FLAX_NAMES = {
    r"block_up_level_(\d+)_(\d+)": r"levels_up.\1.\2",
    r"block_up_level_(\d+)_downsample": r"levels_up_downsample.\1",
    r"block_down_level_(\d+)_(\d+)": r"levels_down.\1.\2",
    r"block_down_level_(\d+)_upsample": r"levels_down_upsample.\1",
    r"residual_block_(\d+)": r"residual_block.\1",
    r"(prior|posterior)_net": r"\1_net.0",
    r"(prior|posterior)_gaussian_layer": r"\1_layer",
    r"pooling_layer": r"pool.ops.0",
    r"unpooling_layer": r"unpool.ops.0",
} | {rf"conv_{k}": f"convs.{1 + 2 * k}" for k in range(CONVOLUTIONS)}
# How a tensor of PyTorch becomes ours.
TURNED = {
    "kernel": lambda tensor: tensor.transpose(2, 3, 1, 0),
    "bias": lambda tensor: tensor,
    "map": lambda tensor: np.moveaxis(tensor[0], 0, -1),  # [1, c, h, w] -> [h, w, c]
    "gain": lambda tensor: tensor[0, :, 0, 0],  # [1, c, 1, 1] -> [c]
}


class _Name(NamedTuple):
    """A tensor of the file that a parameter is made of; a parameter of like layers is made of a list of them."""

    name: str
    kind: str  # of `TURNED`


def efficient_from_torch(tensors: Tensors, net: Network) -> Params:
    """The parameters of the style 'efficient'. Raises InputError where tensors are missing, of another shape, no finite
    numbers, or there are others."""
    return _filled(_efficient_names(net.levels), tensors, net.table, "Efficient-VDVAE")


def baseline_from_torch(tensors: Tensors, net: Network) -> Params:
    """The parameters of the style 'vdvae'. Raises InputError as `efficient_from_torch`."""
    return _filled(_baseline_names(net), tensors, net.table, "VDVAE")


def efficient_from_flax(tree: Mapping[str, Any], net: Network, channels: int, mixtures: int) -> Params:
    """`efficient_from_torch` of a tree of Flax. `mixtures` is 0 for Bernoulli outputs."""
    tensors: dict[str, np.ndarray] = {}
    for path, array in _flattened(tree):
        # Some modules hold one `conv` in another, and projections are named twice.
        *modules, leaf = (name for name, _ in itertools.groupby(path) if name != "conv")
        is_map = leaf in ("scale_bias", "trainable_h")
        name = ".".join([*map(_torch_name, modules), "weight" if leaf == "kernel" else leaf])
        if array.ndim == 4:
            array = np.moveaxis(array, -1, 1) if is_map else array.transpose(3, 2, 0, 1)
        tensors[name.replace("unpool.ops.0.scale_bias", "unpool.scale_bias")] = array
    for name in ("top_down.output_conv.weight", "top_down.output_conv.bias"):
        order = flax_channels(channels, mixtures)
        if mixtures and name in tensors and len(tensors[name]) == len(order):
            tensors[name] = tensors[name][order]
    return efficient_from_torch(tensors, net)


def flax_channels(channels: int, mixtures: int) -> np.ndarray:
    """For each output in PyTorch's order its number in Flax's. Both begin with the mixture's weights; then there are
    [colour][mean, scale, coefficient][component], and in Flax's [mean, scale, coefficient][component][colour]."""
    of_flax = mixtures + np.arange(3 * mixtures * channels).reshape(3 * mixtures, channels)
    return np.concatenate([np.arange(mixtures), of_flax.T.ravel()])


def entries(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """The levels of Efficient-VDVAE with one skip connection each, as its configs list them: of a level with several,
    each layer is an entry of its own, but for one that has all that share its skip connection."""
    found: list[Level] = []
    for level in levels:
        for k in range(level.skips):
            found.append(
                level._replace(
                    stride=level.stride if k == 0 else 1,
                    layers=len(level.sharing) if k == level.shared else 1,
                    skips=1,
                    shared=0,
                    # Further bottom-up blocks come first, that is in the entry next to the image.
                    blocks=level.blocks - level.skips + 1 if k == level.skips - 1 else 1,
                )
            )
    return tuple(found)


def _efficient_names(levels: tuple[Level, ...]) -> Params:
    names: Params = {"bottom_up": {}, "top_down": {}}
    names["ends"] = {
        "input": _conv("bottom_up.input_conv"),
        "start": _Name("top_down.trainable_h", "map"),
        "output": _conv("top_down.output_conv"),
    }
    entry, count = 0, len(entries(levels))
    for i, level in enumerate(levels):
        numbers = range(entry, entry + level.skips)
        up = [count - 1 - number for number in reversed(numbers)]  # bottom-up begins at the image
        names["bottom_up"][f"level_{i}"] = _efficient_up(level, up)
        names["top_down"][f"level_{i}"] = _efficient_down(level, list(numbers))
        entry += level.skips
    return names


def _efficient_up(level: Level, up: list[int]) -> Params:
    names = [f"bottom_up.levels_up.{up[0]}.{j}" for j in range(level.blocks - level.skips)]
    ends = [f"bottom_up.levels_up_downsample.{number}" for number in up]
    found = {
        "blocks": _stack([_efficient_cells(name, level.cells) for name in names + ends]),
        "skips": _stack([_conv(f"{name}.skip_projection") for name in ends]),
    }
    return found | ({"pool": _conv(f"{ends[-1]}.pool.ops.0")} if level.stride > 1 else {})


def _efficient_down(level: Level, numbers: list[int]) -> Params:
    names = [f"top_down.levels_down_upsample.{number}" for number in numbers]
    found: Params = {}
    if level.stride > 1:
        bias_map = _Name(f"{names[0]}.unpool.scale_bias", "map")
        found["enter"] = _conv(f"{names[0]}.unpool.ops.0") | {"bias_map": bias_map}
    further = [f"top_down.levels_down.{numbers[level.shared]}.{j}" for j in range(len(level.sharing) - 1)]
    names[level.shared + 1 : level.shared + 1] = further

    def layer(name: str) -> Params:
        return {
            "prior": _net(lambda k: f"{name}.prior_net.0.convs.{1 + 2 * k}"),
            "prior_projection": _conv(f"{name}.prior_layer.projection"),
            "posterior": _net(lambda k: f"{name}.posterior_net.0.convs.{1 + 2 * k}"),
            "posterior_projection": _conv(f"{name}.posterior_layer.projection"),
            "z_projection": _conv(f"{name}.z_projection"),
            **_efficient_cells(name, level.cells),
        }

    return found | {"layers": _stack([layer(name) for name in names])}


def _efficient_cells(name: str, cells: int) -> Params:
    of_cell = lambda b: _net(lambda k: f"{name}.residual_block.{b}.convs.{1 + 2 * k}")
    return {f"cell_{b}": of_cell(b) for b in range(cells)}


def _baseline_names(net: Network) -> Params:
    up_names, down_names, constants = (
        _numbered(f"{name}") for name in ("encoder.enc_blocks", "decoder.dec_blocks", "decoder.bias_xs")
    )
    cell = lambda name: {"cell_0": _net(lambda k: f"{name}.c{k + 1}")}
    names: Params = {"bottom_up": {}, "top_down": {}}
    for i in reversed(range(len(net.levels))):
        blocks = [cell(next(up_names)) for _ in range(net.levels[i].blocks)]
        of_level = {"blocks": _stack(blocks)} if blocks else {}
        names["bottom_up"][f"level_{i}"] = of_level | ({"pool": cell(next(up_names))} if i > 0 else {})
    for i, level in enumerate(net.levels):
        of_layers = [_baseline_layer(next(down_names)) for _ in range(level.layers)]
        names["top_down"][f"level_{i}"] = {"layers": _stack(of_layers)}
        if "constant" in net.table["top_down"][f"level_{i}"]:
            names["top_down"][f"level_{i}"]["constant"] = _Name(next(constants), "map")
    names["ends"] = {
        "input": _conv("encoder.in_conv"),
        "gain": {"scale": _Name("decoder.gain", "gain"), "bias": _Name("decoder.bias", "gain")},
        "output": _conv("decoder.out_net.out_conv"),
    }
    return names


def _baseline_layer(name: str) -> Params:
    return {
        "prior": _net(lambda k: f"{name}.prior.c{k + 1}"),
        "posterior": _net(lambda k: f"{name}.enc.c{k + 1}"),
        "z_projection": _conv(f"{name}.z_proj"),
        "cell_0": _net(lambda k: f"{name}.resnet.c{k + 1}"),
    }


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}.{i}" for i in itertools.count())


def _net(name: Callable[[int], str]) -> Params:
    return {f"conv_{k}": _conv(name(k)) for k in range(CONVOLUTIONS)}


def _conv(name: str) -> Params:
    return {"kernel": _Name(f"{name}.weight", "kernel"), "bias": _Name(f"{name}.bias", "bias")}


def _stack(trees: list[Any]) -> Any:
    """Like layers as one tree, with a list of what they have in each place."""
    first = trees[0]
    return {key: _stack([tree[key] for tree in trees]) for key in first} if isinstance(first, dict) else trees


def _filled(names: Any, tensors: Tensors, table: Any, what: str) -> Params:
    """The tree with arrays in the places of the names. Raises InputError where these are not the model's."""
    taken = set()

    def array(name: _Name, shape: tuple[int, ...]) -> np.ndarray:
        if name.name not in tensors:
            raise InputError(f"the file lacks the tensor '{name.name}' of shape {_of_torch(shape, name.kind)}")
        taken.add(name.name)
        tensor = np.asarray(tensors[name.name])
        if tensor.shape != _of_torch(shape, name.kind):
            expected = _of_torch(shape, name.kind)
            raise InputError(f"tensor '{name.name}' has the shape {tensor.shape}, not {expected} as in this {what}")
        if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
            raise InputError(f"tensor '{name.name}' holds other things than finite real numbers")
        return np.ascontiguousarray(TURNED[name.kind](tensor))

    def fill(names: Any, table: Any) -> Any:
        if isinstance(table, Initial):
            if isinstance(names, _Name):
                return array(names, table.shape)
            return np.stack([array(name, table.shape[1:]) for name in names])
        return {key: fill(names[key], table[key]) for key in table}

    params = fill(names, table)
    if rest := sorted(set(tensors) - taken):
        shape = np.shape(tensors[rest[0]])
        raise InputError(f"the file has {len(rest)} tensors that this {what} has not, such as '{rest[0]}' {shape}")
    return params


def _of_torch(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape there of what has this shape here."""
    if kind == "kernel":
        return (shape[3], shape[2], *shape[:2])
    if kind == "map":
        return (1, shape[2], *shape[:2])
    return (1, *shape, 1, 1) if kind == "gain" else shape


def _flattened(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, (*path, str(name)))
        else:
            yield (*path, str(name)), np.asarray(value)


def _torch_name(name: str) -> str:
    for pattern, replacement in FLAX_NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name
