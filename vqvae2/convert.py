"""Parameters and codebooks from the PyTorch layout of rosinality/vq-vae-2-pytorch, the two-level VQ-VAE-2.

There `blocks.N` counts every item of a sequence, ReLUs included; a residual block holds its 3x3 convolution as
`conv.1` and its 1x1 as `conv.3`. Arrays are numpy, convolutions OIHW, transposed ones IOHW. Not here: reading the
file.
"""

import re

import numpy as np

NETWORKS = {"enc_b": "encoder_bottom", "enc_t": "encoder_top", "dec_t": "decoder_top", "dec": "decoder_bottom"}
CODE_LEVELS = {"t": "top", "b": "bottom"}


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
