"""A discrete autoencoder and a PixelCNN over its codes on SVHN (Wiggers & Hoogeboom 2020, supplement A.3).

    python train.py --config=configs/arm_latent_svhn.py --config.data.data_dir=$HOME/tensorflow_datasets

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
    config.data.name = "svhn_cropped"
    return config
