"""A split decoded from what a run has stored of it: all images in one array, some as a picture, their mean figures.

    decoded-SPLIT.npy     uint8 levels [n, h, w, c], written batch by batch, in the order of the split
    decoded-SPLIT.png     the first images
    decoded-SPLIT.json    means of what was measured, where the data set is at hand

Not here: how images are stored and decoded (the families' `decode_stored`).
"""

from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
from etils import epath
from jaxtyping import UInt8

from bitsperdim import atomic, images, metrics
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.likelihood import Means

NUM_PICTURES = 64


def write(
    size: int,
    batches: Iterator[tuple[UInt8[np.ndarray, "b h w c"], dict[str, np.ndarray]]],
    split: str,
    levels: int,
    folder: epath.Path,
    stream: TextIO,
) -> dict[str, Any]:
    """The three files; returns what decoded-SPLIT.json says. The array takes its place when it is whole."""
    if atomic.is_remote(folder):
        raise InputError(f"an array cannot grow in {folder}; use --out=FOLDER of this machine")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"decoded-{split}.npy"
    partial = path.parent / f"{path.name}.partial"
    progress, means, shown, whole = metrics.counting(f"decoding {split}", size, stream), Means(), [], None
    for decoded, parts in batches:
        if whole is None:
            whole = np.lib.format.open_memmap(partial, "w+", np.uint8, (size, *decoded.shape[1:]))
        whole[means.count : means.count + len(decoded)] = decoded
        shown += list(decoded[: max(0, NUM_PICTURES - len(shown))])
        means.add(parts, np.ones(len(decoded), bool))
        progress(means.count)
    assert whole is not None
    whole.flush()
    partial.replace(path)
    images.save_png(folder / f"decoded-{split}.png", images.grid(np.stack(shown), levels=levels))
    about = {"split": split, "images": size, **means.means()}
    run_lib.write_json(folder / f"decoded-{split}.json", about)
    return about
