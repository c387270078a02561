"""Parameters and codebooks from the PyTorch layout of rosinality/vq-vae-2-pytorch, the two-level VQ-VAE-2.

There `blocks.N` counts every item of a sequence, ReLUs included; a residual block holds its 3x3 convolution as
`conv.1` and its 1x1 as `conv.3`. Arrays are numpy, convolutions OIHW, transposed ones IOHW. Not here: reading the
file, and the run that it becomes (`importer.py`).
"""

import math
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bitsperdim.errors import InputError
from vqvae2.quantizer import Codebook

NETWORKS = {"enc_b": "encoder_bottom", "enc_t": "encoder_top", "dec_t": "decoder_top", "dec": "decoder_bottom"}
CODE_LEVELS = {"t": "top", "b": "bottom"}


class Sizes(NamedTuple):
    """What the tensors say of the network."""

    channels: int
    hidden: int
    residual: int
    residual_layers: int
    code_dim: int
    num_codes: int


def sizes_from_torch(state: dict[str, np.ndarray]) -> Sizes:
    """The network that the tensors belong to. Raises InputError where one is missing, unknown or of another shape."""
    _, channels, *_ = _shape(state, "enc_b.blocks.0.weight", 4)
    hidden, *_ = _shape(state, "enc_b.blocks.4.weight", 4)
    residual, *_ = _shape(state, "enc_t.blocks.3.conv.1.weight", 4)
    code_dim, num_codes = _shape(state, "quantize_t.embed", 2)
    layers = len(_blocks(state, "enc_t", r"conv\.1\.weight"))
    sizes = Sizes(channels, hidden, residual, layers, code_dim, num_codes)
    expected = _layout(sizes)
    for name, shape in expected.items():
        if _shape(state, name) != shape:
            raise InputError(f"tensor '{name}' has the shape {state[name].shape}, not {shape}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise InputError(
            f"the file has {len(unknown)} tensors that the two-level network has not, such as '{unknown[0]}' of shape "
            f"{state[unknown[0]].shape}"
        )
    return sizes


def _shape(state: dict[str, np.ndarray], name: str, rank: int | None = None) -> tuple[int, ...]:
    if name not in state:
        raise InputError(f"the file lacks the tensor '{name}' of the two-level VQ-VAE-2")
    if rank is not None and state[name].ndim != rank:
        raise InputError(f"tensor '{name}' has the shape {state[name].shape}, not {rank} axes")
    return state[name].shape


