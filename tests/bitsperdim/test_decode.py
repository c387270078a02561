"""Decoded images against the arrays that were written, and resampling against what is known of it."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from bitsperdim import decode
from bitsperdim.decode import Preparation

AS_STORED = Preparation(0, 0, 3)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def written(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def tiff(values, bits, tags=()):
    """Grey, or with a second channel, as it lies in `values`, where Pillow cannot write it. Short values only."""
    height, width, *_ = values.shape
    content = values.tobytes() + bytes(values.nbytes % 2)
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: values.nbytes}
    entries = sorted((entries | dict(tags)).items())
    ifd = b"".join(
        struct.pack("<HHI", tag, 3, len(np.atleast_1d(value)))
        + np.atleast_1d(value).astype("<u2").tobytes().ljust(4, b"\0")
        for tag, value in entries
    )
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(entries)) + ifd + bytes(4)


@pytest.mark.parametrize(
    "kind, options",
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_give_back_their_pixels(kind, options):
    pixels = noise(9, 14, 3)
    np.testing.assert_array_equal(decode.decode(written(pixels, kind, **options), AS_STORED), pixels)


def test_a_bmp_of_16_bits_for_all_colours_together_is_not_a_16_bit_image():
    values = np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], "<u2")  # red, green; blue, white: 5, 6 and 5 bits
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 2, -2, 1, 16, 3, values.nbytes, 0, 0, 0, 0) + masks
    content = b"BM" + struct.pack("<IHHI", 14 + len(header) + values.nbytes, 0, 0, 14 + len(header)) + header
    pixels = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]]
    np.testing.assert_array_equal(decode.decode(content + values.tobytes(), AS_STORED), pixels)


def test_jpeg_is_near_its_smooth_pixels():
    rows, columns = np.mgrid[:48, :80]
    pixels = np.stack([4 * rows, 3 * columns, rows + columns], axis=-1).astype(np.uint8)
    assert np.abs(decode.decode(written(pixels, "JPEG", quality=95), AS_STORED).astype(int) - pixels).max() < 12


def test_grey_is_one_channel_of_colour_and_the_luma_of_colours():
    grey, colour = noise(6, 5), noise(6, 5, 3)
    np.testing.assert_array_equal(decode.decode(written(grey), AS_STORED), np.repeat(grey[..., None], 3, axis=-1))
    got = decode.decode(written(colour), AS_STORED._replace(channels=1))
    assert got.shape == (6, 5, 1)
    np.testing.assert_allclose(got[..., 0], colour @ [0.299, 0.587, 0.114], atol=0.51)


def test_equal_sizes_are_untouched_by_every_way_of_resizing():
    pixels = noise(12, 10, 3)
    for resampling in decode.RESAMPLING:
        for resize in ("cover", "none"):
            preparation = Preparation(12, 10, 3, resize, resampling)
            np.testing.assert_array_equal(decode.decode(written(pixels), preparation, draw=2**63), pixels)


def test_area_takes_exact_means_of_blocks():
    pixels = noise(24, 36, 3)
    blocks = pixels.reshape(6, 4, 9, 4, 3).mean((1, 3))
    got = decode.decode(written(pixels), Preparation(6, 9, 3, resampling="area"))
    np.testing.assert_array_equal(got, np.floor(blocks + 0.5))


@pytest.mark.parametrize("resampling", ["lanczos", "area"])
@pytest.mark.parametrize("shape", [(60, 90), (60, 40), (45, 45)])
def test_the_window_is_the_largest_of_the_targets_aspect_and_lies_in_the_centre(shape, resampling):
    # A ramp stays a ramp under antialiased resampling, so its values tell where every pixel comes from.
    height, width = shape
    rows, columns = np.mgrid[:height, :width] + 0.5
    ramp = np.stack([2 * rows, 2 * columns, 0 * rows + 77], axis=-1).astype(np.uint8)
    got = decode.decode(written(ramp), Preparation(20, 20, 3, resampling=resampling)).astype(float)
    scale = min(height, width) / 20
    expected = (np.arange(20) - 9.5) * scale
    inner = slice(3, -3)  # at the border the filter has less than its support
    np.testing.assert_allclose(got[inner, :, 0], np.tile(expected[inner, None] * 2 + height, 20), atol=1.1)
    np.testing.assert_allclose(got[:, inner, 1], np.tile(expected[None, inner] * 2 + width, (20, 1)), atol=1.1)
    assert (got[..., 2] == 77).all()


def test_pixels_as_stored_are_cropped_at_every_offset_that_exists():
    rows, columns = np.mgrid[:7, :9]
    pixels = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    preparation = Preparation(4, 4, 3, resize="none")
    np.testing.assert_array_equal(decode.decode(written(pixels), preparation), pixels[1:5, 2:6])
    draws = np.random.default_rng(0).integers(0, 2**64, 600, np.uint64).tolist()
    corners = []
    for draw in [*draws, 0, 2**64 - 1]:
        got = decode.decode(written(pixels), preparation, draw)
        top, left = got[0, 0, :2]
        np.testing.assert_array_equal(got, pixels[top : top + 4, left : left + 4])
        corners.append((top, left))
    counts = np.unique(corners, axis=0, return_counts=True)[1]
    assert len(counts) == 4 * 6 and counts.min() > 8  # 25 expected of each
    assert corners[-2:] == [(0, 0), (3, 5)]


def test_random_windows_of_shrunk_images_slide_along_the_longer_side():
    columns = np.broadcast_to(np.arange(200)[None, :, None], (50, 200, 3)).astype(np.uint8)
    lefts = [decode.window(50, 200, Preparation(25, 25, 3), draw)[:2] for draw in (0, 2**63, 2**64 - 1)]
    np.testing.assert_allclose(lefts, [(0, 0), (75, 0), (150, 0)], atol=1e-6)
    got = decode.decode(written(columns), Preparation(25, 25, 3), draw=2**63)
    np.testing.assert_allclose(got[:, 3:-3, 0], np.tile(75 + 2 * np.arange(25)[3:-3] + 0.5, (25, 1)), atol=1.1)


def test_every_way_of_reading_less_of_a_large_jpeg_stays_near_the_whole():
    rows, columns = np.mgrid[:640, :960] / 640
    smooth = 127 + 60 * np.sin(9 * rows)[..., None] + 60 * np.cos(7 * columns[..., None] + np.arange(3))
    content = written(smooth.astype(np.uint8), "JPEG", quality=92)
    whole = np.asarray(
        Image.open(io.BytesIO(content)).resize((32, 32), Image.Resampling.LANCZOS, box=(160, 0, 800, 640))
    )
    got = decode.decode(content, Preparation(32, 32, 3))
    assert np.abs(got.astype(int) - whole).max() <= 3


def test_smaller_images_are_enlarged_only_where_that_is_asked():
    flat = np.full((5, 8, 3), (10, 200, 30), np.uint8)
    with pytest.raises(decode.Unfit, match="is 5x8, smaller than 6x6; set data"):
        decode.decode(written(flat), Preparation(6, 6, 3))
    for resize in ("cover", "none"):
        got = decode.decode(written(flat), Preparation(6, 6, 3, resize=resize, upscale=True))
        np.testing.assert_array_equal(got, np.broadcast_to(flat[0, 0], (6, 6, 3)))


def cut(content, share):
    return content[: int(len(content) * share)]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is empty (0 bytes)"),
        (b"not an image at all", "is not an image in PNG, JPEG, WebP, BMP or TIFF format"),
        (written(noise(8, 8), "GIF"), "is not an image in PNG, JPEG, WebP, BMP or TIFF format"),
        (cut(written(noise(32, 32, 3), "BMP"), 0.5), "is truncated (read 1,563 of 3,126 bytes)"),
        (cut(written(noise(32, 32, 3), "PNG"), 0.5), "is truncated (its 1,586 bytes end within the image)"),
        (
            written(Image.new("1", (20000, 10000))),
            "is too large (Image size (200000000 pixels) exceeds limit of 178956970 pixels)",
        ),
        (written(Image.new("F", (4, 4)), "TIFF"), "cannot be decoded (32 bits a channel)"),
        (tiff(np.zeros((4, 4), "<i2"), 16, {339: 2}), "cannot be decoded (16 signed bits a channel)"),
    ],
    ids=["empty", "text", "gif", "bmp", "png", "huge", "float", "signed"],
)
def test_bytes_that_are_no_whole_image_say_why(content, reason):
    for read in (lambda: decode.decode(content, AS_STORED), lambda: decode.inspect(content)):
        with pytest.raises(decode.Unreadable) as caught:
            read()
        assert str(caught.value).startswith(reason.rstrip(")"))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "PNG"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_images_of_every_format_are_unreadable(kind, share):
    with pytest.raises(decode.Unreadable, match=r"truncated|cannot be decoded|is not an image"):
        decode.inspect(cut(written(noise(64, 64, 3), kind), share))


def test_inspection_finds_the_upright_size_of_a_jpeg():
    exif = Image.Exif()
    for exif[0x0112] in range(1, 9):
        content = written(noise(50, 300, 3), "JPEG", exif=exif)
        size = decode.decode(content, AS_STORED).shape[:2]
        assert decode.inspect(content) == (*size, 8) and size == ((50, 300) if exif[0x0112] < 5 else (300, 50))
    assert decode.inspect(written(noise(50, 300, 3), "JPEG")) == (50, 300, 8)


def exif_of(orientation, kind):
    """EXIF of nothing but an orientation, as a number (kind 3) or as text (kind 2), even where that makes no sense."""
    return (
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI4s", 0x0112, kind, len(orientation), orientation) + bytes(4)
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "exif",
    [
        exif_of(b"6\0", 2),
        struct.pack("<6s8sHHHII", b"Exif", b"II*\0\x08\0\0\0", 1, 0x0112, 3, 1, 99) + bytes(4),
        b"Exif\0\0MM",
    ],
    ids=["text", "99", "cut off"],
)
def test_an_orientation_that_makes_no_sense_turns_neither_the_pixels_nor_the_size(exif):
    content = written(noise(20, 30, 3), "PNG", exif=exif)
    np.testing.assert_array_equal(decode.decode(content, AS_STORED), noise(20, 30, 3))
    assert decode.inspect(content) == (20, 30, 8)


WARNED_OF = """
import io, struct, sys
from PIL import Image

