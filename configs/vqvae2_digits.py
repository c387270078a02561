"""VQ-VAE-2 with class-conditional priors on the 8x8 digits that ship inside scikit-learn: a whole run in two minutes.

    python train.py --config=configs/vqvae2_digits.py
    python sample.py --workdir=runs/vqvae2_digits-base --num=40

Meant for: one CPU core; the smallest run with classes.
Parameters: autoencoder 0.12 M, top 0.14 M, bottom 0.32 M.
Reach: there is no published figure for this data set (17 levels).
Variants: pixels (one stage more, a PixelCNN decoder, which bounds the likelihood of the image), tiny (seconds; for
    tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "pixels", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are pixels and tiny")
    config = config_files.load(f"vqvae2_photos:{variant}")
    config.data = ConfigDict({"source": "digits"})
    # Codes of 4x4 and 2x2; a digit that is mirrored is none.
    config.autoencoder.model.update({"strides": (2, 2), "flip": False})
    for stage in (config.top, config.bottom):
        stage.model.class_conditional = True
    if variant != "tiny":
        config.autoencoder.model.update({"num_codes": 128, "hidden": 32, "residual": 16})
        for stage in (config.autoencoder, config.top, config.bottom):
            stage.train.steps = 500
        for stage in (config.top, config.bottom):
            stage.model.update({"hidden": 32, "residual": 32})
    return config
