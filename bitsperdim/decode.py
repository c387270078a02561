"""Compressed images as people have them, to uint8 arrays of one size: PNG, JPEG, WebP, BMP and TIFF.

In this order: 12 and 16 bits reduced to 8 where that is allowed, palettes expanded, alpha composed on white, CMYK
converted, grey or colour, the rotation of EXIF applied, one window of the target's aspect resampled to the target. Of
animated and multi-page files the first frame is taken. Colour profiles are not applied.

JPEG files at least four times as large as the target are decoded at a half, quarter or eighth of their size (still
twice the target) before Lanczos resampling: faster, and a few levels away from the full decoding at sharp edges.
'area' always decodes in full, so that shrinking to a half, a third, ... takes the exact means of pixel blocks.

Not here: where the bytes come from (`folder_source.py`, `tfds_source.py`), and the cache and threads (`encoded.py`).
"""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # of TIFF
FORMAT = 3  # raise when other pixels come out of the same file: decoded splits in the cache are then made again
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
MODES = {1: "L", 3: "RGB"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ACROSS = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])  # height becomes width
# Pillow warns without a file's name of what does no harm: odd tags, damaged EXIF, more than 89 million pixels.
for _kind in (UserWarning, Image.DecompressionBombWarning):
    warnings.filterwarnings("ignore", category=_kind, module=r"PIL\.")


class Preparation(NamedTuple):
    """What becomes of an image of any size."""

    height: int  # of the result; 0: as stored
    width: int
    channels: int  # 1: grey, 3: colour
    resize: str = "cover"  # 'cover': the largest window that the image holds; 'none': a window of the target's own size
    resampling: str = "lanczos"  # or 'area'
    upscale: bool = False  # whether images smaller than the target are enlarged; else they are refused
    reduce_16_bit: bool = False  # whether 12 and 16 bits are reduced to the upper 8; else they are refused
    upright: bool = True  # whether the rotation of EXIF is applied
    box: tuple[int, ...] = ()  # (left, top, right, bottom), cut out before anything is resized; (): the whole image


class Stored(NamedTuple):
    """An image as its file has it, upright."""

    height: int
    width: int
    depth: int  # bits a channel: 8 (or fewer), 12 or 16


class Unreadable(ValueError):
    """Bytes that are not one whole image. The message follows a file's name: 'is empty'."""


class Unfit(ValueError):
    """A sound image that the preparation refuses. The message follows a file's name: 'is 7x40, ...; set ...'."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


def decode(content: bytes, preparation: Preparation, draw: int | None = None) -> UInt8[np.ndarray, "h w c"]:
    """The image in `content`, prepared. Raises `Unreadable` and `Unfit`.

    The window lies in the centre, or where the 64 random bits of `draw` put it.
    """
    try:
        image = _open(content)
        depth = _depth(image)
        check_depth(depth, preparation)
        _draft(image, preparation)
        image, turn = _in_colours(image, depth, content)
        image = image.convert(MODES[preparation.channels])
        image = image.transpose(turn) if turn is not None and preparation.upright else image
    except Unfit:
        raise
    except Exception as error:  # the decoders raise anything
        raise Unreadable(_reason(content, error)) from error
    check_size(image.height, image.width, preparation)
    image = image.crop(preparation.box) if preparation.box else image  # pyright: ignore[reportArgumentType]
    pixels = np.array(_resampled(image, preparation, draw) if preparation.height else image)
    return pixels.reshape(*pixels.shape[:2], preparation.channels)


def inspect(content: bytes) -> Stored:
    """Decodes the whole image as `decode` does, so that whatever that cannot take raises `Unreadable` here."""
    try:
        image = _open(content)
        (width, height), depth = image.size, _depth(image)
        image.draft(None, (1, 1))  # a JPEG's bits are all read, but an eighth of the pixels is enough
        _, turn = _in_colours(image, depth, content)
    except Exception as error:
        raise Unreadable(_reason(content, error)) from error
    return Stored(width, height, depth) if turn in ACROSS else Stored(height, width, depth)


def check_size(height: int, width: int, preparation: Preparation) -> None:
    """Raises `Unfit` where an upright image of this size does not hold the box, or would have to be enlarged."""
    if preparation.box:
        left, top, right, bottom = preparation.box
        if right > width or bottom > height:
            raise Unfit(f"is {height}x{width}, too small for data.crop_box={preparation.box}", "set a smaller box")
        height, width = bottom - top, right - left
    if not preparation.upscale and (height < preparation.height or width < preparation.width):
        raise Unfit(
            f"is {height}x{width}, smaller than {preparation.height}x{preparation.width}",
            "set data.upscale=true or a smaller size",
        )


def check_depth(depth: int, preparation: Preparation) -> None:
    """Raises `Unfit` where more than 8 bits would have to be reduced, and may not be."""
    if depth > 8 and not preparation.reduce_16_bit:
        raise Unfit(f"has {depth} bits a channel", "set data.reduce_16_bit=true")


def window(
    height: int, width: int, preparation: Preparation, draw: int | None
) -> tuple[float, float, float, float, float]:
    """(left, top, right, bottom) in pixels of the image, and how many of them make a pixel of the target."""
    scale = min(width / preparation.width, height / preparation.height)
    if preparation.resize == "none":
        scale = min(scale, 1.0)
    across, down = preparation.width * scale, preparation.height * scale
    left = _offset(width - across, None if draw is None else draw >> 32, whole=scale == 1)
    top = _offset(height - down, None if draw is None else draw & 0xFFFFFFFF, whole=scale == 1)
    return left, top, min(left + across, width), min(top + down, height), scale


def _offset(free: float, word: int | None, whole: bool) -> float:
    """Half of the `free` pixels, or a uniform share of them from 32 random bits."""
    if word is None:
        return free // 2 if whole else free / 2
    share = word / 2**32
    return int(share * (free + 1)) if whole else share * free


def _resampled(image: Image.Image, preparation: Preparation, draw: int | None) -> Image.Image:
    left, top, right, bottom, scale = window(image.height, image.width, preparation, draw)
    if all(value == int(value) for value in (left, top, scale)) and (scale == 1 or preparation.resampling == "area"):
        # Pixels as they are, or means rounded once; `resize` rounds after each of its two passes.
        return image.reduce(int(scale), (int(left), int(top), round(right), round(bottom)))
    size = (preparation.width, preparation.height)
    return image.resize(size, RESAMPLING[preparation.resampling], box=(left, top, right, bottom))


def _open(content: bytes) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.mode in ("I", "F"):
        is_short = any("16" in layout for layout in _layouts(image))
        raise OSError(f"{'16 signed' if is_short else 32} bits a channel")
    return image


def _layouts(image: ImageFile.ImageFile) -> list[str]:
    """Pillow's names for the order of the bytes: 'RGB;16B', 'I;12'. To be asked before loading."""
    return [str(tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0]) for tile in image.tile]


