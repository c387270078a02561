"""Three hundred pictures as people have them: each is trained on with its pixels, or refused for its own reason."""

import io
import json
import pathlib
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from bitsperdim import config_files, data, trainer
from bitsperdim.errors import InputError

COPIES = 12  # of each kind, with other pixels
SIZE = 16
ORIENTATIONS = {  # of EXIF, as what undoes them
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


class Case(NamedTuple):
    """A file, and what must become of it."""

    ending: str
    content: bytes
    pixels: np.ndarray | None = None  # upright, in colour, before cropping; None: refused
    tolerance: float = 0.0
    refusal: str = ""  # what follows the name of the file
    needs: str = ""  # the key under which it is taken after all


def written(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_16_bits(pixels):
    """Pillow cannot write 16 bits in colour."""
    height, width, channels = pixels.shape
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def on_white(colour, alpha):
    return colour * (alpha / 255) + 255 - alpha


def plain(rng):
    """The five formats, with the right ending and with a wrong one."""
    pixels = rng.integers(0, 256, (21, 24, 3), np.uint8)
    image = Image.fromarray(pixels)
    yield Case(".png", written(image, "PNG"), pixels)
    yield Case(".bmp", written(image, "BMP"), pixels)
    yield Case(".tiff", written(image, "TIFF", compression="tiff_lzw"), pixels)
    yield Case(".WEBP", written(image, "WEBP", lossless=True), pixels)
    yield Case(".jpg", written(image, "PNG"), pixels)
    flat = np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (1200, 1600, 3))
    yield Case(".jpeg", written(Image.fromarray(flat), "JPEG", quality=95), flat, 4.0)


def rotated(rng):
    for orientation, undo in ORIENTATIONS.items():
        stored = rng.integers(0, 256, (18, 25, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        kind = ("PNG", "TIFF")[orientation % 2]
        yield Case(f".{kind.lower()}", written(Image.fromarray(stored), kind, exif=exif), undo(stored))


def in_other_colours(rng):
    """Grey, black and white, palettes, alpha, CMYK."""
    grey = rng.integers(0, 256, (20, 20, 1), np.uint8)
    alpha = rng.integers(0, 256, (20, 20, 1), np.uint8)
    colour = rng.integers(0, 256, (20, 20, 3), np.uint8)
    yield Case(".png", written(Image.fromarray(grey[..., 0]), "PNG"), np.repeat(grey, 3, 2))
    black = grey > 127
    yield Case(".png", written(Image.fromarray(black[..., 0]), "PNG"), np.repeat(black * np.uint8(255), 3, 2))
    yield Case(
        ".png", written(Image.fromarray(np.concatenate([colour, alpha], 2)), "PNG"), on_white(colour, alpha), 1.0
    )
    both = Image.fromarray(np.concatenate([grey, alpha], 2))
    yield Case(".png", written(both, "PNG"), np.repeat(on_white(grey, alpha), 3, 2), 1.0)
    palette, places = rng.integers(0, 256, (16, 3), np.uint8), rng.integers(0, 16, (20, 20), np.uint8)
    image = Image.fromarray(places, "L")
    image.putpalette(palette.tobytes())
    yield Case(".png", written(image, "PNG"), palette[places])
    clear = np.where((places == 3)[..., None], 255, palette[places])
    yield Case(".png", written(image, "PNG", transparency=3), clear)
    inks = rng.integers(0, 256, (20, 20, 4), np.uint8)
    printed = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    yield Case(".tif", written(Image.fromarray(inks, "CMYK"), "TIFF"), printed, 1.0)


def in_motion(rng):
    first, second = (Image.fromarray(rng.integers(0, 256, (17, 19, 3), np.uint8)) for _ in range(2))
    yield Case(".png", written(first, "PNG", save_all=True, append_images=[second]), np.asarray(first))
    moving = written(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    yield Case(".webp", moving, np.asarray(first))


def deep_and_tiny(rng):
    deep = rng.integers(0, 2**16, (20, 20, 3), np.uint16)
    depth = {"refusal": "has 16 bits a channel", "needs": "reduce_16_bit"}
    yield Case(".png", png_of_16_bits(deep), deep >> 8, **depth)
    grey = deep[..., :1]
    yield Case(".tif", written(Image.fromarray(grey[..., 0]), "TIFF"), np.repeat(grey >> 8, 3, 2), **depth)
    flat = np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (7, 40, 3))
    size = {"refusal": "is 7x40, smaller than 16x16", "needs": "upscale"}
    yield Case(".png", written(Image.fromarray(flat), "PNG"), np.broadcast_to(flat[:1, :1], (16, 16, 3)), **size)


def broken(rng):
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    whole = written(image, "BMP")
    yield Case(".bmp", whole[:2000], refusal=f"is truncated (read 2,000 of {len(whole):,} bytes)")
    yield Case(".jpg", written(image, "JPEG")[:900], refusal="is truncated (its 900 bytes end within the image)")
    yield Case(".png", written(image, "PNG")[:900], refusal="is truncated (its 900 bytes end within the image)")
    yield Case(".jpg", b"", refusal="is empty (0 bytes)")
    yield Case(".png", b"<html>404</html>", refusal="is not an image in PNG, JPEG, WebP, BMP or TIFF format")


KINDS = (plain, rotated, in_other_colours, in_motion, deep_and_tiny, broken)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The folder, and its cases by relative name."""
    root = tmp_path_factory.mktemp("ugly")
    rng = np.random.default_rng(0)
    found = {}
    for copy in range(COPIES):
        for kind in KINDS:
            for number, case in enumerate(kind(rng)):
                name = f"Füße, {copy} 写真/{kind.__name__} {number}{case.ending}"
                found[name] = case
    found["huge.png"] = Case(
        ".png",
        written(Image.new("1", (20000, 10000)), "PNG"),
        refusal="is too large (Image size (200000000 pixels) exceeds limit of 178956970 pixels)",
    )
    for name, case in found.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(case.content)
    for name in ("notes.txt", "moving.gif", ".DS_Store", "Füße, 0 写真/._plain 0.png"):
        (root / name).write_bytes(b"ignored")
    return root, found


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """For evaluation, so that the training split is the whole of the ugly folder."""
    folder = tmp_path_factory.mktemp("other")
    Image.new("RGB", (SIZE, SIZE)).save(folder / "a.png")
    return folder


def open_folder(root, other, tmp_path, **values):
    values = {"evaluation_path": str(other), "image_size": SIZE, "resize": "none", "cache_dir": str(tmp_path)} | values
    return data.open_source(data.DataConfig("folder", path=str(root), **values), "train")


def refused(root, other, tmp_path, **values):
    """The head and the lines of the refusal."""
    with pytest.raises(InputError) as caught:
        open_folder(root, other, tmp_path, **values)
    head, *lines = str(caught.value).split("\n  ")
    return head, sorted(lines)


def test_every_picture_is_taken_with_its_pixels_or_named_with_its_reason(cases, other, tmp_path, capsys):
    root, found = cases
    assert len(found) > 300
    bad = {name: case for name, case in found.items() if case.pixels is None}
    unfit = {name: case for name, case in found.items() if case.needs}
    lines = lambda cases: sorted(f"{root / name} {case.refusal}" for name, case in cases.items())

    head, named = refused(root, other, tmp_path)
    assert head == f"{len(bad)} files of {root} cannot be read; remove them or set data.skip_unreadable=true:"
    assert named == lines(bad)

    head, named = refused(root, other, tmp_path, skip_unreadable=True)
    enlarge = "set data.upscale=true or a smaller size"
    assert head == f"{len(unfit)} files of {root} do not fit; set data.reduce_16_bit=true; {enlarge}:"
    assert named == lines(unfit)
    told = capsys.readouterr().err
    assert f"{root}: {len(found) - len(bad)} images; 2 hidden and 2 other files ignored\n" in told
    assert all(f"  left out: {line}\n" in told for line in lines(bad))

    _, named = refused(root, other, tmp_path, skip_unreadable=True, upscale=True)
    assert named == lines({name: case for name, case in unfit.items() if case.needs != "upscale"})

    source = open_folder(root, other, tmp_path, skip_unreadable=True, upscale=True, reduce_16_bit=True)
    good = sorted(set(found) - set(bad))
    assert source.size == len(good)
    assert "left out" not in capsys.readouterr().err  # once is enough
    for name, image in zip(good, source.read(np.arange(source.size))["image"], strict=True):
        truth = found[name].pixels
        top, left = (truth.shape[0] - SIZE) // 2, (truth.shape[1] - SIZE) // 2
        difference = np.abs(image - truth[top : top + SIZE, left : left + SIZE].astype(float)).max()
        assert difference <= found[name].tolerance, name


def test_a_run_trains_on_them_or_writes_nothing(cases, other, tmp_path):
    root, found = cases
    config = config_files.load("vqvae2_photos:tiny")
    folder = {"source": "folder", "path": str(root), "evaluation_path": str(other), "image_size": SIZE}
    config.data = folder | {"resize": "none", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(InputError, match=r"files of .* cannot be read; remove them or set data\.skip_unreadable=true"):
        trainer.train(config, str(tmp_path / "run"), "autoencoder")
    assert not (tmp_path / "run").exists()
    config.data.update({"skip_unreadable": True, "upscale": True, "reduce_16_bit": True})
    run = trainer.train(config, str(tmp_path / "run"), "autoencoder")
    sources = json.loads((run.folder("autoencoder") / "sources.json").read_text())
    assert sources["train"]["size"] == sum(case.pixels is not None for case in found.values())
    assert trainer.evaluate(run, "train")["mse"] > 0


def test_one_broken_file_is_one_line(other, tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(root / "good.png")
    (root / "img_0412.bmp").write_bytes(written(Image.new("RGB", (130, 131)), "BMP")[:18432])
    with pytest.raises(InputError) as caught:
        open_folder(root, other, tmp_path / "cache")
    assert str(caught.value) == (
        f"{root}/img_0412.bmp is truncated (read 18,432 of 51,406 bytes); remove it or set data.skip_unreadable=true"
    )


def test_a_folder_of_nothing_but_broken_files_is_refused(other, tmp_path):
    root = pathlib.Path(tmp_path / "pictures")
    root.mkdir()
    (root / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 images in .*pictures can be read"):
        open_folder(root, other, tmp_path / "cache", skip_unreadable=True)
