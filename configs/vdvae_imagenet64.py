"""Efficient-VDVAE on ImageNet 64x64 (Hazami et al. 2022, Table 3), and VDVAE. Two data sets bear this name.

    python train.py --config=configs/vdvae_imagenet64.py:c1 --config.data.data_dir=$HOME/tensorflow_datasets

Likelihoods of the two cannot be compared: see `vdvae_imagenet32.py`. `imagenet_resized/64x64` is the later,
box-downsampled one of Efficient-VDVAE, `downsampled_imagenet/64x64` the older one of PixelRNN and VDVAE.
Meant for: four GPUs; the base is `:c1` with a bfloat16 trunk and a Polyak average that warms up.
Parameters: 57.0 M.
Reach: c1 3.33, released 3.30, vdvae 3.52 bits/dim (published, each on its own data set; not yet reproduced here).
The paper samples at a temperature of 0.9.
Variants: c1, released, compact, vdvae (on its own data set), released_on_pixelrnn_set (on that of VDVAE), tiny
    (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files
from vdvae.levels import from_block_strings

LATER_BOX_SET = "imagenet_resized/64x64"
PIXELRNN_SET = "downsampled_imagenet/64x64"
VARIANTS = ("c1", "released", "compact", "vdvae", "released_on_pixelrnn_set", "tiny")
DECODER = "1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12"
ENCODER = "64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5"
WIDTHS = {"c1": (512, 512, 256, 256, 64, 64), "compact": (512, 512, 256, 128, 64, 32), "": (512, 512, 256, 256, 64, 64)}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    if variant == "vdvae":
        return _vdvae()
    config = _released()
    if variant in WIDTHS:
        config.model.update({"widths": WIDTHS[variant], "bottlenecks": (0.25, 0.25, 0.25, 0.25, 0.5, 1.0)})
    if variant in ("", "c1"):
        config.model.update({"latents": (64,) * 6, "output_scale": "log_std", "output_beta": 1.0})
    if variant == "":
        config.model.dtype, config.train.ema_ramp = "bfloat16", True
    elif variant == "released_on_pixelrnn_set":
        config.data.name = PIXELRNN_SET
    return tiny(config) if variant == "tiny" else config


def _released() -> ConfigDict:
    config = config_files.load("vdvae_imagenet32:released")
    config.data.update({"name": LATER_BOX_SET, "image_size": 64})
    layers, skips = (6, 7, 19, 25, 16, 11), (6, 7, 9, 10, 16, 5)
    config.model.update({"strides": (1, 4, 2, 2, 2, 2), "layers": layers, "skips": skips, "blocks": skips})
    config.model.update({"widths": (512,) * 6, "bottlenecks": (0.25,) * 6, "kernels": (1, 3, 3, 3, 3, 3)})
    config.model.latents = (32,) * 6
    config.train.batch_size = 32
    config.sampling.temperatures = (0.9,)
    return config


def _vdvae() -> ConfigDict:
    config = config_files.load("vdvae_imagenet32:vdvae")
    config.data.update({"name": PIXELRNN_SET, "image_size": 64})
    config.model.update(from_block_strings(DECODER, ENCODER, width=512, latent=16))
    config.model.whiten = (115.92961967, 69.37404)
    config.train.update({"batch_size": 128, "steps": 1_600_000, "clip_norm": 220.0, "skip_norm": 380.0})
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """The levels of a config, each with one narrow layer; a run of seconds on 64x64 crops of photographs."""
    one = (1,) * len(config.model.strides)
    narrow = {"layers": one, "skips": one, "blocks": one, "widths": (8,) * len(one), "latents": (2,) * len(one)}
    config.model.update(narrow | {"bottlenecks": (0.25,) * len(one), "mixtures": 2})
    config.data = ConfigDict({"source": "photos", "image_size": 64})
    config.objective = ConfigDict({"kl_steps": 200, "gamma_steps": 400})
    config.optim = ConfigDict({"name": "adamax", "learning_rate": 1e-3})
    config.train = ConfigDict({"batch_size": 16, "steps": 6})
    return config
