"""Pictures for people: batches of images as one grid, written as PNG.

Not here: plots of curves, and how an image becomes model input or model output an image (`dequantize.py`).
"""

import io
import math

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8

from bitsperdim import atomic

SEPARATOR = 2  # pixels between tiles, after enlarging
GREY = 128  # of separators and empty places: seen beside black and beside white
TILE = 96  # pixels, the size that small images are brought near to


def grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int | None = None, levels: int = 256
) -> UInt8[np.ndarray, "H W 3"]:
    """Images row by row in one picture; by default about as many columns as rows.

    Each pixel becomes a square of round(96 / max(h, w)) pixels, at least 1: images of 32 pixels are drawn threefold,
    large ones as they are. Images of one channel become RGB. Values 0 ... levels - 1 are spread over 0 ... 255. Places
    left over in the last row are grey. Raises ValueError for anything but uint8 images of 1 or 3 channels, one or more.
    """
    _check(images, levels)
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    return _tile(_enlarge(_to_rgb(images, levels)), columns)


def pairs(
    originals: UInt8[np.ndarray, "n h w c"],
    reconstructions: UInt8[np.ndarray, "n h w c"],
    columns: int = 8,
    levels: int = 256,
) -> UInt8[np.ndarray, "H W 3"]:
    """A grid of alternating rows: originals, below them their reconstructions. Otherwise as `grid`."""
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals {originals.shape} and reconstructions {reconstructions.shape} differ in shape")
    _check(originals, levels)
    _check(reconstructions, levels)
    columns = min(columns, len(originals))
    rows = [_fill_rows(_enlarge(_to_rgb(images, levels)), columns) for images in (originals, reconstructions)]
    # [pair, row, column, h, w, 3] -> row, pair, column, so that a row of originals is followed by its reconstructions.
    alternating = np.stack(rows).reshape(2, -1, columns, *rows[0].shape[1:]).swapaxes(0, 1)
    return _tile(alternating.reshape(-1, *rows[0].shape[1:]), columns)


def save_png(path: epath.PathLike, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a picture, whole or not at all; makes the folder where it is missing."""
    path = epath.Path(path)
    encoded = io.BytesIO()
    PIL.Image.fromarray(picture).save(encoded, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, encoded.getvalue())


def _check(images: np.ndarray, levels: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be uint8 [n, h, w, 1 or 3] with n > 0, not {images.dtype} {images.shape}")
    if images.max(initial=0) >= levels:
        raise ValueError(f"images must have values below levels = {levels}, not {images.max()}")


def _to_rgb(images: np.ndarray, levels: int) -> UInt8[np.ndarray, "n h w 3"]:
    spread = np.rint(images.astype(np.float32) * (255.0 / (levels - 1))).astype(np.uint8)
    return np.broadcast_to(spread, (*spread.shape[:3], 3))


def _enlarge(images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n H W 3"]:
    factor = max(1, round(TILE / max(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _fill_rows(tiles: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "m h w 3"]:
    """The tiles with grey ones behind them, up to a multiple of `columns`."""
    missing = -len(tiles) % columns
    return np.pad(tiles, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=GREY)


def _tile(tiles: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """Tiles in rows of `columns`, a separator between them but none around."""
    spaced = np.pad(_fill_rows(tiles, columns), ((0, 0), (0, SEPARATOR), (0, SEPARATOR), (0, 0)), constant_values=GREY)
    _, height, width, _ = spaced.shape
    rows = spaced.reshape(-1, columns, height, width, 3).swapaxes(1, 2)
    return rows.reshape(-1, columns * width, 3)[:-SEPARATOR, :-SEPARATOR]
