"""Pictures for people: batches of images as one grid, written as PNG.

Not here: plots of curves, and how an image becomes model input or model output an image (`dequantize.py`).
"""

import io
import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from etils import epath
from jaxtyping import UInt8

from bitsperdim import atomic

SEPARATOR = 2  # pixels between tiles, after enlarging
GREY = 128  # of separators and empty places: seen beside black and beside white
WHITE, MARGIN = 255, 3  # of labels: the ground, and pixels around the text
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
    labels: tuple[str, str] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """A grid of alternating rows: originals, below them their reconstructions. Otherwise as `grid`.

    `labels`: what is written beside the rows of either kind.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals {originals.shape} and reconstructions {reconstructions.shape} differ in shape")
    _check(originals, levels)
    _check(reconstructions, levels)
    columns = min(columns, len(originals))
    rows = [_fill_rows(_enlarge(_to_rgb(images, levels)), columns) for images in (originals, reconstructions)]
    # [pair, row, column, h, w, 3] -> row, pair, column, so that a row of originals is followed by its reconstructions.
    alternating = np.stack(rows).reshape(2, -1, columns, *rows[0].shape[1:]).swapaxes(0, 1)
    picture = _tile(alternating.reshape(-1, *rows[0].shape[1:]), columns)
    return picture if labels is None else labelled(picture, rows=labels * len(alternating))


def labelled(
    picture: UInt8[np.ndarray, "H W 3"], columns: Sequence[str] = (), rows: Sequence[str] = ()
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """A grid with a heading above each of its columns and a label to the left of each of its rows, black on white.

    There must be as many as the grid has, for they divide its width and height into equal parts; the picture itself
    stands in the lower right corner as it is. Text that is wider than its column is cut off.
    """
    font = PIL.ImageFont.load_default()
    extent = lambda text: font.getbbox(text)[2:]  # right and lower end, from the origin of the text
    left = max((math.ceil(extent(text)[0]) + 2 * MARGIN for text in rows), default=0)
    above = max((math.ceil(extent(text)[1]) + 2 * MARGIN for text in columns), default=0)
    height, width, _ = picture.shape
    page = np.full((height + above, width + left, 3), WHITE, np.uint8)
    page[above:, left:] = picture
    # Each text on a strip of its own, so that it cannot run into its neighbour or the picture.
    for index, text in enumerate(columns):
        start, end = (left + width * part // len(columns) for part in (index, index + 1))
        offset = max(0, (end - start - math.ceil(extent(text)[0])) // 2)
        page[:above, start:end] = _text(text, end - start, above, offset, MARGIN)
    for index, text in enumerate(rows):
        start, end = (above + height * part // len(rows) for part in (index, index + 1))
        offset = max(0, (end - start - math.ceil(extent(text)[1])) // 2)
        page[start:end, :left] = _text(text, left, end - start, MARGIN, offset)
    return page


def _text(text: str, width: int, height: int, x: int, y: int) -> UInt8[np.ndarray, "h w 3"]:
    strip = PIL.Image.new("RGB", (width, height), (WHITE,) * 3)
    PIL.ImageDraw.Draw(strip).text((x, y), text, fill=(0, 0, 0), font=PIL.ImageFont.load_default())
    return np.asarray(strip)


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
