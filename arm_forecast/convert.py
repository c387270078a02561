"""Parameters from the PyTorch port of PixelCNN++, pclucas14/pixel-cnn-pp.

There `down_layers` counts from the coarsest level and `up_layers` from the finest, kernels are OIHW (transposed ones
IOHW), and weight normalisation keeps a gain for each index of the first axis: the output, but the *input* of transposed
convolutions. Arrays are numpy. Not here: reading the file (`bitsperdim/adopt.py`).
"""

import re

import numpy as np
from jaxtyping import Float

from arm_forecast import layers, pixelcnn
from arm_forecast.pixelcnn import LAST_LEVEL, Grid, NetworkConfig
from bitsperdim.errors import InputError

STEMS = {"stem/u": "u_init", "stem/ul_above": "ul_init.0", "stem/ul_left": "ul_init.1"}
PARTS = {"conv_in": "conv_input.conv", "skip": "nin_skip.lin_a", "conv_out": "conv_out.conv"}


def network_from_torch(state: dict[str, np.ndarray]) -> tuple[NetworkConfig, int]:
    """The network that the tensors belong to, without weight normalisation (see `params_from_torch`), and its number
    of channels. Dropout is the port's."""
    state = _named_as_published(state)
    filters, planes = _tensor(state, "u_init.conv.weight_v", 4).shape[:2]
    outputs, channels = len(_tensor(state, "nin_out.lin_a.weight_v", 2)), planes - 1
    resnets = len({match[1] for name in state if (match := re.match(r"up_layers\.0\.u_stream\.(\d+)\.", name))})
    if not resnets:
        raise InputError("the file lacks the tensors 'up_layers.0.u_stream.0...' of PixelCNN++")
    mixtures, rest = divmod(outputs, {1: 3, 3: 10}.get(channels, outputs + 1))
    if rest or not mixtures:
        raise InputError(f"nin_out.lin_a has {outputs} outputs, which fit no mixture for {channels} channels")
    return NetworkConfig(resnets=resnets, filters=filters, mixtures=mixtures, output="dmol"), channels


def params_from_torch(state: dict[str, np.ndarray], weight_norm: bool = False) -> dict:
    """The parameters of `network_from_torch(state)`, with the kernels g v / ||v|| themselves.

    `weight_norm=True` keeps "g" and "v" as they are, for continuing or comparing (gradients too, then the conversion
    is linear); transposed convolutions then have their gain per input under "g_in". Raises InputError where tensors
    are missing, unknown, of another shape or no finite numbers.
    """
    state = _named_as_published(state)
    config, channels = network_from_torch(state)
    table = pixelcnn.table(config, Grid(4, 4, channels, 256))
    used, params = set(), {}
    for ours, layer in table.items():
        theirs, transposed = _torch_name(ours), ours.startswith("upsize")
        shape = (*((layer.inputs, layer.outputs) if transposed else (layer.outputs, layer.inputs)), *layer.kernel)
        shape = shape if ".lin_a" not in theirs else shape[:2]
        gains = (shape[0], *(1,) * (len(shape) - 1))
        expected = {"bias": (layer.outputs,), "weight_g": gains, "weight_v": shape}
        bias, g, v = (_tensor(state, f"{theirs}.{part}", len(of), of) for part, of in expected.items())
        used |= {f"{theirs}.{part}" for part in expected}
        leaf = {"v": _kernel(v, transposed), "g_in" if transposed else "g": g.ravel(), "bias": bias}
        if not np.square(v.astype(np.float64)).sum(tuple(range(1, v.ndim))).all():
            raise InputError(f"tensor '{theirs}.weight_v' has a row of zeros, which has no direction to normalise")
        if not weight_norm:
            leaf = {"kernel": np.asarray(layers.effective_kernel(leaf)), "bias": bias}
        layers.insert(params, ours, leaf)
    if unknown := sorted(set(state) - used):
        raise InputError(f"the file has {len(unknown)} tensors that PixelCNN++ has not, such as '{unknown[0]}'")
    return params


def _torch_name(name: str) -> str:
    """up1/ul0/conv_in -> up_layers.1.ul_stream.0.conv_input.conv, and so on."""
    if name in STEMS:
        return f"{STEMS[name]}.conv"
    if name == "head":
        return "nin_out.lin_a"
    match = re.fullmatch(r"(up|down|upsize|downsize)(\d)/(ul|u)(\d*)/?(\w*)", name)
    assert match, name
    kind, level, stream, block, part = match.groups()
    if kind in ("up", "down"):
        level = int(level) if kind == "up" else LAST_LEVEL - int(level)
        return f"{kind}_layers.{level}.{stream}_stream.{block}.{PARTS[part]}"
    if kind == "upsize":
        return f"upsize_{stream}_stream.{LAST_LEVEL - 1 - int(level)}.deconv"
    return f"downsize_{stream}_stream.{level}.conv"


def _named_as_published(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch's newer weight normalisation calls its gain and direction otherwise."""
    parts = {f"parametrizations.weight.original{i}": part for i, part in enumerate(("weight_g", "weight_v"))}
    rename = lambda name: next((name.replace(new, old) for new, old in parts.items() if name.endswith(new)), name)
    return {rename(name): tensor for name, tensor in state.items()}


def _tensor(
    state: dict[str, np.ndarray], name: str, axes: int, shape: tuple[int, ...] | None = None
) -> Float[np.ndarray, "..."]:
    """The tensor of that name; InputError where it is none of finite real numbers with these axes, or this shape."""
    if name not in state:
        raise InputError(f"the file lacks the tensor '{name}' of PixelCNN++")
    tensor = state[name]
    if tensor.dtype.kind != "f":
        raise InputError(f"tensor '{name}' holds {tensor.dtype}, not real numbers")
    if shape is not None and tensor.shape != shape:
        raise InputError(f"tensor '{name}' has the shape {tensor.shape}, not {shape}")
    if tensor.ndim != axes:
        raise InputError(f"tensor '{name}' has the shape {tensor.shape}, not one of {axes} axes")
    if not np.isfinite(tensor).all():
        raise InputError(f"tensor '{name}' holds {(~np.isfinite(tensor)).sum()} values that are not finite")
    return tensor


def _kernel(v: np.ndarray, transposed: bool) -> np.ndarray:
    """OIHW (IOHW where transposed, OI where 1x1) -> HWIO."""
    v = v.reshape(*v.shape, *(1,) * (4 - v.ndim))
    return np.ascontiguousarray(v.transpose(2, 3, 0, 1) if transposed else v.transpose(2, 3, 1, 0))
