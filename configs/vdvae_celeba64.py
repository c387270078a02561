"""Efficient-VDVAE on CelebA 64x64 (Hazami et al. 2022, Table 4).

    python train.py --config=configs/vdvae_celeba64.py:released --config.data.data_dir=$HOME/tensorflow_datasets

The box of 148x148 pixels is cut out, then brought to 64x64: bilinearly where the figure was measured, here by means of
pixel blocks. The split is the official one; the test part is measured.
Meant for: two GPUs; the base is `:compact` with a bfloat16 trunk and a Polyak average that warms up, for one.
Parameters: 25.4 M.
Reach: released 1.83 bits/dim (published; not yet reproduced here). The paper samples at a temperature of 0.8.
Variants: released, compact, tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files

VARIANTS = ("released", "compact", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    config = config_files.load("vdvae_imagenet64:released")
    box = {"crop_box": (15, 40, 163, 188), "resampling": "area"}
    config.data = ConfigDict({"source": "tfds", "name": "celeb_a", "image_size": 64, **box})
    layers, skips = (2, 4, 7, 11, 16, 22), (2, 4, 7, 7, 9, 12)
    config.model.update({"layers": layers, "skips": skips, "blocks": skips})
    config.optim.final_fraction = 0.1
    config.train.batch_size = 16
    config.sampling.temperatures = (0.8,)
    if variant in ("", "compact"):
        config.model.update({"widths": (512, 512, 256, 128, 64, 32), "bottlenecks": (0.25, 0.25, 0.25, 0.25, 0.5, 1.0)})
    if variant == "":
        config.model.dtype, config.train.ema_ramp = "bfloat16", True
    elif variant == "tiny":
        tiny = config_files.load("vdvae_imagenet64:tiny")
        tiny.sampling.temperatures = (0.8,)
        return tiny
    return config
