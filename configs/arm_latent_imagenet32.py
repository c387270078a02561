"""A discrete autoencoder and a PixelCNN over its codes on ImageNet 32 (Wiggers & Hoogeboom 2020, supplement A.3).

The images are those of the older downsampling (van den Oord et al. 2016).

    python train.py --config=configs/arm_latent_imagenet32.py --config.data.data_dir=$HOME/tensorflow_datasets

Meant for: one GPU or TPU core.
Parameters: autoencoder 30.0 M, arm 55.0 M.
Reach: the supplement gives settings, no figures.
Variants: tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"no variant '{variant}'; there is tiny")
    config = config_files.load(f"arm_latent_cifar10:{variant}")
    config.data.name = "downsampled_imagenet/32x32"
    config.data.evaluation_split = "validation"
    if variant == "tiny":
        config.data.train_split, config.data.evaluation_split = "validation[:90%]", "validation[99%:]"
    return config
