"""Efficient-VDVAE on ImageNet 32x32 (Hazami et al. 2022, Tables 1a, 1b and 3), and VDVAE. Two data sets bear this name.

    python train.py --config=configs/vdvae_imagenet32.py:c1 --config.data.data_dir=$HOME/tensorflow_datasets

Likelihoods of the two cannot be compared. `imagenet_resized/32x32` is the later release of ILSVRC, box-downsampled
(50,000 validation images); Efficient-VDVAE is trained on it. `downsampled_imagenet/32x32` is the older one of PixelRNN
(49,999 validation images), which most papers and VDVAE used; it is about 0.2 bits/dim harder.
Meant for: two GPUs; the base is `:c1` with a bfloat16 trunk and a Polyak average that warms up.
Parameters: 52.3 M.
Reach: c1 3.60, released 3.58, vdvae 3.80 bits/dim (published, each on its own data set; not yet reproduced here).
The paper samples at a temperature of 0.85.
What the paper leaves open: bottlenecks and skip connections of the rows of Tables 1a and 1b (here those of the released
configs, as far as there are layers). The row 16_25_19_7_6 is `released`; that of 512 channels is
`table1a_41_20_10_7_6`. Rows name the layers, or widths, from 32x32 to 1x1.
Variants: c1, released, compact, vdvae (on its own data set), released_on_pixelrnn_set (on that of VDVAE),
    table1a_11_15_19_7_6, table1a_16_15_19_7_6, table1a_25_25_19_7_6, table1a_41_20_10_7_6, table1b_256,
    table1b_32_32_64_128_256, table1b_64_64_128_256_512, tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files
from vdvae.levels import from_block_strings

LATER_BOX_SET = "imagenet_resized/32x32"
PIXELRNN_SET = "downsampled_imagenet/32x32"
TABLE_1A = ("table1a_11_15_19_7_6", "table1a_16_15_19_7_6", "table1a_25_25_19_7_6", "table1a_41_20_10_7_6")
TABLE_1B = ("table1b_256", "table1b_32_32_64_128_256", "table1b_64_64_128_256_512")
VARIANTS = ("c1", "released", "compact", "vdvae", "released_on_pixelrnn_set", *TABLE_1A, *TABLE_1B, "tiny")
DECODER = "1x2,4m1,4x4,8m4,8x9,16m8,16x19,32m16,32x40"
ENCODER = "32x15,32d2,16x9,16d2,8x8,8d2,4x6,4d4,1x6"


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    if variant == "tiny":
        config = config_files.load("vdvae_cifar10:tiny")
        config.data = ConfigDict({"source": "photos", "image_size": 32})
        return config
    if variant == "vdvae":
        return _vdvae()
    config = _released()
    if variant in ("", "c1"):
        config.model.update({"widths": (512, 512, 256, 128, 64), "bottlenecks": (0.25, 0.25, 0.25, 0.5, 1.0)})
        config.model.update({"latents": (48,) * 5, "output_scale": "log_std", "output_beta": 1.0})
    if variant == "":
        config.model.dtype, config.train.ema_ramp = "bfloat16", True
    elif variant == "compact":
        config.model.update({"widths": (512, 256, 128, 64, 32), "bottlenecks": (0.25, 0.25, 0.25, 0.5, 1.0)})
    elif variant == "released_on_pixelrnn_set":
        config.data.update({"name": PIXELRNN_SET, "evaluation_split": "validation"})
    elif variant.startswith("table1a"):
        _set_layers(config, variant)
    elif variant.startswith("table1b"):
        _set_layers(config, TABLE_1A[-1])
        widths = tuple(int(width) for width in reversed(variant.split("_")[1:]))
        config.model.widths = widths if len(widths) == 5 else widths * 5
        if len(widths) == 5:
            config.model.bottlenecks = (0.25, 0.25, 0.25, 0.5, 1.0)
    return config


def _released() -> ConfigDict:
    config = config_files.load("vdvae_cifar10:released")
    config.data.update({"name": LATER_BOX_SET, "evaluation_split": "validation"})
    skips = (6, 7, 9, 10, 16)
    config.model.update({"layers": (6, 7, 19, 25, 16), "skips": skips, "shared": (), "blocks": skips})
    config.model.widths = (512,) * 5
    config.optim.weight_decay = 0.0
    config.train.batch_size = 64
    config.sampling.temperatures = (0.85,)
    return config


def _set_layers(config: ConfigDict, row: str) -> None:
    layers = tuple(int(count) for count in reversed(row.split("_")[1:]))
    config.model.layers = layers
    config.model.skips = tuple(min(pair) for pair in zip(layers, config.model.skips, strict=True))
    config.model.blocks = config.model.skips


def _vdvae() -> ConfigDict:
    config = config_files.load("vdvae_cifar10:vdvae")
    config.data = ConfigDict(
        {"source": "tfds", "name": PIXELRNN_SET, "image_size": 32, "evaluation_split": "validation"}
    )
    config.model.update(from_block_strings(DECODER, ENCODER, width=512, latent=16))
    config.model.whiten = (116.2373, 69.37404)
    config.optim.learning_rate = 1.5e-4
    config.train.update({"batch_size": 256, "steps": 1_700_000, "ema_decay": 0.999, "skip_norm": 300.0})
    return config