def _layout(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the layout and its shape."""
    c, d, layers = sizes.hidden, sizes.code_dim, sizes.residual_layers
    kernels = {  # without biases: outputs (of transposed convolutions inputs), the other, height, width
        "enc_b.blocks.0": (c // 2, sizes.channels, 4, 4),
        "enc_b.blocks.2": (c, c // 2, 4, 4),
        "enc_b.blocks.4": (c, c, 3, 3),
        "enc_t.blocks.0": (c // 2, c, 4, 4),
        "enc_t.blocks.2": (c, c // 2, 3, 3),
        "dec_t.blocks.0": (c, d, 3, 3),
        "dec.blocks.0": (c, 2 * d, 3, 3),
        "quantize_conv_t": (d, c, 1, 1),
        "quantize_conv_b": (d, d + c, 1, 1),
    }
    transposed = {
        f"dec_t.blocks.{layers + 2}": (c, d, 4, 4),
        f"dec.blocks.{layers + 2}": (c, c // 2, 4, 4),
        f"dec.blocks.{layers + 4}": (c // 2, sizes.channels, 4, 4),
        "upsample_t": (d, d, 4, 4),
    }
    for network, first in (("enc_b", 5), ("enc_t", 3), ("dec_t", 1), ("dec", 1)):
        for block in range(first, first + layers):
            kernels[f"{network}.blocks.{block}.conv.1"] = (sizes.residual, c, 3, 3)
            kernels[f"{network}.blocks.{block}.conv.3"] = (c, sizes.residual, 1, 1)
    layout = {f"{name}.weight": shape for name, shape in (kernels | transposed).items()}
    layout |= {f"{name}.bias": shape[:1] for name, shape in kernels.items()}
    layout |= {f"{name}.bias": shape[1:2] for name, shape in transposed.items()}
    for letter in CODE_LEVELS:
        buffers = {"embed": (d, sizes.num_codes), "cluster_size": (sizes.num_codes,), "embed_avg": (d, sizes.num_codes)}
        layout |= {f"quantize_{letter}.{name}": shape for name, shape in buffers.items()}
    return layout


def params_from_torch(state: dict[str, np.ndarray]) -> dict:
    """The `params` of `Autoencoder(strides=(4, 2), ...)`. Linear in the arrays, so it also converts gradients."""
    params = {ours: _network(state, theirs, is_decoder="dec" in theirs) for theirs, ours in NETWORKS.items()}
    for letter, level in CODE_LEVELS.items():
        params[f"to_code_{level}"] = _conv(state, f"quantize_conv_{letter}")
    params["upsample_top_to_bottom"] = {"up_0": _transposed_conv(state, "upsample_t")}
    return params


def embeddings_from_torch(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The codebooks [K, D] of both levels; the file keeps one code per column."""
    return {level: np.ascontiguousarray(state[f"quantize_{letter}.embed"].T) for letter, level in CODE_LEVELS.items()}


def codebooks_from_torch(state: dict[str, np.ndarray], decay: float) -> dict[str, Codebook]:
    """The codebooks with their running averages, which go on from there.

    The port does not debias: its averages are taken as those of so many updates that 1 - decay^t is 1 in float32.
    """
    updates = math.ceil(-32.0 * math.log(2.0) / math.log(decay))
    return {
        level: Codebook(
            embedding=jnp.asarray(embedding, jnp.float32),
            ema_counts=jnp.asarray(state[f"quantize_{letter}.cluster_size"], jnp.float32),
            ema_sums=jnp.asarray(state[f"quantize_{letter}.embed_avg"].T, jnp.float32),
            updates=jnp.int32(updates),
        )
        for (letter, level), embedding in zip(CODE_LEVELS.items(), embeddings_from_torch(state).values(), strict=True)
    }


def _network(state: dict[str, np.ndarray], name: str, is_decoder: bool) -> dict:
    """An encoder [strided..., 3x3, residual...] or a decoder [3x3, residual..., transposed...], in this order."""
    plain = [f"{name}.blocks.{i}" for i in _blocks(state, name, r"weight")]
    residual = [f"{name}.blocks.{i}" for i in _blocks(state, name, r"conv\.1\.weight")]
    blocks = {}
    for i, block in enumerate(residual):
        blocks[f"block_{i}_conv3"] = _conv(state, f"{block}.conv.1")
        blocks[f"block_{i}_conv1"] = _conv(state, f"{block}.conv.3")
    if is_decoder:
        convs = {"conv": _conv(state, plain[0])}
        convs |= {f"up_{i}": _transposed_conv(state, block) for i, block in enumerate(plain[1:])}
    else:
        convs = {f"down_{i}": _conv(state, block) for i, block in enumerate(plain[:-1])}
        convs |= {"conv": _conv(state, plain[-1])}
    return convs | {"residual": blocks}


def _blocks(state: dict[str, np.ndarray], name: str, ending: str) -> list[int]:
    matches = (re.fullmatch(rf"{name}\.blocks\.(\d+)\.{ending}", key) for key in state)
    return sorted(int(match[1]) for match in matches if match)


def _conv(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": state[f"{name}.bias"]}


def _transposed_conv(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    # PyTorch transposes the convolution itself, flax dilates its input and convolves: the kernel is mirrored in
    # between.
    kernel = state[f"{name}.weight"].transpose(2, 3, 0, 1)[::-1, ::-1]
    return {"kernel": np.ascontiguousarray(kernel), "bias": state[f"{name}.bias"]}
