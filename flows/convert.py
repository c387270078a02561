"""Parameters from the released PyTorch code of MaCow, XuezheMax/macow: its state_dict as a dict of numpy arrays.

There kernels are OIHW (transposed ones IOHW) under `weight_v` with the gain in `weight_g`, steps have numbers, and each
order of a masked convolution has its kernel as the image lies; here kernels are HWIO, like steps are stacked, and all
orders have the kernels of order A (`masked_conv.py`). `weight_inv`, a cached inverse of a 1x1 matrix, is no parameter.
Not here: reading the file (`bitsperdim/adopt.py`).
"""

import re

import jax
import numpy as np

from bitsperdim.errors import InputError
from flows import encoder as encoder_lib
from flows.config import DequantizationConfig, FlowConfig

ORDER_NAMES = {"conv1": "A", "conv2": "B", "conv3": "C", "conv4": "D"}
Params = dict


class State:
    """A state_dict that remembers which of its tensors were used."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays, self.used = arrays, set()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise InputError(f"the file lacks the tensor '{name}' of MaCow")
        self.used.add(name)
        return self.arrays[name]

    def count(self, pattern: str) -> int:
        """The number of different matches of the pattern's group at the beginning of names."""
        return len({match[1] for name in self.arrays if (match := re.match(pattern, name))})

    def unused(self) -> list[str]:
        return sorted(name for name in self.arrays if name not in self.used and not name.endswith("weight_inv"))


def model(state: State) -> tuple[Params, FlowConfig, DequantizationConfig | None]:
    """The parameters of a whole model, and the flows that they belong to.

    Raises InputError where tensors are missing or unknown.
    """
    main = flow_config(state, "flow.")
    params, noise = {"flow": flow(state, "flow.", main), "dequantizer": {}}, None
    if state.count(r"(dequant_flow)\."):
        name = "dequant_flow.macow."
        features = state[f"{_first_step(name)}units.0.conv1.s_conv.conv.weight_v"].shape[1]
        noise = DequantizationConfig(flow_config(state, name), features)
        params["dequantizer"] = {
            "flow": flow(state, name, noise.flow),
            "encoder": encoder(state, "dequant_flow.encoder.", noise.flow.num_halvings),
        }
    if unknown := state.unused():
        raise InputError(f"the file has {len(unknown)} tensors that MaCow has not, such as '{unknown[0]}'")
    return params, main, noise


