"""A folder of a hundred pictures of one's own, of all kinds, through the scripts of every family."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_sample_images

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The figure that each family is judged by, and the levels of its samples.
FAMILIES = {
    "vqvae2": ("rate_bits_per_image", 256),
    "vdvae": ("bits_per_dim", 256),
    "flows": ("bits_per_dim", 256),
    "arm": ("bits_per_dim", 32),
}


def script(name, *flags):
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Crops of two photographs, 40 to 119 pixels wide and high, as PNG and JPEG; one with alpha, one grey."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    folder.mkdir()
    photographs = load_sample_images().images
    for i in range(100):
        height, width = 40 + 7 * i % 80, 40 + 13 * i % 80
        top, left = 31 * i % (427 - height), 53 * i % (640 - width)
        picture = PIL.Image.fromarray(photographs[i % 2][top : top + height, left : left + width])
        if i == 0:
            picture.putalpha(128)
        if i == 1:
            picture = picture.convert("L")
        picture.save(folder / f"{i:03d}.{'jpg' if i % 2 else 'png'}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_own_pictures_are_trained_on_evaluated_and_sampled(family, pictures, tmp_path):
    run = tmp_path / "run"
    script("train", f"--config={family}_folder:tiny", f"--config.data.path={pictures}", f"--workdir={run}")
    script("evaluate", f"--workdir={run}")
    script("sample", f"--workdir={run}", "--num=4", "--nearest=2")
    figure, levels = FAMILIES[family]
    measured = json.loads((run / "evaluation.json").read_text())
    assert np.isfinite(measured[figure])
    first = next(value for value in measured.values() if isinstance(value, dict))
    assert 1 <= first["images"] < 50  # about a tenth is held out
    samples = np.load(run / "samples.npy", allow_pickle=False)
    assert samples.dtype == np.uint8 and samples.shape[0] == 4 and samples.shape[-1] == 3
    assert samples.max() < levels
    for name in ("samples", "nearest"):
        with PIL.Image.open(run / f"{name}.png") as picture:
            assert min(picture.size) > 8