def _depth(image: ImageFile.ImageFile) -> int:
    """Bits a channel. Pillow reduces 16-bit colour by itself, and says so nowhere; only the layout tells."""
    if image.format not in ("PNG", "TIFF"):  # in BMP the same number is the bits of all colours together
        return 8
    return max((int(bits) for name in _layouts(image) for bits in re.findall(r";(12|16)", name)), default=8)


def _draft(image: Image.Image, preparation: Preparation) -> None:
    if preparation.box:  # counts in pixels of the full size
        return
    if preparation.height and preparation.resize == "cover" and preparation.resampling == "lanczos":
        edge = 2 * max(preparation.height, preparation.width)  # either may be across: EXIF may turn the image
        image.draft(None, (edge, edge))


def _in_colours(image: ImageFile.ImageFile, depth: int, content: bytes) -> tuple[Image.Image, Image.Transpose | None]:
    """The whole image, grey or in RGB, 8 bits, on white, and the turn that makes it upright."""
    image.load()
    turn = _turn(image)  # after loading: Pillow itself turns TIFF files while it loads them
    reduced = _in_8_bits(image, depth, content) if depth > 8 else image
    if reduced.mode == "La":  # the one kind of alpha that Pillow takes no further
        reduced = reduced.convert("LA")
    if reduced.has_transparency_data:
        white = Image.new("RGBA", reduced.size, "white")
        reduced = Image.alpha_composite(white, reduced.convert("RGBA"))
    return reduced if reduced.mode in ("L", "1") else reduced.convert("RGB"), turn


def _turn(image: Image.Image) -> Image.Transpose | None:
    """None where EXIF says nothing, or nothing that can be understood."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises anything, and the pixels are sound
        return None


def _in_8_bits(image: ImageFile.ImageFile, depth: int, content: bytes) -> Image.Image:
    """The upper 8 of 12 or 16 bits; white where they are the colour that a PNG names as transparent, in all 16 bits."""
    clear = image.info.pop("transparency", None)
    if image.mode.startswith("I;16"):
        exact = np.asarray(image)
        pixels = (exact >> (depth - 8)).astype(np.uint8)
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow heeds it up to 8 bits only
            pixels = 255 - pixels
    elif clear is None:  # Pillow has taken the upper 8
        return image
    else:
        pixels = np.array(image)
        exact = pixels.astype(np.uint16) << 8 | _low_bytes(content)
    if clear is not None:
        pixels[(exact == clear).reshape(*pixels.shape[:2], -1).all(axis=-1)] = 255
    return Image.fromarray(pixels)


def _low_bytes(content: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Of a PNG of 16-bit colours, of which Pillow keeps the high bytes."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    # Taken for little-endian, what Pillow holds for the high bytes are the low ones.
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return np.asarray(image)


def _reason(content: bytes, error: Exception) -> str:
    """Why it cannot be read, to follow the name of the file."""
    if not content:
        return "is empty (0 bytes)"
    if len(content) < _declared_bytes(content):
        return f"is truncated (read {len(content):,} of {_declared_bytes(content):,} bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in PNG, JPEG, WebP, BMP or TIFF format"
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large ({str(error).split(',')[0]})"
    if "truncated" in str(error).lower():
        return f"is truncated (its {len(content):,} bytes end within the image)"
    return f"cannot be decoded ({error})"


def _declared_bytes(content: bytes) -> int:
    """How long a WebP or BMP file says that it is; 0 for the formats that do not say."""
    if content[:4] == b"RIFF":
        return 8 + int.from_bytes(content[4:8], "little")
    return int.from_bytes(content[2:6], "little") if content[:2] == b"BM" else 0