def flow_config(state: State, name: str) -> FlowConfig:
    """What the tensors of a flow say of it."""
    escaped = re.escape(name)
    levels = state.count(rf"{escaped}blocks\.(\d+)\.")
    if levels < 2:
        raise InputError(f"the file has no MaCow under '{name}blocks': {levels} levels, at least 2 are needed")
    steps, widths, factor, prior_affine = [], [], 4, True
    for i in range(levels):
        block = f"{name}blocks.{i}."
        parts = state.count(rf"{re.escape(block)}layers\.(\d+)\.")
        first = f"{block}layers.0.0." if parts else f"{block}steps.0."
        widths.append(len(state[f"{first}glow_step.coupling.net.conv1.conv.bias"]))
        numbers = [rf"{re.escape(block)}layers\.{part}\.(\d+)\." for part in range(parts)]
        steps.append(tuple(map(state.count, numbers or [rf"{re.escape(block)}steps\.(\d+)\."])))
        if parts:
            channels = state[f"{block}priors.0.actnorm.log_scale"].size
            # The condition of noise is squeezed along, and stands behind the channels that are kept.
            own = state[f"{first}glow_step.coupling.net.conv1.conv.weight_v"].shape[1] - (channels - channels // 2)
            moved = channels + own - state[f"{block}priors.0.nice.net.conv1.conv.weight_v"].shape[1]
            factor = channels // moved
            prior_affine = len(state[f"{block}priors.0.nice.net.conv3.conv.bias"]) == 2 * moved
    first = f"{_first_step(name)}units.0.conv1.net."
    kernel = state[f"{first}masked_conv.conv.weight_v"].shape
    affine = len(state[f"{first}conv1x1.conv.bias"]) == 2 * kernel[1]
    return FlowConfig(
        steps=tuple(steps),
        widths=tuple(widths),
        factor=factor,
        kernel=kernel[2:],
        affine=affine,
        prior_affine=prior_affine,
    )


def flow(state: State, name: str, config: FlowConfig) -> Params:
    """The parameters of a multi-scale flow."""
    return {f"level{i}": level(state, f"{name}blocks.{i}.", counts) for i, counts in enumerate(config.steps)}


def level(state: State, name: str, counts: tuple[int, ...]) -> Params:
    """The parameters of one level: steps, or steps and priors in turn."""
    if not state.count(rf"({re.escape(name)}layers)\."):
        return {"steps0": stacked(state, f"{name}steps.", counts[0])}
    params = {}
    for part, count in enumerate(counts):
        params[f"steps{part}"] = stacked(state, f"{name}layers.{part}.", count)
        params[f"prior{part}"] = glow_step(state, f"{name}priors.{part}.", "nice")
    return params


def stacked(state: State, name: str, count: int) -> Params:
    """Like steps along a first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(step(state, f"{name}{i}.") for i in range(count)))


def step(state: State, name: str) -> Params:
    units = {f"unit{i}": unit(state, f"{name}units.{i}.") for i in range(2)}
    return units | glow_step(state, f"{name}glow_step.", "coupling")


def unit(state: State, name: str) -> Params:
    masked = {order: masked_conv(state, f"{name}{theirs}.", order) for theirs, order in ORDER_NAMES.items()}
    return masked | {part: actnorm(state, f"{name}{part}.") for part in ("actnorm1", "actnorm2")}


def glow_step(state: State, name: str, coupling_name: str) -> Params:
    """actnorm, 1x1 convolution and coupling, of a step or before a split."""
    return {
        "actnorm": actnorm(state, f"{name}actnorm."),
        "conv1x1": {"matrix": state[f"{name}conv1x1.weight"]},
        "coupling": coupling(state, f"{name}{coupling_name}."),
    }


def actnorm(state: State, name: str) -> Params:
    return {"log_scale": state[f"{name}log_scale"].ravel(), "shift": state[f"{name}bias"].ravel()}


def coupling(state: State, name: str) -> Params:
    return {part: convolution(state, f"{name}net.{part}.conv.") for part in ("conv1", "conv2", "conv3")}


def masked_conv(state: State, name: str, order: str) -> Params:
    params = {
        "conv": convolution(state, f"{name}net.masked_conv.conv."),
        "conv1x1": convolution(state, f"{name}net.conv1x1.conv."),
    }
    params["conv"]["kernel"] = oriented_kernel(params["conv"]["kernel"], order)
    if f"{name}s_conv.conv.bias" in state.arrays:
        params["condition"] = convolution(state, f"{name}s_conv.conv.")
    return params


def oriented_kernel(kernel: np.ndarray, order: str) -> np.ndarray:
    """A kernel HWIO for the image as it lies, turned like the image (`masked_conv.oriented`)."""
    kernel = kernel.swapaxes(0, 1) if order in "CD" else kernel
    return kernel[::-1] if order in "BD" else kernel


def convolution(state: State, name: str, transposed: bool = False) -> Params:
    kernel = state[f"{name}weight_v"]
    # A transposed convolution has its input first, and is a convolution with the kernel turned around.
    kernel = kernel.transpose(2, 3, 0, 1)[::-1, ::-1] if transposed else kernel.transpose(2, 3, 1, 0)
    return {"kernel": kernel, "gain": state[f"{name}weight_g"].ravel(), "bias": state[f"{name}bias"]}


def encoder(state: State, name: str, halvings: int) -> Params:
    """The parameters of the encoder of learned noise."""
    params = _blocks(state, f"{name}resnet_bottom.", "resnet")
    for i in range(halvings):
        params[f"down{i}"] = convolution(state, f"{name}down{i}.conv.")
        params |= _blocks(state, f"{name}resnet{i}.", f"resnet{i}")
        params[f"up{i}"] = convolution(state, f"{name}up{i}.deconv.", transposed=True)
    return params | {"head": convolution(state, f"{name}s_level.conv.")}


def _blocks(state: State, name: str, ours: str) -> Params:
    params = {}
    for i in range(encoder_lib.BLOCKS):
        for part, theirs in (("conv1", "conv1"), ("conv2", "conv2"), ("skip", "downsample")):
            if f"{name}main.{i}.{theirs}.conv.bias" in state.arrays:
                params[f"{ours}_block{i}_{part}"] = convolution(state, f"{name}main.{i}.{theirs}.conv.")
    return params


def _first_step(name: str) -> str:
    return f"{name}blocks.0.steps.0."