if sys.argv[1] == "ours":
    from bitsperdim import decode
head = b"Exif\\0\\0II*\\0\\x08\\0\\0\\0"
exifs = [head + struct.pack("<H", 40), head + struct.pack("<HHHIHHI", 1, 0x0112, 3, 2, 6, 6, 0)]
cases = [(Image.new("L", (4, 4)), {"exif": exif}) for exif in exifs] + [(Image.new("1", (10000, 10000)), {})]
for image, options in cases:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    if sys.argv[1] == "ours":
        decode.inspect(file.getvalue())
    else:
        Image.open(io.BytesIO(file.getvalue())).getexif().get(0x0112)
"""


def test_harmless_oddities_that_pillow_warns_of_are_not_told():
    def told(whose):
        command = [sys.executable, "-c", WARNED_OF, whose]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr

    by_pillow = told("Pillow's")
    assert all(what in by_pillow for what in ("Corrupt EXIF data", "tag 274", "DecompressionBombWarning"))
    assert told("ours") == ""


def test_a_box_is_cut_out_of_the_stored_pixels_before_anything_is_resized():
    pixels = noise(218, 178, 3)
    boxed = AS_STORED._replace(box=(15, 40, 163, 188))
    np.testing.assert_array_equal(decode.decode(written(pixels), boxed), pixels[40:188, 15:163])
    means = pixels[40:188, 15:163].reshape(37, 4, 37, 4, 3).mean((1, 3))
    shrunk = decode.decode(written(pixels), boxed._replace(height=37, width=37, resampling="area"))
    np.testing.assert_array_equal(shrunk, np.floor(means + 0.5))
    with pytest.raises(decode.Unfit, match=r"is 218x100, too small for data\.crop_box=\(15, 40, 163, 188\)"):
        decode.decode(written(pixels[:, :100]), boxed)


def in_twelve_bits(values):
    """Two values in three bytes. The width is even."""
    first, second = values.reshape(-1, 2).astype(np.uint8 if values.max() < 256 else np.uint16).T.astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)
    return packed.reshape(len(values), -1)


def deep(most, seed=0, channels=()):
    return np.random.default_rng(seed).integers(0, most, (6, 10, *channels), np.uint16)


def twelve(values):
    return tiff(in_twelve_bits(values), 12, {256: values.shape[1]})


@pytest.mark.parametrize(
    "content, depth, expected",
    [
        (twelve(deep(4096)), 12, deep(4096) >> 4),
        (tiff(deep(65536).astype("<u2"), 16), 16, deep(65536) >> 8),
        (tiff(deep(65536).astype("<u2"), 16, {262: 0}), 16, 255 - (deep(65536) >> 8)),
    ],
    ids=["12 bits", "16 bits", "white is zero"],
)
def test_deep_grey_tiffs_are_refused_or_reduced_by_their_depth(content, depth, expected):
    with pytest.raises(decode.Unfit, match=rf"^has {depth} bits a channel; set data\.reduce_16_bit=true$"):
        decode.decode(content, AS_STORED)
    assert decode.inspect(content) == (6, 10, depth)
    got = decode.decode(content, AS_STORED._replace(reduce_16_bit=True))
    np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, axis=-1))


def test_inks_of_16_bits_are_reduced_as_inks():
    inks = deep(65536, channels=(4,))
    content = tiff(inks.astype("<u2"), 16, {262: 5, 277: 4})
    got = decode.decode(content, AS_STORED._replace(reduce_16_bit=True))
    upper = (inks >> 8).astype(float)
    np.testing.assert_allclose(got, (255 - upper[..., :3]) * (255 - upper[..., 3:]) / 255, atol=1.0)


def png_of_16_bits(pixels, clear):
    """Pillow cannot write 16 bits in colour. `clear` is the colour that counts as transparent."""
    height, width, channels = pixels.shape
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = {b"IHDR": header, b"tRNS": clear.astype(">u2").tobytes(), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_16_bits_becomes_white_and_its_neighbours_do_not(channels):
    pixels = deep(65536, channels=(channels,))
    pixels[1, 2:5] = clear = np.array([0x1234, 0x5678, 0x9ABC][:channels])
    pixels[3, 3] = clear ^ 1  # the same high bytes
    expected = pixels >> 8
    expected[1, 2:5] = 255
    got = decode.decode(png_of_16_bits(pixels, clear), AS_STORED._replace(reduce_16_bit=True))
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (6, 10, 3)))


def test_grey_with_associated_alpha_is_composed_on_white():
    alpha = noise(6, 10)
    grey = (noise(6, 10, seed=1) * (alpha / 255)).astype(np.uint8)  # multiplied already
    content = tiff(np.stack([grey, alpha], axis=-1), (8, 8), {277: 2, 338: 1})
    assert Image.open(io.BytesIO(content)).mode == "La" and decode.inspect(content) == (6, 10, 8)
    got = decode.decode(content, AS_STORED._replace(channels=1))[..., 0]
    np.testing.assert_allclose(got, grey + (255.0 - alpha), atol=1.5)


def test_what_cannot_be_turned_into_colours_is_found_at_inspection(monkeypatch):
    def refuse(image, mode):
        raise ValueError("conversion not supported")

    content = written(noise(6, 10, 3))
    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(decode.Unreadable, match=r"cannot be decoded \(conversion not supported\)"):
        decode.inspect(content)
