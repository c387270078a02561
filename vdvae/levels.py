"""The levels of a hierarchy: what a config says of each, and where it lies once the size of the images is known.

Levels are numbered from the deepest (0) to that of the image, layers from the first that is drawn. Source:
Efficient-VDVAE, appendix C.2 (symmetrical, asymmetrical and mixed skip connections); the block strings are those of
VDVAE's hyper-parameters. Not here: what a block computes (`efficient.py`, `baseline.py`).
"""

import itertools
import math
import re
from typing import Any, NamedTuple

from bitsperdim.errors import InputError
from vdvae.config import ModelConfig


class Level(NamedTuple):
    """One resolution. Several levels may follow each other on one grid (stride 1), with other widths or cells."""

    stride: int  # its edge over that of the level before it
    layers: int
    skips: int  # layers with a skip connection of their own
    shared: int  # the number of the one that the other layers use, behind the layer that has it
    blocks: int  # bottom-up
    width: int
    bottleneck: float
    kernel: int
    skip_width: int
    latent: int  # channels
    cells: int
    height: int
    columns: int  # width is taken

    @property
    def sharing(self) -> range:
        """The layers that use the shared skip connection: one, where every layer has its own."""
        return range(self.shared, self.shared + self.layers - self.skips + 1)

    def skip_of(self, layer: int) -> int:
        """The number of the skip connection that a layer uses."""
        return self.shared if layer in self.sharing else layer - (layer > self.shared) * (self.layers - self.skips)


def levels(config: ModelConfig, shape: tuple[int, int, int]) -> tuple[Level, ...]:
    """The levels for images of this shape (height, width, channels), deepest first."""
    height, columns = padded(config, shape)
    total = math.prod(config.strides)
    found, factor = [], 1
    skip_widths = config.skip_widths or config.widths
    cells = config.cells or (1,) * len(config.strides)
    shared = config.shared or (0,) * len(config.strides)
    for i, stride in enumerate(config.strides):
        factor *= stride
        found.append(
            Level(
                stride=stride,
                layers=config.layers[i],
                skips=config.skips[i],
                shared=shared[i],
                blocks=config.blocks[i],
                width=config.widths[i],
                bottleneck=config.bottlenecks[i],
                kernel=config.kernels[i],
                skip_width=skip_widths[i],
                latent=config.latents[i],
                cells=cells[i],
                height=height * factor // total,
                columns=columns * factor // total,
            )
        )
    return tuple(found)


def padded(config: ModelConfig, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the images in the network: the next multiples of the product of the strides."""
    total = math.prod(config.strides)
    return -(-shape[0] // total) * total, -(-shape[1] // total) * total


def margins(config: ModelConfig, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns of padding above and left of the image: 28x28 digits lie in the middle of 32x32."""
    height, columns = padded(config, shape)
    return (height - shape[0]) // 2, (columns - shape[1]) // 2


def num_layers(levels: tuple[Level, ...]) -> int:
    """L, the top-down layers."""
    return sum(level.layers for level in levels)


def level_of_layer(levels: tuple[Level, ...]) -> tuple[int, ...]:
    """The level of each of the L layers."""
    return tuple(i for i, level in enumerate(levels) for _ in range(level.layers))


def latent_shapes(levels: tuple[Level, ...]) -> tuple[tuple[int, int, int], ...]:
    """Height, width and channels of each layer's latents."""
    of_level = [(level.height, level.columns, level.latent) for level in levels]
    return tuple(of_level[i] for i in level_of_layer(levels))


def from_block_strings(
    decoder: str, encoder: str, width: int, latent: int, bottleneck: float = 0.25, widths: dict[int, int] | None = None
) -> dict[str, Any]:
    """The keys of `ModelConfig` that VDVAE's strings stand for, such as '1x1,4m1,4x2' and '4x3,4d4,1x3'.

    'RxN' is N blocks at the edge R, 'RmS' one that first takes in the level of edge S, 'RdK' one that is then pooled by
    K. `widths` gives other widths at some edges. Convolutions are 3x3 above the edge 2. Raises InputError for strings
    that are no such hierarchy.
    """
    layers = _parsed(decoder, "m")
    blocks = _parsed(encoder, "d")
    edges = sorted(layers)
    if list(layers) != edges:
        raise InputError(f"decoder blocks must begin with the smallest edge and rise, not '{decoder}'")
    strides = [1]
    for below, edge in itertools.pairwise(edges):
        mixed, pooled = layers[edge][1], blocks.get(edge, (0, 0))[1]
        if mixed != below or pooled * below != edge:
            raise InputError(f"edge {edge} must mix in and be pooled to {below} in '{decoder}' and '{encoder}'")
        strides.append(pooled)
    if set(blocks) - set(edges) or blocks.get(edges[0], (0, 0))[1]:
        raise InputError(f"encoder blocks must have the edges of the decoder's, {edges}, not '{encoder}'")
    count = len(edges)
    return {
        "style": "vdvae",
        "strides": tuple(strides),
        "layers": tuple(layers[edge][0] + bool(layers[edge][1]) for edge in edges),
        "skips": (1,) * count,
        "blocks": tuple(blocks.get(edge, (0, 0))[0] for edge in edges),
        "widths": tuple((widths or {}).get(edge, width) for edge in edges),
        "bottlenecks": (bottleneck,) * count,
        "kernels": tuple(3 if edge > 2 else 1 for edge in edges),
        "latents": (latent,) * count,
    }


def _parsed(text: str, letter: str) -> dict[int, tuple[int, int]]:
    """By edge: plain blocks, and the number behind `letter` (0: there is none)."""
    found: dict[int, tuple[int, int]] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"(\d+)(x|{letter})(\d+)", part.strip())
        if match is None:
            raise InputError(f"'{part}' in '{text}' must be EDGExBLOCKS or EDGE{letter}NUMBER")
        edge, kind, number = int(match[1]), match[2], int(match[3])
        plain, other = found.get(edge, (0, 0))
        if kind == letter and other:
            raise InputError(f"edge {edge} has two blocks '{letter}' in '{text}'")
        found[edge] = (plain + number, other) if kind == "x" else (plain, number)
    return found
